"""
The hub's files: what a checkpoint looks like on disk, and how it gets into memory and out again.

    config.json           config_in, config_out: between the hub's keys and those of model.ModelConfig
    *.safetensors         checkpoint_files, load_tensors, save_tensors: FP8 blocks expanded, shards, an index, atomic writes
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ---------------------------------------------------------------------------------------------------------------------
# config.json


def config_in(config, where='config.json'):
    """config: dict of a config.json, in the hub's style or transformers 5's -> the same in the names and values of model.ModelConfig,
    other keys left in. ValueError names the key that is wrong."""
    config = dict(config)
    kind = {'kimi_k2': 'deepseek_v3'}.get(config.get('model_type'), config.get('model_type'))
    known = ('deepseek_v2', 'deepseek_v3', 'qwen2', 'qwen3', 'llama')
    if kind not in known:
        raise ValueError(f'{where}: model_type {kind!r} is not supported; supported: {", ".join(known)}, kimi_k2')
    config['model_type'] = kind
    rope = dict(config.pop('rope_parameters', None) or {})
    config['rope_theta'] = float(rope.pop('rope_theta', config.get('rope_theta', 10000.0)))
    scaling = rope if rope.get('rope_type', rope.get('type', 'default')) != 'default' else config.get('rope_scaling')
    scaling = dict(scaling) if scaling else None
    if scaling:
        scaling['rope_type'] = scaling.pop('rope_type', None) or scaling.get('type')
        scaling.pop('type', None)
        if scaling['rope_type'] not in ('yarn', 'llama3'):
            raise ValueError(f'{where}: rope_scaling type {scaling["rope_type"]!r} is not supported; supported: yarn, llama3')
        scaling.setdefault('original_max_position_embeddings', config.get('max_position_embeddings'))
    config['rope_scaling'] = scaling
    if kind.startswith('deepseek'):
        v3 = kind == 'deepseek_v3'
        config.setdefault('topk_method', 'noaux_tc' if v3 else 'greedy')
        config.setdefault('scoring_func', 'sigmoid' if v3 else 'softmax')
        config.setdefault('norm_topk_prob', v3)
        config['n_group'], config['topk_group'] = config.get('n_group') or 1, config.get('topk_group') or 1
    else:
        heads = config.get('num_attention_heads') or 1
        config['head_dim'] = config.get('head_dim') or config.get('hidden_size', 0) // heads
        config['num_key_value_heads'] = config.get('num_key_value_heads') or heads
    if config.get('use_sliding_window') or config.get('hidden_act', 'silu') != 'silu' or config.get('mlp_bias') \
            or (kind != 'qwen2' and config.get('attention_bias')):
        raise ValueError(f'{where}: sliding windows, activations other than silu and attention or MLP biases are not supported')
    required = ['vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size']
    missing = [name for name in required if name not in config]
    if missing:
        raise ValueError(f'{where}: missing {", ".join(missing)}')
    return config


def config_out(cfg, dtype):
    """-> dict for config.json in the hub's style, with the keys that transformers and vLLM need to load it right."""
    config = asdict(cfg)
    mla_keys = [f.name for f in fields(cfg)][[f.name for f in fields(cfg)].index('q_lora_rank'):]
    for name in (['head_dim'] if cfg.mla else mla_keys):
        del config[name]
    if cfg.mla:
        config['num_key_value_heads'] = cfg.num_attention_heads
    arch = {'deepseek_v2': 'DeepseekV2', 'deepseek_v3': 'DeepseekV3', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'llama': 'Llama'}
    config.update(architectures=[arch[cfg.model_type] + 'ForCausalLM'], hidden_act='silu', attention_bias=cfg.model_type == 'qwen2',
                  torch_dtype=str(dtype).removeprefix('torch.'))
    if cfg.model_type == 'qwen2':
        del config['attention_bias']   # Qwen2's biases are implied
    if cfg.rope_scaling:               # the hub's older loaders read `type`
        config['rope_scaling'] = {'type': cfg.rope_scaling['rope_type'], **cfg.rope_scaling}
    return config


# ---------------------------------------------------------------------------------------------------------------------
# *.safetensors


@torch.no_grad()
def load_tensors(cfg, wanted, files, folder):
    """files: {hub name: open safetensors file}. Copies each tensor to its place, one at a time."""
    wrong = []
    for name, (tensor, index) in wanted.items():
        if name not in files:
            wrong.append(f'missing {name}')
            continue
        value = files[name].get_tensor(name)
        if value.dtype == torch.float8_e4m3fn:
            if name + '_scale_inv' not in files:
                wrong.append(f'missing {name}_scale_inv')
                continue
            value = expand_fp8(value, files[name + '_scale_inv'].get_tensor(name + '_scale_inv'))
        place = tensor.detach()[index]
        if place.shape != value.shape:
            wrong.append(f'misshapen {name}: {list(value.shape)} in the file, {list(place.shape)} by config.json')
            continue
        place.copy_(value)
    mtp = f'model.layers.{cfg.num_hidden_layers}.'
    for name in files:
        copies = cfg.num_nextn_predict_layers and name in (mtp + 'embed_tokens.weight', mtp + 'shared_head.head.weight')
        tied = cfg.tie_word_embeddings and name == 'lm_head.weight'
        known = name in wanted or name.endswith(('rotary_emb.inv_freq', '.weight_scale_inv'))
        if not (known or copies or tied):
            wrong.append(f'unexpected {name}')
    if wrong:
        more = f' and {len(wrong) - 20} more' if len(wrong) > 20 else ''
        raise ValueError(f'{folder}: the weights do not fit config.json: ' + '; '.join(wrong[:20]) + more)


def save_tensors(folder, tensors, config, dtype, max_shard_bytes):
    """tensors: {hub name: tensor}, config: dict for config.json. The files are written beside `folder` and moved in when complete."""
    folder = Path(folder)
    cast = lambda name, t: (t if dtype is None or name.endswith('e_score_correction_bias')  # noqa: E731
                            else t.to(dtype)).cpu().contiguous()
    shards, size = [[]], 0
    for name, t in tensors.items():
        nbytes = t.numel() * (t.element_size() if dtype is None else dtype.itemsize)
        if size and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    files = ['model.safetensors'] if len(shards) == 1 else \
        [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.saving-', dir=folder.parent))
    try:
        for file, names in zip(files, shards):
            save_file({name: cast(name, tensors[name]) for name in names}, temp / file, metadata={'format': 'pt'})
        if len(files) > 1:
            total = sum((temp / file).stat().st_size for file in files)
            index = {'metadata': {'total_size': total}, 'weight_map': {n: f for f, names in zip(files, shards) for n in names}}
            (temp / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1))
        (temp / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
        folder.mkdir(exist_ok=True)
        stale = {p.name for p in folder.glob('model*.safetensors*')} - {p.name for p in temp.iterdir()}
        for p in sorted(temp.iterdir(), key=lambda p: p.name == 'config.json'):  # config.json last: its presence means complete
            os.replace(p, folder / p.name)
        for name in stale:
            (folder / name).unlink()
    except (OSError, SafetensorError) as error:
        raise OSError(f'{folder}: saving failed, what was there is untouched: {error}') from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def expand_fp8(w, scale_inv, block=128):
    """E4M3 [M, N] and float32 scales [ceil(M/128), ceil(N/128)] -> float32: each block times its scale ("inv" notwithstanding)."""
    scale = scale_inv.float().repeat_interleave(block, 0).repeat_interleave(block, 1)
    return w.float() * scale[:w.shape[0], :w.shape[1]]


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} does not exist; a checkpoint is a folder with config.json and *.safetensors') from None
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}: not valid JSON: {error}') from None


def checkpoint_files(folder):
    """-> {tensor name: open safetensors file} over all shards. Errors name a shard that is missing or damaged."""
    index = folder / 'model.safetensors.index.json'
    names = sorted(set(read_json(index)['weight_map'].values())) if index.exists() else \
        sorted(p.name for p in folder.glob('*.safetensors') if p.name != 'expected.safetensors')
    if not names:
        raise FileNotFoundError(f'{folder}: no *.safetensors file')
    files = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f'{folder / name} is named by {index.name} but does not exist; download it again')
        try:
            shard = safe_open(folder / name, 'pt')
        except SafetensorError as error:
            raise ValueError(f'{folder / name}: damaged or truncated ({error}); download it again') from None
        files.update({key: shard for key in shard.keys()})
    return files
