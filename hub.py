"""
The hub's files: what a checkpoint looks like on disk, and how it gets into memory and out again.

    a hub id              local_folder: the folder of its snapshot, downloaded where it is not cached
    config.json           config_in, config_out: between the hub's keys and those of model.ModelConfig
    *.safetensors         checkpoint_files, check_tensors, load_tensors, save_tensors: shards and their index, FP8 blocks expanded

Weights are read one tensor at a time into memory that is already the model's, so loading peaks at the model and its largest tensor. Of a
DTensor (FSDP2, sharded before it had memory) each rank reads the rows that it keeps and no others. Every file is closed after each
tensor: pages of an open one would stay mapped, and count as a second copy.

Left out: pickled weights (*.bin), quantised formats other than FP8 in blocks of 128.
"""

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernels.fp8 import dequantise

BLOCK = 128  # rows and columns of an FP8 block that share a scale
FILES = ('config.json', 'generation_config.json', '*.safetensors', '*.safetensors.index.json')


def local_folder(source, files=FILES):
    """A folder as it is; a hub id ("owner/name", "owner/name@revision") as the folder of its snapshot. What is missing in the cache is
    downloaded, with progress bars, and goes on where an earlier attempt stopped; without a connection, or with HF_HUB_OFFLINE=1, the
    cache serves alone. FileNotFoundError: neither a folder nor a model of the hub that can be had."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r'[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?', str(source)):
        raise FileNotFoundError(f'{source} is no folder (a checkpoint is a folder with config.json and *.safetensors) and no hub id')
    from huggingface_hub import snapshot_download
    name, _, revision = str(source).partition('@')
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files), ignore_patterns=['*/*']))
    except Exception as error:  # of the hub, of its HTTP client, of the disk
        told = ' '.join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f'{source} is no folder here, and the hub gave no such model: {told[:300]}') from error


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} does not exist; a checkpoint is a folder with config.json and *.safetensors') from None
    except ValueError as error:
        raise ValueError(f'{path}: not valid JSON: {error}') from None


def config_in(config, where='config.json'):
    """config: dict of a config.json, in the hub's style or transformers 5's -> the same in the names and values of model.ModelConfig,
    other keys left in. ValueError names the key that is wrong."""
    if not isinstance(config, dict):
        raise ValueError(f'{where}: holds no JSON object')
    config = dict(config)
    known = ('deepseek_v2', 'deepseek_v3', 'qwen2', 'qwen3', 'llama')
    kind = {'kimi_k2': 'deepseek_v3'}.get(config.get('model_type'), config.get('model_type'))
    if kind not in known:
        raise ValueError(f'{where}: model_type {kind!r} (architectures {config.get("architectures")}) is not supported; '
                         f'supported: {", ".join(known)}, kimi_k2')
    required = ['vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size']
    missing = [name for name in required if name not in config]
    if missing:
        raise ValueError(f'{where}: missing {", ".join(missing)}')
    config['model_type'] = kind
    none = ('q_lora_rank', 'n_routed_experts', 'n_shared_experts')   # null: none of these; elsewhere the default
    config = {name: value for name, value in config.items() if value is not None or name in none}
    rope = config.pop('rope_parameters', {})
    scaling = config.pop('rope_scaling', {})
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise ValueError(f'{where}: rope_scaling must be an object, got {scaling or rope!r}')
    config['rope_theta'] = rope.get('rope_theta', config.get('rope_theta', 10000.0))
    if rope.get('rope_type', rope.get('type', 'default')) != 'default':
        scaling = {name: value for name, value in rope.items() if name != 'rope_theta'}
    kind_of_rope = scaling.get('rope_type') or scaling.get('type') or 'default'
    if kind_of_rope not in ('default', 'yarn', 'llama3'):
        raise ValueError(f'{where}: rope_scaling type {kind_of_rope!r} is not supported; supported: yarn, llama3')
    if kind_of_rope != 'default':
        numbers = {name: value for name, value in scaling.items() if name not in ('type', 'rope_type')}
        numbers.setdefault('original_max_position_embeddings', config.get('max_position_embeddings'))
        config['rope_scaling'] = {'rope_type': kind_of_rope, **numbers}
    if kind.startswith('deepseek'):
        v3 = kind == 'deepseek_v3'
        config = {'topk_method': 'noaux_tc' if v3 else 'greedy', 'scoring_func': 'sigmoid' if v3 else 'softmax', 'norm_topk_prob': v3, **config}
    else:
        heads, width = config['num_attention_heads'], config['hidden_size']
        if 'head_dim' not in config and all(isinstance(x, int) and x > 0 for x in (heads, width)):
            if width % heads:
                raise ValueError(f'{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}, and no head_dim is given')
            config['head_dim'] = width // heads
        config.setdefault('num_key_value_heads', heads)
    refused = {'sliding windows': config.get('use_sliding_window'), 'MLP biases': config.get('mlp_bias'),
               f'the activation {config.get("hidden_act")!r}': config.get('hidden_act', 'silu') != 'silu',
               'attention biases': kind != 'qwen2' and config.get('attention_bias')}
    quantised = config.get('quantization_config') or {}
    if quantised and (quantised.get('quant_method') != 'fp8' or quantised.get('weight_block_size') != [BLOCK, BLOCK]):
        refused[f'quantization_config {quantised.get("quant_method")!r} with weight_block_size={quantised.get("weight_block_size")}'] = True
    for what in (what for what, found in refused.items() if found):
        raise ValueError(f'{where}: {what}: not supported')
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


def checkpoint_files(folder):
    """-> {tensor name: (path of its shard, shape)} over all shards. Errors name a shard that is missing or damaged."""
    index = folder / 'model.safetensors.index.json'
    if index.exists():
        named = read_json(index)
        if not isinstance(named, dict) or not isinstance(named.get('weight_map'), dict) or not named['weight_map']:
            raise ValueError(f'{index}: no "weight_map" of tensor names to files')
        names = sorted(set(named['weight_map'].values()))
    else:
        names = [name for name in ('model.safetensors',) if (folder / name).exists()] or sorted(p.name for p in folder.glob('*.safetensors'))
    if not names:
        raise FileNotFoundError(f'{folder}: no *.safetensors file')
    files = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f'{folder / name} is named by {index.name} but does not exist; download it again')
        try:
            with safe_open(folder / name, 'pt') as shard:
                files.update({key: (folder / name, shard.get_slice(key).get_shape()) for key in shard.keys()})
        except (SafetensorError, OSError) as error:
            raise ValueError(f'{folder / name}: damaged or truncated ({error}); download it again') from None
    return files


def check_tensors(cfg, places, files, folder):
    """places: {hub name: (tensor, index)} on the meta device. ValueError names every tensor that is missing, unexpected or misshapen,
    numbers that differ in a range: layers.{0-3,7}."""
    wrong = []
    for name, (tensor, index) in places.items():
        shape = list(tensor[index].shape)
        if name not in files:
            wrong.append(f'missing {name}')
        elif files[name][1] != shape:
            wrong.append(f'misshapen {name}: {files[name][1]} in the file, {shape} by config.json')
        scale = files.get(name + '_scale_inv')
        if scale and scale[1] != [-(-n // BLOCK) for n in shape]:
            wrong.append(f'misshapen {name}_scale_inv: {scale[1]} in the file, {[-(-n // BLOCK) for n in shape]} by config.json')
    mtp = f'model.layers.{cfg.num_hidden_layers}.'
    copies = {'lm_head.weight'} if cfg.tie_word_embeddings else set()
    copies |= {mtp + 'embed_tokens.weight', mtp + 'shared_head.head.weight'} if cfg.num_nextn_predict_layers else set()
    stray = [name for name in files if name not in places and name.removesuffix('_scale_inv') not in places]
    wrong += [f'unexpected {name}' for name in stray if name not in copies and not name.endswith('rotary_emb.inv_freq')]
    if wrong:
        raise ValueError(f'{folder}: the weights do not fit config.json: ' + '; '.join(in_ranges(wrong)))


def in_ranges(names):
    """['a.0.b', 'a.1.b', 'a.2.b', 'c'] -> ['a.{0-2}.b', 'c']: names alike but for a number stand together, the last number first."""
    for position in (2, 1):
        groups = {}
        for name in names:
            found = list(re.finditer(r'(?<=\.)\d+(?=\.)', name))
            if len(found) >= position:
                m = found[position - 1]
                groups.setdefault((name[:m.start()], name[m.end():]), []).append(int(m[0]))
            else:
                groups[name, None] = None
        names = []
        for (before, after), numbers in groups.items():
            if numbers is None or len(numbers) == 1:
                names.append(before if numbers is None else f'{before}{numbers[0]}{after}')
                continue
            runs = []
            for n in sorted(numbers):
                if runs and n == runs[-1][1] + 1:
                    runs[-1][1] = n
                else:
                    runs.append([n, n])
            names.append(before + '{' + ','.join(str(a) if a == b else f'{a}-{b}' for a, b in runs) + '}' + after)
    return names


@torch.no_grad()
def load_tensors(places, files):
    """places: {hub name: (tensor, index)}, as Transformer.hub_tensors gives them. Reads each into its place, whatever its dtype there."""
    for name, (tensor, index) in places.items():
        sharded = hasattr(tensor, 'placements')     # a DTensor; to import that class takes a second
        place, rows = tensor.to_local() if sharded else tensor.detach()[index], slice(None)
        if sharded:
            first = first_row(tensor)
            if index is ...:
                rows = slice(first, first + len(place))
            else:  # the experts of a stack are split between the ranks
                expert, *rest = index if isinstance(index, tuple) else (index,)
                if not first <= expert < first + len(place):
                    continue
                place = place[(expert - first, *rest)]
        if place.numel():
            place.copy_(read(files, name, rows))


def first_row(tensor):
    """A DTensor split over its rows as FSDP2 splits it, like torch.chunk -> this rank's first row."""
    split = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(split) != 1 or not tensor.placements[split[0]].is_shard(0):
        raise ValueError(f'weights are read into tensors sharded over their rows alone, not {tensor.placements}')
    mesh = tensor.device_mesh
    return min(len(tensor), -(-len(tensor) // mesh.size(split[0])) * mesh.get_local_rank(split[0]))


def read(files, name, rows=slice(None)):
    """-> rows of a tensor of the checkpoint, [M, ...] in its dtype; FP8 blocks expanded to float32."""
    with safe_open(files[name][0], 'pt') as shard:
        part = shard.get_slice(name)
        if part.get_dtype() != 'F8_E4M3':
            return part[rows]
        scales = name + '_scale_inv'
        if scales not in files:
            raise ValueError(f'{files[name][0]}: {name} is FP8 and has no {scales}')
        first, last, _ = rows.indices(files[name][1][0])
        block = first // BLOCK
        with safe_open(files[scales][0], 'pt') as other:
            scale = other.get_slice(scales)[block:-(-last // BLOCK)]
        return dequantise(part[block * BLOCK:last], scale)[first - block * BLOCK:]


def save_tensors(folder, tensors, config, dtype, max_shard_bytes):
    """tensors: {hub name: tensor}, config: dict for config.json. Everything is written beside `folder` before anything in it changes. A
    model that was there loses its config.json first and the new one comes last: its presence means that all files are of one model."""
    folder = Path(folder)
    cast = lambda name, t: (t if dtype is None or name.endswith('e_score_correction_bias')  # noqa: E731
                            else t.to(dtype)).cpu().contiguous()
    shards, size, total = [[]], 0, 0
    for name, t in tensors.items():
        nbytes = t.numel() * (t.element_size() if dtype is None or name.endswith('e_score_correction_bias') else dtype.itemsize)
        if size and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    files = ['model.safetensors'] if len(shards) == 1 else \
        [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.saving-', dir=folder.parent))
    try:
        try:
            for file, names in zip(files, shards):
                save_file({name: cast(name, tensors[name]) for name in names}, temp / file, metadata={'format': 'pt'})
            if len(files) > 1:
                index = {'metadata': {'total_size': total}, 'weight_map': {n: f for f, names in zip(files, shards) for n in names}}
                (temp / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1))
            (temp / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
            for path in temp.iterdir():
                with open(path, 'rb') as file:
                    os.fsync(file.fileno())
            folder.mkdir(exist_ok=True)
        except (OSError, SafetensorError) as error:
            raise OSError(f'{folder}: saving failed, what was there is untouched: {error}') from error
        new = sorted(path.name for path in temp.iterdir() if path.name != 'config.json')
        (folder / 'config.json').unlink(missing_ok=True)
        for name in new:
            os.replace(temp / name, folder / name)
        for path in folder.glob('model*.safetensors*'):
            if path.name not in new:
                path.unlink()
        os.replace(temp / 'config.json', folder / 'config.json')
    finally:
        shutil.rmtree(temp, ignore_errors=True)
