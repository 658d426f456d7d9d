"""plan.py against what runs allocate, and against the sizes that released models are known by."""
import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import grpo
import plan
import evaluate
import sft
from configurator import parse
from sample import Sampler
from model import ModelConfig, Transformer

CONFIGS = Path(__file__).resolve().parents[1] / 'config'
DENSE = dict(
    model_type='qwen3', vocab_size=1024, hidden_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=512,
    max_position_embeddings=1024)
MOE = dict(
    model_type='deepseek_v3', vocab_size=1024, hidden_size=128, num_hidden_layers=4,
    num_attention_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=32, intermediate_size=512, first_k_dense_replace=1,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=128,
    max_position_embeddings=1024)
RELEASED = {  # config.json of the hub, less what has no part in sizes
    'Qwen2.5-1.5B': dict(
        model_type='qwen2', vocab_size=151936, hidden_size=1536, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
        tie_word_embeddings=True, max_position_embeddings=131072),
    'Qwen2.5-7B': dict(
        model_type='qwen2', vocab_size=152064, hidden_size=3584, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        tie_word_embeddings=False, max_position_embeddings=131072),
    'Moonlight-16B-A3B': dict(
        model_type='deepseek_v3', vocab_size=163840, hidden_size=2048, num_hidden_layers=27,
        num_attention_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, intermediate_size=11264, moe_intermediate_size=1408,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1,
        max_position_embeddings=8192),
}
PARAMETERS = {
    'Qwen2.5-1.5B': 1_543_714_304,
    'Qwen2.5-7B': 7_615_616_512,
    'Moonlight-16B-A3B': 15_960_000_000,   # the model card's 16B, to four digits
}


class Peak(TorchDispatchMode):
    """`with Peak(tensors) as p:` p.peak is the most bytes of storage alive at once, that of the
    tensors given included."""

    def __init__(self, tensors):
        super().__init__()
        self.sizes = {}   # of the storages that are alive, by address
        self.now = 0
        self.peak = 0
        for t in tensors:
            self.note(t)

    def note(self, t):
        if t.is_mkldnn:      # oneDNN's own tensors have no storage
            storage, key, size = t, id(t), t.numel() * t.element_size()
        else:
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, key)

    def release(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, out)
        return out


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [DENSE, MOE], ids=['dense', 'moe'])
def test_the_peak_of_training_is_as_planned(shape, dtype, checkpointing):
    model = Transformer(ModelConfig(**shape))
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, 1024, (4, 256))
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    batch = dict(input_ids=ids, labels=labels, doc_ids=torch.zeros_like(ids))

    def step():
        # two micro-batches: the second one's activations beside the gradients of the first
        for _ in range(2):
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
                loss = -model.logprobs(**batch)[0].mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step()
    tensors = list(model.parameters())
    for state in optimizer.state.values():
        tensors += state.values()
    with Peak(tensors) as measured:
        step()
    planned = plan.memory(model.cfg, plan.Workload(rows=4, length=256, dtype=dtype,
                                                   checkpointing=checkpointing, gpu=False))
    show(planned, measured.peak)
    assert 0.9 < planned['peak'] / measured.peak < 1.2


def show(planned, peak):
    print(f'{planned["peak"] / 2**20:.1f} MiB planned, {peak / 2**20:.1f} measured',
          {name: round(size / 2**20, 2) for name, size in planned.items()})


@pytest.mark.parametrize('shape', [DENSE, MOE], ids=['dense', 'moe'])
def test_the_peak_of_sampling_is_as_planned(shape):
    model = Transformer(ModelConfig(**shape)).requires_grad_(False)
    prompts = [torch.randint(0, 1024, (200,)).tolist() for _ in range(16)]
    with Peak(model.parameters()) as measured:
        Sampler(model, (), 128).generate(prompts, 8, 8)
    planned = plan.memory(model.cfg, plan.Workload(train=False, slots=128, prompts=16, prompt=200,
                                                   new_tokens=8, gpu=False))
    show(planned, measured.peak)
    assert 0.7 < planned['peak'] / measured.peak < 1.3


@pytest.mark.parametrize('name', RELEASED)
def test_parameters_are_those_of_the_released_model(name):
    cfg, count = ModelConfig.from_hub(RELEASED[name]), PARAMETERS[name]
    sampling = plan.memory(cfg, plan.Workload(train=False, dtype='bfloat16'))
    assert sampling['parameters'] == pytest.approx(2 * count, rel=1e-4)
    training = plan.memory(cfg, plan.Workload(rows=1, length=512, ranks=8))
    assert training['parameters'] == pytest.approx(4 * count / 8, rel=1e-4)
    assert training['gradients'] == pytest.approx(4 * count / 8, rel=1e-4)
    assert training['optimizer'] == pytest.approx(count, rel=1e-4)


PRESETS = {
    'grpo_qwen2.5_1.5b': (grpo, 'Qwen2.5-1.5B'),
    'grpo_qwen2.5_7b': (grpo, 'Qwen2.5-7B'),
    'grpo_moonlight': (grpo, 'Moonlight-16B-A3B'),
    'distill_qwen2.5_math_7b': (sft, 'Qwen2.5-7B'),
}


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_are_planned_refused_and_advised(preset, tmp_path, capsys):
    script, name = PRESETS[preset]
    config = json.dumps(RELEASED[name])
    (tmp_path / 'config.json').write_text(config)     # no weights: none are read
    args = [str(CONFIGS / f'{preset}.py'), f'--init_from={tmp_path}', f'--out_dir={tmp_path}/out']
    script.main(parse(script.Config, [*args, '--plan=8x80']))
    shown = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        part, gib = line.split()
        shown[part] = float(gib)
    assert shown['parameters'] == pytest.approx(4 * PARAMETERS[name] / 8 / 2**30, rel=1e-3)
    assert 1 < shown['peak'] < 80e9 / 2**30
    message = r'does not fit: the peak of [\d.]+ GiB is above 22.4 GiB; '
    with pytest.raises(SystemExit, match=message) as refused:
        script.main(parse(script.Config, [*args, '--plan=1x24']))
    run, cfg = parse(script.Config, args), ModelConfig.from_hub(RELEASED[name])
    said = str(refused.value).split('; ')[1]
    if 'nothing' not in said:  # what it advises does fit
        ranks = 1
        if ' on ' in f' {said}':
            ranks = int(f' {said}'.split(' on ')[1].split()[0])
        flags = [word for word in said.split() if word.startswith('--')]
        changed = plan.needs(parse(script.Config, args + flags), cfg, ranks, True)
        assert changed['peak'] <= 24e9 < plan.needs(run, cfg, 1, True)['peak']
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('change, knob', [
    (dict(micro_tokens=2**19), '--micro_tokens='),
    (dict(slots=4096, prompts=4096), '--slots='),
    (dict(activation_checkpointing=False, micro_tokens=2**15), '--'),
    (dict(dtype='float32', slots=700), '--'),
])
def test_the_one_knob_that_would_make_it_fit_is_named(change, knob):
    cfg = ModelConfig.from_hub(RELEASED['Qwen2.5-1.5B'])
    preset = parse(grpo.Config, [str(CONFIGS / 'grpo_qwen2.5_1.5b.py')])
    run = dataclasses.replace(preset, **change)
    if plan.needs(run, cfg, 1, True)['peak'] <= 40e9:
        pytest.fail('the case fits as it is')
    said = plan.advice(run, cfg, 1, True, 40e9)
    key, value = said.removesuffix(' fits').removeprefix('--').split('=')
    assert said.startswith(knob) and ' ' not in value
    changed = dataclasses.replace(run, **{key: type(getattr(run, key))(value)})
    assert plan.needs(changed, cfg, 1, True)['peak'] <= 40e9


def test_sampling_is_planned_and_bad_machines_are_refused(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(RELEASED['Qwen2.5-7B']))
    evaluate.main(evaluate.Config(checkpoint=str(tmp_path), dtype='bfloat16', slots=8, plan='1x24'))
    with pytest.raises(SystemExit, match='--dtype=bfloat16 fits'):
        evaluate.main(evaluate.Config(checkpoint=str(tmp_path), slots=8, plan='1x24'))
    with pytest.raises(ValueError, match="plan='eight': write ranks x GB"):
        evaluate.main(evaluate.Config(checkpoint=str(tmp_path), plan='eight'))


def test_host_memory_is_that_of_the_data_and_of_what_rank_0_gathers(tmp_path):
    (tmp_path / 'a.jsonl').write_text('x' * 4_000_000)   # a million tokens
    data, model = [str(tmp_path / 'a.jsonl')], ModelConfig()
    with torch.device('meta'):
        parameters = Transformer(model).num_params()
    tokens = plan.host_needs(sft.Config(data=data, tokenizer='x'), model, 8, True)
    assert tokens['data'] == 1_000_000 and tokens['saving'] == 12 * parameters
    problems = plan.host_needs(grpo.Config(data=data, kl_coef=0.1), model, 8, True)
    assert problems['data'] == 40_000_000 and problems['saving'] == 16 * parameters
    sampling = plan.host_needs(evaluate.Config(data=data), model, 1, False)
    assert sampling['saving'] == 0 and sampling['device'] > 0
    assert sampling['peak'] == sum(size for name, size in sampling.items() if name != 'peak')
