"""
tools/gguf.py: the file's tensors and fields against transformers, the tokenizers library and GGUF's
rules written out in NumPy; what is refused. Where llama-cpp-python is installed (it needs a
compiler: pip install llama-cpp-python), llama.cpp itself:

    MODEL=HuggingFaceTB/SmolLM2-135M-Instruct pytest -s -m slow tests/test_gguf.py

compares greedy answers of a released or trained model, there and here, to 50 prompts.
"""
import ctypes
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.bpe import PATTERNS
from data.tokenizer import Tokenizer
from hub import local_folder
from model import Transformer
from sample import Sampler
from tools.gguf import Config, convert, main, with_keys

gguf = pytest.importorskip('gguf')
tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
            "{{ '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 8.0, 'low_freq_factor': 1.0,
          'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}
# name -> changes of the tiny model
MODELS = {
    'tied': dict(tie_word_embeddings=True),
    'wide heads': dict(head_dim=16, num_key_value_heads=4),
    'scaled rope': dict(num_key_value_heads=1, rope_parameters=LLAMA3),
}
ADDED = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
CORPUS = ["Anna has 12 apples and buys 30 more; it's 42 in all.", 'Wie viele? Größer als 7½!',
          'def f(x):\n    return x ** 2\n', ' the  theory of   there, then 2024-11-29'] * 8


def smol_tokenizer():
    """A small one of SmolLM2's kind: digits by themselves, bytes without a token"""
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, show_progress=False, special_tokens=ADDED)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(['<think>'])
    return tokenizer


def llama3_tokenizer():
    """A small one of Llama 3's kind: its pattern, tokens whole, and bos put before a text"""
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    split = pre.Split(tokenizers.Regex(PATTERNS['llama3'][0][0]), 'isolated')
    tokenizer.pre_tokenizer = pre.Sequence(
        [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False,
                                             initial_alphabet=pre.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = ['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', *ADDED]
    tokenizer.add_special_tokens(names)
    first = tokenizers.processors.TemplateProcessing(
        single='<|begin_of_text|> $A', pair='<|begin_of_text|> $A $B',
        special_tokens=[('<|begin_of_text|>', tokenizer.token_to_id('<|begin_of_text|>'))])
    level = tokenizers.processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = tokenizers.processors.Sequence([level, first])
    return tokenizer


def write_model(folder, rows, **changes):
    """A tiny Llama as transformers writes it, with logits that depend on every position"""
    torch.manual_seed(0)
    config = dict(vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256,
                  initializer_range=0.2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes))
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    model.save_pretrained(folder)
    return model.eval()


def write_tokenizer(folder, tokenizer, **config):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    named = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'pad_token': '<|im_end|>',
             'unk_token': '<|endoftext|>', 'chat_template': TEMPLATE}
    (folder / 'tokenizer_config.json').write_text(json.dumps(named | config))


@pytest.fixture(scope='module')
def smol():
    return smol_tokenizer()


@pytest.fixture(params=MODELS)
def converted(request, smol, tmp_path):
    """transformers' model, and the file"""
    write_tokenizer(tmp_path / 'hub', smol)
    rows = smol.get_vocab_size() + 3
    model = write_model(tmp_path / 'hub', rows, **MODELS[request.param])
    convert(tmp_path / 'hub', tmp_path / 'model.gguf')
    return model, tmp_path / 'model.gguf'


def changed(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(path):
    """-> fields, tensors [float32 in NumPy's order of axes] of a file"""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for t in reader.tensors:
        values = np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float64)
        tensors[t.name] = values.reshape([int(n) for n in reversed(t.shape)])
    return fields, tensors


# ---- tensors ----

def rotated(x_THd, frequencies):
    """GGUF's rope: neighbours are a pair"""
    angles = np.arange(len(x_THd))[:, None, None] * frequencies
    even, odd = x_THd[..., 0::2], x_THd[..., 1::2]
    out = np.empty_like(x_THd)
    out[..., 0::2] = even * np.cos(angles) - odd * np.sin(angles)
    out[..., 1::2] = even * np.sin(angles) + odd * np.cos(angles)
    return out


def logits_of_file(path, ids):
    """A Llama in float64, by what a GGUF file says"""
    fields, w = contents(path)
    f = {name.removeprefix('llama.'): value for name, value in fields.items()}
    H, G = f['attention.head_count'], f['attention.head_count_kv']
    d, T = f['attention.key_length'], len(ids)
    frequencies = f['rope.freq_base'] ** -(np.arange(0, d, 2) / d)
    frequencies = frequencies / w.get('rope_freqs.weight', 1)

    def norm(x, name):
        eps = f['attention.layer_norm_rms_epsilon']
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name + '.weight']

    x = w['token_embd.weight'][ids]
    for layer in range(f['block_count']):
        blk = f'blk.{layer}.'
        h = norm(x, blk + 'attn_norm')
        q = rotated((h @ w[blk + 'attn_q.weight'].T).reshape(T, H, d), frequencies)
        k = rotated((h @ w[blk + 'attn_k.weight'].T).reshape(T, G, d), frequencies)
        v = (h @ w[blk + 'attn_v.weight'].T).reshape(T, G, d)
        heads = []
        for head in range(H):
            scores = q[:, head] @ k[:, head * G // H].T / np.sqrt(d)
            scores[np.triu_indices(T, 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[:, head * G // H])
        x = x + np.concatenate(heads, -1) @ w[blk + 'attn_output.weight'].T
        h = norm(x, blk + 'ffn_norm')
        gate = h @ w[blk + 'ffn_gate.weight'].T
        up = h @ w[blk + 'ffn_up.weight'].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[blk + 'ffn_down.weight'].T
    return norm(x, 'output_norm') @ w.get('output.weight', w['token_embd.weight']).T


def some_ids(V, T=100):
    return np.random.default_rng(0).integers(0, V, T)


def test_the_file_by_gguf_s_rules_has_transformers_logits(converted):
    model, path = converted
    ids = some_ids(model.config.vocab_size)
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(logits_of_file(path, ids) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_tensors_are_the_checkpoint_s_in_the_dtype_asked_for(smol, tmp_path, dtype):
    write_tokenizer(tmp_path, smol)
    model = write_model(tmp_path, 256)
    convert(tmp_path, tmp_path / 'model.gguf', dtype)
    fields, tensors = contents(tmp_path / 'model.gguf')
    weights = model.state_dict()
    assert len(tensors) == len(weights)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / 'model.gguf').tensors}
    short = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}[dtype]
    for name, w in tensors.items():
        assert kinds[name] == ('F32' if w.ndim == 1 else short), name

    def rounded(name):
        return weights[name].to(getattr(torch, dtype)).double().numpy()
    assert np.array_equal(tensors['token_embd.weight'], rounded('model.embed_tokens.weight'))
    assert np.array_equal(tensors['output.weight'], rounded('lm_head.weight'))
    down = rounded('model.layers.1.mlp.down_proj.weight')
    assert np.array_equal(tensors['blk.1.ffn_down.weight'], down)
    norm = weights['model.layers.1.post_attention_layernorm.weight'].double().numpy()
    assert np.array_equal(tensors['blk.1.ffn_norm.weight'], norm)

    # a head of 8 rows in the order 0 4 1 5 2 6 3 7
    k = rounded('model.layers.1.self_attn.k_proj.weight')
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(tensors['blk.1.attn_k.weight'], k[[*order, *(8 + i for i in order)]])


def test_shards_are_read_and_an_untied_head_beside_a_tied_config_is_kept(smol, tmp_path):
    write_tokenizer(tmp_path, smol)
    model = write_model(tmp_path, 256)
    convert(tmp_path, tmp_path / 'one.gguf')
    (tmp_path / 'model.safetensors').unlink()
    model.save_pretrained(tmp_path, max_shard_size='40KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    changed(tmp_path / 'config.json', tie_word_embeddings=True)
    with pytest.warns(UserWarning, match='untied'):
        convert(tmp_path, tmp_path / 'two.gguf')
    (fields, one), (again, two) = contents(tmp_path / 'one.gguf'), contents(tmp_path / 'two.gguf')
    assert fields == again and one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


# ---- fields ----

def test_fields_of_the_model(smol, tmp_path):
    write_tokenizer(tmp_path / 'small', smol)
    rope = {'rope_type': 'default', 'rope_theta': 7e3}
    write_model(tmp_path / 'small', 256, rope_parameters=rope, rms_norm_eps=1e-5, head_dim=16)
    said = convert(tmp_path / 'small', tmp_path / 'model.gguf')
    assert 'float32' in said and 'smollm' in said and '\n' not in said
    fields, _ = contents(tmp_path / 'model.gguf')
    expected = {
        'general.architecture': 'llama', 'general.name': 'small', 'general.file_type': 0,
        'llama.vocab_size': 256, 'llama.context_length': 256, 'llama.embedding_length': 32,
        'llama.block_count': 2, 'llama.feed_forward_length': 48, 'llama.attention.head_count': 4,
        'llama.attention.head_count_kv': 2, 'llama.attention.key_length': 16,
        'llama.attention.value_length': 16, 'llama.rope.dimension_count': 16,
        'llama.rope.freq_base': 7e3,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields['llama.attention.layer_norm_rms_epsilon'] == pytest.approx(1e-5)


def tokenizer_fields_of(folder, tokenizer, **config):
    write_tokenizer(folder, tokenizer, **config)
    write_model(folder, tokenizer.get_vocab_size() + 2)
    convert(folder, folder / 'model.gguf')
    fields, _ = contents(folder / 'model.gguf')
    return {name.removeprefix('tokenizer.').removeprefix('ggml.'): value
            for name, value in fields.items() if name.startswith('tokenizer.')}


def test_fields_of_a_tokenizer_of_smollm2_s_kind(smol, tmp_path):
    fields = tokenizer_fields_of(tmp_path, smol)
    V = smol.get_vocab_size()
    model = json.loads(smol.to_str())['model']
    assert fields.pop('tokens') == [*map(smol.id_to_token, range(V)), f'[PAD{V}]', f'[PAD{V + 1}]']
    assert fields.pop('merges') == [' '.join(merge) for merge in model['merges']]
    control, normal, user_defined, unused = 3, 1, 4, 5
    types = [control] * 3 + [normal] * (V - 4) + [user_defined] + [unused] * 2
    assert fields.pop('token_type') == types
    assert fields == {
        'model': 'gpt2', 'pre': 'smollm', 'bos_token_id': 1, 'eos_token_id': 2, 'eot_token_id': 2,
        'padding_token_id': 2, 'unknown_token_id': 0, 'add_bos_token': False,
        'add_eos_token': False, 'add_space_prefix': False, 'chat_template': TEMPLATE,
    }


def test_fields_of_a_tokenizer_of_llama_3_s_kind(tmp_path, capsys):
    tokenizer = llama3_tokenizer()
    texts = ('<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', 'Ġthe')
    bos, end, eot, word = map(tokenizer.token_to_id, texts)
    template = '<|end_of_text|>{{ messages[0].content }}<|eot_id|>'
    write_tokenizer(tmp_path, tokenizer, bos_token={'content': '<|begin_of_text|>'},
                    eos_token='<|eot_id|>', pad_token=None, unk_token=None)
    (tmp_path / 'chat_template.jinja').write_text(template)
    write_model(tmp_path, tokenizer.get_vocab_size())
    changed(tmp_path / 'generation_config.json', eos_token_id=[eot, end, word])
    convert(tmp_path, tmp_path / 'model.gguf')
    fields, _ = contents(tmp_path / 'model.gguf')
    fields = {name.removeprefix('tokenizer.ggml.'): value for name, value in fields.items()}
    assert fields['pre'] == 'llama-bpe'
    assert fields['bos_token_id'] == bos and fields['eos_token_id'] == eot
    assert fields['eot_token_id'] == eot   # of the ends that the template writes
    assert fields['add_bos_token'] and not fields['add_eos_token']
    assert 'padding_token_id' not in fields and 'unknown_token_id' not in fields
    assert fields['tokenizer.chat_template'] == template
    assert "warning: 'Ġthe' ends an answer" in capsys.readouterr().err


def test_transformers_and_the_file_agree_whether_bos_is_put_before(smol, tmp_path):
    for number, config in enumerate([{}, {'add_bos_token': False}, {'add_bos_token': True}]):
        for name, tokenizer in {'smol': smol, 'llama': llama3_tokenizer()}.items():
            folder = tmp_path / f'{name}{number}'
            bos = '<|im_start|>' if name == 'smol' else '<|begin_of_text|>'
            fields = tokenizer_fields_of(folder, tokenizer, bos_token=bos, **config)
            read = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            first = read('a')['input_ids'][0]
            assert fields['add_bos_token'] == (first == fields['bos_token_id']), (name, config)


# ---- what is refused ----

QWEN = {'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2'}
YARN = {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4.0,
        'original_max_position_embeddings': 64}
DIGITS = {'type': 'Digits', 'individual_digits': True}
LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}


@pytest.mark.parametrize('file, change, said', [
    ('config', QWEN, 'Qwen2ForCausalLM is not converted, only LlamaForCausalLM'),
    ('config', {'architectures': ['MistralForCausalLM']}, 'MistralForCausalLM is not converted'),
    ('config', {'model_type': 'qwen2'}, 'model_type qwen2 is not that of'),
    ('config', {'rope_parameters': YARN}, 'rope_scaling yarn is not converted, only llama3'),
    ('config', {'attention_bias': True}, 'attention_bias=True is not supported'),
    ('config', {'vocab_size': 100}, 'the model an embedding of 100'),
    ('tokenizer', {'normalizer': {'type': 'NFC'}}, 'normalizer NFC is not converted'),
    ('tokenizer', {'pre_tokenizer': LEVEL}, 'pre-tokenizer of ByteLevel is not one of those'),
    ('tokenizer', {'pre_tokenizer': None}, 'pre-tokenizer of None is not one of those'),
    ('tokenizer', {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
        DIGITS, {**LEVEL, 'add_prefix_space': True}]}}, 'pre-tokenizer of Digits, ByteLevel'),
    ('tokenizer', {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
        {**DIGITS, 'individual_digits': False}, LEVEL]}}, 'recognised: smollm, llama-bpe'),
    ('tokenizer', {'post_processor': {'type': 'BertProcessing'}}, 'post-processor BertProcessing'),
    ('tokenizer', {'post_processor': {'type': 'TemplateProcessing', 'single': [
        {'SpecialToken': {'id': '<think>'}}, {'Sequence': {'id': 'A'}}]}}, "['<think>'] before"),
    ('tokenizer', {'model': {'type': 'Unigram', 'vocab': {}}}, 'type=Unigram is not a plain'),
    ('tokenizer', {'added_tokens': [{'id': 9, 'content': 'x', 'lstrip': True}]}, "'x' with lstrip"),
    ('tokenizer', {'added_tokens': [{'id': 9}]}, "is malformed: KeyError('content')"),
    ('tokenizer_config', {'eos_token': None}, 'names no eos_token'),
    ('tokenizer_config', {'eos_token': '<end>'}, "eos_token '<end>' is not in the vocabulary"),
])
def test_what_llama_cpp_would_do_otherwise_is_refused_in_one_line(smol, tmp_path, file, change,
                                                                  said):
    write_tokenizer(tmp_path, smol)
    write_model(tmp_path, 256)
    changed(tmp_path / f'{file}.json', **change)
    with pytest.raises(ValueError) as error:
        convert(tmp_path, tmp_path / 'model.gguf')
    assert said in str(error.value) and '\n' not in str(error.value)
    assert not list(tmp_path.glob('model.gguf*'))


def test_merges_are_ignored_as_llama_cpp_ignores_them(smol, tmp_path):
    write_tokenizer(tmp_path, smol)
    write_model(tmp_path, 256)
    changed(tmp_path / 'tokenizer.json', model={**json.loads(smol.to_str())['model'],
                                                'ignore_merges': True})
    with pytest.raises(ValueError, match='ignore_merges=True, but False'):
        convert(tmp_path, tmp_path / 'model.gguf')


def test_a_failure_leaves_the_file_that_was_there(smol, tmp_path):
    write_tokenizer(tmp_path, smol)
    write_model(tmp_path, 256)
    out = tmp_path / 'model.gguf'
    convert(tmp_path, out)
    before = out.read_bytes()
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors['model.layers.1.mlp.up_proj.weight'][3, 3] = 1e5
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'layers\.1\.mlp\.up_proj.* not finite in float16'):
        convert(tmp_path, out, 'float16')
    assert out.read_bytes() == before and not out.with_name('model.gguf.tmp').exists()
    with pytest.raises(ValueError, match='is a folder; OUT is the file'):
        convert(tmp_path, tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    with pytest.raises(ValueError, match='tokenizer.json does not exist'):
        convert(tmp_path, out)


# ---- the script ----

def test_the_script_finds_the_package_and_not_itself(smol, tmp_path):
    write_tokenizer(tmp_path, smol)
    write_model(tmp_path, 256)
    command = [sys.executable, 'gguf.py', tmp_path, tmp_path / 'model.gguf', '--dtype=bfloat16']
    done = subprocess.run(command, cwd=ROOT / 'tools', capture_output=True, text=True)
    assert done.stderr == '' and done.stdout.startswith(f'{tmp_path}/model.gguf: ')
    assert contents(tmp_path / 'model.gguf')[0]['general.file_type'] == 32   # bfloat16


def test_folder_and_out_need_no_keys():
    assert with_keys(['a', '--dtype=float16', 'b']) == ['--folder=a', '--dtype=float16', '--out=b']
    assert with_keys(['my.py', 'a', 'b', 'c']) == ['my.py', '--folder=a', '--out=b', 'c']


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr('tools.gguf.gguf', None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[gguf\]'"):
        main(Config('a', 'b'))


# ---- llama.cpp ----

class LlamaCpp:
    """A file in llama.cpp: float32 cache, no flash attention, one thread; `rows` texts of up to
    256 tokens side by side"""

    def __init__(self, path, rows=1):
        self.api = pytest.importorskip('llama_cpp')
        f32 = self.api.GGML_TYPE_F32
        self.llama = self.api.Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1,
                                    n_gpu_layers=0, type_k=f32, type_v=f32, flash_attn=False,
                                    verbose=False)
        self.vocab = self.api.llama_model_get_vocab(self.llama.model)
        params = self.llama.context_params
        params.n_ctx = 256 * rows
        params.n_seq_max = rows
        self.context = self.api.llama_init_from_model(self.llama.model, params)
        self.batch = self.api.llama_batch_init(256, 0, 1)
        self.lengths = [0] * rows

    def encode(self, text):
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def is_end(self, i):
        return self.api.llama_vocab_is_eog(self.vocab, i)

    def logits(self, ids_of):
        """ids_of: {row: ids that follow those before} -> {row: [V] float32 after the last}"""
        n = 0
        last = {}
        for row, ids in ids_of.items():
            for i in ids:
                self.batch.token[n] = int(i)
                self.batch.pos[n] = self.lengths[row]
                self.batch.n_seq_id[n] = 1
                self.batch.seq_id[n][0] = row
                self.batch.logits[n] = False
                self.lengths[row] += 1
                n += 1
            self.batch.logits[n - 1] = True
            last[row] = n - 1
        self.batch.n_tokens = n
        assert self.api.llama_decode(self.context, self.batch) == 0
        return {row: self.logits_at(at) for row, at in last.items()}

    def logits_at(self, at):
        pointer = self.api.llama_get_logits_ith(self.context, at)
        numbers = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(numbers, (self.llama.n_vocab(),)).copy()

    def answers(self, prompts, count):
        """-> for each prompt greedy ids, the end included, and the logits that each was chosen by
        """
        answers = [([], []) for _ in prompts]
        logits_of = {}
        for row, prompt in enumerate(prompts):
            logits_of |= self.logits({row: prompt})
        while logits_of:
            following = {}
            for row, logits in logits_of.items():
                tokens, seen = answers[row]
                tokens.append(int(logits.argmax()))
                seen.append(logits)
                if len(tokens) < count and not self.is_end(tokens[-1]):
                    following[row] = tokens[-1:]
            logits_of = self.logits(following) if following else {}
        return answers


def test_llama_cpp_has_transformers_logits(converted):
    model, path = converted
    ids = some_ids(model.config.vocab_size)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    logits = LlamaCpp(path).logits({0: ids})[0]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize('tokenizer', [smol_tokenizer, llama3_tokenizer])
def test_llama_cpp_has_the_tokenizer_s_ids(tokenizer, tmp_path):
    tokenizer = tokenizer()
    first = tokenizer.encode('').tokens or ['<|im_start|>']
    tokenizer_fields_of(tmp_path, tokenizer, bos_token=first[0])
    there = LlamaCpp(tmp_path / 'model.gguf')
    rng = random.Random(0)
    pieces = [*' '.join(CORPUS).split(' '), ' ', '  ', '\n', "'s", '345', '½', 'é', '漢字', '🙂',
              '<|im_end|>', '<|im_start|>', '\t', '\r\n', '...', '_', 'ſ', '\u0301']
    for _ in range(500):
        text = ''.join(rng.choice(pieces) for _ in range(8))
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert there.encode(text) == expected, text
    assert [i for i in range(tokenizer.get_vocab_size()) if there.is_end(i)] == [
        i for i in range(tokenizer.get_vocab_size())
        if tokenizer.id_to_token(i) in ('<|im_end|>', '<|endoftext|>', '<|end_of_text|>',
                                        '<|eot_id|>')]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason='no shared files')
def test_llama_cpp_has_the_ids_of_llama_3(tmp_path):
    (tmp_path / 'tokenizer.model').symlink_to(SHARED / 'tokenizers/llama3/tokenizer.model')
    Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    write_model(tmp_path, 128256, hidden_size=8, num_attention_heads=1, num_key_value_heads=1)
    convert(tmp_path, tmp_path / 'model.gguf')
    there = LlamaCpp(tmp_path / 'model.gguf')
    vectors = (SHARED / 'tokenizers/llama3/llama3_vectors.jsonl').read_text().splitlines()
    wrong = [row for row in map(json.loads, vectors) if there.encode(row['text']) != row['ids']]
    assert not wrong


PLAIN = ['What is the capital of France?', 'Name three colours.', 'Who wrote Hamlet?',
         'Why is the sky blue?', 'Write one sentence about the sea.', 'What is 17 plus 25?',
         'Translate "good morning" into Spanish.', 'How many days has a leap year?',
         'Give me a word that rhymes with "light".', 'What does a compiler do?']


@pytest.mark.slow
@pytest.mark.skipif('MODEL' not in os.environ, reason='MODEL= names no model to compare')
def test_greedy_answers_of_a_model_are_those_of_llama_cpp(tmp_path):
    problems = SHARED / 'data/svamp/SVAMP.json'
    if not problems.exists():
        pytest.skip('no word problems')
    source = os.environ['MODEL']
    print('\n' + convert(source, tmp_path / 'model.gguf'))

    # prompts: 40 word problems, 10 plain questions
    rows = json.loads(problems.read_text())[::25]
    questions = [f'{row["Body"].strip().removesuffix(".")}. {row["Question"]}' for row in rows]
    questions += PLAIN
    tokenizer = Tokenizer.from_pretrained(source)
    turns = [[{'role': 'user', 'content': question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(t, add_generation_prompt=True)[0] for t in turns]
    texts = map(tokenizer.decode, prompts)
    there = LlamaCpp(tmp_path / 'model.gguf', len(prompts))
    same_ids = sum(there.encode(text) == ids for text, ids in zip(texts, prompts))
    print(f'{same_ids} of {len(prompts)} prompts have the same ids')

    # answers
    model = Transformer.from_pretrained(source).eval().use_tokens(tokenizer)
    sampler = Sampler(model, tokenizer.stop_ids)
    here = sampler.generate(prompts, max_new_tokens=40, temperature=0.0)
    equal = 0
    gaps = []
    answers = there.answers(prompts, 40)
    for question, prompt, [completion], (tokens, logits) in zip(questions, prompts, here, answers):
        if tokens == completion.tokens:
            equal += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(tokens, completion.tokens)) if a != b)
        with torch.no_grad():
            ours = model(torch.tensor([prompt + tokens[:at]]))[0, -1].numpy()
        gaps.append(max(ours.max() - ours[tokens[at]],
                        logits[at].max() - logits[at][completion.tokens[at]]))
        for name, z in (('here', ours), ('llama.cpp', logits[at])):
            first, second = np.argsort(-z)[:2]
            print(f'{question[:50]!r} token {at + 1}, {name}: '
                  f'{tokenizer.decode([first])!r} {z[first]:.5f}, '
                  f'{tokenizer.decode([second])!r} {z[second]:.5f}')
    print(f'{equal} of {len(prompts)} answers are equal')
    assert same_ids == len(prompts) == 50
    assert equal >= 45 and max(gaps, default=0) < 0.01


def test_a_hub_id_is_a_name_too(smol, tmp_path, monkeypatch):
    write_tokenizer(tmp_path / 'small', smol)
    write_model(tmp_path / 'small', 256)
    asked = []

    def download(name, **how):
        asked.extend(how['allow_patterns'])
        return str(tmp_path / 'small')
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    convert('owner/name', tmp_path / 'model.gguf')
    assert {'tokenizer.json', 'tokenizer_config.json', '*.safetensors'} <= {*asked}
    assert local_folder(tmp_path) == tmp_path
