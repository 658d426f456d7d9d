"""plan.py against what runs allocate, and against the sizes that released models are known by."""
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import grpo
import plan
import sample
import sft
from decode import Sampler
from model import ModelConfig, Transformer

DENSE = dict(model_type='qwen3', vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             head_dim=32, intermediate_size=512, max_position_embeddings=1024)
MOE = dict(model_type='deepseek_v3', vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, q_lora_rank=None,
           kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=512, first_k_dense_replace=1,
           n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=128, max_position_embeddings=1024)
RELEASED = {  # config.json of the hub, less what has no part in sizes -> parameters
    'Qwen2.5-1.5B': (dict(model_type='qwen2', vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
                          num_key_value_heads=2, intermediate_size=8960, tie_word_embeddings=True, max_position_embeddings=131072), 1_543_714_304),
    'Qwen2.5-7B': (dict(model_type='qwen2', vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
                        num_key_value_heads=4, intermediate_size=18944, tie_word_embeddings=False, max_position_embeddings=131072), 7_615_616_512),
    'Moonlight-16B-A3B': (dict(model_type='deepseek_v3', vocab_size=163840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16,
                               kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                               intermediate_size=11264, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
                               num_experts_per_tok=6, first_k_dense_replace=1, max_position_embeddings=8192), 15_960_110_208),
}


def measured(run, *models_and_optimizers):
    """Peak bytes of all tensors alive while run() runs, those of the models and optimizers included."""
    from torch.distributed._tools.mem_tracker import MemTracker
    tracker = MemTracker()
    tracker.track_external(*models_and_optimizers)
    with tracker:
        run()
    peak = tracker.get_tracker_snapshot('peak')
    return sum(kinds['Total'] for kinds in peak.values())


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [DENSE, MOE], ids=['dense', 'moe'])
def test_the_peak_of_training_is_as_planned(shape, dtype, checkpointing):
    model = Transformer(ModelConfig(**shape))
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, 1024, (4, 256))
    batch = dict(input_ids=ids, labels=F.pad(ids[:, 1:], (0, 1), value=-100), doc_ids=torch.zeros_like(ids))

    def step():
        for _ in range(2):  # two micro-batches: the second one's activations beside the gradients of the first
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
                loss = -model.logprobs(**batch)[0].mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step()
    peak = measured(step, model, optimizer)
    planned = plan.plan(model.cfg, rows=4, length=256, dtype=dtype, checkpointing=checkpointing, gpu=False)
    print(f'{planned["peak"] / 2**20:.1f} MiB planned, {peak / 2**20:.1f} measured', {k: round(v / 2**20, 2) for k, v in planned.items()})
    assert 0.9 < planned['peak'] / peak < 1.2


@pytest.mark.parametrize('shape', [DENSE, MOE], ids=['dense', 'moe'])
def test_the_peak_of_sampling_is_as_planned(shape):
    model = Transformer(ModelConfig(**shape)).requires_grad_(False)
    prompts = [torch.randint(0, 1024, (200,)).tolist() for _ in range(16)]
    peak = measured(lambda: Sampler(model, (), 128).generate(prompts, 8, 8), model)
    planned = plan.plan(model.cfg, train=False, slots=128, prompts=16, prompt=200, new_tokens=8, gpu=False)
    print(f'{planned["peak"] / 2**20:.1f} MiB planned, {peak / 2**20:.1f} measured', {k: round(v / 2**20, 2) for k, v in planned.items()})
    assert 0.7 < planned['peak'] / peak < 1.3
