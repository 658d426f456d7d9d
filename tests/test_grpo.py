"""grpo.py and rollout.py: every variant against a slow float64 reference from its paper's formula,
rollouts and whole runs on a tiny model."""
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch

import evaluate
import grpo
import rewards
import rollout
import sample as sample_script
import sft
from configurator import ConfigError, parse
from data import tokenizer as data_tokenizer
from data.countdown import prepare
from data.prompts import encode_prompts, instructed
from data.tokenizer import Tokenizer
from grpo import Config, advantages, kl_terms, losses, policy_loss, token_weights
from model import ModelConfig, Transformer
from rollout import Sample, collate, micro_batches
from sample import Completion, Sampler
from test_tokenizer import FAMILIES as FAMILIES_OF_TEMPLATES
from test_tokenizer import chat_tokenizer
from train import expert_counts

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(model_type='deepseek_v3', num_hidden_layers=2, hidden_size=32, intermediate_size=48,
            moe_intermediate_size=16, max_position_embeddings=96)
GQA = dict(model_type='qwen3', num_hidden_layers=2, hidden_size=32, intermediate_size=48,
           num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=96)
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """A folder with a tiny untrained checkpoint and problem files."""
    folder = tmp_path_factory.mktemp('toy')
    tokenizer = prepare.toy_tokenizer()
    torch.manual_seed(0)
    ids = dict(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    model = Transformer(ModelConfig(**ids, **TINY))
    with torch.no_grad():  # ends and answers by chance, so that rewards differ within groups
        model.lm_head.weight[tokenizer.eos_id] += 0.1
    model.save_pretrained(folder / 'm')
    tokenizer.save_pretrained(folder / 'm')
    rng = random.Random(0)
    rows = [prepare.rl_problem(rng, (1 + i, 2, 3), 6 + i) for i in range(8)]
    prepare.write_rows(folder / 'rl.jsonl', rows)
    return folder


def config(toy, out, **changes):
    given = dict(out_dir=str(out), init_from=str(toy / 'm'), data=[str(toy / 'rl.jsonl')],
                 rewards={'length_coin': 1.0}, steps=4, prompts=4, group=4, max_new_tokens=10,
                 micro_tokens=96, eval_every=0, save_every=0, learning_rate=1e-3, threads=1)
    return Config(**{**given, **changes})


@pytest.fixture(autouse=True)
def coin(monkeypatch):
    """A reward that an untrained model gets different values of; another that half of the problems
    give none of."""
    def length_coin(response, row):
        return float(len(response) % 3)

    def half(response, row):
        return length_coin(response, row) * (row['target'] % 2)
    monkeypatch.setitem(rewards.REWARDS, 'length_coin', length_coin)
    monkeypatch.setitem(rewards.REWARDS, 'half', half)


def sample(prompt, tokens, logprobs=None, finished=True, total=0.0, number=-1, routes=None):
    score = {'total': total, 'rewards': {}, 'finished': finished, 'length': len(tokens),
             'mixed': False}
    return Sample(prompt, tokens, logprobs or [0.0] * len(tokens), score, routes, number)


def padded(values):
    """With the 0 of a row without a sample"""
    return torch.cat([values, torch.zeros(1)])


def small_model(**more):
    return Transformer(ModelConfig(vocab_size=30, initializer_range=0.3, **{**TINY, **more}))


def random_tokens(count):
    return torch.randint(3, 30, (count,)).tolist()


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

# --------------------------------------------------------------------------------------------------
# the maths


def test_advantages_in_the_group_in_the_batch_and_without_scale():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
    A, varies = advantages(r, 'group')
    assert varies.tolist() == [True, False, True]
    sd = math.sqrt(4 * 0.5 ** 2 / 3)  # over G - 1
    assert A[0].tolist() == pytest.approx([0.5 / sd, -0.5 / sd, -0.5 / sd, 0.5 / sd], rel=1e-5)
    assert A[1].tolist() == [0, 0, 0, 0]
    sd = math.sqrt((0.75 ** 2 + 3 * 0.25 ** 2) / 3)
    assert A[2].tolist() == pytest.approx([0.75 / sd] + [-0.25 / sd] * 3, rel=1e-5)
    assert advantages(r, 'none')[0][2].tolist() == [0.75, -0.25, -0.25, -0.25]
    mean = 5 / 12  # of all rewards, not of centred ones
    whole = math.sqrt((3 * (1 - mean) ** 2 + 4 * (0.5 - mean) ** 2 + 5 * mean ** 2) / 11)
    A = advantages(r, 'batch')[0]
    assert A[2].tolist() == pytest.approx([0.75 / whole] + [-0.25 / whole] * 3, rel=1e-5)
    assert A[1].tolist() == [0, 0, 0, 0]
    assert advantages(r[1:2], 'batch')[0].tolist() == [[0, 0, 0, 0]]


def test_advantages_are_the_courses_snapshot_and_trls_arithmetic():
    """CS336's _snapshots of compute_group_normalized_rewards: groups of 4, eps 1e-6; TRL's eps is
    1e-4."""
    r = torch.tensor([[0.2, 0.5, 0.0, 0.4], [0.9, 0.7, 0.2, 0.0]])
    normalised = [[-0.33823919, 1.01471758, -1.24021041, 0.56373197],
                  [1.07061708, 0.59478730, -0.59478724, -1.07061708]]
    centred = [[-0.075, 0.225, -0.275, 0.125], [0.45, 0.25, -0.25, -0.45]]
    assert torch.allclose(advantages(r, 'group')[0], torch.tensor(normalised), rtol=1e-6)
    assert torch.allclose(advantages(r, 'none')[0], torch.tensor(centred), rtol=1e-6)
    rows, every = r.double().tolist(), r.double().flatten().tolist()
    for norm in ('group', 'batch'):
        A = advantages(r.double(), norm, eps=1e-4)[0]
        for row, got in zip(rows, A.tolist()):
            mean = sum(row) / 4
            spread = row if norm == 'group' else every
            middle = sum(spread) / len(spread)
            std = math.sqrt(sum((x - middle) ** 2 for x in spread) / (len(spread) - 1))
            assert got == pytest.approx([(x - mean) / (std + 1e-4) for x in row], rel=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage_and_no_variance_whatever_the_number(dtype):
    for value in (16.3, 100.3, 0.1, 1 / 3, -7.7, 1e6 + 0.1, 1e-12, 3e20, 0.0):
        for G in (2, 3, 7, 8, 16):
            r = torch.full((1, G), value, dtype=dtype)
            for norm in ('group', 'batch', 'none'):
                A, varies = advantages(r, norm)
                assert not A.any() and not varies.any(), (value, G, norm)
        mixed = torch.tensor([[0.0, 1, 1, 0]], dtype=dtype)
        varying = torch.cat([torch.full((1, 4), value, dtype=dtype), mixed])
        for norm in ('group', 'batch', 'none'):
            A, varies = advantages(varying, norm)
            assert not A[0].any() and A[1].all() and varies.tolist() == [False, True]
    # and those that differ vary
    close = torch.tensor([[1e-7, 0.0], [1e6, 1e6 + 0.5], [16.3, 16.3 + 1e-5]], dtype=dtype)
    A, varies = advantages(close, 'none')
    assert varies.all() and (A != 0).all()


def test_totals_that_are_equal_on_paper_do_not_vary(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, 'a', lambda response, row: row['a'])
    monkeypatch.setitem(rewards.REWARDS, 'b', lambda response, row: row['b'])
    totals = [rewards.combined('', {'a': a, 'b': b}, {'a': 1.0, 'b': 0.1})[0]
              for a, b in ((0.1, 2.0), (0.3, 0.0), (0.0, 3.0), (0.2, 1.0), (0.7, -4.0))]
    assert totals == [0.3] * 5  # 0.1 + 0.2 != 0.3 in doubles
    nothing = [rewards.combined('', {'a': 0.3, 'b': -3}, {'a': 1, 'b': 0.1})[0], 0.0]
    assert nothing == [0.0, 0.0]
    assert not advantages(torch.tensor([totals], dtype=torch.float64), 'group')[1].any()
    assert not advantages(torch.tensor([[0.1 + 0.2, 0.3]], dtype=torch.float64), 'group')[1].any()


def test_without_a_baseline_the_rewards_themselves_are_pushed():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(advantages(r, 'none', 'none')[0], r)
    A, varies = advantages(r, 'group', 'none')
    assert A[0].tolist() == pytest.approx([math.sqrt(3), 0, 0, math.sqrt(3)], rel=1e-5)
    # there is no deviation to divide by
    assert A[1].tolist() == [1, 1, 1, 1] and varies.tolist() == [True, False]
    assert torch.allclose(advantages(r, 'batch', 'none')[0], r / r.std(), rtol=1e-5)


def test_the_kl_in_the_reward_is_measured_by_the_tasks_deviation():
    task = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    k1 = torch.tensor([[0.3, -0.2, 0.1, 0.0], [0.2, -0.3, 0.1, 0.4]], dtype=torch.float64)
    std = math.sqrt(1 / 3)
    for coef in (1e-6, 1e-3, 0.1):
        A, varies = advantages(task, 'group', 'mean', coef * k1)
        want = [x - 0.5 - coef * (k - 0.05) for x, k in zip(task[0].tolist(), k1[0].tolist())]
        assert A[0].tolist() == pytest.approx([a / (std + 1e-6) for a in want])
        # not a full advantage
        assert A[1].tolist() == pytest.approx([-coef * (k - 0.1) for k in k1[1].tolist()])
        assert varies.tolist() == [True, False]
        A = advantages(task[1:], 'batch', 'mean', coef * k1[1:])[0]
        assert A[0].tolist() == pytest.approx([-coef * (k - 0.1) for k in k1[1].tolist()])


def test_token_weights_are_those_of_the_three_papers_and_leave_out_the_empty():
    lengths = torch.tensor([2, 8, 10])
    sequence = token_weights(lengths, 'sequence', 99)      # GRPO: mean of means
    token = token_weights(lengths, 'token', 99)            # DAPO: mean over tokens
    constant = token_weights(lengths, 'constant', 50)      # Dr.GRPO: a constant
    assert sequence.tolist() == pytest.approx([1 / 6, 1 / 24, 1 / 30])
    assert token.tolist() == pytest.approx([1 / 20] * 3)
    assert constant.tolist() == pytest.approx([1 / 150] * 3)
    for norm in ('sequence', 'token', 'constant'):         # a truncated one among them
        with_gap = token_weights(torch.tensor([2, 0, 8, 10]), norm, 50)
        assert with_gap[1] == 0
        assert with_gap[[0, 2, 3]].tolist() == token_weights(lengths, norm, 50).tolist()


def test_k1_k2_k3_against_the_divergence_in_closed_form():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    kl = (p * (p / q).log()).sum().item()
    k1, k2, k3 = (kl_terms(p.log(), q.log(), kind) for kind in ('k1', 'k2', 'k3'))
    assert (p * k1).sum().item() == pytest.approx(kl) and (p * k3).sum().item() == pytest.approx(kl)
    assert torch.allclose(k3, q / p - (q / p).log() - 1) and (k3 >= 0).all()
    assert torch.allclose(k2, 0.5 * (p / q).log() ** 2)
    # gradients through logits: that of k1 in a loss has mean 0, that of k2 is the divergence's
    z = p.log().clone().requires_grad_()
    true = torch.autograd.grad((z.softmax(0) * (z.log_softmax(0) - q.log())).sum(), z)[0]
    mean = {'k1': 0.0, 'k2': 0.0}
    for kind in mean:
        for v in range(3):
            term = kl_terms(z.log_softmax(0)[v], q[v].log(), kind)
            mean[kind] = mean[kind] + p[v] * torch.autograd.grad(term, z)[0]
    assert mean['k1'].abs().max() < 1e-12
    assert torch.allclose(mean['k2'], true) and true.abs().max() > 0.1


VARIANTS = {
    'grpo': dict(loss_norm='sequence', kl_coef=0.04),
    'grpo, wide clip of R1': dict(clip_low=10.0, clip_high=10.0, kl_coef=0.001),
    'dr_grpo': dict(advantage_norm='none', loss_norm='constant', max_new_tokens=9),
    'dapo': dict(clip_high=0.28, loss_norm='token', mask_truncated=True),
    'gspo': dict(ratio='sequence', loss_norm='sequence', clip_low=0.03, clip_high=0.04),
    'cispo': dict(objective='cispo', clip_low=1.0, clip_high=0.1),
    'reinforce': dict(objective='reinforce', advantage_norm='none'),
    'batch norm, k2': dict(advantage_norm='batch', kl='k2', kl_coef=0.1),
    'k1': dict(kl='k1', kl_coef=0.1),
    'tis': dict(tis=1.1, loss_norm='sequence', kl_coef=0.1),
    'clip off': dict(clip_low=math.inf, clip_high=math.inf),
    'gspo, clip off': dict(ratio='sequence', loss_norm='sequence', clip_low=math.inf,
                           clip_high=math.inf),
    'no baseline': dict(objective='reinforce', baseline='none', advantage_norm='none'),
    'no baseline, group norm': dict(baseline='none'),
    'no baseline, k1, batch norm': dict(baseline='none', kl='k1', kl_coef=0.1,
                                        advantage_norm='batch'),
}


def slow(cfg, R, logp, old, ref, sampled, finished):
    """The loss of one update, float64, one completion and token at a time, as the papers write it.
    R [P][G]; the others flat lists over completions of lists or tensors [T]."""
    P, G = len(R), len(R[0])
    N = P * G
    beta = cfg.kl_coef

    def deviation(values):
        mean = sum(values) / len(values)
        return (sum((r - mean) ** 2 for r in values) / (len(values) - 1)) ** 0.5 + 1e-6
    whole = deviation([r for group in R for r in group])
    std = {'group': [deviation(group) for group in R], 'batch': [whole] * P, 'none': [1.0] * P}
    if cfg.kl == 'k1':  # r - beta sum_t log(pi / pi_ref), of the policy that sampled
        k1 = [float((sampled[i] - ref[i]).sum()) for i in range(N)]
        R = [[R[p][g] - beta * k1[p * G + g] for g in range(G)] for p in range(P)]
    base = [sum(group) / G if cfg.baseline == 'mean' else 0.0 for group in R]
    above = [[r - base[p] for r in R[p]] for p in range(P)]
    in_loss = [i for i in range(N) if finished[i] or not cfg.mask_truncated]
    n_tokens = sum(len(logp[i]) for i in in_loss)
    loss = 0.0
    for i in in_loss:
        p, g = divmod(i, G)
        T = len(logp[i])
        A = above[p][g] / std[cfg.advantage_norm][p]
        s = ((logp[i] - old[i]).sum() / T).exp()  # GSPO eq. 7
        whole, kl_whole = 0.0, 0.0
        for t in range(T):
            rho = s if cfg.ratio == 'sequence' else (logp[i][t] - old[i][t]).exp()
            clipped = rho.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
            value = {'clip': min(rho * A, clipped * A),
                     'cispo': clipped.detach() * A * logp[i][t],
                     'reinforce': A * logp[i][t]}[cfg.objective]
            x = ref[i][t] - logp[i][t]
            kl = {'k1': 0.0, 'k2': 0.5 * x ** 2, 'k3': x.exp() - x - 1}[cfg.kl]
            trust = min(math.exp(old[i][t] - sampled[i][t]), cfg.tis) if cfg.tis else 1.0
            whole = whole + trust * value
            kl_whole = kl_whole + kl
        norm = {'sequence': T * len(in_loss), 'token': n_tokens,
                'constant': len(in_loss) * cfg.max_new_tokens}[cfg.loss_norm]
        loss = loss - (whole - beta * kl_whole) / norm
    return loss

@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_equals_the_papers_formula_in_float64(name):
    cfg, rng = Config(**VARIANTS[name]), torch.Generator().manual_seed(5)
    cfg = Config(**VARIANTS[name])
    rng = torch.Generator().manual_seed(5)

    def randn(n):
        return torch.randn(n, generator=rng, dtype=torch.float64)
    lengths = [4, 1, 7, 3, 5, 2]
    base = [-1.5 + randn(n) * 0.3 for n in lengths]
    old, ref, sampled = ([b + 0.15 * randn(len(b)) for b in base] for _ in range(3))
    finished = [True, True, False, True, True, True]
    R = [[1.0, 0.0, 0.3], [0.2, 0.2, 1.0]]
    samples = [sample([1] * 2, list(range(3, 3 + n)), sampled[i].tolist(), finished[i], number=i)
               for i, n in enumerate(lengths)]

    # as main does it, on two micro-batches
    parts = micro_batches(samples, 24, 1)
    assert len(parts) > 1 and sorted(s.number for part in parts for s in part) == list(range(6))
    R_PG, penalty = torch.tensor(R, dtype=torch.float64), None
    if cfg.kl == 'k1':
        k1 = torch.stack([(s - r).sum() for s, r in zip(sampled, ref)])
        penalty = cfg.kl_coef * k1.view(2, 3)
    A_PG, _ = advantages(R_PG, cfg.advantage_norm, cfg.baseline, penalty)
    in_loss = torch.tensor([grpo.length_in_loss(cfg, s) for s in samples])
    A_N = padded(A_PG.flatten())
    w_N = padded(token_weights(in_loss, cfg.loss_norm, cfg.max_new_tokens))
    leaves, loss = {}, 0.0
    for samples_of in parts:
        part = collate(samples_of, CPU)
        numbers = [s.number for s in samples_of]
        part.update(old_logp=torch.cat([old[i] for i in numbers]),
                    ref_logp=torch.cat([ref[i] for i in numbers]) if cfg.kl_coef else None,
                    sampler_logp=torch.cat([sampled[i] for i in numbers]))
        for i in numbers:
            leaves[i] = base[i].clone().requires_grad_()
        logp = torch.cat([leaves[i] for i in numbers])
        policy, kl, _ = losses(cfg, part, logp, A_N, w_N)
        loss = loss + policy + kl
    loss.backward()

    want = [b.clone().requires_grad_() for b in base]
    expected = slow(cfg, R, want, old, ref, sampled, finished)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for i, w in enumerate(want):
        got = leaves[i].grad
        wanted = torch.zeros_like(got) if w.grad is None else w.grad
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12), i
    assert any((w.grad is not None and w.grad.abs().max() > 1e-3) for w in want)


def gradient(cfg, R, lengths, shift=0.2):
    """d loss / d logp of one update at some off-policy point, [n]"""
    R = torch.tensor(R, dtype=torch.float64)
    samples = [sample([1], [2] * n, number=i) for i, n in enumerate(lengths)]
    part = collate(samples, CPU)
    n = sum(lengths)
    old = torch.linspace(-2, -1, n, dtype=torch.float64)
    part.update(old_logp=old, ref_logp=None, sampler_logp=old)
    logp = (old + shift * torch.linspace(-1, 1, n, dtype=torch.float64)).requires_grad_()
    A_N = padded(advantages(R, cfg.advantage_norm)[0].flatten())
    w_N = padded(token_weights(torch.tensor(lengths), cfg.loss_norm, cfg.max_new_tokens))
    losses(cfg, part, logp, A_N, w_N)[0].backward()
    return logp.grad


def test_equalities_that_must_hold_between_variants():
    R, std = [[1.0, 0.0, 0.0, 0.0]], 0.5 + 1e-6
    equal, unequal = [5] * 4, [5, 2, 3, 1]
    one_token, some = [1] * 4, [3, 1, 2, 5]
    plain = Config(loss_norm='sequence')
    dr = Config(advantage_norm='none', loss_norm='constant', max_new_tokens=5)
    gspo = Config(ratio='sequence', loss_norm='sequence')
    cispo, reinforce = Config(objective='cispo'), Config(objective='reinforce')

    def alike(a, b, rtol):
        return torch.allclose(a, b, rtol=rtol)
    assert alike(gradient(plain, R, equal) * std, gradient(dr, R, equal), 1e-12)  # and one group
    assert not alike(gradient(plain, R, unequal) * std, gradient(dr, R, unequal), 1e-2)
    assert alike(gradient(plain, R, one_token), gradient(gspo, R, one_token), 1e-12)
    assert not alike(gradient(plain, R, [3] * 4), gradient(gspo, R, [3] * 4), 1e-2)
    on_policy = gradient(reinforce, R, some, shift=0)
    assert alike(gradient(cispo, R, some, shift=0), on_policy, 1e-12)
    assert not alike(gradient(cispo, R, some), gradient(reinforce, R, some), 1e-2)
    assert alike(gradient(Config(), R, some, shift=0), on_policy, 1e-12)


@pytest.mark.parametrize('A, rho, low, high', [
    (1.0, 1.5, 0.2, 0.2), (1.0, 0.5, 0.2, 0.2), (-1.0, 1.5, 0.2, 0.2), (-2.0, 0.5, 0.2, 0.2),
    (1.0, 1.25, 0.2, 0.28), (1.0, 1.3, 0.2, 0.28), (-1.0, 0.1, 10.0, 10.0)])
def test_clipped_loss_and_gradient_case_by_case(A, rho, low, high):
    logp = torch.tensor([math.log(rho)], dtype=torch.float64, requires_grad=True)
    A_1, w_1 = torch.tensor([A]), torch.tensor([0.5])
    loss, below, above = policy_loss(logp, logp, A_1, w_1, 'clip', low, high)
    loss.backward()
    bound = min(max(rho, 1 - low), 1 + high)
    binds = A * bound < A * rho
    assert (below.item(), above.item()) == (binds and rho < 1, binds and rho > 1)
    assert loss.item() == pytest.approx(-0.5 * min(rho * A, bound * A))
    assert logp.grad.item() == pytest.approx(0.0 if binds else -0.5 * rho * A)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('ratio', ['token', 'sequence'])
def test_a_ratio_that_overflows_where_it_is_clipped_away_has_no_gradient(dtype, ratio):
    cfg = Config(ratio=ratio, loss_norm='sequence')
    samples = [sample([1], [2 + i, 3 + i], number=i) for i in range(3)]
    part = collate(samples, CPU)
    logp = torch.full((6,), -0.5, dtype=dtype, requires_grad=True)
    # log rho 1000 with A > 0, and A = 0
    old = torch.tensor([-1000.5, -1000.5, -0.4, -0.6, -1000.5, -1000.5], dtype=dtype)
    part.update(old_logp=old, ref_logp=None, sampler_logp=old)
    A_N, w_N = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([1 / 6, 1 / 6, 1 / 6, 0.0])
    loss, kl_loss, tokens = losses(cfg, part, logp, A_N, w_N)
    (loss + kl_loss).backward()
    rhos = [math.exp(-0.1), math.exp(0.1)] if ratio == 'token' else [1.0, 1.0]
    assert loss.item() == pytest.approx(-(2 * 1.2 - sum(rhos)) / 6, rel=1e-6)
    assert logp.grad.tolist() == pytest.approx([0, 0, rhos[0] / 6, rhos[1] / 6, 0, 0], rel=1e-6)
    assert tokens['clipped_high'].tolist() == [True, True, False, False, False, False]
    assert torch.isfinite(tokens['ratio']).all()
    for objective in ('cispo', 'reinforce'):  # whose gradient does not go through rho
        logp.grad = None
        loss = losses(Config(objective=objective, ratio=ratio), part, logp, A_N, w_N)[0]
        loss.backward()
        bound = torch.tensor([1.2, 1.2, *rhos, 0, 0]) if objective == 'cispo' else torch.ones(6)
        want = -bound * torch.tensor([1, 1, -1, -1, 0, 0]) / 6
        assert torch.isfinite(loss) and torch.allclose(logp.grad, want.to(dtype), rtol=1e-6)
    trusted = losses(Config(tis=2.0), {**part, 'sampler_logp': old - 1000}, logp, A_N, w_N)[0]
    plain = losses(Config(), part, logp, A_N, w_N)[0]
    assert torch.isfinite(trusted) and trusted.item() == pytest.approx(2 * plain.item())


def test_zero_variance_groups_keep_their_kl_term():
    samples = [sample([1], [2, 3], number=i) for i in range(2)]
    part = collate(samples, CPU)
    ref = torch.tensor([-1.0, -2.0, -1.5, -0.5])
    part.update(old_logp=None, ref_logp=ref, sampler_logp=ref)
    logp = (ref + 0.3).requires_grad_()
    A, _ = advantages(torch.tensor([[1.0, 1.0]]), 'group')
    w_N = torch.tensor([0.25, 0.25, 0.0])
    policy, kl, _ = losses(Config(kl_coef=0.1), part, logp, padded(A[0]), w_N)
    (policy + kl).backward()
    of_kl = 0.1 * 0.25 * (1 - math.exp(-0.3))
    assert policy.item() == 0 and torch.allclose(logp.grad, torch.full((4,), of_kl))


# --------------------------------------------------------------------------------------------------
# micro-batches: padding, stop token, temperature, truncation


def test_rows_hold_prompt_and_completion_with_its_stop_token_and_nothing_else():
    samples = [sample([1, 2, 3], [10, 11, 9], [-1.0, -2.0, -3.0], number=7),
               sample([4], [12], [-4.0], number=5)]
    out = collate(samples, CPU)
    # the last token of each is never an input
    assert out['input_ids'].tolist() == [[1, 2, 3, 10, 11], [4, 0, 0, 0, 0]]
    assert out['labels'].tolist() == [[-100, -100, 10, 11, 9], [12, -100, -100, -100, -100]]
    assert out['uses'].view(2, 5).tolist() == [[1] * 5, [1] + [0] * 4] and out['prefix'] is None
    assert out['sampler_logp'].tolist() == [-1, -2, -3, -4] and out['number'].tolist() == [7, 5]
    assert out['routes'] is None


def test_micro_batches_are_sorted_within_the_budget_and_even_over_ranks():
    rng = random.Random(0)
    samples = []
    for i in range(200):
        prompt = [1] * rng.randint(1, 40)
        samples.append(sample(prompt, [2] * rng.randint(1, 300), number=i))
    for world in (1, 2, 3):
        parts = micro_batches(samples, 1000, world)
        assert sorted(s.number for part in parts for s in part) == list(range(200))
        lengths = [len(s) for part in parts for s in part]
        assert lengths == sorted(lengths, reverse=True)
        sizes = [len(part) * max(map(len, part)) for part in parts]
        assert max(sizes) <= 1000
        per_rank = [sum(sizes[r::world]) for r in range(world)]
        assert max(per_rank) < 1.15 * min(per_rank)
        assert sum(sizes) < 1.1 * sum(lengths)  # little of it is padding
    even = micro_batches([sample([1], [2] * 10, number=i) for i in range(8)], 1000, 2)
    assert [len(part) for part in even] == [4, 4]  # not 8 and nothing
    too_long = [sample([1], [2] * 2000), sample([1], [2])]
    assert [len(part) for part in micro_batches(too_long, 1000, 1)] == [1, 1]


def test_padding_and_neighbours_change_no_log_prob_and_no_gradient():
    torch.manual_seed(3)
    model = small_model()
    samples = [sample([1 + i] * (2 + i), random_tokens(n), number=i)
               for i, n in enumerate((4, 1, 9))]
    cfg = Config(temperature=0.7)
    together = collate(samples, CPU)
    logp, H = grpo.forward(model, together, cfg, CPU, entropy=True)
    alone = [grpo.forward(model, collate([s], CPU), cfg, CPU, entropy=True) for s in samples]
    assert torch.allclose(logp, torch.cat([a[0] for a in alone]), atol=1e-5)
    assert torch.allclose(H, torch.cat([a[1] for a in alone]), atol=1e-5)
    logp.sum().backward()
    got = gradients_of(model)
    model.zero_grad()
    # what the padding holds is nobody's business
    together['input_ids'][together['uses'].view(3, -1) == 0] = 29
    other = grpo.forward(model, together, cfg, CPU)[0]
    other.sum().backward()
    # not bit by bit: padding goes to experts too, and moves the rows of their products
    assert torch.allclose(other, logp, rtol=0, atol=2e-6)
    for name, g in got.items():
        assert torch.allclose(g, model.get_parameter(name).grad, atol=1e-6), name


@pytest.mark.parametrize('shape', [TINY, GQA], ids=['mla', 'gqa'])
def test_a_prompt_computed_once_for_its_group_gives_the_same(shape):
    torch.manual_seed(3)
    moe = {}
    if shape is TINY:
        moe = dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
    model = Transformer(ModelConfig(vocab_size=30, initializer_range=0.3, **moe, **shape))
    cfg = Config()
    prompts = [[1], [4, 5, 6, 7, 8, 9, 3, 2, 1, 4, 6], [9, 8, 7, 6, 5, 4, 3]]
    samples = [sample(prompts[i % 3], random_tokens(1 + i % 4), number=i) for i in range(12)]
    once = sum(map(len, prompts)) - 3 + sum(len(s.tokens) for s in samples)
    results = []
    for share in (True, False):
        part, routes = collate(samples, CPU, share), [] if moe else None
        assert (part['prefix'] is not None) == share
        assert part['uses'].sum() == sum(map(len, samples))
        assert not share or (part['uses'] > 0).sum() == once
        logp, H = grpo.forward(model, part, cfg, CPU, routes, entropy=True)
        (logp * torch.linspace(0, 1, len(logp))).sum().backward()
        counts = expert_counts(routes, 4, part['uses']) if moe else torch.zeros(1)
        results.append((logp, H, counts, gradients_of(model)))
        model.zero_grad()
    (a, Ha, na, ga), (b, Hb, nb, gb) = results
    assert torch.equal(na, nb)  # experts are counted once a completion
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(Ha, Hb, atol=1e-5)
    for name, g in ga.items():
        assert torch.allclose(g, gb[name], atol=1e-5 + 1e-4 * g.abs().max()), name


def test_temperature_is_inside_the_log_probs_and_the_stop_token_has_one():
    torch.manual_seed(3)
    model, cfg = small_model(), Config(temperature=0.7)
    s = sample([5, 6], [7, 8, 2])  # 2: the stop token
    logp, H = grpo.forward(model, collate([s], CPU), cfg, CPU, entropy=True)
    table = (model(torch.tensor([[5, 6, 7, 8]]))[0].double() / 0.7).log_softmax(-1)[1:]
    want = [table[t, token].item() for t, token in enumerate(s.tokens)]
    assert logp.tolist() == pytest.approx(want, abs=1e-5)
    assert H.tolist() == pytest.approx((-(table.exp() * table).sum(-1)).tolist(), abs=1e-5)
    logp[-1].backward()  # it is learnt like every other token
    assert model.lm_head.weight.grad[2].abs().max() > 1e-3


def test_gradient_of_a_step_equals_the_formula_one_completion_at_a_time():
    torch.manual_seed(3)
    model, reference = small_model(), small_model()
    cfg = Config(temperature=0.7, kl_coef=0.05, clip_low=0.1, clip_high=0.2, loss_norm='sequence')
    samples = []
    for g in range(2):
        for n in (4, 1, 7):
            samples.append(sample([1 + g] * (3 + g), random_tokens(n), number=len(samples)))
    R = torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.0, 1.0]])
    # as if the policy had moved since
    shift = [0.25 * torch.randn(len(s.tokens)) for s in samples]
    lengths = torch.tensor([len(s.tokens) for s in samples])
    A_N = padded(advantages(R, 'group')[0].flatten())
    w_N = padded(token_weights(lengths, 'sequence', 0).float())
    for some in micro_batches(samples, 30, 1):
        part = collate(some, CPU)
        logp, _ = grpo.forward(model, part, cfg, CPU)
        with torch.no_grad():
            part['ref_logp'] = grpo.forward(reference, part, cfg, CPU)[0]
        part['old_logp'] = logp.detach() + torch.cat([shift[s.number] for s in some])
        policy, kl, _ = losses(cfg, part, logp, A_N, w_N)
        (policy + kl).backward()
    got = gradients_of(model)
    model.zero_grad()

    total = 0.0
    for i, s in enumerate(samples):
        ids = torch.tensor([s.prompt + s.tokens])
        logits, ref_logits = model(ids)[0] / 0.7, reference(ids)[0].detach() / 0.7
        mean, of_group = 0.0, R[i // 3]
        advantage = (of_group[i % 3] - of_group.mean()) / (of_group.std() + 1e-6)
        for t, token in enumerate(s.tokens):
            at = len(s.prompt) + t - 1
            lp, lr = logits[at].log_softmax(-1)[token], ref_logits[at].log_softmax(-1)[token]
            rho = (lp - (lp.detach() + shift[i][t])).exp()
            kl = (lr - lp).exp() - (lr - lp) - 1
            gain = torch.minimum(rho * advantage, rho.clamp(0.9, 1.2) * advantage)
            mean = mean + gain - cfg.kl_coef * kl
        total = total - mean / len(s.tokens) / len(samples)
    total.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(got[name], p.grad, atol=2e-5 + 1e-3 * p.grad.abs().max()), name


@pytest.mark.slow
def test_memory_of_the_log_probs_grows_with_the_chunk_and_not_with_tokens_times_vocabulary():
    pytest.importorskip('resource')
    from tools.bench import log_prob_memory
    sizes = (2048, 0), (1024, 64), (2048, 64)
    naive, small, large = (log_prob_memory(N, 65536, 16, chunk) for N, chunk in sizes)
    assert naive > 2048 * 65536 * 4 * 2 / 2**30  # logits and their gradient: 1 GiB
    # 64 x 65536 logits are 16 MiB; resident memory is coarse
    assert max(small, large) < 0.15 and abs(large - small) < 0.1


@pytest.mark.parametrize('share', [True, False])
def test_replayed_routes_are_those_the_forward_takes(share):
    torch.manual_seed(0)
    model = small_model(n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=0)
    samples = [sample([1, 2, 5, 6, 7], [3, 4, 5, 6], number=0), sample([7], [8, 9], number=1),
               sample([1, 2, 5, 6, 7], [9], number=2)]
    for s in samples:  # each alone, as a sampler would
        plain = []
        grpo.forward(model, collate([s], CPU), Config(), CPU, plain)
        s.routes = torch.stack([chosen for _, chosen in plain], 1).short()
    part, taken = collate(samples, CPU, share), []
    is_token = part['uses'] > 0
    assert (part['prefix'] is not None) == share
    logp, _ = grpo.forward(model, part, Config(), CPU, taken)
    for (_, chosen), layer in zip(taken, part['routes']):
        assert torch.equal(chosen[is_token], layer[is_token])
    free = grpo.forward(model, {**part, 'routes': None}, Config(), CPU)[0]
    assert torch.allclose(logp, free, atol=1e-5)  # those it would have taken
    for s in samples:
        s.routes = (s.routes + 1) % 8
    taken = []
    other, _ = grpo.forward(model, collate(samples, CPU, share), Config(), CPU, taken)
    assert not torch.allclose(logp, other, atol=1e-3)
    for (_, chosen), layer in zip(taken, part['routes']):
        assert torch.equal(chosen[is_token], (layer[is_token] + 1) % 8)


@pytest.mark.parametrize('share', [True, False])
def test_the_reference_chooses_its_own_experts(share):
    torch.manual_seed(0)
    shape = dict(vocab_size=30, initializer_range=0.3, n_routed_experts=8, num_experts_per_tok=2,
                 first_k_dense_replace=0, **TINY)
    policy, reference = Transformer(ModelConfig(**shape)), Transformer(ModelConfig(**shape))
    samples = [sample([1, 2, 5, 6, 7], [3, 4, 5, 6], number=0)]
    samples += [sample([1, 2, 5, 6, 7], [9], number=1)]
    for s in samples:
        taken = []
        grpo.forward(policy, collate([s], CPU), Config(), CPU, taken)
        s.routes = torch.stack([chosen for _, chosen in taken], 1).short()
    part = collate(samples, CPU, share)
    grpo.freeze_logprobs(Config(replay_routes=True, kl_coef=0.1), policy, reference, [[part]], CPU)
    assert part['routes'] is not None  # the policy takes the sampler's
    for s, got in zip(samples, part['ref_logp'].split([4, 1])):
        table = reference(torch.tensor([s.prompt + s.tokens]))[0].log_softmax(-1)
        alone = [table[len(s.prompt) - 1 + t, token].item() for t, token in enumerate(s.tokens)]
        assert got.tolist() == pytest.approx(alone, abs=1e-4)


def test_problems_take_turns_and_every_epoch_is_a_new_order():
    order = grpo.problem_order([3, 5], seed=1)
    steps = [[next(order) for _ in range(4)] for _ in range(15)]
    assert all([f for f, _ in s] == [0, 1, 0, 1] for s in steps)
    rows = [r for s in steps for f, r in s if f == 0]
    epochs = [rows[i:i + 3] for i in range(0, 30, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    again = grpo.problem_order([3, 5], seed=1)
    assert [[next(again) for _ in range(4)] for _ in range(15)] == steps


# --------------------------------------------------------------------------------------------------
# whole runs


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text().splitlines()]


def weights(folder):
    return (Path(folder) / 'model.safetensors').read_bytes()


WALL_CLOCK = {'seconds', 'seconds_sampling', 'seconds_training', 'tokens_per_second', 'memory_gib'}


def same(a, b, tolerance=0.0):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for key in x.keys() - WALL_CLOCK:
            close = tolerance and y[key] is not None
            y_key = pytest.approx(y[key], rel=tolerance, abs=tolerance) if close else y[key]
            assert x[key] == y_key, key


def test_sampler_and_trainer_agree_and_the_first_ratio_is_exactly_one(toy, tmp_path):
    grpo.main(config(toy, tmp_path / 'a', temperature=0.8))
    lines = metrics(tmp_path / 'a')
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    assert all(line['mismatch_max'] < 1e-4 and line['mismatch_kl'] < 1e-6 for line in lines)
    assert all(line['ratio'] == line['ratio_max'] == 1 and line['clipped'] == 0 for line in lines)
    assert lines[0]['advantage_std'] > 0.1 and lines[0]['grad_norm'] > 0
    assert 0 <= lines[0]['zero_variance'] < 1
    before = Transformer.from_pretrained(toy / 'm')
    after = Transformer.from_pretrained(tmp_path / 'a')
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    grpo.main(config(toy, tmp_path / 'b', updates=2, steps=1, warmup_steps=0))
    assert metrics(tmp_path / 'b')[0]['ratio_max'] > 1.0001  # the second update is off-policy


def test_rows_that_only_round_a_vocabulary_up_change_no_number(toy, tmp_path):
    """Though they would be the likeliest tokens: rewards, loss, entropy, KL and weights are those
    of the same model without them."""
    model = Transformer.from_pretrained(toy / 'm')
    n, state = model.cfg.vocab_size, model.state_dict()
    wide = Transformer(ModelConfig(**{**vars(model.cfg), 'vocab_size': n + 30}))
    for name, t in wide.state_dict().items():
        t[:len(state[name])] = state[name]
    with torch.no_grad():
        wide.lm_head.weight[n:] = 20 * torch.randn(30, wide.cfg.hidden_size)
    wide.save_pretrained(tmp_path / 'wide')
    for file in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
        shutil.copy(toy / 'm' / file, tmp_path / 'wide')
    how = dict(steps=2, kl_coef=0.1, reference_every=0, temperature=0.8)
    grpo.main(config(toy, tmp_path / 'a', **how))
    grpo.main(config(toy, tmp_path / 'b', init_from=str(tmp_path / 'wide'), **how))
    for a, b in zip(metrics(tmp_path / 'a'), metrics(tmp_path / 'b'), strict=True):
        assert b['mismatch_max'] < 1e-5
        for key in ('reward', 'loss', 'entropy', 'kl', 'grad_norm', 'length'):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
    heads = [Transformer.from_pretrained(tmp_path / run).lm_head.weight for run in ('a', 'b')]
    assert torch.allclose(heads[0], heads[1][:n], atol=1e-6)
    assert torch.equal(heads[1][n:], wide.lm_head.weight[n:])


@pytest.mark.parametrize('change', ['top_p=0.9', 'top_k=5', 'min_p=0.9'])
def test_biased_rollouts_are_refused_unless_allowed(toy, change):
    with pytest.raises((ConfigError, ValueError), match='allow_biased=True'):
        parse(Config, [f'--{change}'])
    name, value = change.split('=')
    value = float(value) if '.' in value else int(value)
    cfg = config(toy, 'unused', allow_biased=True, **{name: value})
    model, tokenizer = grpo.load_model(cfg, CPU)
    problems = grpo.read_rows(toy / 'rl.jsonl', require=('prompt', 'task'))

    def tokens(cfg):
        groups, _ = rollout.sample_groups(
            cfg, model, tokenizer, problems, list(range(8)), 3, CPU)
        return [[s.tokens for s in group] for group in groups]
    plain, biased = tokens(config(toy, 'unused', allow_biased=True)), tokens(cfg)
    assert plain == tokens(config(toy, 'unused')) and biased != plain


def test_a_stored_rollout_scores_alike_in_sampler_and_trainer(toy):
    model, tokenizer = grpo.load_model(config(toy, 'unused'), CPU)
    cfg = config(toy, 'unused', temperature=0.6, max_new_tokens=30)
    problems = grpo.read_rows(toy / 'rl.jsonl', require=('prompt', 'task'))
    groups, _ = rollout.sample_groups(cfg, model, tokenizer, problems, list(range(8)), 3, CPU)
    samples = [s for group in groups for s in group]
    assert {bool(s.score['finished']) for s in samples} == {True, False}
    for s in samples:
        assert (s.tokens[-1] in tokenizer.stop_ids) == s.score['finished']
        assert len(s.logprobs) == len(s.tokens) == s.score['length']
    part = collate(samples, CPU)
    with torch.no_grad():
        logp = grpo.forward(model, part, cfg, CPU)[0]
        assert (logp - part['sampler_logp']).abs().max() < 1e-4
        at_another_temperature = grpo.forward(model, part, config(toy, 'unused'), CPU)[0]
        assert (at_another_temperature - part['sampler_logp']).abs().max() > 0.05


def test_bfloat16_keeps_the_ratio_exact_and_weighs_the_mismatch(toy, tmp_path):
    grpo.main(config(toy, tmp_path / 'a', dtype='bfloat16', tis=2.0, steps=2))
    lines = metrics(tmp_path / 'a')
    assert all(line['ratio'] == line['ratio_max'] == 1 for line in lines)
    for line in lines:
        assert 1e-4 < line['mismatch_max'] < 0.5 and 0 <= line['mismatch_kl'] < 0.01
        assert line['mismatch'] <= line['mismatch_max']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_samplers_routes_are_replayed(toy, tmp_path, dtype, monkeypatch):
    tokenizer = grpo.load_model(config(toy, 'unused'), CPU)[1]
    shape = dict(n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=0,
                 num_nextn_predict_layers=1, initializer_range=0.1, **TINY)
    ids = dict(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    Transformer(ModelConfig(**ids, **shape)).save_pretrained(tmp_path / 'm')
    tokenizer.save_pretrained(tmp_path / 'm')
    seen, true = [], grpo.forward
    def forward(model, part, cfg, device):
        seen.append((part['routes'], part['uses'] > 0, taken := []))
        return true(model, part, cfg, device, taken)
    monkeypatch.setattr(grpo, 'forward', forward)
    grpo.main(config(toy, tmp_path / 'a', init_from=str(tmp_path / 'm'), replay_routes=True,
                     steps=2, dtype=dtype))
    lines = metrics(tmp_path / 'a')
    most = 1e-4 if dtype == 'float32' else 0.5
    assert all(line['mismatch_max'] < most for line in lines) and len(seen) >= 2
    for replay, is_token, taken in seen:  # and not chosen anew
        assert len(replay) == len(taken) == 2
        for wanted, (_, chosen) in zip(replay, taken):
            assert torch.equal(wanted[is_token], chosen[is_token])
    assert all(line['expert_max_load'] >= 1 and line['router_bias_max'] == 0 for line in lines)


@pytest.mark.parametrize('changes', [
    {}, {'kl_coef': 0.1, 'reference_every': 3, 'updates': 2},
    {'rewards': {'half': 1.0}, 'dynamic_sampling': 2, 'kl_coef': 0.1, 'kl': 'k1'}])
def test_a_stopped_run_goes_on_to_the_same_bits(toy, tmp_path, changes, monkeypatch):
    grpo.main(config(toy, tmp_path / 'whole', steps=5, **changes))
    counter = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(grpo.Stop, 'wanted', lambda self, device: next(counter) >= 2)
        with pytest.raises(SystemExit):
            grpo.main(config(toy, tmp_path / 'cut', steps=5, **changes))
    assert not (tmp_path / 'cut' / 'config.json').exists()
    grpo.main(config(toy, tmp_path / 'cut', steps=5, **changes))
    same(metrics(tmp_path / 'cut'), metrics(tmp_path / 'whole'))
    assert weights(tmp_path / 'cut') == weights(tmp_path / 'whole')


def test_a_resumed_run_refuses_other_problems(toy, tmp_path, monkeypatch):
    grpo.main(config(toy, tmp_path / 'a', steps=1, save_every=1))
    (tmp_path / 'a' / 'config.json').unlink()
    with pytest.raises(ValueError, match='other problems or another seed'):
        grpo.main(config(toy, tmp_path / 'a', steps=2, data=[str(toy / 'rl.jsonl')] * 2))
    with pytest.raises(ValueError, match='saved without a reference'):
        grpo.main(config(toy, tmp_path / 'a', steps=2, kl_coef=0.1))


def test_dynamic_sampling_trains_on_groups_that_vary(toy, tmp_path):
    half = dict(rewards={'half': 1.0}, steps=3)
    grpo.main(config(toy, tmp_path / 'plain', **half))
    grpo.main(config(toy, tmp_path / 'dynamic', dynamic_sampling=40, **half))
    plain, dynamic = metrics(tmp_path / 'plain'), metrics(tmp_path / 'dynamic')
    assert all(line['sampled_groups'] == 4 for line in plain)
    assert all(line['sampled_groups'] > 4 for line in dynamic)
    for line in dynamic:  # every group varies
        assert line['advantage_std'] == pytest.approx(math.sqrt(3 / 4), abs=1e-5)
    assert all(line['advantage_std'] < 0.8 for line in plain)
    assert all(line['zero_variance'] > 0 for line in dynamic)
    grpo.main(config(toy, tmp_path / 'hopeless', rewards={'countdown': 0.0}, steps=1,
                     dynamic_sampling=2))
    assert metrics(tmp_path / 'hopeless')[0]['sampled_groups'] == 12  # attempts end


def test_dynamic_sampling_asks_whether_a_problem_is_settled_by_correctness():
    def group(rights, totals):
        scores = [{'total': t, 'rewards': {'accuracy': r, 'overlong': t - r}}
                  for r, t in zip(rights, totals)]
        return [Sample([1], [2], [0.0], score) for score in scores]
    dapo = Config(rewards={'accuracy': 1.0, 'overlong': 0.5})
    wrong_and_long = group([0, 0, 0, 0], [0, -0.5, -0.2, 0])
    assert rollout.settled(dapo, wrong_and_long) and rollout.settled(dapo, group([1, 1], [1, 0.6]))
    assert not rollout.settled(dapo, group([1, 0, 0, 0], [1, 0, 0, 0]))
    assert not rollout.settled(dapo, group([0.5, 0], [0, 0]))
    scores = [{'task': 'math', 'total': -t, 'rewards': {'math': 0.0}} for t in (0.0, 0.5)]
    by_name = [Sample([1], [2], [0.0], score) for score in scores]
    assert rollout.settled(Config(rewards={'math': 1.0, 'overlong': 0.5}), by_name)
    for other in ({'overlong': 1.0}, {'accuracy': 0.0, 'overlong': 1.0}):  # accuracy is no reward
        assert not rollout.settled(Config(rewards=other), wrong_and_long)
        assert rollout.settled(Config(rewards=other), group([1, 0], [0.1 + 0.2, 0.3]))


def test_what_dynamic_sampling_cannot_replace_keeps_its_place(monkeypatch):
    cfg, drawn = Config(rewards={'accuracy': 1.0}, prompts=6, dynamic_sampling=2, group=2), []
    right = [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1]
    def sample_groups(cfg, model, tokenizer, problems, numbers, step, device):
        drawn.extend(numbers)
        def sample_of(n, r):
            return Sample([n], [1], [0.0], {'total': r, 'rewards': {'accuracy': r}, 'length': 1})
        return [[sample_of(n, right[n]), sample_of(n, 0)] for n in numbers], torch.zeros(2)
    monkeypatch.setattr(rollout, 'sample_groups', sample_groups)
    model = torch.nn.Linear(1, 1)
    order = iter([(0, i) for i in range(20)])
    groups, every, *_ = rollout.collect(cfg, model, None, [[{}] * 20], order, 0, CPU, 0, 1)
    assert drawn == list(range(13)) and len(every) == 13  # 6, then the 4 and the 3 that are missing
    # two of the settled, where they were drawn
    assert [group[0].prompt[0] for group in groups] == [0, 1, 2, 4, 7, 12]


@pytest.mark.parametrize('length', [60, 80, 90, 99, 100])
def test_the_dapo_preset_keeps_the_papers_proportions(length):
    cfg = parse(Config, [str(ROOT / 'config' / 'grpo_dapo.py')])
    row = {'max_length': 100, 'completion_tokens': length}
    soft = rewards.REWARDS['overlong']('', row)
    # eq. 13 with a cache of a fifth
    assert soft == pytest.approx(max(-1.0, min(0.0, (80 - length) / 20)))
    for right in (True, False):  # ours is the paper's over 2, and half
        paper = (1.0 if right else -1.0) + soft
        ours = cfg.rewards['accuracy'] * right + cfg.rewards['overlong'] * soft
        assert ours == pytest.approx(paper / 2 + 0.5)
    group = [cfg.rewards['accuracy'] + cfg.rewards['overlong'] * soft, *[1.0] * 3, *[0.0] * 4]
    assert advantages(torch.tensor([group]), 'group')[0][0, 0] > 0 or length == 100


def test_the_reference_is_replaced_after_so_many_updates():
    preset = str(ROOT / 'config' / 'grpo_deepseek.py')
    one = parse(Config, [preset])
    rollouts = parse(Config, [preset, '--prompts=512', '--updates=16', '--group=16'])

    def replaced(cfg, steps):
        return [step for step in range(1, steps) if grpo.becomes_reference(cfg, step)]
    assert replaced(one, 1000) == [400, 800] and replaced(rollouts, 100) == [25, 50, 75]
    assert 8192 == rollouts.prompts * rollouts.group and 512 == 8192 // rollouts.updates
    twice = Config(kl_coef=0.1, epochs=2, reference_every=5, updates=2)
    assert replaced(twice, 9) == [2, 3, 4, 5, 7, 8]  # when 5, 10, 15, ... are full, 4 each
    assert not grpo.becomes_reference(Config(kl_coef=0.1), 400)


@pytest.mark.parametrize('changes', [{}, {'updates': 2}, {'dynamic_sampling': 1}, {'kl_coef': 0.1}])
def test_the_numbers_of_a_step_are_of_all_its_samples(toy, tmp_path, monkeypatch, changes):
    """Half of the groups do not vary; entropy and expert load by a plain forward of each sample."""
    folder, tokenizer = tmp_path / 'm', grpo.load_model(config(toy, 'unused'), CPU)[1]
    shape = dict(n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=0, **TINY)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id,
                                    initializer_range=0.2, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seen, plain = [], grpo.collect
    monkeypatch.setattr(grpo, 'collect', lambda *args: (seen.append(plain(*args)), seen[-1])[1])
    grpo.main(config(toy, tmp_path / 'a', init_from=str(folder), rewards={'half': 1.0}, steps=1,
                     temperature=0.8, clip_low=0.0, clip_high=0.0, learning_rate=1e-2,
                     warmup_steps=0, **changes))
    (groups, every, _), line = seen[0], metrics(tmp_path / 'a')[0]
    assert 0 < line['zero_variance'] < 1
    assert (len(every) > len(groups)) == ('dynamic_sampling' in changes)
    H, tokens, load = 0.0, 0, torch.zeros(2, 8)
    for s in (s for group in every for s in group):
        ids, routes = torch.tensor([s.prompt + s.tokens]), []
        with torch.no_grad():
            rope, mask = model.context(ids[:, :-1])
            h = model.hidden(ids[:, :-1], rope, mask, routes)
            logits = model.logits(h)[0, len(s.prompt) - 1:].double() / 0.8
        H += torch.distributions.Categorical(logits=logits).entropy().sum().item()
        tokens += len(s.tokens)
        load += torch.stack([chosen.flatten().bincount(minlength=8) for _, chosen in routes])
    assert line['entropy'] == pytest.approx(H / tokens, rel=1e-4)
    busiest = (load.amax(1) / load.mean(1)).mean().item()
    assert line['expert_max_load'] == pytest.approx(busiest, rel=1e-3)
    if changes == {'updates': 2}:  # a clip of 0 binds on each token that gains
        assert 0 < line['clipped'] < 0.5 and line['ratio_max'] > 1
    elif 'kl_coef' not in changes:
        assert line['ratio'] == line['ratio_max'] == 1 and line['kl'] is None


def test_clip_fractions_are_of_all_tokens_and_ratios_of_those_computed(toy, tmp_path, monkeypatch):
    seen, lengths, true, plain = [], [], grpo.losses, grpo.collect
    def collect(*args):
        out = plain(*args)
        lengths.extend(len(s.tokens) for group in out[0] for s in group)
        return out
    def losses_of(*args):
        out = true(*args)
        tokens = out[2]
        seen.append(((tokens['weight'] > 0).sum().item(), tokens['clipped_low'].sum().item(),
                     tokens['clipped_high'].sum().item(), tokens['ratio'].double().sum().item()))
        return out
    monkeypatch.setattr(grpo, 'losses', losses_of)
    monkeypatch.setattr(grpo, 'collect', collect)
    grpo.main(config(toy, tmp_path / 'a', rewards={'half': 1.0}, steps=1, learning_rate=1e-2,
                     warmup_steps=0, updates=2, epochs=2, clip_low=1e-4, clip_high=1e-4))
    line, (computed, low, high, rho) = metrics(tmp_path / 'a')[0], map(sum, zip(*seen))
    assert computed < 2 * sum(lengths) and low + high > 0  # some are not computed
    assert line['clipped_low'] == low / (2 * sum(lengths))
    assert line['clipped_high'] == high / (2 * sum(lengths))
    assert line['clipped'] == (low + high) / (2 * sum(lengths))
    assert line['ratio'] == pytest.approx(rho / computed, rel=1e-6) and line['ratio'] != 1
    grpo.main(config(toy, tmp_path / 'alike', rewards={'countdown': 0.0}, steps=1, updates=2))
    line = metrics(tmp_path / 'alike')[0]
    assert line['ratio'] is line['ratio_max'] is None and line['clipped'] == 0


def test_truncated_completions_can_be_left_out_of_the_loss(toy, tmp_path):
    cut = dict(max_new_tokens=2, steps=1, warmup_steps=0)
    grpo.main(config(toy, tmp_path / 'a', mask_truncated=True, **cut))
    grpo.main(config(toy, tmp_path / 'b', **cut))
    a, b = metrics(tmp_path / 'a')[0], metrics(tmp_path / 'b')[0]
    assert 0.5 < a['truncated'] == b['truncated']
    assert a['advantage_std'] == b['advantage_std']  # they count in the mean of the group
    assert a['loss'] != b['loss'] and a['flops'] < b['flops']
    grpo.main(config(toy, tmp_path / 'all', max_new_tokens=1, mask_truncated=True, steps=1, seed=4))
    if metrics(tmp_path / 'all')[0]['truncated'] == 1:
        assert metrics(tmp_path / 'all')[0]['grad_norm'] == 0


def test_k1_acts_through_the_reward(toy, tmp_path):
    changes = dict(rewards={'countdown': 0.0}, kl_coef=0.5, steps=3, warmup_steps=0,
                   learning_rate=1e-2)
    # no reward but the KL's, which is 0 but for rounding
    grpo.main(config(toy, tmp_path / 'a', kl='k1', **changes))
    assert abs(metrics(tmp_path / 'a')[0]['kl']) < 1e-4
    changes['rewards'] = {'length_coin': 1.0}
    for kl in ('k1', 'k3'):
        grpo.main(config(toy, tmp_path / kl, kl=kl, **changes))
    k1, k3 = metrics(tmp_path / 'k1'), metrics(tmp_path / 'k3')
    assert k1[0]['loss'] == pytest.approx(k3[0]['loss'], abs=1e-3)
    assert k1[2]['kl'] != k3[2]['kl'] and weights(tmp_path / 'k1') != weights(tmp_path / 'k3')


def test_k1_is_in_the_reward_of_completions_out_of_the_loss_too(toy, tmp_path, monkeypatch):
    seen, plain = [], grpo.advantages
    monkeypatch.setattr(grpo, 'advantages', lambda *args: (seen.append(args), plain(*args))[1])
    grpo.main(config(toy, tmp_path / 'a', kl='k1', kl_coef=0.5, mask_truncated=True,
                     max_new_tokens=30, steps=2, warmup_steps=0, learning_rate=1e-2))
    assert metrics(tmp_path / 'a')[1]['truncated'] > 0.2
    penalty = seen[1][3]
    assert (penalty != 0).all() and penalty.abs().max() > 1e-3


def test_k1_does_not_make_a_full_advantage_of_equal_rewards(toy, tmp_path):
    changes = dict(rewards={'countdown': 0.0}, kl='k1', steps=3, warmup_steps=0, learning_rate=1e-2)
    for coef in (0.5, 0.005):
        grpo.main(config(toy, tmp_path / f'{coef}', kl_coef=coef, **changes))
        assert 0 < metrics(tmp_path / f'{coef}')[2]['advantage_std'] < coef


@pytest.mark.parametrize('changes', [{'epochs': 3}, {'epochs': 2, 'updates': 2}])
def test_epochs_go_through_a_rollout_again_with_its_log_probs_frozen(
        toy, tmp_path, monkeypatch, changes):
    logps, olds, true_forward, true_losses = [], [], grpo.forward, grpo.losses
    changes = dict(steps=1, warmup_steps=0, learning_rate=1e-2, micro_tokens=10_000, **changes)
    def forward(model, part, cfg, device, *routes):
        logp, entropy = true_forward(model, part, cfg, device, *routes)
        tokens, numbers = part['uses'].sum().item() + len(part['number']), part['number'].tolist()
        logps.append((numbers, logp.detach().clone(), torch.is_grad_enabled(), tokens))
        return logp, entropy
    def losses_of(cfg, part, logp, *rest):
        olds.append((logp.detach() if part['old_logp'] is None else part['old_logp']).clone())
        return true_losses(cfg, part, logp, *rest)
    monkeypatch.setattr(grpo, 'forward', forward)
    monkeypatch.setattr(grpo, 'losses', losses_of)
    grpo.main(config(toy, tmp_path / 'a', **changes))
    E, U = changes['epochs'], changes.get('updates', 1)
    before, trained = [x for x in logps if not x[2]], [x for x in logps if x[2]]
    # the first update's own are those that sampled
    assert len(before) == U - 1 and len(trained) == len(olds) == E * U
    frozen = [trained[0]] + before
    for k, ((numbers, logp, *_), old) in enumerate(zip(trained, olds)):
        assert numbers == frozen[k % U][0] and torch.equal(old, frozen[k % U][1])
        assert torch.equal(old, logp) == (k == 0)
    line = metrics(tmp_path / 'a')[0]
    assert line['ratio_max'] > 1.001
    grpo.main(config(toy, tmp_path / 'once', **{**changes, 'epochs': 1}))
    a = metrics(tmp_path / 'once')[0]
    assert a['reward'] == line['reward'] and a['advantage_std'] == line['advantage_std']
    active = Transformer.from_pretrained(toy / 'm').num_params(active=True)
    of_an_epoch = 6 * active * sum(x[3] for x in trained[:U])
    assert line['flops'] - a['flops'] == pytest.approx((E - 1) * of_an_epoch)


def test_two_processes_equal_one(toy, tmp_path):
    # each rank grades in a process of its own
    mine = tmp_path / 'my.py'
    mine.write_text('def tail_reward(response, row):\n    return len(response) % 5 / 5\n')
    flags = [f'--init_from={toy / "m"}', f"--data=['{toy / 'rl.jsonl'}']", '--steps=3',
             '--prompts=4', '--group=4', '--max_new_tokens=10', '--micro_tokens=96',
             '--eval_every=0', '--save_every=0', '--learning_rate=1e-3', '--threads=1',
             '--device=cpu', '--updates=2', '--kl_coef=0.1', '--bias_rate=0.01',
             '--advantage_norm=batch', '--dynamic_sampling=1', '--reward_workers=1',
             "--rewards={'repetition': 1.0, 'random': 1.0, 'tail': 0.5}", f'--reward_file={mine}']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    subprocess.run([*torchrun, 'grpo.py', f'--out_dir={tmp_path / "two"}', *flags], cwd=ROOT,
                   env=environment, check=True, timeout=300)
    grpo.main(parse(Config, [f'--out_dir={tmp_path / "one"}', *flags]))
    same(metrics(tmp_path / 'two'), metrics(tmp_path / 'one'), 2e-3)
    assert 0 < metrics(tmp_path / 'two')[0]['reward_tail'] < 1
    one = Transformer.from_pretrained(tmp_path / 'one')
    two = Transformer.from_pretrained(tmp_path / 'two')
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.allclose(a, b, atol=2e-4), name


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in sorted(Path(folder).rglob('*'))}


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_never_ended(toy, tmp_path):
    changes = dict(save_every=0, kl_coef=0.1, updates=2)
    grpo.main(config(toy, tmp_path / 'whole', steps=5, **changes))
    grpo.main(config(toy, tmp_path / 'a', steps=3, **changes))
    grpo.main(config(toy, tmp_path / 'a', steps=5, **changes))
    same(metrics(tmp_path / 'a'), metrics(tmp_path / 'whole'))
    assert weights(tmp_path / 'a') == weights(tmp_path / 'whole')


def test_a_run_with_nothing_left_to_do_says_so_and_changes_nothing(toy, tmp_path, monkeypatch):
    grpo.main(config(toy, tmp_path / 'a', steps=2))
    spent = metrics(tmp_path / 'a')[0]['flops']
    grpo.main(config(toy, tmp_path / 'b', steps=9, max_flops=spent))
    before = contents(tmp_path)
    monkeypatch.setattr(grpo, 'load_model', None)
    for out, changes, said in (('a', {'steps': 2}, 'finished model of step 2: raise steps'),
                               ('a', {'steps': 1}, 'is at step 2, past steps=1'),
                               ('b', {'steps': 9, 'max_flops': spent}, 'raise max_flops to')):
        with pytest.raises(ValueError, match=said):
            grpo.main(config(toy, tmp_path / out, **changes))
    assert contents(tmp_path) == before


def test_an_unfinished_run_past_its_steps_stops_and_changes_nothing(toy, tmp_path):
    grpo.main(config(toy, tmp_path / 'a', steps=2))
    (tmp_path / 'a' / 'config.json').unlink()
    before = contents(tmp_path)
    given = vars(config(toy, tmp_path / 'a', steps=1))
    command = [sys.executable, 'grpo.py', *(f'--{key}={value}' for key, value in given.items())]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 1 and told.stderr.startswith('grpo.py: ')
    assert 'past steps=1' in told.stderr and told.stderr.count('\n') == 1
    assert contents(tmp_path) == before


def test_prompts_without_room_are_named_or_dropped_and_counted(toy, tmp_path, capsys, monkeypatch):
    rows = (toy / 'rl.jsonl').read_text().splitlines()
    long = json.loads(rows[0])
    long['prompt'][0]['content'] += ' plus' * 300
    mixed = [*rows[:3], json.dumps(long), *rows[3:6], json.dumps(long)]
    for name, kept in (('mixed', mixed), ('short', rows[:6])):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(kept) + '\n')
    given = {name: config(toy, tmp_path / name, data=[f'{tmp_path}/{name}.jsonl'], steps=1)
             for name in ('mixed', 'short')}
    context = ModelConfig.read(toy / 'm' / 'config.json').max_position_embeddings
    new = given['mixed'].max_new_tokens
    where = (rf'{tmp_path}/mixed.jsonl, row 4: the prompt has 30\d tokens, and '
             f'max_new_tokens={new} leaves room for {context - new} in the context of {context}')
    with monkeypatch.context() as patch:
        patch.setattr(grpo, 'load_model', None)
        with pytest.raises(ValueError, match=where + r' \(2 of 8 rows are too long\)'):
            grpo.main(given['mixed'])
        changes = dict(eval_data=[f'{tmp_path}/mixed.jsonl'])
        with pytest.raises(ValueError, match=where):
            grpo.main(config(toy, tmp_path / 'c', **changes))
        with pytest.raises(ValueError, match=where.replace('row 4', 'row 1')):
            (tmp_path / 'mixed.jsonl').write_text(json.dumps(long) + '\n')
            grpo.main(config(toy, tmp_path / 'c', long_prompts='drop', **changes))
    (tmp_path / 'mixed.jsonl').write_text('\n'.join(mixed) + '\n')
    given['mixed'].long_prompts = 'drop'
    grpo.main(given['mixed'])
    assert re.search(where + '; 2 of 8 rows are too long and dropped', capsys.readouterr().err)
    grpo.main(given['short'])
    same(metrics(tmp_path / 'mixed'), metrics(tmp_path / 'short'))


def test_a_prompt_that_the_template_refuses_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, 'load_model', None)
    rows = [json.loads(line) for line in (toy / 'rl.jsonl').read_text().splitlines()]
    rows[2]['prompt'].insert(0, {'role': 'system', 'content': 'be short'})
    prepare.write_rows(path := tmp_path / 'rows.jsonl', rows)
    said = f'^{path}, row 3: the chat template fails: the toy template has no role system$'
    for changes in ({'data': [str(path)]}, {'eval_data': [str(path)]},
                    {'data': [str(path)], 'show': 3}):
        with pytest.raises(ValueError, match=said):
            grpo.main(config(toy, tmp_path / 'a', **changes))
    with pytest.raises(ValueError, match=said):
        evaluate.main(evaluate.Config(checkpoint=str(toy / 'm'), data=[str(path)]))


@pytest.mark.parametrize('changes, said', [
    ({'rewards': {'acuracy': 1.0}}, "did you mean 'accuracy'"),
    ({'data': ['absent.jsonl']}, 'absent.jsonl does not exist'),
    ({'eval_data': ['absent.jsonl']}, 'absent.jsonl does not exist'),
    ({'init_from': 'out/none/base'}, 'does not exist: run make r1 RUN=out/none, or set init_from'),
    ({'init_from': 'model'}, '^model does not exist: set init_from to a folder or a hub id, own'),
    ({'init_from': str(ROOT / 'README.md')}, 'README.md is no folder: set init_from to the folder'),
    ({'tokenizer': './none'}, '^./none does not exist: set tokenizer to a folder or a hub id, '),
])
def test_mistakes_are_told_before_the_model_is_loaded(toy, tmp_path, changes, said, monkeypatch):
    monkeypatch.setenv('RUN', 'out/none')
    monkeypatch.setattr(grpo, 'load_model', None)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        grpo.main(config(toy, tmp_path / 'a', **changes))
    assert not (tmp_path / 'a').exists()


def test_a_few_rollouts_are_always_written_to_be_read(toy, tmp_path):
    grpo.main(config(toy, tmp_path / 'a', steps=4, samples_every=2, rewards={'half': 1.0}))
    text = (tmp_path / 'a' / 'samples.txt').read_text(encoding='utf-8')
    rows = [json.loads(line) for line in (toy / 'rl.jsonl').read_text().splitlines()]
    seen = re.findall(r'^step (\d), (\S+) row (\d+): half (\S+), total (\S+), advantage (\S+), '
                      r'tokens (\d+)\n  prompt\n    (.*)\n  response\n', text, re.M)
    assert {int(step) for step, *_ in seen} == {1, 2, 4}
    for _, path, row, half, total, _, _, prompt in seen:
        assert path == str(toy / 'rl.jsonl') and half == total
        (message,) = rows[int(row) - 1]['prompt']
        assert prompt == f'⟦<|user|>⟧{message["content"]}⟦<|assistant|>⟧'
    first = [float(advantage) for step, *_, advantage, _, _ in seen if step == '1']
    assert first[0] > 0 > first[1]  # the best of its group, and the worst
    grpo.main(config(toy, tmp_path / 'b', steps=1, samples_every=0))
    assert (tmp_path / 'b' / 'samples.txt').read_text() == ''


def test_show_prints_prompts_and_what_their_own_answers_earn(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grpo, 'load_model', None)
    prompt = [{'role': 'user', 'content': ' 1 2 3'}]
    rows = [{'prompt': prompt, 'task': 'countdown', 'numbers': [2, 3, 7], 'target': 13},
            {'prompt': prompt, 'task': 'math', 'answer': '1/2'},
            {'prompt': prompt, 'task': 'choice', 'answer': 'B'}]
    (tmp_path / 'x.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    both = {'accuracy': 1.0, 'format': 0.5}
    for prefill, start in (('', '<think> I know the answer.</think>'),
                           ('<think>', ' I know the answer.</think>'), ('<think></think>', '')):
        grpo.main(config(toy, tmp_path / 'a', data=[f'{tmp_path}/x.jsonl'], show=3, rewards=both,
                         prefill=prefill))
        shown = capsys.readouterr().out
        assert shown.count(f'    ⟦<|user|>⟧ 1 2 3⟦<|assistant|>⟧{prefill}\n') == 3
        format, total = (1, 1.5) if start else (0, 1)  # nothing was thought
        assert shown.count(f'rewarded with accuracy 1, format {format}, total {total}') == 3
        assert shown.count(f'\n    {start}<answer> ') == 3
        assert f'{start}<answer> 1/2</answer>' in shown
    assert not (tmp_path / 'a').exists()


def test_settings_that_do_nothing_are_told(toy, tmp_path, capsys):
    changes = dict(reference_every=5, clip_high=0.3, min_lr=0.5, eval_rows=3, shard_ranks=2,
                   unsafe_code=True)
    cfg = config(toy, tmp_path / 'a', show=1, **changes)
    grpo.main(cfg)
    told = capsys.readouterr().err
    for key, value in {**changes, 'eval_every': 0}.items():
        assert f'warning: {key}={value} does nothing: ' in told, key
    assert told.count('does nothing') == len(changes) + 1
    grpo.main(config(toy, tmp_path / 'a', show=1, eval_every=5, **{
        'reference_every': 5, 'kl_coef': 0.1, 'clip_high': 0.3, 'updates': 2, 'kl': 'k1'}))
    assert 'does nothing' not in capsys.readouterr().err


UNEQUAL = {'one prompt': dict(prompts=1, eval_rows=1),
           'two of eight': dict(prompts=2, group=8, updates=2, kl_coef=0.1, kl='k1', eval_rows=4,
                                replay_routes=True, bias_rate=0.01, activation_checkpointing=True,
                                dynamic_sampling=1)}


def train_each(settings):
    for one in settings:
        grpo.main(Config(**one))


def test_ranks_with_unequal_prompts_and_drafts_train_what_one_does(toy, tmp_path, ranks):
    """What a rank samples last, drafts or nothing, must not decide what its backward gathers."""
    tokenizer = grpo.load_model(config(toy, 'unused'), CPU)[1]
    shape = dict(TINY, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(n_routed_experts=4, num_nextn_predict_layers=1, **shape))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_id] += 0.1
    model.save_pretrained(tmp_path / 'm')
    tokenizer.save_pretrained(tmp_path / 'm')

    def settings(world):
        common = dict(init_from=str(tmp_path / 'm'), steps=2, device='cpu', eval_every=1,
                      eval_data=[str(toy / 'rl.jsonl')], rewards={'repetition': 1.0, 'random': 1.0})
        return [vars(config(toy, tmp_path / f'{name} {world}', **common, **changes))
                for name, changes in UNEQUAL.items()]

    def told(name, world):  # but for the drafts, which depend on the rows of a rank
        lines = metrics(tmp_path / f'{name} {world}')
        return [{key: line[key] for key in line.keys() - {'mtp_acceptance', 'eval_drafts_accepted'}}
                for line in lines]
    train_each(settings(1))
    for world in (2, 3):
        ranks(world, train_each, settings(world))
        for name in UNEQUAL:
            same(told(name, world), told(name, 1), 2e-3)


def test_without_a_baseline_a_group_may_be_one_completion(toy, tmp_path):
    r = torch.tensor([[2.0], [0.0], [1.0]])
    assert torch.equal(advantages(r, 'none', 'none')[0], r)
    assert torch.allclose(advantages(r, 'batch', 'none')[0], r)  # their deviation is 1
    how = dict(group=1, prompts=8, baseline='none', steps=1, objective='reinforce')
    grpo.main(config(toy, tmp_path / 'a', advantage_norm='none', **how))
    line = metrics(tmp_path / 'a')[0]
    assert line['grad_norm'] > 0 and line['advantage_std'] > 0 and line['reward'] > 0
    with pytest.raises(ValueError, match='2 or more completions'):
        config(toy, 'unused', advantage_norm='group', **how)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match='prompts=4 does not divide'):
        parse(Config, ['--prompts=4', '--updates=3'])
    off = parse(Config, ['--clip_low=inf', '--clip_high=inf'])
    assert off.clip_low == off.clip_high == math.inf
    for wrong, said in (
            ('data=[]', 'data is empty'),
            ('group=1', '2 or more completions'),
            ('prompts=0', 'prompts must be 1 or more'),
            ('epochs=0', 'epochs must be 1 or more'),
            ('clip_low=-0.1', 'clip_low must be 0 or more'),
            ('kl_coef=inf', 'kl_coef must be 0 or more'),
            ('baseline=median', "baseline must be 'mean' or 'none'"),
            ('learning_rate=1e400', 'learning_rate must be 0 or more'),
            ("rewards={'accuracy': 'x'}", 'rewards must be'),
            ('loss_norm=mean', "must be 'sequence' or 'token' or 'constant', not 'mean'"),
            ('dtype=bf16', "dtype must be 'float32' or 'bfloat16', not 'bf16'"),
            ('schedule=cosin', "not 'cosin'")):
        with pytest.raises(ConfigError, match=said):
            parse(Config, [f'--{wrong}'])


@pytest.mark.parametrize(
    'name', ['grpo', 'deepseek', 'dr_grpo', 'dapo', 'gspo', 'cispo', 'reinforce'])
def test_presets_are_the_variants_tested_above(name):
    cfg = parse(Config, [str(ROOT / 'config' / f'grpo_{name}.py')])
    tested = Config(**VARIANTS.get(name, dict(loss_norm='sequence')))
    for key in ('objective', 'ratio', 'advantage_norm', 'loss_norm', 'kl'):
        assert getattr(cfg, key) == getattr(tested, key), key
    assert cfg.out_dir == Config().out_dir  # they go on top of a run's file


def test_a_compute_budget_ends_the_run(toy, tmp_path):
    grpo.main(config(toy, tmp_path / 'a', steps=2))
    budget = metrics(tmp_path / 'a')[0]['flops'] * 1.5
    grpo.main(config(toy, tmp_path / 'b', steps=50, max_flops=budget))
    assert metrics(tmp_path / 'b')[-1]['step'] == 2


@pytest.mark.parametrize('kind', ['linear', 'cosine'])
def test_the_rate_of_a_run_that_ends_by_its_compute_comes_down_with_it(
        toy, tmp_path, kind, capsys, monkeypatch):
    decay = dict(schedule=kind, min_lr=0.1, warmup_steps=0)
    grpo.main(config(toy, tmp_path / 'plain', steps=1, **decay))
    budget = 8 * metrics(tmp_path / 'plain')[0]['flops']
    grpo.main(config(toy, tmp_path / 'a', steps=50, max_flops=budget, **decay))
    lines = metrics(tmp_path / 'a')
    rates = [line['lr'] / 1e-3 for line in lines]
    assert len(rates) < 20 and rates[0] == 1.0 and rates == sorted(rates, reverse=True)
    assert 0.1 < rates[-1] < 0.3
    spent = [0.0, *(line['flops'] / budget for line in lines)]
    for share, rate in zip(spent, rates):
        tail = 1 - share if kind == 'linear' else 0.5 * (1 + math.cos(math.pi * share))
        assert rate == pytest.approx(0.1 + 0.9 * tail)

    # stopped and gone on it is the same run
    counter = iter(range(100))
    budgeted = dict(steps=50, max_flops=budget, **decay)
    with monkeypatch.context() as patch:
        patch.setattr(grpo.Stop, 'wanted', lambda self, device: next(counter) >= 2)
        with pytest.raises(SystemExit):
            grpo.main(config(toy, tmp_path / 'cut', **budgeted))
    grpo.main(config(toy, tmp_path / 'cut', **budgeted))
    same(metrics(tmp_path / 'cut'), lines)
    assert weights(tmp_path / 'cut') == weights(tmp_path / 'a')

    # steps that end sooner are what counts
    grpo.main(config(toy, tmp_path / 'b', steps=4, max_flops=100 * budget, **decay))
    assert metrics(tmp_path / 'b')[-1]['lr'] == pytest.approx(1e-4)
    # and a run that goes on with more is told of the jump, from the rate that it had
    capsys.readouterr()
    grpo.main(config(toy, tmp_path / 'a', steps=len(lines) + 1, max_flops=2 * budget, **decay))
    assert (f'the learning rate jumps from {lines[-1]["lr"]:.3g} in step {len(lines)} to '
            in capsys.readouterr().err)


def test_a_step_without_any_variance_is_counted_told_and_changes_nothing(toy, tmp_path, capsys):
    grpo.main(config(toy, tmp_path / 'a', rewards={'countdown': 0.0}, steps=2))
    assert [line['zero_variance'] for line in metrics(tmp_path / 'a')] == [1.0, 1.0]
    for line in metrics(tmp_path / 'a'):
        assert line['entropy'] > 1 and line['clipped'] == 0
        assert line['ratio'] == line['ratio_max'] == 1
        assert line['mismatch'] is line['mismatch_max'] is line['kl'] is None  # not computed
    assert capsys.readouterr().err.count('every group scored alike') == 1  # once
    before = Transformer.from_pretrained(toy / 'm')
    after = Transformer.from_pretrained(tmp_path / 'a')
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    grpo.main(config(toy, tmp_path / 'kl', rewards={'countdown': 0.0}, steps=1, kl_coef=0.1))
    assert metrics(tmp_path / 'kl')[0]['entropy'] > 0  # with a KL term they are


# --------------------------------------------------------------------------------------------------
# guards


def test_numbers_of_a_rollout_counted_by_hand():
    def sample(task, total, accuracy, length, finished=True, mixed=False):
        parts = {'accuracy': accuracy, 'format': total - accuracy}
        score = {'task': task, 'total': total, 'rewards': parts, 'length': length,
                 'finished': finished, 'mixed': mixed}
        return Sample([1, 2], [3] * length, [], score)
    cut = sample('countdown', 0.2, 0.0, 30, finished=False)
    mixed = sample('countdown', 0.0, 0.0, 70, mixed=True)
    every = [[sample('countdown', 1.2, 1.0, 10), cut],
             [sample('countdown', 0.0, 0.0, 50), mixed],
             [sample('preference', 0.5, 0.5, 5), sample('preference', 0.9, 0.9, 7)]]
    got = grpo.rollout_numbers(Config(rewards={'accuracy': 1.0, 'format': 1.0}), every)
    assert got == pytest.approx({
        'reward': 2.8 / 6, 'length': 172 / 6, 'right': 1 / 4, 'truncated': 1 / 6, 'mixing': 1 / 6,
        'zero_variance': 1 / 3, 'reward_accuracy': 2.4 / 6, 'reward_format': 0.4 / 6,
        'length_right': 10, 'length_wrong': 50, 'sampled_groups': 3, 'judged': 0.7})


def test_right_is_not_there_where_nobody_scored_the_task_and_is_never_a_total():
    def sample(total, **parts):
        score = {'task': 'math', 'total': total, 'rewards': parts}
        return Sample([1, 2], [3], [], {**score, 'length': 1, 'finished': True, 'mixed': False})
    tossed = [[sample(1.0, random=1.0), sample(0.0, random=0.0)]]
    coin = grpo.rollout_numbers(Config(rewards={'random': 1.0}), tossed)
    assert not {'right', 'length_right', 'length_wrong', 'judged'} & coin.keys()
    assert coin['reward'] == 0.5
    weights = {'accuracy': 0.0, 'random': 1.0}
    control = [[sample(1.0, random=1.0, accuracy=0.0), sample(0.0, random=0.0, accuracy=1.0)]]
    assert grpo.rollout_numbers(Config(rewards=weights), control)['right'] == 0.5
    by_name = [[sample(3.0, math=0.5), sample(3.0, math=0.9)]]  # graded, weighed by 3
    got = grpo.rollout_numbers(Config(rewards={'math': 3.0}), by_name)
    assert got['right'] == 0 and got['length_right'] is None and got['length_wrong'] == 1


def test_what_there_is_nothing_of_is_null():
    score = {'task': 'countdown', 'total': 0.0, 'rewards': {'accuracy': 0.0}, 'length': 3,
             'finished': True, 'mixed': False}
    every = [[Sample([1], [3] * 3, [], score)] * 2]
    got = grpo.rollout_numbers(Config(rewards={'accuracy': 1.0}), every)
    assert got['length_right'] is None and got['length_wrong'] == 3 and got['right'] == 0
    well = dict(reward=0.5, zero_variance=0.4, truncated=0.1, kl=None, entropy=0.3,
                mismatch_kl=None, reward_failures=0)
    assert grpo.warnings_of(well, {'entropy': 0.5}) == {}


def test_warnings_say_the_cause_and_the_key():
    well = dict(reward=0.5, zero_variance=0.4, truncated=0.1, kl=0.01, entropy=0.3,
                mismatch_kl=1e-4, reward_failures=0)
    assert grpo.warnings_of(well, {'entropy': 0.5}) == {}
    cases = {'zero variance': ({'zero_variance': 1}, 'prefill'),
             'truncated': ({'truncated': 1}, 'max_new_tokens'),
             'kl': ({'kl': 3.0}, 'learning_rate'),
             'entropy': ({'entropy': 0.001}, 'clip_high'),
             'mismatch': ({'mismatch_kl': 0.5}, 'tis=2')}
    keys = set(Config.__dataclass_fields__)
    for name, (changes, key) in cases.items():
        wrong = grpo.warnings_of({**well, **changes}, {'entropy': 0.5})
        assert list(wrong) == [name] and key in wrong[name] and key.split('=')[0] in keys


def test_rewards_that_fail_are_told_by_name(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rewards, 'FAILURES', type(rewards.FAILURES)())
    monkeypatch.setattr(rewards, 'EXAMPLES', {})
    monkeypatch.setitem(rewards.REWARDS, 'length_coin',
                        lambda response, row: row['target'] % 2 or row['tagret'])
    grpo.main(config(toy, tmp_path / 'a', steps=2))
    assert "length_coin: KeyError 8 times (KeyError: 'tagret')" in capsys.readouterr().err
    assert [line['reward_failures'] for line in metrics(tmp_path / 'a')] == [8, 8]


def test_a_run_whose_reward_raises_on_all_of_its_first_step_stops_and_shows_the_error(
        toy, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, 'EXAMPLES', {})
    monkeypatch.setitem(rewards.REWARDS, 'length_coin', lambda response, row: row['tagret'])
    said = "'length_coin' failed on all of 16 samples: KeyError: 'tagret'"
    with pytest.raises(ValueError, match=said):
        grpo.main(config(toy, tmp_path / 'a', rewards={'format': 1.0, 'length_coin': 1.0}))
    assert metrics(tmp_path / 'a') == []


def test_a_row_without_what_its_task_reads_is_refused_before_the_first_step(toy, tmp_path):
    rows = [json.loads(line) for line in (toy / 'rl.jsonl').read_text().splitlines()]
    del rows[5]['target']
    prepare.write_rows(tmp_path / 'bad.jsonl', rows)
    bad = str(tmp_path / 'bad.jsonl')
    train = {'data': [bad], 'rewards': {'accuracy': 1.0}}
    for changes in (train, {'eval_data': [bad], 'eval_every': 1}):
        with pytest.raises(ValueError, match=f"^{bad}:6: 'target' is missing"):
            grpo.main(config(toy, tmp_path / 'a', **changes))
    grpo.main(config(toy, tmp_path / 'a', data=[bad], steps=1))  # nobody reads it


def test_a_reward_file_is_a_reward_and_a_task_its_hash_is_kept_and_a_change_told(
        toy, tmp_path, capsys):
    mine = tmp_path / 'my.py'
    mine.write_text('def coin_reward(response, row):\n    return len(response) % 3 / 2\n'
                    'coin_reward.needs = ("side",)\n')
    rows = [{'prompt': f' {n} {n + 1} {n + 2} make 6', 'task': 'coin', 'side': 'head'}
            for n in range(8)]
    prepare.write_rows(tmp_path / 'coin.jsonl', rows)
    changes = dict(data=[str(tmp_path / 'coin.jsonl')], eval_data=[str(tmp_path / 'coin.jsonl')],
                   rewards={'coin': 1.0}, reward_file=str(mine), eval_every=1, reward_workers=1)
    try:
        grpo.main(config(toy, tmp_path / 'a', steps=1, save_every=1, **changes))
        first, line = metrics(tmp_path / 'a')[0], metrics(tmp_path / 'a')[1]
        assert 0 < line['reward'] == line['reward_coin'] < 1 and 0 < line['right'] < 1
        assert 0 < first['eval_accuracy'] < 1 and 0 < first['eval_pass1'] < first['eval_accuracy']
        state = torch.load(tmp_path / 'a' / 'step_00000001' / 'state.pt', weights_only=True)
        digest = hashlib.sha256(mine.read_bytes()).hexdigest()
        assert state['reward_file'] == {'path': str(mine), 'sha256': digest}
        (tmp_path / 'a' / 'config.json').unlink()
        grpo.main(config(toy, tmp_path / 'a', steps=2, **changes))
        assert 'others score' not in capsys.readouterr().err
        (tmp_path / 'a' / 'config.json').unlink()
        shutil.rmtree(tmp_path / 'a' / 'step_00000002', ignore_errors=True)
        mine.write_text(mine.read_text().replace('% 3 / 2', '% 2'))
        grpo.main(config(toy, tmp_path / 'a', steps=2, **changes))
        assert (f'from step 1 on others score: the reward_file of the checkpoint was {mine} '
                f'(sha256 {digest[:12]}), now it is {mine}') in capsys.readouterr().err
        prepare.write_rows(tmp_path / 'coin.jsonl', [*rows, {'prompt': '1', 'task': 'coin'}])
        with pytest.raises(ValueError, match=r"coin.jsonl:9: 'side' is missing"):
            grpo.main(config(toy, tmp_path / 'b', **changes))
        with pytest.raises(ValueError, match="unknown reward 'coinn'.*did you mean 'coin'"):
            grpo.main(config(toy, tmp_path / 'b', **{**changes, 'rewards': {'coinn': 1.0}}))
    finally:
        rewards.use_file('')
        rewards.prepare({'format': 1.0}, ())


def test_an_update_that_is_not_finite_is_skipped_and_too_many_stop_the_run(
        toy, tmp_path, monkeypatch, capsys):
    true, calls, bad = grpo.policy_loss, iter(range(100)), {1}
    def broken(*args):
        loss, low, high = true(*args)
        return (loss * float('nan') if next(calls) in bad else loss), low, high
    monkeypatch.setattr(grpo, 'policy_loss', broken)
    whole = dict(micro_tokens=10_000, steps=3)
    grpo.main(config(toy, tmp_path / 'a', **whole))
    assert [line['skipped'] for line in metrics(tmp_path / 'a')] == [0, 1, 0]
    told = capsys.readouterr().err
    assert 'step 2: loss or gradient is not finite, update skipped (1 in a row)' in told
    state = Transformer.from_pretrained(tmp_path / 'a').state_dict()
    assert all(torch.isfinite(t).all() for t in state.values())
    calls, bad = iter(range(100)), set(range(1, 9))
    with pytest.raises(FloatingPointError, match='3 updates in a row.*bad_batch_rank0.pt'):
        grpo.main(config(toy, tmp_path / 'b', **{**whole, 'steps': 9}))
    saved = torch.load(tmp_path / 'b' / 'bad_batch_rank0.pt', weights_only=True)
    assert saved['step'] == 3 and saved['update'] == 0  # and the batch goes through the loss again
    part = saved['parts'][0]
    model = Transformer.from_pretrained(toy / 'm')
    logp, _ = grpo.forward(model, part, config(toy, 'x'), CPU)
    loss, *_ = losses(config(toy, 'x'), part, logp, saved['advantage'], saved['weight'])
    assert not torch.isfinite(loss) and torch.isfinite(logp).all()


# ---- presets of real models: what the prompt asks for is what the rewards want

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
KIMI = ("{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}")
TOKENIZERS = {  # pattern, added tokens, template, bos, eos: as the hub's
    'qwen2': ('qwen2', ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], CHATML, None,
              '<|endoftext|>'),
    'kimi': ('kimi', ['[BOS]', '[EOS]', '<|im_end|>', '<|im_user|>', '<|im_assistant|>',
                      '<|im_middle|>'], KIMI, '[BOS]', '[EOS]')}
FAMILIES = {
    'qwen2': dict(model_type='qwen2', num_hidden_layers=1, hidden_size=32, num_attention_heads=2,
                  num_key_value_heads=2, intermediate_size=48),
    'kimi': dict(TINY, first_k_dense_replace=1)}
PRESETS = {'grpo_qwen2.5_1.5b': 'qwen2', 'grpo_qwen2.5_7b': 'qwen2', 'grpo_moonlight': 'kimi'}
SHARED = ROOT.parent / 'shared' / 'tokenizers' / 'qwen2'
PROBLEM = {'prompt': [{'role': 'user', 'content': 'What is 6 times 7?'}], 'answer': '42',
           'task': 'math'}
R1_ZERO_ANSWER = ' Six sevens are 42. </think> <answer> 42 </answer>'


def family_tokenizer(family, tags=()):
    # '>\n' is one token of Qwen's: it ends an answer and is no part of it
    pattern, added, template, bos, eos = TOKENIZERS[family]
    words = ['>\n', ' the', ' answer', 'think', 'answer']
    return Tokenizer.from_words(words, [*added, *tags], pattern, template, bos, eos)


def scored_perfect(cfg, tokenizer, problem, answer, more=''):
    """The score of an answer to the prompt that the settings make; the prompt, which is printed"""
    rows = [instructed(problem, cfg.instruction)]
    (prompt,), rows = encode_prompts(tokenizer, rows, cfg.prefill)
    print(tokenizer.decode(prompt))
    completion = Completion(tokenizer.encode_assistant(answer + more), [], True)
    ((score,),) = evaluate.score(tokenizer, rows, [[completion]], cfg.rewards, cfg.stop)
    return score, tokenizer.decode(prompt)


@pytest.mark.parametrize('tags', [(), data_tokenizer.TAGS], ids=['text', 'tokens'])
@pytest.mark.parametrize('name', PRESETS)
def test_a_perfect_answer_earns_the_full_reward_of_a_preset(name, tags):
    cfg = parse(Config, [str(ROOT / 'config' / f'{name}.py')])
    assert set(cfg.rewards) == {'accuracy', 'format'}
    tokenizer = family_tokenizer(PRESETS[name], tags)
    tokenizer.chat_template = data_tokenizer.TEMPLATES[cfg.chat_template]
    # a base model goes on: with the rest of the token that ended the answer, with another question
    for more in ('', '\n', '\nUser: What is 1 + 1?'):
        score, prompt = scored_perfect(cfg, tokenizer, PROBLEM, R1_ZERO_ANSWER, more)
        assert score['total'] == sum(cfg.rewards.values()) and score['response'] == R1_ZERO_ANSWER
    assert '<think> reasoning process here </think> <answer> answer here </answer>' in prompt
    assert prompt.endswith('User: What is 6 times 7?. Assistant: <think>')
    score, _ = scored_perfect(cfg, tokenizer, PROBLEM, ' It is 42. </think> The answer is 42.')
    assert score['total'] == 0


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason='no shared files')
def test_a_perfect_answer_in_the_tokens_of_qwen(tmp_path):
    for name in ('vocab.json', 'merges.txt', 'tokenizer_config.json'):
        (tmp_path / name).symlink_to(SHARED / name)
    cfg = parse(Config, [str(ROOT / 'config' / 'grpo_qwen2.5_1.5b.py')])
    tokenizer = Tokenizer.from_pretrained(tmp_path, cfg.chat_template)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode_assistant(cfg.prefill)]
    assert pieces == [' <', 'think', '>']
    score, _ = scored_perfect(cfg, tokenizer, PROBLEM, R1_ZERO_ANSWER, '\nUser:')
    assert score['total'] == sum(cfg.rewards.values()) and score['response'] == R1_ZERO_ANSWER


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_runs_on_a_small_model_of_its_family(tmp_path, name):
    cfg = parse(Config, [str(ROOT / 'config' / f'{name}.py')])
    tokenizer = family_tokenizer(PRESETS[name])
    torch.manual_seed(0)
    shape = {**FAMILIES[PRESETS[name]], 'max_position_embeddings': 1024}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    model.save_pretrained(tmp_path / 'm')
    tokenizer.save_pretrained(tmp_path / 'm')
    prepare.write_rows(tmp_path / 'rl.jsonl', [PROBLEM] * 4)
    data = [str(tmp_path / 'rl.jsonl')]
    grpo.main(replace(cfg, out_dir=str(tmp_path / 'a'), init_from=str(tmp_path / 'm'), data=data,
                      eval_data=data, dtype='float32', steps=1, prompts=4, group=2,
                      max_new_tokens=6, micro_tokens=2048, slots=8, eval_every=1, eval_rows=1,
                      save_every=0, threads=1))
    first, step, last = metrics(tmp_path / 'a')
    assert first['eval_problems'] == last['eval_problems'] == 1 and step['length'] > 0
    saved = Tokenizer.from_pretrained(tmp_path / 'a')  # chats as it was trained
    assert saved.chat_template == data_tokenizer.TEMPLATES['r1_zero']
    assert saved.eos_id in saved.stop_ids


def test_an_instruct_model_is_asked_by_instruction():
    """The command of the README: a model with a chat template of its own, and both rewards."""
    asked = ('Reason within <think> </think> tags, then give the final answer within '
             '<answer> </answer> tags.')
    cfg = config(ROOT, 'unused', rewards={'accuracy': 1.0, 'format': 0.2}, instruction=asked)
    answer = '<think>\n6 * 7\n</think>\n<answer>42</answer>'
    score, prompt = scored_perfect(cfg, family_tokenizer('qwen2'), PROBLEM, answer)
    assert score['total'] == 1.2 and f'What is 6 times 7?\n{asked}<|im_end|>' in prompt


@pytest.mark.parametrize('name', ['zero', 'rl', 'final', 'student_rl'])
def test_a_perfect_answer_earns_the_full_reward_of_the_toys_presets(name):
    cfg = parse(Config, [str(ROOT / 'config' / 'r1' / f'{name}.py')])
    rng, numbers, target = random.Random(0), (2, 3, 4), 24
    row = prepare.rl_problem(rng, numbers, target)
    reasoning, expression = prepare.trace(rng, row['numbers'], target, 'search', 'en')
    answer = prepare.respond(rng, reasoning, expression, broken=False)
    score, _ = scored_perfect(cfg, prepare.toy_tokenizer(), row, answer)
    assert score['total'] == pytest.approx(sum(cfg.rewards.values()))


def test_instruction_and_stop_reach_rollouts_and_evaluation(toy, tmp_path, monkeypatch):
    seen = []
    def generate(self, prompts, *args, **how):
        seen.append((self.stop_strings, {self.tokenizer.decode(ids) for ids in prompts}))
        return plain(self, prompts, *args, **how)
    plain = Sampler.generate
    monkeypatch.setattr(Sampler, 'generate', generate)
    grpo.main(config(toy, tmp_path / 'a', steps=1, instruction=' sort', stop=['!'], eval_every=1,
                     eval_rows=3, eval_data=[str(toy / 'rl.jsonl')], prefill='<think>'))
    assert len(seen) == 3 and all(stop == ['!'] for stop, _ in seen)
    ends = [text.endswith('\n sort<|assistant|><think>') for _, texts in seen for text in texts]
    assert len(ends) == 10 and all(ends)
    with pytest.raises(ConfigError, match='stop'):
        parse(Config, ["--stop=['']"])


def test_a_run_resumed_on_another_day_samples_the_same(toy, tmp_path, monkeypatch):
    class AnotherDay(datetime):
        @classmethod
        def now(cls):
            return cls(2031, 2, 3)
    today = "{{ strftime_now('%d %B') }}" + data_tokenizer.TOY_TEMPLATE
    (tmp_path / 'today.jinja').write_text(today)
    changes = dict(chat_template=str(tmp_path / 'today.jinja'), steps=2, prompts=2)
    grpo.main(config(toy, tmp_path / 'whole', **changes))
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(grpo.Stop, 'wanted', lambda self, device: next(calls) >= 1)
        with pytest.raises(SystemExit):
            grpo.main(config(toy, tmp_path / 'cut', **changes))
    monkeypatch.setattr(grpo.checkpoint, 'datetime', AnotherDay)
    grpo.main(config(toy, tmp_path / 'cut', **changes))
    same(metrics(tmp_path / 'cut'), metrics(tmp_path / 'whole'))
    assert weights(tmp_path / 'cut') == weights(tmp_path / 'whole')


@pytest.mark.parametrize('name', FAMILIES_OF_TEMPLATES)
def test_training_rollouts_evaluation_and_chat_have_one_prompt(tmp_path, monkeypatch, name):
    template, arguments, _, closes = FAMILIES_OF_TEMPLATES[name]
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(template)
    tokenizer.save_pretrained(tmp_path / 'm')
    shape = {**FAMILIES['qwen2'], 'max_position_embeddings': 256}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    model.save_pretrained(tmp_path / 'm')
    question = {'role': 'user', 'content': ' 1 + 1?\n'}
    problem = {'prompt': [question], 'answer': '2', 'task': 'match'}
    answer = {'role': 'assistant', 'content': 'two' if closes else '<think>\nhm\n</think>\n\ntwo'}
    prepare.write_rows(tmp_path / 'rl.jsonl', [problem])
    prepare.write_rows(tmp_path / 'sft.jsonl', [{'messages': [question, answer]}])
    seen, plain = [], Sampler.generate
    def generate(self, prompts, *args, **how):
        seen.extend(prompts)
        return plain(self, prompts, *args, **how)
    monkeypatch.setattr(Sampler, 'generate', generate)

    here = dict(template_args=arguments, threads=1)
    data = [str(tmp_path / 'rl.jsonl')]
    rollouts = dict(data=data, eval_data=data, eval_every=1, steps=1, prompts=1, group=2, **here)
    grpo.main(config(tmp_path, tmp_path / 'a', max_new_tokens=4, **rollouts))
    evaluation = dict(data=data, n=1, greedy=False, max_new_tokens=4)
    evaluate.main(evaluate.Config(checkpoint=str(tmp_path / 'm'), **evaluation, **here))
    lines = iter([question['content'], ''] * 2)
    monkeypatch.setattr('builtins.input', lambda _: next(lines))
    for checkpoint, given in ((tmp_path / 'm', here), (tmp_path / 'a', dict(threads=1))):
        # what was trained talks as it was trained, without the key
        talk = sample_script.Config(checkpoint=str(checkpoint), chat=True, max_new_tokens=2,
                                    **given)
        sample_script.main(talk)
    cfg = sft.Config(init_from=str(tmp_path / 'm'), data=[str(tmp_path / 'sft.jsonl')], **here)
    _, trained = sft.load_model(cfg, 'cpu')
    ids, mask = (x.tolist() for x in sft.tokenise(cfg, trained)[0])
    assert len(seen) == 6 and all(ids[:mask.index(1)] == prompt for prompt in seen)
