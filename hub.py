"""
The hub's files: what a checkpoint looks like on disk, and how it gets into memory and out again.

    a hub id         local_folder: the folder of its snapshot, downloaded where it is not cached
    config.json      config_in, config_out: between the hub's keys and those of model.ModelConfig
    *.safetensors    checkpoint_files, check_tensors, load_tensors, save_tensors: shards and their
                     index, FP8 blocks expanded

What a file holds and this code does not use is never passed over in silence: keys of config.json
and tensors that would change the result are refused by name, and so is a second set of weights
beside the first; keys that nobody knows are told.

Weights are read one tensor at a time into memory that is already the model's, so loading peaks at
the model and its largest tensor. Of a DTensor (FSDP2, sharded before it had memory) each rank reads
the rows that it keeps and no others. Every file is closed after each tensor: pages of an open one
would stay mapped, and count as a second copy.

Left out: pickled weights (*.bin), quantised formats other than FP8 in blocks of 128.
"""
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernels.fp8 import dequantise

BLOCK = 128  # rows and columns of an FP8 block that share a scale
ID = re.compile(r'[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?')     # "owner/name", "owner/name@revision"
FILES = ('config.json', 'generation_config.json', '*.safetensors', '*.safetensors.index.json')


def local_folder(source, files=FILES, wanted='such model'):
    """
    A folder as it is; a hub id ("owner/name", "owner/name@revision") as the folder of its snapshot.

    What is missing in the cache is downloaded, with progress bars, and goes on where an earlier
    attempt stopped; without a connection, or with HF_HUB_OFFLINE=1, the cache serves alone.
    files: patterns of what is wanted of the snapshot, and `wanted` what they are in the message.
    FileNotFoundError: neither a folder nor a model of the hub that can be had.
    """
    if Path(source).is_dir():
        return Path(source)
    if not ID.fullmatch(str(source)):
        raise FileNotFoundError(f'{source} is no folder (a checkpoint is a folder with config.json '
                                'and *.safetensors) and no hub id')
    from huggingface_hub import snapshot_download
    name, _, revision = str(source).partition('@')
    patterns = dict(allow_patterns=list(files), ignore_patterns=['*/*'])
    try:
        return Path(snapshot_download(name, revision=revision or None, **patterns))
    except Exception as error:  # of the hub, of its HTTP client, of the disk
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f'{source} is no folder here, and the hub gave no {wanted}: '
                                f'{reason[:300]}') from error


def read_json(path, default=None):
    """default: what is returned where there is no such file, None for a FileNotFoundError.
    ValueError names a file that is not JSON."""
    if default is not None and not Path(path).exists():
        return default
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} does not exist; a checkpoint is a folder with config.json '
                                'and *.safetensors') from None
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from None


# ---- config.json: what its keys mean ----

REQUIRED = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
            'intermediate_size')

# What a key that is absent stands for: the defaults of transformers' configuration of the family.
# Keys that are in none of these tables are judged by the tables that follow.
ALL = dict(rms_norm_eps=1e-6, initializer_range=0.02, tie_word_embeddings=False)
GQA = dict(ALL, head_dim=None, num_key_value_heads=None)
MLA = dict(ALL, num_key_value_heads=None, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
           qk_rope_head_dim=64, v_head_dim=128, moe_layer_freq=1, aux_loss_alpha=0.001)
FAMILIES = {
    'deepseek_v2': dict(
        MLA, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=None, moe_intermediate_size=1407,
        first_k_dense_replace=0, n_group=None, topk_group=None, topk_method='greedy',
        scoring_func='softmax', norm_topk_prob=False, routed_scaling_factor=1.0,
        num_nextn_predict_layers=0),
    'deepseek_v3': dict(
        MLA, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        first_k_dense_replace=3, n_group=8, topk_group=4, topk_method='noaux_tc',
        scoring_func='sigmoid', norm_topk_prob=True, routed_scaling_factor=2.5,
        num_nextn_predict_layers=0),    # where that is absent the files decide, see from_pretrained
    'qwen2': dict(GQA, max_position_embeddings=32768, num_key_value_heads=32, bos_token_id=None,
                  eos_token_id=None),
    'qwen3': dict(GQA, max_position_embeddings=32768, num_key_value_heads=32, head_dim=128,
                  bos_token_id=None, eos_token_id=None),
    'llama': dict(GQA, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
}
OTHER_NAMES = {'num_mtp_layers': 'num_nextn_predict_layers',
               'num_local_experts': 'n_routed_experts',
               'num_experts': 'n_routed_experts'}      # in transformers 5, of the DeepSeek families
ROUTER = ('topk_method', 'scoring_func', 'norm_topk_prob')   # of the family, for new models too
NULLABLE = ('q_lora_rank', 'n_routed_experts', 'n_shared_experts', 'num_key_value_heads',
            'head_dim', 'bos_token_id', 'eos_token_id', 'n_group', 'topk_group')
# null in any other key means that it is absent

# Keys that change what a model computes, and the values that mean what is computed here: others are
# refused.
OFF, ONE = (None, False, 0, [], {}), (None, 1)
ONLY = {
    'hidden_act': ('silu', 'swish'), 'hidden_activation': ('silu', 'swish', None),
    'attention_bias': OFF, 'qkv_bias': OFF, 'mlp_bias': OFF, 'use_bias': OFF, 'bias': OFF,
    'lm_head_bias': OFF, 'use_sliding_window': OFF, 'sliding_window': OFF,
    'sliding_window_pattern': OFF, 'attention_chunk_size': OFF, 'no_rope_layers': OFF,
    'no_rope_layer_interval': OFF, 'index_topk': OFF, 'use_mrope': OFF, 'mrope_section': OFF,
    'rope_interleaved': OFF, 'rope_interleave': (True, None), 'rope_ratio': ONE,
    'rope_local_base_freq': OFF, 'partial_rotary_factor': ONE, 'rotary_pct': ONE, 'alibi': OFF,
    'is_causal': (True, None), 'use_qk_norm': OFF, 'qk_layernorm': OFF, 'qk_norm': OFF,
    'clip_qkv': OFF, 'query_pre_attn_scalar': OFF, 'attn_temperature_tuning': OFF,
    'attn_logit_softcapping': OFF, 'final_logit_softcapping': OFF, 'logits_soft_cap': OFF,
    'attention_multiplier': OFF, 'embedding_multiplier': ONE, 'residual_multiplier': ONE,
    'lm_head_multiplier': ONE, 'logits_scaling': ONE, 'logit_scale': ONE, 'scale_emb': ONE,
    'scale_depth': OFF, 'scale_embeddings': OFF, 'normalize_embeddings': OFF,
    'parallel_attn': OFF, 'use_parallel_residual': OFF, 'mlp_layer_types': OFF,
    'per_layer_config': OFF, 'pruned_heads': OFF, 'is_encoder_decoder': OFF,
    'add_cross_attention': OFF, 'text_config': OFF, 'vision_config': OFF,
    'compression_config': OFF, 'swiglu_limit': OFF, 'use_bidirectional_attention': OFF,
    'scale_embedding': OFF, 'rescale_embeddings': OFF, 'layer_rope_theta': OFF, 'mup_enabled': OFF,
    'mla_use_nope': OFF, 'num_kv_shared_layers': OFF, 'num_experts': OFF, 'num_local_experts': OFF,
    'apply_residual_connection_post_layernorm': OFF,
}
HARMLESS = set("""
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attn_implementation chunk_size_feed_forward cls_token_id cross_attention_hidden_size
    decoder_start_token_id dtype ep_size finetuning_task id2label is_decoder is_llama_config
    keys_to_ignore_at_inference label2id max_window_layers model_type name_or_path num_labels
    original_max_position_embeddings output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix pretraining_tp problem_type qk_head_dim quantization_config
    return_dict return_dict_in_generate router_aux_loss_coef sep_token_id seq_aux
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version
    use_bfloat16 use_cache
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length min_p
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values
    repetition_penalty suppress_tokens temperature top_k top_p typical_p
""".split())
ELSEWHERE = ('layer_types', 'attention_types', 'rope_theta', 'rope_scaling', 'rope_parameters',
             'sliding_window', 'attention_bias')   # keys that are judged by their own rules
SCALING = {   # what is used of rope_scaling, by its type
    'default': (),
    'yarn': ('factor', 'original_max_position_embeddings', 'beta_fast', 'beta_slow', 'truncate',
             'mscale', 'mscale_all_dim', 'attention_factor', 'attn_factor'),
    'llama3': ('factor', 'original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor'),
}
FP8 = {'quant_method', 'weight_block_size', 'fmt', 'activation_scheme', 'scale_fmt',
       'modules_to_not_convert', 'ignored_layers'}   # what is quantised is seen by the tensors
ARCHITECTURES = {'deepseek_v2': 'DeepseekV2', 'deepseek_v3': 'DeepseekV3', 'qwen2': 'Qwen2',
                 'qwen3': 'Qwen3', 'llama': 'Llama'}


# ---- config.json: reading and writing ----

def config_in(config, where='config.json', family=True):
    """
    config: dict of a config.json, in the hub's style or transformers 5's -> the same in the names
    and values of model.ModelConfig, other keys left in.

    family: keys that are absent take the family's defaults; else they are left to ModelConfig's.
    ValueError names the key that is wrong, or that would change the result and is not supported;
    a warning names those that are not known.
    """
    if not isinstance(config, dict):
        raise ValueError(f'{where}: holds no JSON object')
    model_type = config.get('model_type')
    kind = 'deepseek_v3' if model_type == 'kimi_k2' else model_type
    if kind not in FAMILIES:
        raise ValueError(f'{where}: model_type {kind!r} (architectures '
                         f'{config.get("architectures")}) is not supported; supported: '
                         f'{", ".join(FAMILIES)}, kimi_k2')
    mla = kind.startswith('deepseek')

    # keys that are there, under the names used here
    config = {name: value for name, value in config.items()
              if value is not None or name in NULLABLE}
    for other, name in OTHER_NAMES.items():
        if mla and other in config:
            value = config.pop(other)
            if config.setdefault(name, value) != value:
                raise ValueError(f'{where}: {name} and {other} are the same and differ')
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise ValueError(f'{where}: missing {", ".join(missing)}')
    config['model_type'] = kind

    check_keys(config, kind, where)
    if family:
        warn_of_keys(config, kind, where)

    # keys that are absent
    defaults = {}
    if family:
        defaults = FAMILIES[kind]
    elif mla:
        defaults = {name: FAMILIES[kind][name] for name in ROUTER}
    config = {**defaults, **config}
    if mla:
        fill_mla(config, where, family)
    else:
        fill_gqa(config, where)
    config['rope_theta'], config['rope_scaling'] = rope_in(config, where)
    return config


def fill_mla(config, where, family):
    """Sets the keys of a DeepSeek model that follow from others, or that null stands for."""
    heads = config['num_attention_heads']
    if family and config['num_key_value_heads'] not in (None, heads):
        raise ValueError(f'{where}: num_key_value_heads={config["num_key_value_heads"]} is not '
                         f'num_attention_heads={heads}: latent attention has as many')
    if family and config['n_routed_experts'] and config['num_experts_per_tok'] is None:
        raise ValueError(f'{where}: missing num_experts_per_tok')
    config['num_key_value_heads'] = heads
    for name in ('n_group', 'topk_group'):
        if config.get(name, 1) is None:     # no groups
            config[name] = 1
    if config.get('num_experts_per_tok', 0) is None:
        del config['num_experts_per_tok']


def fill_gqa(config, where):
    """Sets the keys of a Qwen or Llama model that follow from others."""
    heads, width = config['num_attention_heads'], config['hidden_size']
    counted = all(type(n) is int and n > 0 for n in (heads, width))   # else ModelConfig refuses
    if config.get('head_dim') is None and counted:
        if width % heads:
            raise ValueError(f'{where}: hidden_size={width} is not a multiple of '
                             f'num_attention_heads={heads}, and no head_dim is given')
        config['head_dim'] = width // heads
    if config.get('num_key_value_heads') is None:
        config['num_key_value_heads'] = heads


def supported_values(kind):
    """ONLY, as it stands for this family: {key: values that mean what is computed here}"""
    supported = dict(ONLY)
    if kind == 'qwen2':
        del supported['attention_bias']     # its biases are implied
        supported['qkv_bias'] = (True, None)
    if kind == 'qwen3':
        for name in ('qk_norm', 'use_qk_norm', 'qk_layernorm'):
            supported[name] = (True, None)
    if kind.startswith('qwen'):
        del supported['sliding_window']     # counts with use_sliding_window alone
    return supported


def check_keys(config, kind, where):
    """ValueError names a key whose value would change the result."""
    supported = supported_values(kind)
    for name in sorted(config.keys() & supported.keys()):
        if config[name] not in supported[name]:
            values = [repr(value) for value in supported[name][:2] if value is not None]
            raise ValueError(f'{where}: {name}={config[name]!r} is not supported, '
                             f'only {" or ".join(values)}')
    for name in ('layer_types', 'attention_types'):
        others = {str(t) for t in config.get(name, ())} - {'full_attention', 'attention'}
        if others:
            raise ValueError(f'{where}: {name} with {", ".join(sorted(others))} is not supported, '
                             'only full_attention')
    nope, rope, head = (config.get(f'qk_{part}_dim') for part in ('nope_head', 'rope_head', 'head'))
    if kind.startswith('deepseek') and None not in (nope, rope, head) and nope + rope != head:
        raise ValueError(f'{where}: qk_head_dim={head} is not qk_nope_head_dim + '
                         f'qk_rope_head_dim = {nope + rope}')
    check_quantisation(config.get('quantization_config') or {}, where)


def check_quantisation(quantised, where):
    """ValueError unless quantization_config is empty, or of FP8 in the blocks read here."""
    if not quantised:
        return
    method, block = quantised.get('quant_method'), quantised.get('weight_block_size')
    if method != 'fp8' or block != [BLOCK, BLOCK]:
        raise ValueError(f'{where}: quantization_config {method!r} with weight_block_size={block} '
                         f'is not supported, only fp8 in blocks of [{BLOCK}, {BLOCK}]')
    if quantised.get('fmt', 'e4m3') != 'e4m3':
        raise ValueError(f'{where}: quantization_config fmt={quantised["fmt"]!r} is not supported')
    for name in sorted(quantised.keys() - FP8):
        raise ValueError(f'{where}: quantization_config {name}={quantised[name]!r} is not '
                         'supported')


def warn_of_keys(config, kind, where):
    """Warns of keys that are not known here, and of one that programs read differently."""
    mla, v3 = kind.startswith('deepseek'), kind == 'deepseek_v3'
    k = config.get('num_experts_per_tok')
    if mla and config.get('norm_topk_prob', v3) and (k == 1 or not v3):
        warnings.warn(f'{where}: norm_topk_prob=True in {kind} with num_experts_per_tok={k}: '
                      'programs differ in what they make of that; here weights of two or more '
                      'experts are divided by their sum, then multiplied by routed_scaling_factor',
                      stacklevel=2)

    known = {*REQUIRED, *FAMILIES[kind], *supported_values(kind), *HARMLESS, *ELSEWHERE}
    if mla:
        known |= {'auto_map', 'head_dim'}    # of older releases, and the rope width
    unknown = [f'{name}={config[name]!r}'[:80] for name in sorted(config.keys() - known)
               if config[name] not in (*OFF, '')]
    if unknown:
        warnings.warn(f'{where}: not known here and not used: {", ".join(unknown)}; if the model '
                      'needs one of them, its results are not those of its release', stacklevel=2)


CHOICES = {
    'topk_method': ('greedy', 'group_limited_greedy', 'noaux_tc'),
    'scoring_func': ('softmax', 'sigmoid'),
}
MAY_BE_0 = 'first_k_dense_replace', 'num_nextn_predict_layers'


def check_values(cfg, where):
    """cfg: ModelConfig. ValueError names the first value that cannot be right."""
    for f in fields(cfg):
        check_type(f.name, f.type, getattr(cfg, f.name), where)
    for name, choices in CHOICES.items():
        value = getattr(cfg, name)
        if value not in choices:
            raise ValueError(f'{where}: {name} must be one of {", ".join(choices)}, got {value!r}')
    if (cfg.qk_rope_head_dim if cfg.mla else cfg.head_dim) % 2:
        raise ValueError(f'{where}: the rotated width of a head must be even')
    if cfg.rope_scaling:
        check_scaling(cfg.rope_scaling, where)
    if cfg.mla and cfg.n_routed_experts:
        check_groups_of_experts(cfg, where)
    if not cfg.mla and cfg.num_attention_heads % cfg.num_key_value_heads:
        raise ValueError(
            f'{where}: num_attention_heads={cfg.num_attention_heads} is not a multiple of '
            f'num_key_value_heads={cfg.num_key_value_heads}')
    if cfg.num_nextn_predict_layers > 1:
        raise ValueError(f'{where}: num_nextn_predict_layers={cfg.num_nextn_predict_layers}; '
                         'at most 1 is supported')


def check_type(name, kind, value, where):
    """kind: int, float, or what isinstance takes. bool is no number."""
    if kind is int:
        low = 0 if name in MAY_BE_0 else 1
        if type(value) is not int or value < low:
            raise ValueError(f'{where}: {name} must be an integer >= {low}, got {value!r}')
    elif kind is float:
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f'{where}: {name} must be a number >= 0, got {value!r}')
    elif not isinstance(value, kind):
        said = getattr(kind, '__name__', kind)
        raise ValueError(f'{where}: {name} must be {said}, got {value!r}')


def check_scaling(s, where):
    """s: rope_scaling, of which the type is known"""
    def is_number(value):
        return type(value) in (int, float)

    needed = ['factor', 'original_max_position_embeddings']
    if s.get('rope_type') == 'llama3':
        needed += ['low_freq_factor', 'high_freq_factor']
    wrong = [name for name in needed if not is_number(s.get(name)) or s[name] <= 0]
    if wrong:
        raise ValueError(
            f'{where}: rope_scaling needs a number > 0 for {", ".join(wrong)}, got {s}')
    for name, value in s.items():
        right = type(value) is bool if name == 'truncate' else is_number(value)
        if name != 'rope_type' and not right:
            raise ValueError(f'{where}: rope_scaling: {name} cannot be {value!r}')


def check_groups_of_experts(cfg, where):
    E, n_group, topk_group = cfg.n_routed_experts, cfg.n_group, cfg.topk_group
    if E % n_group or topk_group > n_group:
        raise ValueError(f'{where}: {E} experts do not split into n_group={n_group} '
                         f'of which topk_group={topk_group}')
    if cfg.num_experts_per_tok > E // n_group * topk_group:
        raise ValueError(f'{where}: num_experts_per_tok={cfg.num_experts_per_tok} exceeds '
                         'the experts to choose from')


def rope_in(config, where):
    """
    Takes rope_parameters, rope_scaling and rope_theta out of config -> the base, and the scaling
    {'rope_type': ..., and its numbers} or None. Two that contradict each other are a ValueError.
    """
    thetas = {'rope_theta': config.pop('rope_theta', None)}
    scalings = {}
    for key in ('rope_parameters', 'rope_scaling'):
        thetas[key], scalings[key] = scaling_in(config.pop(key, None) or {}, f'{where}: {key}')
    theta = agreed('rope_theta', thetas, where)
    scaling = agreed('a scaling', scalings, where)

    if scaling:
        length = 'original_max_position_embeddings'
        inside, outside = scaling.get(length), config.get(length)
        if None not in (inside, outside) and inside != outside:
            raise ValueError(f'{where}: {length} is {outside!r}, and {inside!r} in the scaling')
        given = [n for n in (inside, outside) if n is not None]
        scaling[length] = given[0] if given else config.get('max_position_embeddings')
    return 10000.0 if theta is None else theta, scaling


def scaling_in(numbers, where):
    """numbers: of rope_parameters or rope_scaling -> the base or None, and the scaling or None"""
    if not isinstance(numbers, dict):
        raise ValueError(f'{where} must be an object, got {numbers!r}')
    numbers = {name: value for name, value in numbers.items() if value is not None}
    new, old = numbers.pop('rope_type', None), numbers.pop('type', None)
    kind = new or old or 'default'
    if old not in (None, kind):
        raise ValueError(f'{where} has rope_type {kind!r} and type {old!r}')
    if kind not in SCALING:
        raise ValueError(f'{where} type {kind!r} is not supported; supported: yarn, llama3')
    theta = numbers.pop('rope_theta', None)
    if numbers.pop('partial_rotary_factor', 1) != 1:
        raise ValueError(f'{where} with a partial_rotary_factor is not supported')
    for name in sorted(numbers.keys() - set(SCALING[kind])):
        used = ', '.join(SCALING[kind]) or 'rope_theta'
        raise ValueError(f'{where} holds {name}={numbers[name]!r}, which is not '
                         f'supported in the type {kind!r}; used are {used}')
    return theta, None if kind == 'default' else {'rope_type': kind, **numbers}


def agreed(what, values, where):
    """values: {key: value or None} -> the one value that is given, None without one"""
    given = {key: value for key, value in values.items() if value is not None}
    first = next(iter(given.values()), None)
    if any(value != first for value in given.values()):
        raise ValueError(f'{where}: {" and ".join(given)} give {what} and differ: '
                         + ' and '.join(repr(value) for value in given.values()))
    return first


def config_out(cfg, dtype, attention_factor=1.0):
    """-> dict for config.json in the hub's style, with the keys that transformers and vLLM need to
    load it right. attention_factor: YaRN's on cos and sin, written beside an attn_factor, which
    vLLM reads and transformers does not."""
    config = asdict(cfg)
    if cfg.mla:
        del config['head_dim']
        config['num_key_value_heads'] = cfg.num_attention_heads
    else:
        names = [f.name for f in fields(cfg)]
        for name in names[names.index('q_lora_rank'):]:   # all of MLA and MoE
            del config[name]
    config['architectures'] = [ARCHITECTURES[cfg.model_type] + 'ForCausalLM']
    config['hidden_act'] = 'silu'
    config['torch_dtype'] = str(dtype).removeprefix('torch.')
    if cfg.model_type != 'qwen2':      # Qwen2's biases are implied
        config['attention_bias'] = False
    if cfg.rope_scaling:               # the hub's older loaders read `type`
        config['rope_scaling'] = {'type': cfg.rope_scaling['rope_type'], **cfg.rope_scaling}
        if 'attn_factor' in cfg.rope_scaling:
            config['rope_scaling']['attention_factor'] = attention_factor
    return config


# ---- *.safetensors: which files, which tensors ----

def checkpoint_files(folder):
    """
    -> {tensor name: (path of its shard, shape, dtype as safetensors spells it)} over all shards.

    Errors name a shard that is missing or damaged, and two files that hold the same tensor, of
    which one must be old: no order between them is right. A file of other tensors that no index
    names is told and left out, an adapter beside the weights refused.
    """
    index = folder / 'model.safetensors.index.json'
    present = sorted(path.name for path in folder.glob('*.safetensors'))
    named = shards_of(index) if index.exists() else []
    others = [name for name in present if name not in named]
    for name in named:
        if name not in present:
            advice = 'download it again'
            if others:
                advice = f'if the model is in {others[0]}, remove the index'
            raise FileNotFoundError(f'{folder / name} is named by {index.name} but does not exist; '
                                    + advice)
    if not present:
        raise FileNotFoundError(f'{folder}: no *.safetensors file')

    files, unread = {}, {}
    for name in named + others:
        found = tensors_of(folder / name)
        twice = sorted(found.keys() & files.keys())
        if twice:
            first = files[twice[0]][0].name
            by = f' ({index.name} names the first)' if first in named and name not in named else ''
            raise ValueError(f'{folder}: both {first} and {name} hold {twice[0]}{by}; remove the '
                             'one that is not this model')
        of_a_model = any(key.startswith(('model.', 'lm_head.')) for key in found)
        if name in named or not named and of_a_model:
            files.update(found)
        else:
            unread[name] = found

    if not files:      # none has the names of a model: the caller says which are wrong
        for found in unread.values():
            files.update(found)
        return files
    for name, found in unread.items():
        reason = f'that {index.name} does not name' if named else 'not of this model'
        warnings.warn(f'{folder / name} is not read: {len(found)} tensors, the first '
                      f'{min(found, default=None)}, {reason}', stacklevel=2)
    return files


def shards_of(index):
    """index: path of model.safetensors.index.json -> sorted names of the files in it"""
    content = read_json(index)
    weight_map = content.get('weight_map') if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index}: no "weight_map" of tensor names to files')
    return sorted(set(weight_map.values()))


def tensors_of(path):
    """path of a shard -> {tensor name: (path, shape, dtype)}, from its header"""
    found = {}
    try:
        with safe_open(path, 'pt') as shard:
            for name in shard.keys():
                part = shard.get_slice(name)
                found[name] = (path, part.get_shape(), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{path}: damaged or truncated ({error}); download it again') from None
    if any('.lora_' in name for name in found) or path.name.startswith('adapter_model'):
        raise ValueError(f'{path} is an adapter, which is not applied here: merge it '
                         'into the weights, or move it away')
    return found


def check_tensors(cfg, places, files, folder):
    """
    places: {hub name: (tensor, index)} on the meta device; files: of checkpoint_files. ValueError
    names every tensor that is missing, unexpected, misshapen or of a dtype that is not read,
    numbers that differ in a range: layers.{0-3,7}. Copies of embedding and head that the MTP layer
    has in the files are compared: a warning where they differ.
    """
    wrong = []
    for name, (tensor, index) in places.items():
        wrong += faults(name, list(tensor[index].shape), files)

    copies = copies_of_shared(cfg)
    for name in files:
        expected = name in places or name.removesuffix('_scale_inv') in places
        if not expected and name not in copies and not name.endswith('rotary_emb.inv_freq'):
            wrong.append(f'unexpected {name}')
    if wrong:
        raise ValueError(f'{folder}: the weights do not fit config.json: '
                         + '; '.join(in_ranges(wrong)))

    for copy, shared in copies.items():
        of_mtp = copy != 'lm_head.weight'
        if of_mtp and differ(files, copy, shared):
            warnings.warn(f'{folder}: {copy} is not {shared}, which the MTP layer shares here: '
                          'what it predicts is not what the release does', stacklevel=2)


def faults(name, shape, files):
    """What is wrong with a tensor of this name, which config.json gives this shape: a list"""
    wrong = []
    _, found, dtype = files.get(name, (None, None, None))
    if dtype is None:
        wrong.append(f'missing {name}')
    elif found != shape:
        wrong.append(f'misshapen {name}: {found} in the file, {shape} by config.json')
    elif dtype not in ('F64', 'F32', 'F16', 'BF16', 'F8_E4M3'):
        wrong.append(f'{dtype} is no dtype to load: {name}')

    if name + '_scale_inv' in files:
        _, found, _ = files[name + '_scale_inv']
        blocks = [-(-n // BLOCK) for n in shape]
        if dtype not in (None, 'F8_E4M3'):
            wrong.append(f'{dtype} with scales as for FP8: {name}')
        if found != blocks:
            wrong.append(f'misshapen {name}_scale_inv: {found} in the file, '
                         f'{blocks} by config.json')
    return wrong


def copies_of_shared(cfg):
    """-> {copy that the files may hold: the tensor that the model has in its place}, by name"""
    embedding = 'model.embed_tokens.weight'
    head = embedding if cfg.tie_word_embeddings else 'lm_head.weight'
    copies = {}
    if cfg.tie_word_embeddings:
        copies['lm_head.weight'] = embedding
    if cfg.num_nextn_predict_layers:
        mtp = f'model.layers.{cfg.num_hidden_layers}'
        copies[f'{mtp}.embed_tokens.weight'] = embedding
        copies[f'{mtp}.shared_head.head.weight'] = head
    return copies


def adapt_to_files(cfg, files, folder, changes):
    """Changes a ModelConfig, read with these changes from folder's config.json, where the tensors
    in the files say otherwise: a warning says what, but where config.json leaves it open."""
    mtp_layer = f'model.layers.{cfg.num_hidden_layers}.'
    if cfg.num_nextn_predict_layers and not any(name.startswith(mtp_layer) for name in files):
        warnings.warn(f'{folder}: config.json promises an MTP layer, the files hold none '
                      '(transformers drops it); the model has none', stacklevel=2)
        cfg.num_nextn_predict_layers = 0
    if cfg.mla and mtp_layer + 'eh_proj.weight' in files:
        keys = {'num_nextn_predict_layers', 'num_mtp_layers', *changes}
        if not keys & read_json(folder / 'config.json').keys():
            cfg.num_nextn_predict_layers = 1
    if cfg.tie_word_embeddings and differ(files, 'lm_head.weight', 'model.embed_tokens.weight'):
        warnings.warn(
            f'{folder}: config.json ties the head to the embedding, but lm_head.weight '
            'in the files is another: the model has the head of the files, untied (as '
            'transformers 5 does)',
            stacklevel=2
        )
        cfg.tie_word_embeddings = False


def stored_dtype(files):
    """Of the embedding, which is BF16 in an FP8 checkpoint; float32 for others than halves"""
    halves = {'F16': torch.float16, 'BF16': torch.bfloat16}
    return halves.get(files['model.embed_tokens.weight'][2], torch.float32)


def differ(files, a, b):
    """Whether both tensors are there, and are not equal"""
    if a not in files or b not in files:
        return False
    shape = files[a][1]
    if files[b][1] != shape:
        return True
    at_once = max(1, 2**24 // shape[-1])
    for first in range(0, shape[0], at_once):
        rows = slice(first, first + at_once)
        if not torch.equal(read(files, a, rows).float(), read(files, b, rows).float()):
            return True
    return False


def in_ranges(names):
    """['a.0.b', 'a.1.b', 'a.2.b', 'c'] -> ['a.{0-2}.b', 'c']: names alike but for a number stand
    together, the last number first."""
    for position in (2, 1):
        groups = {}   # (text before the number, text after it) -> numbers; (name, None) without one
        for name in names:
            found = list(re.finditer(r'(?<=\.)\d+(?=\.)', name))
            if len(found) < position:
                groups[name, None] = []
                continue
            number = found[position - 1]
            around = name[:number.start()], name[number.end():]
            groups.setdefault(around, []).append(int(number[0]))
        names = []
        for (before, after), numbers in groups.items():
            if not numbers:
                names.append(before)
            elif len(numbers) == 1:
                names.append(f'{before}{numbers[0]}{after}')
            else:
                names.append(f'{before}{{{runs(numbers)}}}{after}')
    return names


def runs(numbers):
    """[0, 1, 2, 5] -> '0-2,5'"""
    found = []
    for n in sorted(numbers):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ','.join(str(first) if first == last else f'{first}-{last}' for first, last in found)


# ---- *.safetensors: reading ----

@torch.no_grad()
def load_tensors(places, files):
    """places: {hub name: (tensor, index)}, as Transformer.hub_tensors gives them. Reads each into
    its place, whatever its dtype there."""
    for name, (tensor, index) in places.items():
        rows = slice(None)
        if hasattr(tensor, 'placements'):     # a DTensor; to import that class takes a second
            place, rows = place_on_rank(tensor, index)
        else:
            place = tensor.detach()[index]
        if place.numel():
            place.copy_(read(files, name, rows))


def place_on_rank(tensor, index):
    """A DTensor, and where in it a tensor of the files belongs -> this rank's part of that place,
    and which rows of the files' tensor go there."""
    local, first = tensor.to_local(), first_row(tensor)
    if index is ...:
        return local, slice(first, first + len(local))
    expert, *rest = index if isinstance(index, tuple) else (index,)   # in a stack of experts
    if first <= expert < first + len(local):
        return local[(expert - first, *rest)], slice(None)
    return local[:0], slice(None)   # another rank's


def first_row(tensor):
    """A DTensor split over its rows as FSDP2 splits it, like torch.chunk -> this rank's first."""
    split = [i for i, p in enumerate(tensor.placements) if not p.is_replicate()]
    if len(split) != 1 or not tensor.placements[split[0]].is_shard(0):
        raise ValueError('weights are read into tensors sharded over their rows alone, '
                         f'not {tensor.placements}')
    mesh = tensor.device_mesh
    rows_a_rank = -(-len(tensor) // mesh.size(split[0]))
    return min(len(tensor), rows_a_rank * mesh.get_local_rank(split[0]))


def read(files, name, rows=slice(None)):
    """-> rows of a tensor of the checkpoint, [M, ...] in its dtype; FP8 blocks as float32"""
    path, shape, dtype = files[name]
    with safe_open(path, 'pt') as shard:
        part = shard.get_slice(name)
        if dtype != 'F8_E4M3':
            return part[rows]
        scales = name + '_scale_inv'
        if scales not in files:
            raise ValueError(f'{path}: {name} is FP8 and has no {scales}')
        first, last, _ = rows.indices(shape[0])
        block = first // BLOCK
        with safe_open(files[scales][0], 'pt') as other:
            scale = other.get_slice(scales)[block:-(-last // BLOCK)]
        return dequantise(part[block * BLOCK:last], scale)[first - block * BLOCK:]


# ---- *.safetensors: writing ----

def save_tensors(folder, tensors, config, dtype, max_shard_bytes):
    """
    tensors: {hub name: tensor}, config: dict for config.json. dtype: of the files, None for as in
    memory; routing biases always stay as in memory.

    Everything is written beside `folder` before anything in it changes. A model that was there
    loses its config.json first and the new one comes last: its presence means that all files are
    of one model. OSError where they cannot be written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.saving-', dir=folder.parent))
    try:
        try:
            write_files(temporary, tensors, config, dtype, max_shard_bytes)
            folder.mkdir(exist_ok=True)
        except (OSError, SafetensorError) as error:
            raise OSError(f'{folder}: saving failed, what was there is untouched: '
                          f'{error}') from error
        move_in(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_files(folder, tensors, config, dtype, max_shard_bytes):
    """Writes shards, their index where there are several, and config.json, and brings them to the
    disk."""
    def saved_dtype(name):
        biases = name.endswith('e_score_correction_bias')
        return tensors[name].dtype if dtype is None or biases else dtype

    def saved(name):
        return tensors[name].to(saved_dtype(name)).cpu().contiguous()

    # which tensors are in which shard
    shards, size, total = [[]], 0, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * saved_dtype(name).itemsize
        if size and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
        total += nbytes

    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = 'model.safetensors'
        if len(shards) > 1:
            file = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        metadata = {'format': 'pt'}
        save_file({name: saved(name) for name in names}, folder / file, metadata)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1))
    (folder / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
    for path in folder.iterdir():
        with open(path, 'rb') as file:
            os.fsync(file.fileno())


def move_in(temporary, folder):
    """Moves the files of `temporary` into `folder` in place of the model there."""
    new = sorted(path.name for path in temporary.iterdir() if path.name != 'config.json')
    (folder / 'config.json').unlink(missing_ok=True)
    for name in new:
        os.replace(temporary / name, folder / name)
    for path in folder.glob('model*.safetensors*'):
        if path.name not in new:
            path.unlink()
    os.replace(temporary / 'config.json', folder / 'config.json')
