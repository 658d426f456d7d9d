"""train.py: optimizers and the schedule by their formulas."""
import math

import pytest
import torch

from judge import RewardModel
from model import ModelConfig
from train import Muon, Training, make_optimizers, orthogonalise, schedule


def test_orthogonalise_brings_singular_values_near_one_and_keeps_the_vectors():
    torch.manual_seed(0)
    for shape in [(24, 40), (40, 24), (3, 16, 30)]:
        g = torch.randn(shape)
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        got = orthogonalise(g)
        s = torch.linalg.svdvals(got)
        assert s.min() > 0.5 and s.max() < 1.3
        inside = u.mT @ got @ v.mT              # diagonal in the singular basis of g
        off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() < 1e-3


def test_muon_steps_by_its_formula():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(8, 4))
    before = w.detach().clone()
    g1 = torch.randn(8, 4)
    g2 = torch.randn(8, 4)
    optimizer = Muon([w], lr=0.1, momentum=0.9, weight_decay=0.5)
    for g in (g1, g2):
        w.grad = g
        optimizer.step()
    m1 = g1
    x = before * (1 - 0.05) - 0.1 * math.sqrt(2) * orthogonalise(g1 + 0.9 * m1)
    m2 = 0.9 * m1 + g2
    x = x * (1 - 0.05) - 0.1 * math.sqrt(2) * orthogonalise(g2 + 0.9 * m2)
    assert torch.allclose(w, x, atol=1e-5)


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    shape = dict(model_type='deepseek_v3', num_hidden_layers=2, hidden_size=32,
                 num_attention_heads=4, intermediate_size=48, moe_intermediate_size=16,
                 n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
                 max_position_embeddings=256, num_nextn_predict_layers=1)
    model = RewardModel(ModelConfig(vocab_size=40, **shape))
    names = {id(p): name for name, p in model.named_parameters()}
    cfg = Training(muon_learning_rate=0.02, learning_rate=3e-3)
    adam, muon = make_optimizers(model, cfg)
    under_adam = [names[id(p)] for group in adam.param_groups for p in group['params']]
    under_muon = [names[id(p)] for group in muon.param_groups for p in group['params']]
    for name in ('score.weight', 'score.bias', 'model.embed_tokens.weight'):
        assert name in under_adam
    assert any('gate.weight' in name for name in under_adam)
    assert all('proj' in name or 'expert' in name for name in under_muon), under_muon
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(under_adam) + len(under_muon) == trained


def test_schedules():
    cfg = Training(steps=110, warmup_steps=10, min_lr=0.1)
    for kind in ('constant', 'linear', 'cosine'):
        cfg.schedule = kind
        assert schedule(4, cfg) == pytest.approx(0.5) and schedule(10, cfg) == 1.0
        for step in (10, 35, 60, 109):
            done = (step - 10) / 99
            want = {'constant': 1.0, 'linear': 1 - 0.9 * done,
                    'cosine': 0.55 + 0.45 * math.cos(math.pi * done)}
            assert schedule(step, cfg) == pytest.approx(want[kind])


@pytest.mark.parametrize('kind', ['linear', 'cosine'])
def test_the_last_step_is_at_min_lr(kind):
    def rates(steps, warmup):
        cfg = Training(steps=steps, warmup_steps=warmup, schedule=kind, min_lr=0.1)
        return [schedule(step, cfg) for step in range(steps)]
    for steps in range(2, 60):
        for warmup in range(steps):
            got = rates(steps, warmup)
            assert got[-1] == pytest.approx(0.1) and max(got) == 1.0, (steps, warmup)
            top = got.index(1.0)
            assert top == max(0, warmup - 1) and got[top:] == sorted(got[top:], reverse=True)
            assert got[:top + 1] == [(step + 1) / max(1, warmup) for step in range(top + 1)]
    assert rates(1, 0) == [1.0] and rates(1, 1) == [1.0]  # there is nothing to come down to
    # it ends with its warm-up, or in it
    assert rates(3, 3) == [1 / 3, 2 / 3, 1.0] and rates(2, 4) == [0.25, 0.5]
