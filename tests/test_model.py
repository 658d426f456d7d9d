"""model.py against transformers: stored logits of the shared fixtures where they are, and random
models built here."""
import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import plan
from kernels import cpu
from kv_cache import Cache, KVBuffer
from model import (ModelConfig, Transformer, rope_frequencies, sequence_balance_loss,
                   update_router_bias)
from sample import Sampler

FIXTURES = Path(__file__).resolve().parents[2] / 'shared' / 'fixtures'
NAMES = ['deepseek-v3', 'deepseek-v3-fp8', 'moonlight', 'deepseek-v2-lite', 'deepseek-v2',
         'qwen2', 'qwen3', 'llama3']

SMALL = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=64, initializer_range=0.2)
MLA = dict(
    SMALL, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, first_k_dense_replace=1)
YARN = dict(
    rope_type='yarn', factor=4.0, original_max_position_embeddings=16, beta_fast=32, beta_slow=1,
    mscale=0.707, mscale_all_dim=0.707)
LLAMA3 = dict(
    rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16)
FAMILIES = {
    'v3': dict(
        MLA, model_type='deepseek_v3', q_lora_rank=24, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, rope_scaling=YARN),
    'moonlight': dict(
        MLA, model_type='deepseek_v3', n_shared_experts=2, routed_scaling_factor=2.4,
        rms_norm_eps=1e-5),
    'v2': dict(
        MLA, model_type='deepseek_v2', q_lora_rank=24, topk_method='group_limited_greedy',
        scoring_func='softmax', norm_topk_prob=False, n_group=4, topk_group=2,
        routed_scaling_factor=4.0, rope_scaling=YARN),
    'v2-lite': dict(
        MLA, model_type='deepseek_v2', topk_method='greedy', scoring_func='softmax',
        norm_topk_prob=False),
    'qwen2': dict(SMALL, model_type='qwen2', head_dim=8, tie_word_embeddings=True),
    'qwen3': dict(SMALL, model_type='qwen3', head_dim=16),
    'llama3': dict(SMALL, model_type='llama', head_dim=8, rope_scaling=LLAMA3),
}


def small(family, **changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**FAMILIES[family], **changes}))
    with torch.no_grad():  # norms, biases and routing biases that are not trivial
        for name, t in model.state_dict().items():
            if 'norm' in name or name.endswith('bias'):
                t += 0.1 * torch.randn_like(t)
    return model


@pytest.mark.parametrize('name', NAMES)
def test_fixture_parity(name):
    folder = FIXTURES / f'tiny-{name}'
    if not folder.exists():
        pytest.skip('needs the shared fixtures')
    model = Transformer.from_pretrained(folder)
    expected = load_file(folder / 'expected.safetensors')
    ids = expected['input_ids']
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        assert (model(ids) - expected['logits']).abs().max() < 2e-4
        rope, mask = model.context(ids)
        routes = []
        h = model.hidden(ids, rope, mask, routes)
        assert (-model.logprobs(ids, labels)[0].mean() - expected['loss']).abs() < 1e-5
        moe = [i for i in range(model.cfg.num_hidden_layers) if model.cfg.is_moe(i)]
        for i, (_, chosen) in zip(moe, routes, strict=True):
            assert torch.equal(chosen.sort(-1).values, expected[f'moe.{i}.indices'])
        if 'mtp.logits' in expected:
            h2 = model.mtp_hidden(h[:, :-1], ids[:, 1:], *model.context(ids[:, :-1]))
            assert (model.logits(h2) - expected['mtp.logits']).abs().max() < 2e-4


@pytest.mark.parametrize('style', ['config.json', 'config_v5.json'])
@pytest.mark.parametrize('name', NAMES)
def test_both_config_styles_mean_the_same(name, style):
    folder = FIXTURES / f'tiny-{name}'
    if not folder.exists():
        pytest.skip('needs the shared fixtures')
    a, b = (ModelConfig.from_hub(json.loads((folder / name).read_text()))
            for name in ('config.json', style))
    keys = ['rope_theta', 'rope_scaling', 'n_group', 'topk_method', 'scoring_func',
            'num_key_value_heads']
    if not a.mla:       # in transformers 5's DeepSeek configs head_dim is the rope width
        keys.append('head_dim')
    for key in keys:
        assert getattr(a, key) == getattr(b, key)


@pytest.mark.parametrize('family', FAMILIES)
def test_transformers_loads_what_we_save(family, tmp_path):
    transformers = pytest.importorskip('transformers')
    model = small(family, num_nextn_predict_layers=0)
    model.save_pretrained(tmp_path, max_shard_bytes=40_000)
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (model(ids) - expected).abs().max() < 2e-4 * max(1.0, expected.std().item())
        again = Transformer.from_pretrained(tmp_path)
    written, read = model.state_dict(), again.state_dict()
    assert written.keys() == read.keys()
    for name in written:
        assert torch.equal(written[name], read[name]), name


@pytest.mark.parametrize('family', FAMILIES)
def test_we_load_what_transformers_makes_and_saves(family, tmp_path):
    transformers = pytest.importorskip('transformers')
    shape = dict(FAMILIES[family])
    rope = {'rope_theta': 10000.0, **(shape.pop('rope_scaling', None) or {'rope_type': 'default'})}
    heads = 2
    if 'kv_lora_rank' in shape:
        shape = {'n_group': 1, 'topk_group': 1, **shape}     # their defaults are those of V3
        heads = 4
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        shape.pop('model_type'), **shape, rope_parameters=rope, num_key_value_heads=heads)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, t in theirs.state_dict().items():
            if 'norm' in name or 'bias' in name:
                t += 0.1 * torch.randn_like(t)
    theirs.save_pretrained(tmp_path, max_shard_size='40KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 1
    ids = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = Transformer.from_pretrained(tmp_path)
        assert (ours(ids) - expected).abs().max() < 2e-4 * max(1.0, expected.std().item())
    assert ours.num_params() == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize('change', [{'attention_factor': 1.3}, {'truncate': False},
                                    {'beta_fast': 4, 'beta_slow': 2},
                                    {'mscale': 1.5, 'mscale_all_dim': 0.5}, {'attn_factor': 0.8}])
def test_every_key_of_yarn_counts_as_in_transformers(change, tmp_path):
    """And attn_factor, which only vLLM and SGLang read: it multiplies 0.1 ln(factor) + 1."""
    transformers = pytest.importorskip('transformers')
    plain = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=16)
    model, without = (small('qwen3', rope_scaling=scaling,
                            rope_theta=100.0) for scaling in ({**plain, **change}, plain))
    model.save_pretrained(tmp_path)
    if 'attn_factor' in change:
        config = json.loads((tmp_path / 'config.json').read_text())['rope_scaling']
        product = 0.8 * (0.1 * math.log(4) + 1)
        assert config['attn_factor'] == 0.8 and config['attention_factor'] == pytest.approx(product)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        ours, expected = model(ids), theirs(ids).logits
        assert (ours - expected).abs().max() < 2e-4 * max(1.0, expected.std().item())
        assert (ours - without(ids)).abs().max() > 1e-3     # and the key does something


def others(value):
    """Values beside one of a config.json that might mean something else."""
    if isinstance(value, dict):
        changed = [{**value, key: v} for key in value for v in others(value[key])]
        return changed + [{k: value[k] for k in value if k != key} for key in value]
    if value is None or isinstance(value, bool):
        return [not value] if value is not None else [2]
    if isinstance(value, (int, float)):
        return [value + 1, value // 2 if isinstance(value, int) else 1.5 * value + 0.1]
    if isinstance(value, list):
        return [['sliding_attention'] * len(value)] if 'full_attention' in value else []
    return {'silu': ['gelu'], 'greedy': ['group_limited_greedy'],
            'group_limited_greedy': ['greedy']}.get(value, [])


@pytest.mark.slow
@pytest.mark.parametrize('family', ['v3', 'v2', 'qwen2', 'qwen3', 'llama3'])
def test_a_key_that_changes_what_transformers_computes_is_used_refused_or_told(family, tmp_path):
    """Every key of the family's configuration there, changed and left out, one at a time."""
    transformers = pytest.importorskip('transformers')
    small(family, num_nextn_predict_layers=0).save_pretrained(tmp_path)
    path, ids, counts = tmp_path / 'config.json', torch.randint(0, 96, (1, 24)), [0, 0]
    base = json.loads(path.read_text())
    every = {**transformers.AutoConfig.from_pretrained(tmp_path).to_dict(), **base}
    left_alone = {'architectures', 'model_type', 'transformers_version', 'dtype', 'torch_dtype',
                  'rope_parameters', 'id2label', 'label2id', 'return_dict', 'vocab_size'}
    for key in sorted(every.keys() - left_alone):
        for value in [*others(every[key]), 'absent']:
            config = {**base, key: value}
            if value == 'absent':
                del config[key]
            path.write_text(json.dumps(config))
            try:
                theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path,
                                                                           dtype=torch.float32)
                with torch.no_grad():
                    expected = theirs.eval()(ids).logits
            except Exception:   # it cannot be read there: there is nothing to compare with
                continue
            with warnings.catch_warnings(record=True) as told, torch.no_grad():
                warnings.simplefilter('always')
                try:
                    ours = Transformer.from_pretrained(tmp_path)(ids)
                except ValueError:
                    counts[0] += 1
                    continue
            same = (ours - expected).abs().max() < 5e-3 * max(1.0, expected.std().item())
            assert same or told, (key, value)
            counts[1] += 1
    assert min(counts) > 5


def test_attn_factor_of_the_released_model_makes_its_scores_as_sharp_as_without_yarn():
    """R1-0528-Qwen3-8B: 0.8782 (0.1 ln 4 + 1) = 1; without it scores are (0.1 ln 4 + 1)^2 = 1.3
    times as large."""
    released = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=32768,
                    attn_factor=0.8782488562869419)
    cfg = ModelConfig(**{**FAMILIES['qwen3'], 'rope_scaling': released})
    assert rope_frequencies(cfg)[1] == pytest.approx(1.0, abs=1e-7)


def test_a_head_in_the_files_that_is_not_the_embedding_is_not_dropped(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = small('qwen2', tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    path, ids = tmp_path / 'config.json', torch.randint(0, 96, (2, 12))
    path.write_text(json.dumps({**json.loads(path.read_text()), 'tie_word_embeddings': True}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with pytest.warns(UserWarning,
                      match='ties the head to the embedding, but lm_head.weight in the files is'):
        read = Transformer.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(ids),
                           model(ids)) and (read(ids) - theirs(ids).logits).abs().max() < 2e-4
    read.save_pretrained(tmp_path / 'again')
    written = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert written['tie_word_embeddings'] is False
    tensors = load_file(tmp_path / 'model.safetensors')
    save_file({**tensors, 'lm_head.weight': tensors['model.embed_tokens.weight'].clone()},
              tmp_path / 'model.safetensors')
    assert Transformer.from_pretrained(tmp_path).cfg.tie_word_embeddings     # an equal copy is one


@pytest.mark.parametrize('family', FAMILIES)
def test_decode_with_cache_equals_forward(family):
    model = small(family)
    ids = torch.randint(0, 96, (3, 30))
    with torch.no_grad():
        expected = model(ids)
        logits, entries = model.read_prompts(ids[:, :10], torch.tensor([9, 9, 4]))
        assert torch.allclose(logits[0], expected[0, 9], atol=2e-4)
        assert torch.allclose(logits[2], expected[2, 4], atol=2e-4)
        layers = model.cfg.num_hidden_layers
        own = KVBuffer(model.cfg, layers, 3, 30, torch.float32, ids.device)
        cache = Cache(model.cfg, own)
        for layer, entry in enumerate(entries):
            own.write(layer, torch.arange(3), entry)
        for t in range(10, 29, 2):  # two query tokens at a time
            at = torch.tensor([[t, t + 1]] * 3)
            cache.begin(at, t + 2, torch.float32)
            got = model.logits(model.decode(ids[:, t:t + 2], at, cache))
            assert torch.allclose(got, expected[:, t:t + 2], atol=5e-4)
    width = 16 + 8 if model.cfg.mla else 2 * 2 * model.cfg.head_dim
    assert sum(part.shape[-1] for part in entries[0]) == width


@pytest.mark.parametrize('family', ['v3', 'qwen3'])
def test_without_the_paths_of_a_cpu_the_model_trains_samples_and_is_planned(family, monkeypatch):
    model = small(family)
    ids = torch.randint(0, 96, (2, 40))
    doc_ids = (torch.arange(40) > 15).long().expand(2, 40)
    results = {}
    for on in (True, False):
        monkeypatch.setattr(cpu, 'ENABLED', on)
        model.zero_grad()
        logits = model(ids, doc_ids=doc_ids)
        logits.log_softmax(-1)[..., 0].mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        samples = Sampler(model, [0], slots=20).generate([[3, 4, 5]] * 4, 5, 6, seed=1)
        tokens = [completion.tokens for group in samples for completion in group]
        planned = plan.memory(model.cfg, plan.Workload(gpu=False))
        results[on] = logits.detach(), gradients, tokens, planned
    logits, gradients, tokens, planned = results[False]
    assert (logits - results[True][0]).abs().max() < 1e-5
    for ours, theirs in zip(gradients, results[True][1], strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * (1 + theirs.abs().max())
    assert tokens == results[True][2] and planned == results[True][3]


@pytest.mark.parametrize('family', ['v3', 'qwen2'])
def test_documents_of_a_packed_row_do_not_see_each_other(family):
    model = small(family, num_nextn_predict_layers=int(family == 'v3'))
    a, b = torch.randint(0, 96, (1, 9)), torch.randint(0, 96, (1, 13))
    ids = torch.cat([a, b], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
    doc_ids = torch.tensor([[0] * 9 + [1] * 13])
    labels = torch.cat([F.pad(x[:, 1:], (0, 1), value=-100) for x in (a, b)], dim=1)
    mtp = family == 'v3'
    with torch.no_grad():
        packed = model.logprobs(ids, labels, positions, doc_ids, mtp=mtp)
        alone = [model.logprobs(x, F.pad(x[:, 1:], (0, 1), value=-100), mtp=mtp) for x in (a, b)]
    assert torch.allclose(packed[0], torch.cat([x[0] for x in alone]), atol=1e-5)
    if mtp:
        assert torch.allclose(packed[2], torch.cat([x[2] for x in alone]), atol=1e-5)


def test_logprobs_temperature_and_entropy_are_those_of_the_softmax():
    model = small('qwen3')
    ids = torch.randint(0, 96, (2, 12))
    labels = torch.full_like(ids, -100)
    labels[:, 4:9] = ids[:, 5:10]
    with torch.no_grad():
        logp, entropy, _ = model.logprobs(ids, labels, temperature=0.7, entropy=True)
        p = torch.distributions.Categorical(logits=model(ids)[:, 4:9] / 0.7)
    assert torch.allclose(logp, p.log_prob(ids[:, 5:10]).flatten(), atol=1e-5)
    assert torch.allclose(entropy, p.entropy().flatten(), atol=1e-5)


def test_experts_equal_a_loop_over_tokens():
    model = small('v3')
    moe = model.model.layers[1].mlp
    x = torch.randn(1, 17, 32, requires_grad=True)
    y, (scores, chosen) = moe(x)
    weights, _, _ = moe.gate(x[0])
    expected = []
    for t in range(17):
        total = moe.shared_experts(x[0, t])
        for k, e in enumerate(chosen[t].tolist()):
            gate, up = (moe.experts.gate_up_proj[e] @ x[0, t]).chunk(2)
            total = total + weights[t, k] * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
        expected.append(total)
    expected = torch.stack(expected)
    assert torch.allclose(y[0], expected, atol=1e-4)
    grad = torch.randn_like(expected)
    got, = torch.autograd.grad(y[0], x, grad, retain_graph=True)
    want, = torch.autograd.grad(expected, x, grad)
    assert torch.allclose(got, want, atol=1e-3)


def test_replayed_routing_reproduces_the_forward_and_another_choice_does_not():
    model = small('v3')
    ids = torch.randint(0, 96, (2, 10))
    rope, mask = model.context(ids)
    routes = []
    with torch.no_grad():
        h = model.hidden(ids, rope, mask, routes)
        same = model.hidden(ids, rope, mask, replay=[chosen for _, chosen in routes])
        other = model.hidden(ids, rope, mask, replay=[(chosen + 1) % 8 for _, chosen in routes])
    assert torch.equal(h, same) and not torch.allclose(h, other, atol=1e-2)


def test_router_bias_moves_towards_balance_and_does_not_enter_the_weights():
    model = small('moonlight')
    gate = model.model.layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    counts = torch.tensor([[8, 0, 4, 4, 4, 4, 4, 4], [4] * 8])
    update_router_bias(model, counts, 0.5)
    moved = gate.e_score_correction_bias - before
    assert torch.allclose(moved, torch.tensor([-0.5, 0.5, 0, 0, 0, 0, 0, 0]))
    x = torch.randn(5, 32)
    with torch.no_grad():
        gate.e_score_correction_bias.fill_(0.0)
        weights, chosen, _ = gate(x)
        gate.e_score_correction_bias.fill_(5.0)
        shifted, same, _ = gate(x)
    assert torch.equal(chosen.sort(-1).values, same.sort(-1).values)
    assert torch.allclose(weights.sort(-1).values, shifted.sort(-1).values, atol=1e-5)


def test_sequence_balance_loss_is_one_when_uniform_and_the_formula_otherwise():
    uniform = torch.full((8, 4), 0.25), torch.arange(16).view(8, 2) % 4
    assert sequence_balance_loss(*uniform, torch.ones(2, 4)).item() == pytest.approx(1.0)
    scores, chosen = torch.rand(8, 4), torch.randint(0, 2, (8, 1))
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])       # the rest is padding
    expected = 0.0
    for b, T in ((0, 3), (1, 2)):
        tokens = range(4 * b, 4 * b + T)
        for i in range(4):
            f = 4 / T * sum(int(chosen[t, 0] == i) for t in tokens)
            expected += f * sum((scores[t, i] / scores[t].sum()).item() for t in tokens) / T / 2
    assert sequence_balance_loss(scores, chosen, real).item() == pytest.approx(expected, rel=1e-5)


def test_activation_checkpointing_changes_no_gradient():
    model = small('v3')
    ids = torch.randint(0, 96, (2, 12))
    grads = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model(ids).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_mtp_weights_survive_saving(tmp_path):
    model = small('v3', num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / 'model.safetensors'))
    for name in ('eh_proj', 'enorm', 'shared_head.norm'):
        assert f'model.layers.3.{name}.weight' in names
    hub = json.loads((tmp_path / 'config.json').read_text())
    assert hub['num_nextn_predict_layers'] == 1
    assert hub['topk_method'] == 'noaux_tc' and hub['scoring_func'] == 'sigmoid'
    assert hub['moe_layer_freq'] == 1 and hub['num_key_value_heads'] == 4
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[3].eh_proj.weight, model.model.layers[3].eh_proj.weight)


def test_saving_in_bfloat16_keeps_the_routing_bias_in_float32(tmp_path):
    small('moonlight').save_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / 'model.safetensors')
    assert tensors['model.layers.1.mlp.gate.e_score_correction_bias'].dtype == torch.float32
    assert tensors['model.layers.1.mlp.gate.weight'].dtype == torch.bfloat16
    assert json.loads((tmp_path / 'config.json').read_text())['torch_dtype'] == 'bfloat16'


def test_one_error_names_every_tensor_that_does_not_fit(tmp_path):
    small('qwen2').save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    del tensors['model.norm.weight']
    tensors['model.layers.0.mlp.up_proj.weight'] = torch.zeros(3, 3)
    tensors['model.layers.9.mlp.up_proj.weight'] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    text = str(error.value)
    assert 'missing model.norm.weight' in text
    assert 'unexpected model.layers.9.mlp.up_proj.weight' in text
    assert 'misshapen model.layers.0.mlp.up_proj.weight: [3, 3]' in text and '\n' not in text


def test_damaged_and_missing_files_are_named(tmp_path):
    model = small('qwen2')
    model.save_pretrained(tmp_path / 'cut')
    file = tmp_path / 'cut' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match='model.safetensors: damaged or truncated'):
        Transformer.from_pretrained(tmp_path / 'cut')
    model.save_pretrained(tmp_path / 'shards', max_shard_bytes=40_000)
    (tmp_path / 'shards' / 'model-00002-of-00002.safetensors').unlink(missing_ok=True)
    missing = sorted((tmp_path / 'shards').glob('model-*.safetensors'))[-1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match='does not exist'):
        Transformer.from_pretrained(tmp_path / 'shards')
    with pytest.raises(FileNotFoundError, match='config.json'):
        Transformer.from_pretrained(tmp_path / 'nowhere')


@pytest.mark.parametrize('change, said', [
    ({'model_type': 'gpt2'}, "model_type 'gpt2'"),
    ({'num_hidden_layers': -1}, 'num_hidden_layers must be an integer >= 1'),
    ({'hidden_size': 'wide'}, 'hidden_size must be an integer'),
    ({'rope_scaling': {'type': 'dynamic'}}, "rope_scaling type 'dynamic' is not supported"),
    ({'num_key_value_heads': 3}, 'not a multiple of num_key_value_heads=3'),
    ({'use_sliding_window': True}, 'not supported'),
])
def test_wrong_config_values_are_named(tmp_path, change, said):
    small('qwen2').save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert said in str(error.value) and str(path) in str(error.value)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import hub as module
    first = small('qwen2')
    first.save_pretrained(tmp_path / 'm')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'm').iterdir()}

    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, 'save_file', full)
    with pytest.raises(OSError, match='what was there is untouched'):
        small('qwen2').save_pretrained(tmp_path / 'm')
    assert {p.name: p.read_bytes() for p in (tmp_path / 'm').iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ['m']


def test_loading_reads_into_place(tmp_path):
    """A copy made under another name loads the same; files of a fixture are not modified."""
    model = small('moonlight')
    model.save_pretrained(tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    a = Transformer.from_pretrained(tmp_path / 'a', torch.bfloat16)
    b = Transformer.from_pretrained(tmp_path / 'b')
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x.float(), y.to(x.dtype).float()), name
    assert a.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 3e-6), (torch.bfloat16, 0.05)])
def test_norms_and_rotations_in_fewer_passes_have_autograds_gradients(dtype, tolerance):
    from kernels.rmsnorm import rms_norm, rms_norm_torch
    from kernels.rope import apply_rope, rope_torch
    x, r = (torch.randn(3, 17, 4, 24).to(dtype).requires_grad_() for _ in range(2))
    w = torch.randn(24, requires_grad=True)
    rope = torch.randn(1, 17, 1, 12), torch.randn(1, 17, 1, 12)
    cases = [      # ours, the reference, what has gradients
        (rms_norm(x, w, 1e-5), rms_norm_torch(x, w, 1e-5), (x, w)),
        (sum(rms_norm(x, w, 1e-5, r)), sum(rms_norm_torch(x, w, 1e-5, r)), (x, r, w)),
    ]
    for interleaved in (True, False):
        ours, theirs = apply_rope(x, rope, interleaved), rope_torch(x, *rope, interleaved)
        cases.append((ours, theirs, (x,)))
    for ours, theirs, inputs in cases:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
        g = torch.randn_like(ours)
        grads = torch.autograd.grad(ours, inputs, g)
        wanted = torch.autograd.grad(theirs, inputs, g)
        for p, q in zip(grads, wanted, strict=True):
            torch.testing.assert_close(p, q, atol=20 * tolerance, rtol=tolerance)
