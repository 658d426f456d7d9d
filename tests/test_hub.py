"""hub.py: checkpoints by hub id, damaged and wrong ones, shards read by their ranks, memory, atomic
saving."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import hub
from data.tokenizer import Tokenizer
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parents[1]
MOE = dict(
    model_type='deepseek_v3', vocab_size=96, hidden_size=32, num_hidden_layers=3,
    num_attention_heads=4, intermediate_size=48, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=6,
    num_experts_per_tok=3, moe_intermediate_size=16, num_nextn_predict_layers=1,
    max_position_embeddings=64, initializer_range=0.2)
DENSE = dict(
    model_type='qwen2', vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=64,
    tie_word_embeddings=True)


def made(shape, **changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**shape, **changes}))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- hub ids ----


@pytest.fixture
def cached(tmp_path):
    """A cache as the hub's client keeps it, with a model and a tokenizer as owner/name."""
    commit = '0123456789abcdef0123456789abcdef01234567'
    repo = tmp_path / 'cache' / 'models--owner--name'
    model = made(MOE, vocab_size=258)
    model.save_pretrained(repo / 'snapshots' / commit, max_shard_bytes=60_000)
    Tokenizer.from_words([], ['<|user|>', '<|end|>']).save_pretrained(repo / 'snapshots' / commit)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text(commit)
    return model, repo / 'snapshots' / commit


FROM_THE_HUB = '''
import sys, torch
from data.tokenizer import Tokenizer
from model import Transformer
model = Transformer.from_pretrained('owner/name')
Tokenizer.from_pretrained('owner/name').check_model(model.cfg.vocab_size, 'owner/name')
torch.save(model.state_dict(), sys.argv[1])
try:
    Transformer.from_pretrained('owner/other')
except FileNotFoundError as error:
    print(error)
'''


def test_a_hub_id_is_read_from_the_cache_without_a_connection(cached, tmp_path):
    model, folder = cached
    env = {**os.environ, 'HF_HUB_CACHE': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, '-c', FROM_THE_HUB, tmp_path / 'read.pt']
    said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True,
                          check=True).stdout
    read = torch.load(tmp_path / 'read.pt')
    assert all(torch.equal(read[name], t) for name, t in model.state_dict().items())
    assert said.startswith('owner/other is no folder here, and the hub gave no such model:')
    assert said.count('\n') == 1


def test_what_is_asked_of_the_hub(cached, monkeypatch):
    model, folder = cached
    asked = []

    def download(name, **how):
        asked.append((name, how['revision'], how['allow_patterns'], how['ignore_patterns']))
        return str(folder)
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    assert same(Transformer.from_pretrained('owner/name@v1.0'), model)
    Tokenizer.from_pretrained('owner/name@v1.0')
    assert [a[:2] for a in asked] == [('owner/name', 'v1.0')] * 2
    of_model, of_tokenizer = asked[0][2], asked[1][2]
    assert '*.safetensors' in of_model and 'config.json' in of_model
    assert not any('bin' in pattern for pattern in of_model)
    assert '*.safetensors' not in of_tokenizer
    assert asked[0][3] == ['*/*']   # original/consolidated... of some repositories


@pytest.mark.parametrize('failure', [
    ConnectionError('the network is down'),
    OSError(28, 'No space left on device'),
    RuntimeError('?\nno'),
])
def test_a_failed_download_is_one_line(failure, monkeypatch):
    def download(*_, **__):
        raise failure
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    with pytest.raises(FileNotFoundError) as error:
        Transformer.from_pretrained('owner/name')
    assert str(error.value).startswith('owner/name is no folder here')
    assert '\n' not in str(error.value)
    with pytest.raises(FileNotFoundError, match='is no folder'):
        Transformer.from_pretrained('/nowhere/at/all')


# ---- bad input ----

def test_numbers_of_wrong_tensors_stand_in_ranges(tmp_path):
    made(MOE).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    for e in (0, 1, 2, 5):
        del tensors[f'model.layers.1.mlp.experts.{e}.up_proj.weight']
        del tensors[f'model.layers.2.mlp.experts.{e}.up_proj.weight']
    del tensors['model.norm.weight']
    tensors['model.layers.0.mlp.gate_proj.weight'] = torch.zeros(2, 2)
    # stray, as in some checkpoints
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.zeros(2)
    tensors['score.weight'] = torch.zeros(1)
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    said = str(error.value).split(': ', 2)[2].split('; ')
    assert said == ['misshapen model.layers.0.mlp.gate_proj.weight: '
                    '[2, 2] in the file, [48, 32] by config.json',
                    'missing model.layers.{1-2}.mlp.experts.{0-2,5}.up_proj.weight',
                    'missing model.norm.weight',
                    'unexpected score.weight']


@pytest.mark.parametrize('change, said', [
    ({'model_type': 'mamba', 'architectures': ['MambaForCausalLM']},
     "model_type 'mamba' (architectures ['MambaForCausalLM']) is not supported"),
    ({'rms_norm_eps': 'small'}, "rms_norm_eps must be a number >= 0, got 'small'"),
    ({'rope_theta': -1}, 'rope_theta must be a number >= 0'),
    ({'tie_word_embeddings': 'yes'}, "tie_word_embeddings must be bool, got 'yes'"),
    ({'num_hidden_layers': 2.5}, 'num_hidden_layers must be an integer >= 1, got 2.5'),
    ({'rope_scaling': {'type': 'yarn'}}, 'rope_scaling needs a number > 0 for factor'),
    ({'rope_scaling': [1]}, 'rope_scaling must be an object'),
    ({'topk_method': 'best'}, 'topk_method must be one of greedy'),
    ({'num_experts_per_tok': 7}, 'num_experts_per_tok=7 exceeds'),
    ({'n_group': 4}, 'do not split into n_group=4'),
    ({'quantization_config': {'quant_method': 'awq'}}, "quantization_config 'awq'"),
    ({'quantization_config': {'quant_method': 'fp8', 'weight_block_size': [64, 64]}},
     'weight_block_size=[64, 64]'),
])
def test_a_wrong_value_is_named_with_its_file(tmp_path, change, said):
    made(MOE).save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    message = str(error.value)
    assert said in message and message.startswith(str(path)) and '\n' not in message


SIZES = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=48)
COMMON = dict(attention_dropout=0.0, hidden_act='silu', initializer_range=0.02, use_cache=True,
              torch_dtype='bfloat16', transformers_version='4.48.3')
QWEN = dict(SIZES, **COMMON, num_key_value_heads=2, bos_token_id=1, eos_token_id=1,
            rms_norm_eps=1e-6, max_window_layers=2, use_sliding_window=False,
            tie_word_embeddings=False)
LLAMA = dict(SIZES, **COMMON, num_key_value_heads=2, bos_token_id=1, eos_token_id=[1, 2],
             rms_norm_eps=1e-5, attention_bias=False, mlp_bias=False, pretraining_tp=1,
             architectures=['LlamaForCausalLM'])
DEEPSEEK = dict(
    SIZES, **COMMON, architectures=['DeepseekV3ForCausalLM'], attention_bias=False,
    auto_map={'AutoConfig': 'configuration_deepseek.DeepseekV3Config'}, aux_loss_alpha=0.001,
    bos_token_id=0, eos_token_id=1, ep_size=1, first_k_dense_replace=1, kv_lora_rank=16,
    max_position_embeddings=163840,
    moe_intermediate_size=16, moe_layer_freq=1, n_group=4, topk_group=2, n_routed_experts=8,
    n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=3, num_key_value_heads=4,
    num_nextn_predict_layers=1, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=12, rms_norm_eps=1e-6, rope_theta=10000, routed_scaling_factor=2.5,
    scoring_func='sigmoid',
    seq_aux=True, tie_word_embeddings=False, topk_method='noaux_tc',
    rope_scaling=dict(type='yarn', factor=40, beta_fast=32, beta_slow=1, mscale=1.0,
                      mscale_all_dim=1.0, original_max_position_embeddings=4096))
YARN_8B = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=32768,
               attn_factor=0.8782488562869419)
RELEASED = {    # the keys of the hub's config.json, with small sizes
    'Qwen2.5-7B-Instruct': dict(QWEN, model_type='qwen2', max_position_embeddings=32768,
                                sliding_window=131072, rope_theta=1000000.0),
    'Qwen2.5-Math-1.5B': dict(QWEN, model_type='qwen2', max_position_embeddings=4096,
                              sliding_window=4096, use_mrope=False, rope_theta=10000,
                              tie_word_embeddings=True),
    'Qwen3-8B': dict(QWEN, model_type='qwen3', head_dim=8, attention_bias=False, rope_scaling=None,
                     max_position_embeddings=40960, sliding_window=None, rope_theta=1000000),
    'DeepSeek-R1-0528-Qwen3-8B': dict(QWEN, model_type='qwen3', head_dim=8, attention_bias=False,
                                      rope_scaling=YARN_8B, max_position_embeddings=131072,
                                      sliding_window=None, rope_theta=1000000),
    'Llama-3.2-1B-Instruct': dict(
        LLAMA, model_type='llama', head_dim=8, max_position_embeddings=131072, rope_theta=500000.0,
        tie_word_embeddings=True, rope_scaling=dict(
            factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
            original_max_position_embeddings=8192, rope_type='llama3')),
    'SmolLM2-135M-Instruct': {
        **LLAMA, 'model_type': 'llama', 'is_llama_config': True, 'rope_interleaved': False,
        'pad_token_id': 2, 'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True,
        'max_position_embeddings': 8192,
        'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16'}}},
    'DeepSeek-V3.1': dict(DEEPSEEK, model_type='deepseek_v3', quantization_config=dict(
        activation_scheme='dynamic', fmt='e4m3', quant_method='fp8', scale_fmt='ue8m0',
        weight_block_size=[128, 128])),
    'Kimi-K2-Instruct': dict(DEEPSEEK, model_type='kimi_k2', n_group=1, topk_group=1,
                             rope_theta=50000.0, num_nextn_predict_layers=0,
                             routed_scaling_factor=2.827),
    'DeepSeek-V2-Lite': dict(DEEPSEEK, model_type='deepseek_v2', pretraining_tp=1, q_lora_rank=None,
                             scoring_func='softmax', topk_method='greedy', n_group=1,
                             norm_topk_prob=False, topk_group=1, num_nextn_predict_layers=0,
                             routed_scaling_factor=1.0),
    'Moonlight-16B-A3B': dict(DEEPSEEK, model_type='deepseek_v3', pretraining_tp=1,
                              q_lora_rank=None, rope_scaling=None, max_position_embeddings=8192,
                              rms_norm_eps=1e-5,
                              num_nextn_predict_layers=0, n_group=1, topk_group=1),
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', RELEASED)
def test_the_configuration_of_a_released_model_is_read_without_a_word(name):
    config = RELEASED[name]
    cfg = ModelConfig.from_hub(config)
    same = config.keys() & {'max_position_embeddings', 'rms_norm_eps', 'rope_theta', 'q_lora_rank',
                            'n_group', 'routed_scaling_factor', 'num_nextn_predict_layers',
                            'tie_word_embeddings'}
    assert {key: getattr(cfg, key) for key in same} == {key: config[key] for key in same}
    assert bool(cfg.rope_scaling) == bool(config.get('rope_scaling'))
    again = ModelConfig.from_hub(json.loads(json.dumps(hub.config_out(cfg, torch.bfloat16, 1.0))))
    if 'attn_factor' in (cfg.rope_scaling or {}):
        assert again.rope_scaling.pop('attention_factor') == 1.0
    assert again == cfg


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('kind', ['deepseek_v2', 'deepseek_v3', 'qwen2', 'qwen3', 'llama'])
def test_keys_that_are_absent_take_the_defaults_of_the_family(kind):
    transformers = pytest.importorskip('transformers')
    given = {**SIZES, 'num_attention_heads': 32, 'hidden_size': 256}
    given |= {'num_experts_per_tok': 6} if kind == 'deepseek_v2' else {}
    theirs = transformers.AutoConfig.for_model(kind, **given).to_dict()
    ours = ModelConfig.from_hub({'model_type': kind, **given})
    # null is no groups there; where heads share a latent, a number of key heads has no meaning
    theirs |= {key: 1 for key in ('n_group', 'topk_group') if theirs.get(key, 1) is None}
    compared = [key for key in vars(ours) if key in theirs and not (
        ours.mla and key in ('head_dim', 'num_key_value_heads', 'num_nextn_predict_layers'))]
    assert {'max_position_embeddings', 'rms_norm_eps', 'tie_word_embeddings'} <= set(compared)
    assert {key: getattr(ours, key) for key in compared} == {key: theirs[key] for key in compared}
    assert ours.rope_theta == theirs['rope_parameters']['rope_theta']
    written = {key: value for key, value in theirs.items() if value is not None}
    if ours.mla:
        written['num_key_value_heads'] = 32
    read = ModelConfig.from_hub(written)     # as transformers 5 writes them
    assert all(getattr(read, key) == getattr(ours, key) for key in compared)


def test_a_key_without_a_default_is_demanded_and_a_new_model_keeps_ours():
    with pytest.raises(ValueError, match='missing num_experts_per_tok'):
        ModelConfig.from_hub({'model_type': 'deepseek_v2', **SIZES})
    new = ModelConfig.new({'model_type': 'deepseek_v3', **SIZES})
    assert (new.max_position_embeddings, new.routed_scaling_factor) == (512, 1.0)
    assert (new.q_lora_rank, new.kv_lora_rank, new.n_group) == (None, 32, 1)
    assert (new.topk_method, new.norm_topk_prob) == ('noaux_tc', True)


@pytest.mark.parametrize('name, change, said', [
    ('Qwen3-8B', {'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ('Qwen3-8B', {'attention_bias': True}, 'attention_bias=True'),
    ('Qwen3-8B', {'layer_types': ['full_attention', 'sliding_attention']},
     'layer_types with sliding_attention'),
    ('Qwen3-8B', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ('Qwen3-8B', {'final_logit_softcapping': 30.0}, 'final_logit_softcapping=30.0'),
    ('Qwen3-8B', {'num_experts': 8}, 'num_experts=8'),
    ('Qwen2.5-7B-Instruct', {'use_mrope': True}, 'use_mrope=True'),
    ('Qwen2.5-7B-Instruct', {'is_causal': False}, 'is_causal=False'),
    ('Llama-3.2-1B-Instruct', {'mlp_bias': True}, 'mlp_bias=True'),
    ('Llama-3.2-1B-Instruct', {'sliding_window': 4096}, 'sliding_window=4096'),
    ('Llama-3.2-1B-Instruct', {'rope_interleaved': True}, 'rope_interleaved=True'),
    ('Llama-3.2-1B-Instruct', {'logits_scaling': 8.0}, 'logits_scaling=8.0'),
    ('DeepSeek-V3.1', {'rope_interleave': False}, 'rope_interleave=False'),
    ('DeepSeek-V3.1', {'num_key_value_heads': 2},
     'num_key_value_heads=2 is not num_attention_heads=4'),
    ('DeepSeek-V3.1', {'qk_head_dim': 24}, 'qk_head_dim=24'),
    ('DeepSeek-V3.1', {'num_mtp_layers': 0}, 'num_nextn_predict_layers and num_mtp_layers'),
    ('DeepSeek-V3.1', {'quantization_config': {**RELEASED['DeepSeek-V3.1']['quantization_config'],
                                               'fmt': 'e5m2'}}, "fmt='e5m2'"),
    ('DeepSeek-V3.1', {'quantization_config': {**RELEASED['DeepSeek-V3.1']['quantization_config'],
                                               'bits': 4}}, 'quantization_config bits=4'),
    ('Qwen3-8B', {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}, "type 'linear'"),
    ('Qwen3-8B', {'rope_scaling': {'rope_type': 'default', 'mrope_section': [1, 1, 2]}},
     'mrope_section=[1, 1, 2]'),
    ('Qwen3-8B', {'rope_scaling': {'rope_type': 'default', 'type': 'mrope'}}, "type 'mrope'"),
    ('Qwen3-8B', {'rope_parameters': {'full_attention': {'rope_type': 'default'}}},
     'full_attention='),
    ('Qwen3-8B', {'rope_parameters': {'rope_theta': 5.0}},
     'rope_theta and rope_parameters give rope_theta'),
    ('Qwen3-8B', {'rope_scaling': {**YARN_8B, 'finetuned': True}},
     'rope_scaling holds finetuned=True'),
    ('Qwen3-8B', {'rope_scaling': {**YARN_8B, 'low_freq_factor': 1.0}},
     'rope_scaling holds low_freq_factor=1.0'),
    ('Qwen3-8B', {'rope_scaling': {**YARN_8B, 'partial_rotary_factor': 0.5}},
     'partial_rotary_factor'),
    ('Qwen3-8B', {'rope_scaling': {**YARN_8B, 'attention_factor': 1.2}},
     'attention_factor must be 1,'),
    ('Qwen3-8B', {'rope_scaling': {**YARN_8B, 'beta_fast': '32'}}, "beta_fast cannot be '32'"),
    ('Qwen3-8B', {'rope_scaling': YARN_8B, 'original_max_position_embeddings': 4096},
     'is 4096, and 32768'),
    ('Qwen3-8B', {'rope_scaling': YARN_8B, 'rope_parameters': {**YARN_8B, 'factor': 2.0}},
     'give a scaling and differ'),
    ('Llama-3.2-1B-Instruct',
     {'rope_scaling': {**RELEASED['Llama-3.2-1B-Instruct']['rope_scaling'],
                       'attention_factor': 1.0}},
     'holds attention_factor=1.0'),
])
def test_a_key_that_would_change_the_result_is_refused_by_name(name, change, said):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hub({**RELEASED[name], **change}, 'x/config.json')
    assert said in str(error.value) and str(error.value).startswith('x/config.json: ')


def test_a_key_that_nobody_knows_is_told():
    config = {**RELEASED['Qwen3-8B'], 'frobnication': 0.5, 'quiet': None, 'attention_dropout': 0.1,
              'auto_map': {'AutoModel': 'modeling.Own'}}
    with pytest.warns(UserWarning,
                      match="attention_dropout=0.1, auto_map=.*'modeling.Own'.*, frobnication=0.5;"
                      ) as told:
        ModelConfig.from_hub(config, 'x/config.json')
    assert len(told) == 1 and 'quiet' not in str(told[0].message)


def test_a_key_that_programs_read_differently_is_told():
    for name, change in (('DeepSeek-V2-Lite', {'norm_topk_prob': True}),
                         ('DeepSeek-V3.1', {'num_experts_per_tok': 1})):
        with pytest.warns(UserWarning, match='programs differ in what they make of that'):
            ModelConfig.from_hub({**RELEASED[name], **change})


# ---- several files ----

def test_old_shards_beside_a_newer_file_are_refused_whichever_is_right(tmp_path):
    made(DENSE).save_pretrained(tmp_path, max_shard_bytes=10_000)
    save_file(made(DENSE, vocab_size=97).state_dict(), tmp_path / 'model.safetensors')
    with pytest.raises(ValueError,
                       match='both model-00001-of-00011.safetensors and model.safetensors hold .*'
                                         r'\(model.safetensors.index.json names the first\)'):
        Transformer.from_pretrained(tmp_path)
    for path in tmp_path.glob('model-*.safetensors'):
        path.unlink()                  # of the old ones the index alone is left
    with pytest.raises(FileNotFoundError, match='is in model.safetensors, remove the index'):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize('other', ['model-copy.safetensors', 'a.safetensors',
                                   'model.fp16.safetensors'])
def test_two_files_with_the_same_names_and_no_index_are_refused(tmp_path, other):
    made(DENSE).save_pretrained(tmp_path)
    (tmp_path / other).write_bytes((tmp_path / 'model.safetensors').read_bytes())
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert other in str(error.value) and ' model.safetensors ' in str(error.value)


def test_shards_without_an_index_are_one_model(tmp_path):
    model = made(DENSE)
    model.save_pretrained(tmp_path, max_shard_bytes=10_000)
    (tmp_path / 'model.safetensors.index.json').unlink()
    assert same(Transformer.from_pretrained(tmp_path), model)


def test_an_adapter_beside_the_weights_is_refused_and_what_is_no_part_of_them_told(tmp_path):
    model = made(DENSE)
    model.save_pretrained(tmp_path)
    save_file({'layers.0.attention.wq.weight': torch.zeros(2)},
              tmp_path / 'consolidated.safetensors')
    with pytest.warns(UserWarning,
                      match='consolidated.safetensors is not read: 1 tensors, the first layers.0'):
        assert same(Transformer.from_pretrained(tmp_path), model)
    lora = {'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight': torch.zeros(2)}
    save_file(lora, tmp_path / 'adapter_model.safetensors')
    with pytest.raises(ValueError, match='adapter_model.safetensors is an adapter'):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize('name, change, said', [
    ('model.layers.0.mlp.up_proj.weight', lambda t: t.to(torch.int8), 'I8 is no dtype to load: {}'),
    ('model.layers.0.mlp.up_proj.weight_scale_inv', lambda t: torch.ones(1, 1),
     'F32 with scales as for FP8: {}'),
])
def test_a_tensor_of_another_quantisation_is_refused(tmp_path, name, change, said):
    made(DENSE).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors[name] = change(tensors.get(name))
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert said.format('model.layers.0.mlp.up_proj.weight') in str(error.value)


def test_copies_that_the_mtp_layer_has_in_the_files_are_compared(tmp_path):
    made(MOE).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    copy = 'model.layers.3.shared_head.head.weight'
    for factor, told in ((1.0, 0), (2.0, 1)):
        save_file({**tensors, copy: factor * tensors['lm_head.weight']},
                  tmp_path / 'model.safetensors')
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            Transformer.from_pretrained(tmp_path)
        assert len(seen) == told
        assert not told or f'{copy} is not lm_head.weight' in str(seen[0].message)


def test_where_config_says_nothing_of_an_mtp_layer_the_files_decide(tmp_path):
    for layers in (0, 1):
        made(MOE, num_nextn_predict_layers=layers).save_pretrained(tmp_path)
        config = json.loads((tmp_path / 'config.json').read_text())
        del config['num_nextn_predict_layers']
        (tmp_path / 'config.json').write_text(json.dumps(config))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert Transformer.from_pretrained(tmp_path).cfg.num_nextn_predict_layers == layers


def test_broken_files_are_named(tmp_path):
    made(DENSE).save_pretrained(tmp_path, max_shard_bytes=10_000)
    shards, index = sorted(tmp_path.glob('model-*')), tmp_path / 'model.safetensors.index.json'
    whole = shards[1].read_bytes()
    for cut in (len(whole) - 1, 100, 4, 0):
        shards[1].write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f'{shards[1].name}: damaged or truncated'):
            Transformer.from_pretrained(tmp_path)
    shards[1].unlink()
    missing = f'{shards[1].name} is named by {index.name} but does not exist'
    with pytest.raises(FileNotFoundError, match=missing):
        Transformer.from_pretrained(tmp_path)
    index.write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match='no "weight_map"'):
        Transformer.from_pretrained(tmp_path)
    index.write_text('{')
    with pytest.raises(ValueError, match='model.safetensors.index.json is not JSON'):
        Transformer.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = Tokenizer.from_words(['ab'], ['<|end|>'])    # 258 tokens
    tokenizer.check_model(258, 'x')
    tokenizer.check_model(384, 'x')                          # rounded up
    for rows in (257, 151_936):
        with pytest.raises(ValueError, match='x and y do not belong together: the tokenizer has '
                                             f'258 tokens, the model an embedding of {rows}'):
            tokenizer.check_model(rows, 'x and y')


def test_a_wrong_checkpoint_is_one_line_on_the_terminal(tmp_path):
    made(DENSE).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_words(['ab'], ['<|end|>'])     # 258 tokens, the model has 97
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, ROOT / 'sample.py', f'--checkpoint={tmp_path}', '--chat=True']
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 1 and run.stderr.count('\n') == 1
    assert run.stderr.startswith(f'sample.py: tokenizer and model in {tmp_path} '
                                 'do not belong together')


# ---- each rank reads what it keeps ----

def read_by_two_ranks(rank, folder, shapes):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    read, elements, places = hub.read, [], []

    def counted(files, name, rows=slice(None)):
        part = read(files, name, rows)
        elements.append(part.numel())
        return part

    def into_units(model):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    for name, dtype in shapes:
        elements.clear()
        hub.read = counted
        model = Transformer.from_pretrained(folder / name, dtype, shard=into_units)
        hub.read = read
        whole = Transformer.from_pretrained(folder / name, dtype)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        theirs = whole.state_dict()
        for key, tensor in model.state_dict().items():
            ours = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(ours, theirs.pop(key)), key
        assert not theirs
        kept = sum(p.to_local().numel() for p in model.parameters())
        kept += sum(buffer.numel() for buffer in model.buffers())
        read_here = sum(elements)
        assert read_here == kept, (read_here, kept)   # nothing that this rank does not keep

        ids = torch.arange(20)[None]
        torch.testing.assert_close(model(ids), whole(ids))
        register_fsdp_forward_method(model, 'logprobs')
        for m in (model, whole):
            m.absent = torch.arange(80, m.cfg.vocab_size)
        torch.testing.assert_close(model.logprobs(ids, ids)[0], whole.logprobs(ids, ids)[0])
        places.append(kept)
    torch.save(places, folder / f'kept{rank}')
    dist.destroy_process_group()


def test_each_rank_reads_only_the_rows_that_it_keeps(tmp_path):
    moe = dict(MOE, n_routed_experts=5)      # 5 experts and 97 rows do not halve
    made(moe).save_pretrained(tmp_path / 'moe', max_shard_bytes=60_000)
    made(DENSE).save_pretrained(tmp_path / 'dense')
    jobs = [('moe', torch.float32), ('dense', torch.bfloat16)]
    torch.multiprocessing.start_processes(read_by_two_ranks, (tmp_path, jobs), nprocs=2,
                                          start_method='spawn')
    for i, shape in enumerate((moe, DENSE)):
        kept = [torch.load(tmp_path / f'kept{rank}')[i] for rank in (0, 1)]
        model = made(shape)
        sharded = sum(p.numel() for p in model.parameters())
        on_both = sum(b.numel() for b in model.buffers())
        assert sum(kept) == sharded + 2 * on_both
        assert max(kept) < 0.6 * sum(kept)


def test_rows_of_fp8_blocks_are_the_rows_of_the_whole(tmp_path):
    w = (torch.randn(300, 200) * 20).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    save_file({'w': w, 'w_scale_inv': scale}, tmp_path / 'model.safetensors')
    files = hub.checkpoint_files(tmp_path)
    expected = w.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    for rows in (slice(None), slice(0, 150), slice(150, 300), slice(128, 256), slice(299, 300)):
        assert torch.equal(hub.read(files, 'w', rows), expected[rows])


# ---- memory ----

PEAK = '''
import sys, threading, time, torch
from model import Transformer
def rss(what):
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(what))
torch.set_num_threads(1)
torch.nn.functional.silu(torch.randn(64, 64) @ torch.randn(64, 64))     # the libraries' own memory
Transformer.from_pretrained(sys.argv[2], getattr(torch, sys.argv[3]))(torch.arange(8)[None])
before = rss('VmRSS')
with open('/proc/self/clear_refs', 'w') as f:
    f.write('5')                                                        # forget the peak so far
model = Transformer.from_pretrained(sys.argv[1], getattr(torch, sys.argv[3]))
loaded = rss('VmHWM') - before
with torch.no_grad():
    model(torch.arange(16)[None])
size = sum(t.nbytes for t in model.state_dict().values())
print(size, loaded, rss('VmHWM') - before)
'''


LARGE = dict(MOE, vocab_size=32000, hidden_size=1024, num_hidden_layers=12, intermediate_size=4096,
             moe_intermediate_size=704, n_routed_experts=32, kv_lora_rank=128)
MIDDLE = dict(MOE, vocab_size=4096, hidden_size=512, num_hidden_layers=6, intermediate_size=2048,
              moe_intermediate_size=512, n_routed_experts=16, kv_lora_rank=64)


@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK),
                    reason='needs Linux to say what the peak was')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [MIDDLE, pytest.param(LARGE, marks=pytest.mark.slow)],
                         ids=['middle', 'large'])
def test_loading_and_a_forward_pass_peak_near_the_size_of_the_weights(tmp_path, shape, dtype):
    # one file: mapped whole it would count twice
    made(shape).save_pretrained(tmp_path / 'big', dtype=torch.bfloat16)
    made(MOE).save_pretrained(tmp_path / 'small')
    command = [sys.executable, '-c', PEAK, tmp_path / 'big', tmp_path / 'small', dtype]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size, loaded, peak = map(int, run.stdout.split())
    print(f'{dtype}: {size / 2**20:.0f} MiB, loading {loaded / size:.3f}, '
          f'with a forward pass {peak / size:.3f}')
    assert 0.9 * size < loaded <= peak < 1.2 * size


# ---- saving ----

def test_shards_are_of_the_size_asked_for_and_keep_every_tensor(tmp_path):
    model = made(MOE)
    model.save_pretrained(tmp_path, dtype=torch.bfloat16, max_shard_bytes=20_000)
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    sizes, names = [], {}
    for path in sorted(tmp_path.glob('model-*.safetensors')):
        tensors = load_file(path)
        sizes.append(sum(t.nbytes for t in tensors.values()))
        assert sizes[-1] <= 20_000 or len(tensors) == 1
        names.update(dict.fromkeys(tensors, path.name))
        with safe_open(path, 'pt') as f:
            assert f.metadata() == {'format': 'pt'}
    assert names == index['weight_map'] and len(sizes) > 3
    assert sum(sizes) == index['metadata']['total_size']
    of_the_mtp_layer = {'eh_proj.weight', 'mlp.experts.5.down_proj.weight'}
    assert {f'model.layers.3.{name}' for name in of_the_mtp_layer} <= set(names)
    again = Transformer.from_pretrained(tmp_path, torch.bfloat16).state_dict()
    before = model.state_dict()
    assert again.keys() == before.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name


class Killed(BaseException):
    pass


def killed_after(steps, function, *args):
    """Whether function(*args) was stopped after so many renames and deletions of files."""
    left = steps

    def counted(call):
        def run(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return call(*args, **kwargs)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'replace', counted(os.replace))
        patch.setattr(Path, 'unlink', counted(Path.unlink))
        try:
            function(*args)
        except Killed:
            return True
    return False


@pytest.mark.parametrize('before, after', [(20_000, 2**30), (2**30, 20_000), (20_000, 20_000)])
def test_a_save_that_is_killed_while_it_replaces_leaves_no_mixture(tmp_path, before, after):
    """Stopped after any number of its renames and deletions, the folder holds the old model, the
    new one, or none that loads."""
    old, new = made(MOE), made(MOE)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(1)
    for steps in range(30):
        folder = tmp_path / str(steps)
        old.save_pretrained(folder, max_shard_bytes=before)
        if not killed_after(steps, new.save_pretrained, folder, None, after):
            break
        try:
            found = Transformer.from_pretrained(folder)
        except FileNotFoundError as error:
            assert 'config.json does not exist' in str(error)
        else:
            assert same(found, old) or same(found, new)
    assert steps > 2 and same(Transformer.from_pretrained(folder), new)
