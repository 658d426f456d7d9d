"""grpo.py: the maths against a slow reference from the papers' formulas, packing, and whole runs on a tiny model."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo
from data.countdown import prepare
from grpo import Config, Sample, advantages, k3, pack_samples, policy_loss, token_weights
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(model_type='deepseek_v3', num_hidden_layers=2, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
            max_position_embeddings=96)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """A folder with a tiny untrained checkpoint and problem files."""
    folder = tmp_path_factory.mktemp('toy')
    tokenizer = prepare.toy_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, **TINY))
    with torch.no_grad():  # ends and answers by chance, so that rewards differ within groups
        model.lm_head.weight[tokenizer.eos_id] += 0.1
    model.save_pretrained(folder / 'm')
    tokenizer.save_pretrained(folder / 'm')
    import random
    rng = random.Random(0)
    rows = [prepare.rl_problem(rng, (1 + i, 2, 3), 6 + i) for i in range(8)]
    prepare.write_rows(folder / 'rl.jsonl', rows)
    return folder


def config(toy, out, **changes):
    return Config(**{**dict(out_dir=str(out), init_from=str(toy / 'm'), data=[str(toy / 'rl.jsonl')], rewards={'length_coin': 1.0}, steps=4,
                            prompts=4, group=4, max_new_tokens=10, row_len=48, micro_rows=2, eval_every=0, save_every=0, learning_rate=1e-3,
                            threads=1), **changes})


@pytest.fixture(autouse=True)
def coin(monkeypatch):
    """A reward that an untrained model gets different values of."""
    import rewards
    monkeypatch.setitem(rewards.REWARDS, 'length_coin', lambda response, row: float(len(response) % 3))


def test_advantages_are_standardised_in_the_group_and_zero_without_variance():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
    A, varies = advantages(r, scale=True)
    assert varies.tolist() == [True, False, True]
    assert A[0].tolist() == [1, -1, -1, 1] and A[1].tolist() == [0, 0, 0, 0]
    sd = math.sqrt(0.75 * 0.25)
    assert A[2].tolist() == pytest.approx([0.75 / sd, -0.25 / sd, -0.25 / sd, -0.25 / sd])
    assert advantages(r, scale=False)[0][2].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_token_weights_are_those_of_the_three_papers():
    lengths = torch.tensor([2, 8, 10])
    assert token_weights(lengths, 'sequence', 99).tolist() == pytest.approx([1 / 6, 1 / 24, 1 / 30])   # GRPO: mean of means
    assert token_weights(lengths, 'token', 99).tolist() == pytest.approx([1 / 20] * 3)                 # DAPO: mean over tokens
    assert token_weights(lengths, 'constant', 50).tolist() == pytest.approx([1 / 150] * 3)             # Dr.GRPO: a constant
    with pytest.raises(ValueError, match="'sequence', 'token' or 'constant'"):
        token_weights(lengths, 'mean', 50)


@pytest.mark.parametrize('A, rho, low, high', [(1.0, 1.5, 0.2, 0.2), (1.0, 0.5, 0.2, 0.2), (-1.0, 1.5, 0.2, 0.2), (-2.0, 0.5, 0.2, 0.2),
                                               (1.0, 1.25, 0.2, 0.28), (1.0, 1.3, 0.2, 0.28), (-1.0, 0.1, 10.0, 10.0)])
def test_clipped_loss_and_gradient_case_by_case(A, rho, low, high):
    logp = torch.tensor([math.log(rho)], dtype=torch.float64, requires_grad=True)
    loss, clipped = policy_loss(logp, torch.zeros(1, dtype=torch.float64), torch.tensor([A]), torch.tensor([0.5]), low, high)
    loss.backward()
    bound = min(max(rho, 1 - low), 1 + high)
    binds = A * bound < A * rho
    assert clipped.item() == binds
    assert loss.item() == pytest.approx(-0.5 * min(rho * A, bound * A))
    assert logp.grad.item() == pytest.approx(0.0 if binds else -0.5 * rho * A)


def test_k3_is_the_papers_and_its_mean_is_the_divergence():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    values = k3(p.log(), q.log())
    assert torch.allclose(values, q / p - (q / p).log() - 1)
    assert (values >= 0).all() and (p * values).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


def test_gradient_of_a_packed_step_equals_the_formula_one_completion_at_a_time():
    torch.manual_seed(3)
    model = Transformer(ModelConfig(vocab_size=30, initializer_range=0.3, **TINY))
    reference = Transformer(ModelConfig(vocab_size=30, initializer_range=0.3, **TINY))
    cfg = Config(temperature=0.7, kl_coef=0.05, clip_low=0.1, clip_high=0.2, loss_norm='sequence')
    groups = [[Sample([1 + g] * (3 + g), torch.randint(3, 30, (n,)).tolist(), []) for n in (4, 1, 7)] for g in range(2)]
    R = torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.0, 1.0]])
    A, _ = advantages(R, True)
    samples = [s for group in groups for s in group]
    old_shift = [0.25 * torch.randn(len(s.tokens)) for s in samples]                       # as if the policy had moved since
    weights = token_weights(torch.tensor([len(s.tokens) for s in samples]), 'sequence', 0)
    for s, a, w in zip(samples, A.flatten().tolist(), weights.tolist()):
        s.advantage, s.weight, s.logprobs = a, w, [0.0] * len(s.tokens)

    # the way of the script, with the shift carried in `sampled`
    for s, shift in zip(samples, old_shift):
        s.logprobs = shift.tolist()
    part = pack_samples(samples, 20)
    assert len(part['labels']) < len(samples)
    here = part['labels'] != -100
    logp, _ = grpo.forward(model, part, cfg, torch.device('cpu'))
    with torch.no_grad():
        ref, _ = grpo.forward(reference, part, cfg, torch.device('cpu'))
    loss, _ = policy_loss(logp, logp.detach() + part['sampled'][here], part['advantage'][here], part['weight'][here], 0.1, 0.2)
    (loss + cfg.kl_coef * (part['weight'][here] * k3(logp, ref)).sum()).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    # the formula: one completion, one token at a time
    slow = 0.0
    for i, s in enumerate(samples):
        ids = torch.tensor([s.prompt + s.tokens])
        logits, ref_logits = model(ids)[0] / 0.7, reference(ids)[0].detach() / 0.7
        mean, of_group = 0.0, R[i // 3]
        advantage = (of_group[i % 3] - of_group.mean()) / of_group.std(correction=0)
        for t, token in enumerate(s.tokens):
            at = len(s.prompt) + t - 1
            lp, lr = logits[at].log_softmax(-1)[token], ref_logits[at].log_softmax(-1)[token]
            rho = (lp - (lp.detach() + old_shift[i][t])).exp()
            kl = (lr - lp).exp() - (lr - lp) - 1
            mean = mean + torch.minimum(rho * advantage, rho.clamp(0.9, 1.2) * advantage) - cfg.kl_coef * kl
        slow = slow - mean / len(s.tokens) / len(samples)
    slow.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(got[name], p.grad, atol=2e-5 + 1e-3 * p.grad.abs().max()), name


def test_packed_samples_label_the_completion_with_its_stop_token_and_nothing_else():
    samples = [Sample([1, 2, 3], [10, 11, 9], [-1.0, -2.0, -3.0], 0.5, 0.25), Sample([4], [12], [-4.0], -0.5, 0.125)]
    out = pack_samples(samples, 8)
    assert out['labels'].shape == (1, 8)
    row = {name: t[0].tolist() for name, t in out.items()}
    assert row['input_ids'] == [1, 2, 3, 10, 11, 4, 0, 0]                     # the last token of each is never an input
    assert row['labels'] == [-100, -100, 10, 11, 9, 12, -100, -100]
    assert row['positions'] == [0, 1, 2, 3, 4, 0, 0, 0]
    assert row['sampled'] == [0, 0, -1, -2, -3, -4, 0, 0]
    assert row['advantage'] == [0, 0, 0.5, 0.5, 0.5, -0.5, 0, 0] and row['weight'] == [0, 0, 0.25, 0.25, 0.25, 0.125, 0, 0]
    assert row['doc_ids'][:6] == [0] * 5 + [1] and -1 in row['doc_ids'][6:]


def test_problems_take_turns_and_every_epoch_is_a_new_order():
    order = grpo.problem_order([3, 5], 4, seed=1)
    steps = [next(order) for _ in range(15)]
    assert all([f for f, _ in s] == [0, 1, 0, 1] for s in steps)
    rows = [r for s in steps for f, r in s if f == 0]
    assert all(sorted(rows[i:i + 3]) == [0, 1, 2] for i in range(0, 30, 3)) and len({tuple(rows[i:i + 3]) for i in range(0, 30, 3)}) > 1
    again = grpo.problem_order([3, 5], 4, seed=1)
    assert [next(again) for _ in range(15)] == steps


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text().splitlines()]


WALL_CLOCK = ('seconds', 'seconds_sampling', 'seconds_training')


def same(a, b, tolerance=0.0):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for key in x.keys() - set(WALL_CLOCK):
            assert x[key] == (pytest.approx(y[key], rel=tolerance, abs=tolerance) if tolerance else y[key]), key


def test_sampler_and_trainer_agree_and_the_model_moves(toy, tmp_path):
    grpo.main(config(toy, tmp_path / 'a', updates=2))
    lines = metrics(tmp_path / 'a')
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    assert all(line['mismatch_max'] < 1e-4 for line in lines)
    assert lines[0]['advantage_std'] > 0.1 and lines[0]['grad_norm'] > 0 and 0 <= lines[0]['zero_variance'] < 1
    before, after = Transformer.from_pretrained(toy / 'm'), Transformer.from_pretrained(tmp_path / 'a')
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


@pytest.mark.parametrize('changes', [{}, {'kl_coef': 0.1, 'reference_every': 3, 'updates': 2}])
def test_a_stopped_run_goes_on_to_the_same_bits(toy, tmp_path, changes, monkeypatch):
    grpo.main(config(toy, tmp_path / 'whole', steps=5, **changes))
    counter = iter(range(100))
    monkeypatch.setattr(grpo.Stop, 'wanted', lambda self, device: next(counter) >= 2)
    with pytest.raises(SystemExit):
        grpo.main(config(toy, tmp_path / 'cut', steps=5, **changes))
    monkeypatch.undo()
    import rewards
    monkeypatch.setitem(rewards.REWARDS, 'length_coin', lambda response, row: float(len(response) % 3))
    assert not (tmp_path / 'cut' / 'config.json').exists()
    grpo.main(config(toy, tmp_path / 'cut', steps=5, **changes))
    same(metrics(tmp_path / 'cut'), metrics(tmp_path / 'whole'))
    assert (tmp_path / 'cut' / 'model.safetensors').read_bytes() == (tmp_path / 'whole' / 'model.safetensors').read_bytes()


def test_two_processes_equal_one(toy, tmp_path):
    flags = [f'--init_from={toy / "m"}', f"--data=['{toy / 'rl.jsonl'}']", "--rewards={'repetition': 1.0, 'format': 1.0, 'language': 1.0}",
             '--steps=3', '--prompts=4', '--group=4', '--max_new_tokens=10', '--row_len=48', '--micro_rows=2', '--eval_every=0',
             '--save_every=0', '--learning_rate=1e-3', '--threads=1', '--device=cpu', '--updates=2', '--kl_coef=0.1']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    run = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'grpo.py']
    subprocess.run([*run, f'--out_dir={tmp_path / "two"}', *flags], cwd=ROOT, env=environment, check=True, timeout=300)
    subprocess.run([sys.executable, 'grpo.py', f'--out_dir={tmp_path / "one"}', *flags], cwd=ROOT, env=environment, check=True, timeout=300)
    same(metrics(tmp_path / 'two'), metrics(tmp_path / 'one'), 2e-3)
    one, two = Transformer.from_pretrained(tmp_path / 'one'), Transformer.from_pretrained(tmp_path / 'two')
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.allclose(a, b, atol=2e-4), name


def test_a_finished_run_is_not_repeated_and_prompts_must_divide(toy, tmp_path, capsys):
    grpo.main(config(toy, tmp_path / 'a', steps=1))
    capsys.readouterr()
    grpo.main(config(toy, tmp_path / 'a', steps=1))
    assert 'holds a finished model' in capsys.readouterr().out
    with pytest.raises(ValueError, match='prompts=4 does not divide'):
        grpo.main(config(toy, tmp_path / 'b', updates=3))


def test_a_compute_budget_ends_the_run(toy, tmp_path):
    grpo.main(config(toy, tmp_path / 'a', steps=2))
    budget = metrics(tmp_path / 'a')[0]['flops'] * 1.5
    grpo.main(config(toy, tmp_path / 'b', steps=50, max_flops=budget))
    assert metrics(tmp_path / 'b')[-1]['step'] == 2


def test_a_step_without_any_variance_is_counted_and_changes_nothing(toy, tmp_path):
    grpo.main(config(toy, tmp_path / 'a', rewards={'countdown': 0.0}, steps=2))
    assert [line['zero_variance'] for line in metrics(tmp_path / 'a')] == [1.0, 1.0]
    before, after = Transformer.from_pretrained(toy / 'm'), Transformer.from_pretrained(tmp_path / 'a')
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
