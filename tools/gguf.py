r"""
A checkpoint in the hub's layout as one GGUF file, for llama.cpp and what is built on it (needs the
[gguf] extra).

    python tools/gguf.py out/smol/final final.gguf
    python tools/gguf.py HuggingFaceTB/SmolLM2-135M-Instruct smol.gguf --dtype=float16

    config.json              -> llama.*: widths, heads, rope; Llama 3's rope scaling as a tensor of
                                divisors, rope_freqs
    *.safetensors            -> token_embd, blk.N.*, output_norm, and output unless it is tied
    tokenizer.json and its   -> tokenizer.*: tokens, merges, bos, eos, eot, chat template
    configuration

Other layouts than Llama's are refused by name, and so are tokenizers that llama.cpp would cut
otherwise: it knows pre-tokenizers by name, here recognised by their steps (PRE).

The two ropes differ. The hub's rotates dimension i of a head with i + d/2, GGUF's rotates 2i with
2i + 1, both at the frequency of number i. So the rows of the query and key matrices change places
(`interleaved`); scores stay as they are, since queries and keys change alike.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
# A script finds its own folder first on the path, and this file in it instead of the package gguf:
# the project's folder takes its place.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]
from configurator import run

import torch

import hub
from data.bpe import PATTERNS, with_added_tokens
from model import ModelConfig, Transformer, rope_frequencies

try:
    import gguf
except ImportError:   # main says so
    gguf = None


@dataclass
class Config:
    folder: str                            # FOLDER: the checkpoint, a folder or a hub id
    out: str                               # OUT: the file to write
    dtype: Literal['float32', 'float16', 'bfloat16'] = 'float32'  # of matrices; vectors stay
                                           # float32


TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja')

# The hub's names without .weight -> GGUF's
OF_MODEL = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}
OF_LAYER = {
    'input_layernorm': 'attn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}

# dtype -> GGUF's name of it, and of a file of such matrices
STORED = {
    'float32': ('F32', 'ALL_F32'),
    'float16': ('F16', 'MOSTLY_F16'),
    'bfloat16': ('BF16', 'MOSTLY_BF16'),
}

# llama.cpp's name of a pre-tokenizer -> the regexes that cut a text, one after the other, and
# whether a piece that is a token stays whole, whatever the merges make of it (ignore_merges)
PRE = {
    'smollm': ((r'\p{N}', *PATTERNS['gpt2'][0]), False),
    'llama-bpe': (PATTERNS['llama3'][0], True),
}
# Tokens at which llama.cpp stops wherever a vocabulary has them
ENDS = ('<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>', '<|endoftext|>', '<|end|>',
        '<｜end▁of▁sentence｜>')


# ---- config.json ----

def read_config(folder):
    """-> ModelConfig; ValueError names a layout, or a rope, that is not written here."""
    path = folder / 'config.json'
    config = hub.read_json(path)
    kind = (config.get('architectures') or [config.get('model_type')])[0]
    if kind not in ('LlamaForCausalLM', 'llama'):
        raise ValueError(f'{path}: {kind} is not converted, only LlamaForCausalLM')
    cfg = ModelConfig.read(path)
    if cfg.model_type != 'llama':
        raise ValueError(f'{path}: model_type {cfg.model_type} is not that of LlamaForCausalLM')
    if cfg.rope_scaling and cfg.rope_scaling['rope_type'] != 'llama3':
        raise ValueError(f'{path}: rope_scaling {cfg.rope_scaling["rope_type"]} is not converted, '
                         'only llama3')
    return cfg


def model_fields(cfg, name, dtype):
    """-> {field: value}, the fields as GGUFWriter's methods add_... call them"""
    return {
        'name': name,
        'file_type': gguf.LlamaFileType[STORED[dtype][1]],
        'vocab_size': cfg.vocab_size,
        'context_length': cfg.max_position_embeddings,
        'embedding_length': cfg.hidden_size,
        'block_count': cfg.num_hidden_layers,
        'feed_forward_length': cfg.intermediate_size,
        'head_count': cfg.num_attention_heads,
        'head_count_kv': cfg.num_key_value_heads,
        'key_length': cfg.head_dim,
        'value_length': cfg.head_dim,
        'layer_norm_rms_eps': cfg.rms_norm_eps,
        'rope_dimension_count': cfg.head_dim,
        'rope_freq_base': cfg.rope_theta,
    }


# ---- the tokenizer ----

def tokenizer_fields(folder, vocab_size):
    """-> {field: value} as in `model_fields`. ValueError says what llama.cpp would do otherwise."""
    path = folder / 'tokenizer.json'
    if not path.exists():
        raise ValueError(f'{path} does not exist, and no other form of a tokenizer is converted')
    spec = hub.read_json(path)
    config = hub.read_json(folder / 'tokenizer_config.json', {})
    try:
        tokens, types = token_list(spec, config, vocab_size)
        fields = {
            'tokenizer_model': 'gpt2',   # byte-level BPE
            'tokenizer_pre': pre_of(spec),
            'token_list': tokens,
            'token_types': types,
            'token_merges': merges_of(spec['model']),
            'add_space_prefix': False,
        }
        template = chat_template(folder, config)
        if template:
            fields['chat_template'] = template
        generation = hub.read_json(folder / 'generation_config.json', {})
        fields |= special_ids(tokens, config, generation, template or '')
        fields |= added_around(spec.get('post_processor'), config)
        return fields
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is malformed: {error!r}') from error


def token_list(spec, config, vocab_size):
    """-> the text of every id in GPT-2's alphabet of bytes (added tokens as they are), and its
    gguf.TokenType. Rows of the embedding that stand for no token are [PAD...]."""
    kinds = gguf.TokenType
    if spec.get('normalizer') is not None:
        raise ValueError(f'normalizer {spec["normalizer"]["type"]} is not converted, only none')
    tokens = [f'[PAD{i}]' for i in range(vocab_size)]
    types = [kinds.UNUSED] * vocab_size

    def put(i, text, kind):
        if not 0 <= i < vocab_size:
            raise ValueError(f'token {text!r} has id {i}, the model an embedding of {vocab_size}')
        tokens[i] = text
        types[i] = kind

    for text, i in spec['model']['vocab'].items():
        put(i, text, kinds.NORMAL)
    with_added_tokens(spec, config)
    for token in spec['added_tokens']:
        flags = [name for name in ('lstrip', 'rstrip', 'single_word') if token.get(name)]
        if flags:
            raise ValueError(f'added token {token["content"]!r} with {flags[0]} is not converted')
        kind = kinds.CONTROL if token.get('special') else kinds.USER_DEFINED
        put(token['id'], token['content'], kind)
    if len(set(tokens)) < vocab_size:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise ValueError(f'two ids have the text {twice!r}')
    return tokens, types


def merges_of(model):
    """-> the merges as 'left right'"""
    options = ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback')
    found = [f'{key}={model[key]}' for key in ('type', *options) if model.get(key)]
    if found != ['type=BPE']:
        raise ValueError(f'a model of {", ".join(found)} is not a plain byte-level BPE')
    return [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]


def pre_of(spec):
    """-> llama.cpp's name of the pre-tokenizer; ValueError where it has none that is known here"""
    pre = spec.get('pre_tokenizer') or {'type': None}
    steps = pre.get('pretokenizers', [pre])
    regexes = tuple(regex for step in steps for regex in regexes_of(step))
    whole = bool(spec['model'].get('ignore_merges', False))
    for name, (known, ignore_merges) in PRE.items():
        if regexes == known and steps[-1]['type'] == 'ByteLevel':
            if whole != ignore_merges:
                raise ValueError(f'ignore_merges={whole}, but {ignore_merges} in llama.cpp\'s '
                                 f'pre-tokenizer {name}')
            return name
    raise ValueError(f'pre-tokenizer of {", ".join(str(step["type"]) for step in steps)} is not '
                     f'one of those recognised: {", ".join(PRE)} in llama.cpp\'s names')


def regexes_of(step):
    """-> the regexes by which a step of a pre-tokenizer cuts, each match a piece; ('?',) of a step
    that is not known"""
    kind = step['type']
    if kind == 'Digits' and step['individual_digits']:
        return (r'\p{N}',)
    if kind == 'Split' and step['behavior'] == 'Isolated' and not step['invert']:
        regex = step['pattern'].get('Regex', '?')
        return (regex.replace('\r', r'\r').replace('\n', r'\n'),)
    if kind == 'ByteLevel' and not step['add_prefix_space']:
        return PATTERNS['gpt2'][0] if step['use_regex'] else ()
    return ('?',)


def chat_template(folder, config):
    """-> the folder's Jinja text, None without one"""
    path = folder / 'chat_template.jinja'
    if path.exists():
        return path.read_text(encoding='utf-8')
    template = config.get('chat_template')
    if isinstance(template, list):
        return {t['name']: t['template'] for t in template}.get('default')
    return template


def text_of(token):
    """A token as tokenizer_config.json names it, by its text or as an object -> its text or None"""
    return token['content'] if isinstance(token, dict) else token


def special_ids(tokens, config, generation, template):
    """
    -> bos, eos, pad, unk by tokenizer_config.json; eot, the end at which the template closes a turn
    of the assistant. Ends of generation_config.json that llama.cpp would pass by are told.
    """
    def id_of(name):
        text = text_of(config.get(name))
        if text is None:
            return None
        if text not in tokens:
            raise ValueError(f'{name} {text!r} is not in the vocabulary')
        return tokens.index(text)

    eos = id_of('eos_token')
    if eos is None:   # llama.cpp would take id 11
        raise ValueError('tokenizer_config.json names no eos_token')
    ids = {name: id_of(f'{name}_token') for name in ('bos', 'pad', 'unk')} | {'eos': eos}
    if ids['bos'] is None:   # likewise; it is put nowhere
        ids['bos'] = eos

    others = generation.get('eos_token_id') or []
    ends = [eos, *(others if isinstance(others, list) else [others])]
    if max(ends) >= len(tokens):
        raise ValueError(f'eos_token_id {max(ends)} of generation_config.json is no token')
    written = [i for i in ends if tokens[i] in template or i == eos and 'eos_token' in template]
    if written:
        ids['eot'] = written[0]
    for i in ends:
        if i not in (eos, ids.get('eot')) and tokens[i] not in ENDS:
            print(f'warning: {tokens[i]!r} ends an answer by generation_config.json; GGUF has no '
                  'place for it, and llama.cpp goes on', file=sys.stderr)
    return {f'{name}_token_id': i for name, i in ids.items() if i is not None}


def added_around(post_processor, config):
    """-> whether bos comes before a text and eos after it. The post-processor of tokenizer.json
    decides alone, as in transformers: add_bos_token in the configuration is for other files."""
    before, after = [], []
    post_processor = post_processor or {'type': 'ByteLevel'}
    for step in post_processor.get('processors', [post_processor]):
        if step['type'] == 'TemplateProcessing':
            pieces = [piece.get('SpecialToken', {}).get('id') for piece in step['single']]
            at = pieces.index(None)   # of the text itself
            before, after = pieces[:at], pieces[at + 1:]
        elif step['type'] != 'ByteLevel':
            raise ValueError(f'post-processor {step["type"]} is not converted')
    bos, eos = (text_of(config.get(name)) for name in ('bos_token', 'eos_token'))
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise ValueError(f'the post-processor puts {before} before a text and {after} after it; '
                         'only bos_token and eos_token are converted')
    return {'add_bos_token': bool(before), 'add_eos_token': bool(after)}


# ---- tensors ----

def gguf_name(name):
    """'model.layers.3.self_attn.q_proj.weight' -> 'blk.3.attn_q.weight'"""
    stem = name.removesuffix('.weight')
    if stem in OF_MODEL:
        return f'{OF_MODEL[stem]}.weight'
    layer, part = stem.removeprefix('model.layers.').split('.', 1)
    return f'blk.{layer}.{OF_LAYER[part]}.weight'


def interleaved(weight, heads):
    """weight [heads·d, C] -> the same rows, those of each head in the order 0, d/2, 1, d/2 + 1, ...
    """
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def rope_divisors(cfg):
    """-> [d/2] float32: by what Llama 3's scaling divides the frequencies"""
    plain, _ = rope_frequencies(replace(cfg, rope_scaling=None))
    scaled, _ = rope_frequencies(cfg)
    return plain / scaled


def read_tensor(cfg, files, name, dtype):
    """-> a tensor of the hub's name, as GGUF has it: matrices in dtype, vectors in float32"""
    tensor = hub.read(files, name)
    if name.endswith('q_proj.weight'):
        tensor = interleaved(tensor, cfg.num_attention_heads)
    elif name.endswith('k_proj.weight'):
        tensor = interleaved(tensor, cfg.num_key_value_heads)
    tensor = tensor.to(torch.float32 if tensor.ndim == 1 else getattr(torch, dtype))
    if not tensor.isfinite().all():
        raise ValueError(f'{files[name][0]}: {name} holds a value that is not finite in {dtype}')
    return tensor


def write_tensors(writer, cfg, files, dtype):
    """Writes the file of a writer that has its fields, one tensor in memory at a time -> how many
    numbers are in it"""
    with torch.device('meta'):
        places = Transformer(cfg).hub_tensors()
    hub.check_tensors(cfg, places, files, files['model.embed_tokens.weight'][0].parent)

    # what is in the file
    divisors = rope_divisors(cfg) if cfg.rope_scaling else None
    if divisors is not None:
        add_info(writer, 'rope_freqs.weight', divisors, dtype)
    for name, (tensor, _) in places.items():
        add_info(writer, gguf_name(name), tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    # the tensors, in that order
    if divisors is not None:
        writer.write_tensor_data(divisors.numpy())
    for name in places:
        tensor = read_tensor(cfg, files, name, dtype).contiguous()
        if tensor.dtype == torch.bfloat16:   # which numpy has not
            tensor = tensor.view(torch.int16)
        writer.write_tensor_data(tensor.numpy())
    return sum(tensor.numel() for tensor, _ in places.values())


def add_info(writer, name, tensor, dtype):
    """Tells the writer of a tensor that it will be given."""
    if tensor.ndim == 1:
        dtype = 'float32'
    size = tensor.numel() * getattr(torch, dtype).itemsize
    kind = gguf.GGMLQuantizationType[STORED[dtype][0]]
    writer.add_tensor_info(name, tuple(tensor.shape), None, size, raw_dtype=kind)


# ---- the script ----

def convert(source, out, dtype='float32'):
    """
    source: a folder or a hub id -> one line that says what is in the file `out`, which is complete
    or not there. ValueError, FileNotFoundError: what is not converted, or does not fit together.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f'{out} is a folder; OUT is the file to write')
    folder = hub.local_folder(source, (*hub.FILES, *TOKENIZER_FILES))
    cfg = read_config(folder)
    files = hub.checkpoint_files(folder)
    hub.adapt_to_files(cfg, files, folder, {})
    fields = model_fields(cfg, Path(source).resolve().name, dtype)
    fields |= tokenizer_fields(folder, cfg.vocab_size)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + '.tmp')
    writer = gguf.GGUFWriter(temporary, 'llama')
    try:
        for name, value in fields.items():
            getattr(writer, f'add_{name}')(value)
        numbers = write_tensors(writer, cfg, files, dtype)
        writer.close()
        os.replace(temporary, out)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return (f'{out}: {numbers / 1e6:.1f}M parameters in {dtype}, {out.stat().st_size / 1e6:.1f} MB;'
            f' {cfg.vocab_size} tokens, pre-tokenizer {fields["tokenizer_pre"]}')


def with_keys(argv):
    """The arguments with --folder= and --out= before the first two that are not config files or
    settings"""
    keys = ['folder', 'out']
    named = []
    for argument in argv:
        if keys and not argument.startswith('-') and not argument.endswith('.py'):
            argument = f'--{keys.pop(0)}={argument}'
        named.append(argument)
    return named


def main(cfg):
    if gguf is None:
        sys.exit("gguf.py: the package gguf is missing; pip install -e '.[gguf]'")
    print(convert(cfg.folder, cfg.out, cfg.dtype))


if __name__ == '__main__':
    sys.argv[1:] = with_keys(sys.argv[1:])
    run(main, Config)
