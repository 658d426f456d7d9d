"""sample.py and evaluate.py against a sampler without a cache, closed forms, and enumeration."""
import dataclasses
import itertools
import json
import math
import random
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import configurator
import evaluate
import rewards
import sample
from data import tokenizer as data_tokenizer
from data.countdown import prepare
from data.countdown.prepare import toy_tokenizer
from data.prompts import encode_prompts, instructed
from data.tokenizer import TOY_TEMPLATE, Tokenizer
from evaluate import pass_at_k
from graders import sandbox
from kernels import fp8, packed
from model import ModelConfig, Transformer
from tools import budget
from sample import Completion, Sampler, pick, uniform

MODELS = {
    'mla': dict(model_type='deepseek_v3', num_hidden_layers=2, hidden_size=32, intermediate_size=48, moe_intermediate_size=16),
    'gqa': dict(model_type='qwen2', num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=8, num_key_value_heads=2),
}
PROMPTS = [[5, 6, 7], [9] * 11, [1, 2], [30, 31, 32, 33, 34]]


def make(kind):
    torch.manual_seed(1)
    shape = {**MODELS['gqa'], 'model_type': kind} if kind == 'qwen3' else MODELS[kind]     # qwen3: no biases, norms on q and k
    return Transformer(ModelConfig(vocab_size=40, max_position_embeddings=64, initializer_range=0.2, **shape))


def without_cache(model, prompt, number, index, n, temperature, seed, stop):
    """The same noise, but the whole sequence forward for every token."""
    ids, logps = list(prompt), []
    with torch.no_grad():
        for position in range(n):
            logp = (model(torch.tensor([ids]))[0, -1].double() / (temperature or 1.0)).log_softmax(-1)
            keys = (torch.tensor([k]) for k in (number, index, position))
            u = uniform(seed, *keys).item()
            x = int(logp.argmax()) if temperature == 0 else min(int((logp.exp().cumsum(0) <= u).sum()), len(logp) - 1)
            ids.append(x)
            logps.append(logp[x].item())
            if x in stop:
                break
    return ids[len(prompt):], logps


@pytest.mark.parametrize('temperature', [0.0, 0.7, 1.0])
@pytest.mark.parametrize('kind', MODELS)
def test_equals_sampling_without_a_cache(kind, temperature):
    model, stop = make(kind), [3, 4]
    got = Sampler(model, stop, slots=5).generate(PROMPTS, 3, 16, temperature, seed=11)
    for p, prompt in enumerate(PROMPTS):
        for s in range(3):
            tokens, logps = without_cache(model, prompt, p, s, 16, temperature, 11, stop)
            assert got[p][s].tokens == tokens
            assert got[p][s].logprobs == pytest.approx(logps, abs=1e-4)
            assert got[p][s].finished == (tokens[-1] in stop)
            assert len(tokens) == 16 or tokens[-1] in stop


@pytest.mark.parametrize('kind', MODELS)
def test_a_sample_does_not_depend_on_slots_or_company(kind):
    model = make(kind)
    reference = Sampler(model, [3], slots=100).generate(PROMPTS, 3, 10, 1.0, seed=5)
    tokens = lambda results: [[c.tokens for c in samples] for samples in results]  # noqa: E731
    for slots, check in [(1, 4), (3, 1), (7, 16)]:
        assert tokens(Sampler(model, [3], slots, check).generate(PROMPTS, 3, 10, 1.0, seed=5)) == tokens(reference)
    alone = Sampler(model, [3]).generate([PROMPTS[2]], 3, 10, 1.0, seed=5, keys=[2])
    assert [c.tokens for c in alone[0]] == [c.tokens for c in reference[2]]
    other = Sampler(model, [3]).generate(PROMPTS, 3, 10, 1.0, seed=6)
    assert [c.tokens for c in other[0]] != [c.tokens for c in reference[0]]


@pytest.mark.parametrize('kind', MODELS)
def test_ids_without_a_token_are_never_sampled_and_count_in_no_log_prob(kind):
    """Whatever their logits, here the largest by far; as if the vocabulary had no such rows, in
    every way of sampling."""
    torch.manual_seed(1)
    shape = dict(MODELS[kind], num_nextn_predict_layers=int(kind == 'mla'))
    model = Transformer(ModelConfig(vocab_size=40, max_position_embeddings=64,
                                    initializer_range=0.2, **shape))
    absent, drafted = [0, 17, 36, 37, 38, 39], 0
    there = [i for i in range(40) if i not in absent]
    with torch.no_grad():
        model.head_weight[absent] = 30 * torch.randn(len(absent), 32)
    model.use_tokens(SimpleNamespace(ids_without_token=lambda vocab_size: absent))
    filters = {'top_k': 9, 'top_p': 0.95, 'min_p': 0.02}
    ways = [(1, 0.0, {}), (8, 0.8, {}), (1, 1.0, filters)]
    for n, temperature, filters in ways:
        sampler = Sampler(model, [3], slots=40)        # 32 rows: on packed weights; 4: with drafts
        completions = sampler.generate(PROMPTS, n, 20, temperature, seed=1, **filters)
        for prompt, samples in zip(PROMPTS, completions):
            assert not {t for c in samples for t in c.tokens} & set(absent)
            for c in samples[:2]:
                ids, tau = torch.tensor([prompt + c.tokens]), temperature or 1.0
                labels = torch.full_like(ids, -100)
                labels[0, len(prompt) - 1:-1] = torch.tensor(c.tokens)
                with torch.no_grad():
                    logp, entropy, _ = model.logprobs(ids, labels, temperature=tau, entropy=True)
                    z = model(ids)[0, len(prompt) - 1:-1, there] / tau
                truth = torch.distributions.Categorical(logits=z)
                expected = truth.log_prob(torch.tensor([there.index(t) for t in c.tokens]))
                for got in (logp, torch.tensor(c.logprobs)):
                    assert torch.allclose(got, expected, atol=1e-5)
                assert torch.allclose(entropy, truth.entropy(), atol=1e-5)
                if temperature == 0:
                    assert z.argmax(-1).tolist() == [there.index(t) for t in c.tokens]
        drafted += sampler.drafted
    assert bool(drafted) == (kind == 'mla')


def test_logprobs_are_the_training_forwards():
    model = make('mla')
    for prompt, samples in zip(PROMPTS, Sampler(model, [3]).generate(PROMPTS, 2, 24, 0.8, seed=1)):
        for c in samples:
            ids = torch.tensor([prompt + c.tokens])
            labels = torch.full_like(ids, -100)
            labels[0, len(prompt) - 1:-1] = torch.tensor(c.tokens)
            with torch.no_grad():
                logp = model.logprobs(ids, labels, temperature=0.8)[0]
            assert torch.allclose(logp, torch.tensor(c.logprobs), atol=1e-4)


def test_frequencies_follow_the_softmax_and_the_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    n = 20000
    keys = torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    p = (logits / 0.8).softmax(-1)
    x, logp = pick(logits.expand(n, -1), uniform(3, *keys), temperature=0.8, top_p=1.0)
    share = torch.bincount(x, minlength=5) / n
    assert (share - p).abs().max() < 4 * 0.5 / n ** 0.5
    assert torch.allclose(logp, p.log()[x], atol=1e-5)
    x, logp = pick(logits.expand(n, -1), uniform(3, *keys), temperature=0.8, top_p=0.8)
    inside = 2 if p[:2].sum() >= 0.8 else 3
    assert x.max().item() == inside - 1
    share = torch.bincount(x, minlength=5)[:inside] / n
    assert (share - p[:inside] / p[:inside].sum()).abs().max() < 4 * 0.5 / n ** 0.5
    assert torch.allclose(logp, p.log()[x], atol=1e-5)  # of the whole distribution, as the trainer's are


def test_uniform_numbers_are_uniform_and_unrelated():
    a = torch.arange(30000)
    u = uniform(1, a % 50, a // 50 % 20, a // 1000)
    v = uniform(2, a % 50, a // 50 % 20, a // 1000)
    assert 0 <= u.min() and u.max() < 1 and len(u.unique()) == len(u)
    assert ((torch.histc(u.float(), 20, 0, 1) - 1500).square() / 1500).sum() < 45   # chi-square, 19 degrees: p = 0.001
    for other in (v, u.roll(1), u.roll(50), u.roll(1000)):
        assert torch.corrcoef(torch.stack([u, other]))[0, 1].abs() < 0.025


@pytest.mark.parametrize('prompts, arguments, said', [
    ([[]], {}, 'prompt 0 has 0 tokens'),
    ([[1], [2] * 60], {}, 'prompt 1 has 60 tokens; with max_new_tokens=10 the context of 64 leaves room for 1 to 54'),
    ([], {}, 'nothing to sample'),
    ([[1]], {'temperature': -1.0}, 'temperature=-1.0'),
    ([[1]], {'top_p': 0.0}, 'top_p=0.0'),
])
def test_impossible_requests_are_refused(prompts, arguments, said):
    with pytest.raises(ValueError) as error:
        Sampler(make('gqa')).generate(prompts, **{'n': 1, 'max_new_tokens': 10, **arguments})
    assert said in str(error.value)


def test_a_logit_that_is_not_finite_names_the_request():
    model = make('gqa')
    with torch.no_grad():
        model.model.norm.weight[0] = float('nan')
    with pytest.raises(FloatingPointError, match='prompt 0, sample 0 are not finite'):
        Sampler(model).generate([[1, 2]], 1, 4)


def test_tokens_are_reported_as_they_appear():
    model, heard = make('gqa'), []
    got = Sampler(model, [3], slots=1, check_every=1).generate([[5, 6]], 1, 12, seed=2, on_token=lambda p, s, t: heard.append(t))
    assert heard == got[0][0].tokens


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, right, k in [(8, 3, 1), (8, 3, 4), (8, 0, 8), (6, 5, 2), (8, 1, 8), (4, 4, 1)]:
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_statistics_by_hand():
    def s(answer, right, length=10, finished=True, mixed=False):
        return {'answer': answer, 'rewards': {'accuracy': float(right), 'format': 1.0}, 'length': length, 'finished': finished, 'mixed': mixed}
    scored = [[s('1', 1), s('2', 0), s('1', 1), s('3', 0, 30, False)], [s('4', 0), s('4', 0), s('5', 1, mixed=True), s(None, 0)]]
    got = evaluate.statistics(scored)
    assert got['pass1'] == pytest.approx(3 / 8) and got['length'] == 12.5 and got['truncated'] == 1 / 8 and got['mixing'] == 1 / 8
    assert got['maj4'] == 0.5 and got['pass2'] == pytest.approx((5 / 6 + 3 / 6) / 2) and got['pass4'] == 1.0
    low, high = got['pass1_ci']
    assert 0 < low < 0.375 < high < 1
    assert got['length_wrong'] == pytest.approx(70 / 5) and got['length_right'] == 10


def test_intervals_are_wilsons_and_for_many_problems_the_normal_ones():
    assert evaluate.mean_ci([0.0] * 10)[1] == pytest.approx([0, 0.2775], abs=1e-4)   # of the tables
    assert evaluate.mean_ci([1.0] * 30)[1] == pytest.approx([0.8865, 1], abs=1e-4)
    assert evaluate.mean_ci([1.0] * 50 + [0.0] * 50)[1] == pytest.approx([0.4038, 0.5962], abs=1e-3)
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)).square()
    mean, (low, high) = evaluate.mean_ci(x.tolist())
    half = 1.96 * x.std().item() / math.sqrt(4000)
    assert mean == pytest.approx(x.mean().item()) and [low, high] == pytest.approx([mean - half, mean + half], abs=0.02 * half)


def test_kept_samples_are_good_different_and_limited():
    cfg = evaluate.Config(keep={'accuracy': 1, 'format': 1}, keep_per_prompt=2, keep_rows=3)
    def s(text, accuracy=1.0, finished=True):
        return {'response': text, 'finished': finished, 'rewards': {'accuracy': accuracy, 'format': 1.0}}
    rows = [{'prompt': 'a', 'task': 'match'}, {'prompt': 'b', 'task': 'match', 'prefill': '<think>'}]
    scored = [[s('x'), s('x'), s('wrong', 0.0), s('cut', finished=False), s('y'), s('z')], [s('u'), s('v')]]
    texts = [row['messages'][-1]['content'] for row in evaluate.kept(cfg, rows, scored)]
    assert texts == ['x', '<think>u', 'y']


def test_the_script_evaluates_writes_samples_and_keeps(tmp_path):
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**MODELS['gqa'], 'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': 64}))
    model.save_pretrained(tmp_path / 'm')
    tokenizer.save_pretrained(tmp_path / 'm')
    rows = [{'prompt': ' 1 2 3 make 6', 'task': 'countdown', 'numbers': [1, 2, 3], 'target': 6, 'language': 'en'}] * 3
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    cfg = evaluate.Config(
        checkpoint=str(tmp_path / 'm'), data=[str(tmp_path / 'p.jsonl')], n=2, max_new_tokens=12,
        out=str(tmp_path / 'o.jsonl'), summary=str(tmp_path / 's.json'))
    numbers = evaluate.main(cfg)
    written = [json.loads(line) for line in (tmp_path / 'o.jsonl').read_text().splitlines()]
    assert len(written) == 3 and all(len(row['samples']) == 2 for row in written)
    assert all({'vote', 'answer', 'rewards'} <= s.keys() for row in written for s in row['samples'])
    assert json.loads((tmp_path / 's.json').read_text()) == numbers
    assert numbers[str(tmp_path / 'p.jsonl')]['problems'] == 3 and 'greedy' in numbers[str(tmp_path / 'p.jsonl')]


def test_chat_streams_an_answer(tmp_path, monkeypatch, capsys):
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**MODELS['gqa'], 'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': 64}))
    lines = iter([' 1 2 3 make 6', ''])
    monkeypatch.setattr('builtins.input', lambda _: next(lines))
    sample.chat(sample.Config(max_new_tokens=8), model, tokenizer)
    said = capsys.readouterr().out
    expected = Sampler(model, tokenizer.stop_ids).generate([tokenizer.apply_chat_template(
        [{'role': 'user', 'content': ' 1 2 3 make 6'}], add_generation_prompt=True)[0]], 1, 8, seed=2)[0][0]
    assert isinstance(expected, Completion)
    assert tokenizer.decode([t for t in expected.tokens if t not in tokenizer.stop_ids]).split('�')[0] in said.replace('\x1b[0m', '')
    assert 'no word' not in said


@pytest.mark.parametrize('line, told', [
    (' 3 7 99 make =29', "no word for '9' and reads bytes"),
    ('3 7 8 make =29', 'no word for \'3\' and reads bytes, which it was not trained on: do not '
     'believe the answer; begin with a space, as in " 3 7 8 make =29"'),
    ('What is 2 plus 2?', "no word for 'What', '?' and reads bytes"),
])
def test_chat_of_the_toy_says_what_it_has_no_words_for(line, told, monkeypatch, capsys):
    tokenizer, lines = toy_tokenizer(), iter([line, ''])
    shape = {**MODELS['gqa'], 'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': 64}
    monkeypatch.setattr('builtins.input', lambda _: next(lines))
    sample.chat(sample.Config(max_new_tokens=2), Transformer(ModelConfig(**shape)), tokenizer)
    said = capsys.readouterr().out
    assert told in said


# ---- the engine's other ways


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_speculation_gives_the_stream_of_plain_decoding(temperature):
    torch.manual_seed(1)
    model = Transformer(ModelConfig(vocab_size=12, max_position_embeddings=64, initializer_range=0.2, num_nextn_predict_layers=1, **MODELS['mla']))
    prompts, limits = [[t % 12 for t in p] for p in PROMPTS], [20, 11, 20, 2]
    plain = Sampler(model, [3], speculate=0)
    plain = plain.generate(prompts, 3, limits, temperature, seed=4, routes=True, entropy=True)
    for slots, check in [(100, 4), (5, 1), (1, 9)]:
        drafting = Sampler(model, [3], slots, check, speculate=100)
        drafting.speculating = lambda run, queue: not queue and run.m > 0         # however bad this model's drafts are
        got = drafting.generate(prompts, 3, limits, temperature, seed=4, routes=True, entropy=True)
        for a, b in zip((c for group in plain for c in group), (c for group in got for c in group)):
            assert a.tokens == b.tokens and a.finished == b.finished and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert torch.equal(a.routes, b.routes)
            assert a.entropy == pytest.approx(b.entropy, rel=1e-4)
        assert drafting.accepted < drafting.drafted and (drafting.accepted or slots < 100)


def test_drafting_stops_where_it_does_not_pay():
    torch.manual_seed(1)
    model = Transformer(ModelConfig(vocab_size=40, max_position_embeddings=128, initializer_range=0.2, num_nextn_predict_layers=1, **MODELS['mla']))
    sampler = Sampler(model, speculate=4)
    sampler.generate([[1, 2, 3]], 4, 40, seed=1)
    assert 64 <= sampler.drafted < 90 and sampler.accepted < sampler.drafted / 2
    assert not make('gqa').cfg.num_nextn_predict_layers and Sampler(make('gqa'), speculate=9).speculate == 0


@pytest.mark.parametrize('kind', MODELS)
def test_sizes_rounded_for_graphs_change_nothing(kind, monkeypatch):
    model = make(kind)
    expected = Sampler(model, [3], slots=9).generate(PROMPTS, 4, 12, 1.0, seed=5)
    monkeypatch.setattr(sample.Run, 'rounded', lambda self, n: sample.bucket(n))
    got = Sampler(model, [3], slots=9).generate(PROMPTS, 4, 12, 1.0, seed=5)
    assert [[c.tokens for c in group] for group in got] == [[c.tokens for c in group] for group in expected]
    assert [sample.bucket(n) for n in (1, 4, 5, 8, 9, 17, 33, 100)] == [1, 4, 5, 8, 10, 20, 40, 112]


def test_the_kernel_is_given_rows_and_prompts_in_order(monkeypatch):
    model = make('mla')  # mla_decode takes its PyTorch reference on CPU
    expected = Sampler(model, [3], slots=7).generate(PROMPTS, 4, 12, 1.0, seed=5)
    monkeypatch.setattr(sample, 'fused', lambda x: True)
    got = Sampler(model, [3], slots=7).generate(PROMPTS, 4, 12, 1.0, seed=5)
    assert [[c.tokens for c in group] for group in got] == [[c.tokens for c in group] for group in expected]


@pytest.mark.parametrize('kind', MODELS)
def test_each_request_has_its_own_length(kind):
    model, limits = make(kind), [[1, 5], [9, 2], [3, 3], [12, 1]]
    whole = Sampler(model, slots=3).generate(PROMPTS, 2, 12, 1.0, seed=5)
    cut = Sampler(model, slots=3).generate(PROMPTS, 2, limits, 1.0, seed=5)
    for p in range(4):
        for s in range(2):
            assert cut[p][s].tokens == whole[p][s].tokens[:limits[p][s]] and not cut[p][s].finished
            assert cut[p][s].logprobs == pytest.approx(whole[p][s].logprobs[:limits[p][s]], abs=1e-5)


@pytest.mark.parametrize('slots, check', [(1, 1), (5, 4), (50, 16)])
def test_a_stop_string_ends_at_the_token_that_completes_it(slots, check):
    model, tokenizer = make('gqa'), type('Letters', (), {'decode': lambda self, ids: ''.join(chr(97 + i % 26) for i in ids)})()
    free = Sampler(model, [3]).generate(PROMPTS, 4, 24, 1.0, seed=9)
    got = Sampler(model, [3], slots, check, stop_strings=['ab', 'q'], tokenizer=tokenizer).generate(PROMPTS, 4, 24, 1.0, seed=9)
    ended = 0
    for a, b in zip((c for group in free for c in group), (c for group in got for c in group)):
        text = tokenizer.decode(a.tokens)
        ends = [text.find(s) + len(s) for s in ('ab', 'q') if s in text]
        assert b.tokens == a.tokens[:min(ends)] if ends else b.tokens == a.tokens
        assert b.finished == (bool(ends) or a.finished) and len(b.logprobs) == len(b.tokens)
        ended += bool(ends)
    assert ended > 2
    with pytest.raises(ValueError, match='stop strings need the tokenizer'):
        Sampler(model, stop_strings='x').generate([[1]], 1, 4)


@pytest.mark.parametrize('filters, inside', [({'top_k': 2}, 2), ({'min_p': 0.3}, 2), ({'min_p': 0.9}, 1), ({'top_k': 4, 'top_p': 0.9}, 3), ({'top_k': 9}, 5)])
def test_frequencies_follow_the_filters(filters, inside):
    logits, n = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]), 20000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    p = logits.softmax(-1)
    x, logp = pick(logits.expand(n, -1), u, 1.0, **filters)
    expected = p.clone()
    expected[inside:] = 0
    assert torch.allclose(torch.bincount(x, minlength=5) / n, expected / expected.sum(), atol=1e-4)
    assert torch.allclose(logp, p.log()[x], atol=1e-5)


@pytest.mark.parametrize('V', [1, 40, 512, 513, 5000])
def test_the_largest_in_blocks_is_the_first_largest(V):
    z = torch.randint(0, 1 + V // 3, (300, V)).float()
    assert torch.equal(z.gather(1, sample.largest(z)[:, None]), z.amax(-1, keepdim=True))
    assert torch.equal(sample.largest(z), (z == z.amax(-1, keepdim=True)).int().argmax(-1))


@pytest.mark.parametrize('V', [40, 512, 513, 5000])
def test_inversion_in_blocks_equals_the_plain_cumulative_sum(V):
    torch.manual_seed(V)
    p = (3 * torch.randn(300, V)).softmax(-1)
    p[:, V // 3:V // 2] = 0
    u = torch.rand(300, dtype=torch.float64)
    x, cdf = sample.invert(p, u), p.double().cumsum(-1)
    plain = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1)
    assert (x == plain).float().mean() > 0.99 and (cdf.gather(1, x[:, None])[:, 0] - u * cdf[:, -1] > -1e-6).all()
    last = sample.invert(p, torch.full((300,), 1 - 2**-53, dtype=torch.float64))
    assert (p.gather(1, last[:, None]) > 0).all()


def test_policy_gradients_can_refuse_a_changed_distribution():
    for change in ({'top_p': 0.9}, {'top_k': 5}, {'min_p': 0.1}):
        with pytest.raises(ValueError, match='biases the ratio'):
            Sampler(make('gqa')).generate([[1]], 1, 4, unbiased=True, **change)


@pytest.mark.parametrize('slots', [2, 50])
def test_routes_are_those_of_the_training_forward(slots):
    model = make('mla')
    got = Sampler(model, [3], slots).generate(PROMPTS, 3, 12, 1.0, seed=2, routes=True)
    for prompt, group in zip(PROMPTS, got):
        for c in group:
            ids, routes = torch.tensor([prompt + c.tokens])[:, :-1], []
            rope, mask = model.context(ids)
            with torch.no_grad():
                model.hidden(ids, rope, mask, routes)
            assert c.routes.shape == (ids.shape[1], 1, 2) and not c.routes.is_inference()      # a trainer can save them for its backward pass
            assert torch.equal(c.routes.long().sort(-1).values, torch.stack([chosen for _, chosen in routes], 1).sort(-1).values)


@pytest.mark.parametrize('temperature, slots', [(1.0, 5), (0.0, 50)])
def test_entropies_are_those_of_the_softmax_that_was_drawn_from(temperature, slots):
    def letters_of(self, ids):
        return ''.join(chr(97 + i % 26) for i in ids)
    model, letters = make('mla'), type('Letters', (), {'decode': letters_of})()
    sampler = Sampler(model, [3], slots, stop_strings=['ab', 'q'], tokenizer=letters)
    got = sampler.generate(PROMPTS, 3, 12, temperature, top_p=0.9, seed=2, entropy=True)
    plain = sampler.generate(PROMPTS, 3, 12, temperature, top_p=0.9, seed=2)
    for prompt, group, others in zip(PROMPTS, got, plain):
        for c, other in zip(group, others):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + c.tokens]))[0, len(prompt) - 1:-1].double()
            H = torch.distributions.Categorical(logits=logits / (temperature or 1.0)).entropy()
            assert c.entropy == pytest.approx(H.sum().item(), rel=1e-4)
            assert (c.tokens, c.logprobs) == (other.tokens, other.logprobs)
            assert other.entropy is None


def test_the_drafts_of_an_evaluation_are_those_of_both_its_passes(tmp_path, monkeypatch):
    tokenizer = toy_tokenizer()
    torch.manual_seed(1)
    shape = {**MODELS['mla'], 'num_nextn_predict_layers': 1, 'max_position_embeddings': 96}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.2,
                                    **shape))
    rows = [{'prompt': f' 1 2 {n} make 6', 'task': 'countdown', 'numbers': [1, 2, n], 'target': 6}
            for n in (1, 2)]
    counts, plain = [], sample.Run.advance
    def advance(self, count, speculating):
        before = self.drafted, self.accepted
        plain(self, count, speculating)
        greedy = self.how['temperature'] == 0
        counts.append((greedy, self.drafted - before[0], self.accepted - before[1]))
    monkeypatch.setattr(sample.Run, 'advance', advance)
    numbers, _ = evaluate.evaluate(model, tokenizer, rows, n=2, max_new_tokens=20, speculate=4)
    for greedy in (True, False):
        assert sum(drafted for g, drafted, _ in counts if g == greedy) > 0
    drafted, accepted = (sum(c[k] for c in counts) for k in (1, 2))
    assert numbers['drafts_accepted'] == accepted / drafted


def test_memory_is_planned_and_the_slots_that_fit_are_named(monkeypatch):
    model = make('gqa')
    monkeypatch.setattr(sample, 'free_memory', lambda device: 100_000)
    with pytest.raises(ValueError, match=r'slots=\d+ fit') as error:
        Sampler(model, slots=1000).generate(PROMPTS, 100, 40)
    fit = int(str(error.value).split('slots=')[1].split()[0])
    Sampler(model, slots=fit).check(PROMPTS, 100, [[40] * 100] * 4, 1.0, 1.0, 0, 0.0, False)
    with pytest.raises(ValueError, match='slots=0 fit: shorten'):
        monkeypatch.setattr(sample, 'free_memory', lambda device: 1000)
        Sampler(model, slots=2).generate(PROMPTS, 100, 40)


def test_what_was_finished_before_a_bad_logit_is_kept():
    model, heard = make('gqa'), []
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = float('nan')
    with pytest.raises(FloatingPointError, match='prompt 2, sample 0 are not finite') as error:
        Sampler(model, slots=1).generate([[5, 6], [7], [8, 39]], 1, 6, on_done=lambda p, s, c: heard.append((p, c.tokens)))
    kept = error.value.completions
    assert heard == [(0, kept[0][0].tokens), (1, kept[1][0].tokens)] and kept[2] == [None]


# ---- evaluation


def tiny_checkpoint(folder, rows=3):
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**MODELS['gqa'], 'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': 96}))
    model.save_pretrained(folder / 'm')
    tokenizer.save_pretrained(folder / 'm')
    rows = [{'prompt': f' 1 2 {i + 1} make 6', 'task': 'countdown', 'numbers': [1, 2, i + 1], 'target': 6, 'language': 'en'} for i in range(rows)]
    (folder / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return model, tokenizer, dict(checkpoint=str(folder / 'm'), data=[str(folder / 'p.jsonl')], n=2, max_new_tokens=12, slots=2, threads=1)


def test_a_stopped_evaluation_goes_on_to_the_same_samples(tmp_path, monkeypatch):
    *_, settings = tiny_checkpoint(tmp_path)
    evaluate.main(evaluate.Config(**settings, out=str(tmp_path / 'whole.jsonl')))
    whole, drawn = Sampler.generate, []

    def stops(self, prompts, *args, on_done, **more):
        drawn.append(len(prompts))
        def done(*completion):
            on_done(*completion)
            if sum(drawn) < 10 and completion[0] == 1:
                raise KeyboardInterrupt
        return whole(self, prompts, *args, on_done=done, **more)
    monkeypatch.setattr(Sampler, 'generate', stops)
    out = str(tmp_path / 'o.jsonl')
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(evaluate.Config(**settings, out=out))
    assert len((tmp_path / 'o.jsonl.partial').read_text().splitlines()) == 2 and not (tmp_path / 'o.jsonl').exists()
    with open(out + '.partial', 'a') as f:
        f.write('["samples", 2, [[[1, 2')                             # a line cut short
    drawn[:] = [10]
    evaluate.main(evaluate.Config(**settings, out=out))
    assert drawn == [10, 2, 3] and (tmp_path / 'o.jsonl').read_text() == (tmp_path / 'whole.jsonl').read_text()
    assert not (tmp_path / 'o.jsonl.partial').exists()


def test_a_partial_file_of_other_settings_is_not_used(tmp_path, capsys):
    first = evaluate.Partial(tmp_path / 'x', {'seed': 1})
    first.add('samples', 0, 0, 1, Completion([1, 2], [], True))
    assert evaluate.Partial(tmp_path / 'x', {'seed': 1}).get('samples', 0)[0].tokens == [1, 2]
    assert evaluate.Partial(tmp_path / 'x', {'seed': 2}).get('samples', 0) is None
    assert 'begun anew' in capsys.readouterr().err


def test_budget_forcing_cuts_and_prolongs_the_thinking(tmp_path):
    model, tokenizer, _ = tiny_checkpoint(tmp_path)
    end, wait = tokenizer.encode('</think>'), tokenizer.encode(' no')
    prompts = [[5, 6, 7], [8, 9]]
    sampler = lambda stops: Sampler(model, stops, slots=3, tokenizer=tokenizer)  # noqa: E731
    free = sampler([]).generate(prompts, 2, 6, 1.0, seed=3, keys=[0, 1_000_000])
    got = evaluate.forced(sampler([]), tokenizer, prompts, 2, 20, 1.0, seed=3, think_budget=6)
    for p, group in enumerate(got):
        for s, c in enumerate(group):
            alone = sampler([]).generate([prompts[p]], 1, 6, 1.0, seed=3, keys=[p * 1_000_003 + s])[0][0].tokens
            cut = alone + end if end[0] not in alone else alone[:alone.index(end[0]) + 1]
            assert c.tokens[:len(cut)] == cut and len(c.tokens) == 20 and not c.finished and (len(cut) < 7 or c.logprobs[6] == 0.0)
    assert len(free[0][0].tokens) == 6
    # every token ends the thinking: it is replaced by `wait`, three tokens, until there are 8
    text = tokenizer.decode([int(t) for t in got[0][0].tokens[:1]])
    loud = type('Loud', (), {'encode_assistant': staticmethod(tokenizer.encode_assistant),
                             'decode': staticmethod(lambda ids: ''.join(f'[{i}]' for i in ids)),
                             'stop_ids': [], 'text': text})()
    ((c,),) = evaluate.forced(
        Sampler(model, slots=2, tokenizer=loud), loud, [prompts[0]], 1, 20, 1.0, seed=3,
        think_budget=10, think_at_least=8, think_end=']', wait=' no')
    assert len(wait) == 3 and c.tokens[:9] == wait * 3 and len(c.tokens) == 20


def scored_sample(answer, accuracy, task='math', **parts):
    return {'answer': answer, 'task': task, 'rewards': {'accuracy': float(accuracy), **parts},
            'length': 10, 'finished': True, 'mixed': False}


def test_best_of_n_is_the_sample_of_the_highest_reward():
    first = [scored_sample('1', 1, judge=0.2), scored_sample('2', 0, judge=0.9)]
    second = [scored_sample('1', 1, judge=0.8), scored_sample('2', 0, judge=0.1)]
    assert evaluate.best_of([first, second], {'judge': 1.0}) == [0.0, 1.0]
    assert evaluate.best_of([first, second], {'judge': -1.0}) == [1.0, 0.0]


def test_equal_answers_are_one_vote_however_they_are_spelled():
    answers = ['3', '1/2', '0.5', '3', '\\frac{1}{2}', None]
    scored = [[scored_sample(a, a not in ('3', None)) for a in answers]]
    evaluate.vote(scored, [{'task': 'math', 'answer': '1/2'}])
    assert [s['vote'] for s in scored[0]] == ['3', '1/2', '1/2', '3', '1/2', None]
    got = evaluate.statistics(scored)
    assert got['maj2'] == got['maj4'] == 0.0
    assert evaluate.majority(scored[0]) == 1.0                    # 2 : 2, 2 : 3
    assert evaluate.majority([scored_sample(None, 0)] * 2) == 0.0


def test_majorities_have_wilsons_interval_and_none_that_collapses():
    scored = [[scored_sample('1', 1), scored_sample('1', 1)] for _ in range(30)]
    got = evaluate.statistics(scored)
    assert got['maj2'] == 1.0 and got['maj2_ci'] == pytest.approx([0.8865, 1], abs=1e-4)


def test_a_graded_reward_is_right_at_one_and_has_its_mean_beside():
    """One meaning for pass@1, maj@k and the best of n; what never reaches 1 is never right."""
    scored = [[scored_sample('1', 0.5), scored_sample('1', 0.5)],
              [scored_sample('1', 1.0), scored_sample('2', 0.2)]]
    got = evaluate.statistics(scored)
    assert got['pass1'] == 1 / 4 and got['pass2'] == 1 / 2
    assert got['accuracy'] == pytest.approx(2.2 / 4)
    assert got['maj2'] == 1 / 2 and evaluate.best_of(scored, {'accuracy': 1.0}) == [0.0, 1.0]
    never = evaluate.statistics([[scored_sample('1', 0.07)] * 2] * 3)
    assert (never['pass1'], never['maj2'], never['accuracy']) == (0, 0, pytest.approx(0.07))
    assert never['length_right'] is None and never['truncated_right'] is None
    assert never['length_wrong'] == 10


def test_tasks_without_right_and_wrong_have_no_such_numbers():
    judged = [[scored_sample('x', 0.6, 'preference'), scored_sample('x', 0.8, 'preference')]]
    got = evaluate.statistics(judged)
    assert got['judged'] == pytest.approx(0.7) and got['length'] == 10
    assert not {'pass1', 'pass2', 'maj2', 'accuracy', 'length_right'} & got.keys()
    assert evaluate.best_of(judged, {'accuracy': 1.0}) == []
    both = evaluate.statistics(judged + [[scored_sample('1', 1), scored_sample('2', 0)]])
    assert both['pass1'] == 1 / 2 and both['judged'] == pytest.approx(0.7) and both['problems'] == 2
    samples = [scored_sample(None, 1, 'code'), scored_sample(None, 0, 'code')]
    programs = evaluate.statistics([samples])
    assert programs['pass2'] == 1.0 and 'maj2' not in programs    # are two programs the same?


def test_a_reward_that_is_called_like_a_number_takes_nobodys_place():
    got = evaluate.statistics([[scored_sample('1', 1, length=-0.5, format=0.3)]])
    assert got['length'] == 10 and got['reward_length'] == -0.5 and got['format'] == 0.3


def test_the_interval_of_values_that_share_a_group_is_that_of_the_groups():
    values = [1.0] * 60 + [0.0] * 40
    one_each = evaluate.mean_ci(values)
    assert evaluate.mean_ci(values, range(100)) == one_each
    tens = [i // 10 for i in range(100)]             # ten that agree in each of ten groups: n = 10
    of_ten = evaluate.mean_ci([1.0] * 6 + [0.0] * 4)[1]
    assert evaluate.mean_ci(values, tens)[1] == pytest.approx(of_ten)
    spread = [i % 10 for i in range(100)]          # every group is like the whole: n = 100
    low, high = evaluate.mean_ci(values, spread)[1]
    assert (low, high) == (pytest.approx(0.502, abs=1e-3), pytest.approx(0.6906, abs=1e-3))
    assert evaluate.mean_ci([1.0] * 100, tens)[1] == evaluate.mean_ci([1.0] * 10)[1]
    assert evaluate.mean_ci(values, [0] * 100)[1] == pytest.approx(evaluate.mean_ci([0.6])[1])


def test_kept_samples_lie_in_their_bands():
    def s(text, length=5, right=1.0):
        return {'response': text, 'finished': True, 'length': length, 'rewards': {'accuracy': right}}
    rows = [{'prompt': name, 'task': 'match'} for name in 'abc']
    scored = [[s('a1'), s('a2')], [s('b1', 9), s('b2'), s('b3', right=0.0)], [s('c1', right=0.0), s('c2', right=0.0)]]

    def texts(**band):
        kept = evaluate.kept(evaluate.Config(**band), rows, scored)
        return [row['messages'][-1]['content'] for row in kept]
    assert texts(keep_pass_rate=[0.1, 0.9]) == ['b1', 'b2', 'b3'] and texts(keep_pass_rate=[0.0, 0.0]) == ['c1', 'c2']
    assert texts(keep_length=[6, 10]) == ['b1'] and texts(keep={'accuracy': 1}, keep_length=[1, 8]) == ['a1', 'b2', 'a2']


@pytest.mark.slow
@pytest.mark.parametrize('flag, said', [
    ('--keep_rows=3', 'keep_rows=3 does nothing: no file is written, set out'),
    ("--keep={'accuracy': 1}", 'does nothing: no file is written, set out'),
    ('--keep_per_prompt=2 --out=x', 'keep_per_prompt=2 does nothing: set one of keep, keep_length'),
])
def test_filters_that_filter_nothing_are_refused(flag, said):
    with pytest.raises(ValueError, match=said):
        evaluate.main(configurator.parse(evaluate.Config, flag.replace(' 1', '1').split()))


def test_rows_kept_are_at_most_so_many_of_all_files(tmp_path, monkeypatch):
    *_, settings = tiny_checkpoint(tmp_path, rows=2)
    (path,) = settings['data']
    (tmp_path / 'other.jsonl').write_text(Path(path).read_text())
    given = {**settings, 'data': [path, f'{tmp_path}/other.jsonl'], 'keep': {'accuracy': 0.0},
             'keep_rows': 3, 'stop': list('0123456789 ')}
    evaluate.main(evaluate.Config(**given, out=f'{tmp_path}/kept.jsonl'))
    assert len((tmp_path / 'kept.jsonl').read_text().splitlines()) == 3


def test_ranks_share_the_problems_and_write_one_file_each(tmp_path):
    *_, settings = tiny_checkpoint(tmp_path, rows=5)
    (path,) = settings['data']
    single = tmp_path / 'single.jsonl'                       # one rank has no problem of it
    single.write_text(Path(path).read_text().splitlines(True)[0])
    settings['data'] = [path, str(single)]
    one = evaluate.main(evaluate.Config(**settings, out=str(tmp_path / 'one.jsonl')))
    (tmp_path / 'settings.py').write_text(''.join(f'{key} = {value!r}\n' for key, value in settings.items()))
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = ['evaluate.py', str(tmp_path / 'settings.py'),
               f'--out={tmp_path}/two.jsonl', f'--summary={tmp_path}/s.json']
    subprocess.run([*start, *command], check=True, cwd=Path(__file__).parents[1], timeout=240)
    lines = lambda name: (tmp_path / name).read_text().splitlines()  # noqa: E731
    both = [lines('two-00000-of-00002.jsonl'), lines('two-00001-of-00002.jsonl')]
    assert [len(x) for x in both] == [4, 2]
    samples = [json.loads(both[i % 2][i // 2])['samples'] for i in range(5)]
    samples.append(json.loads(both[0][3])['samples'])
    assert samples == [json.loads(line)['samples'] for line in lines('one.jsonl')]
    two = json.loads((tmp_path / 's.json').read_text())
    for path in settings['data']:
        expected = {key: value for key, value in one[path].items() if key != 'drafts_accepted'}
        assert two[path].items() >= expected.items()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
@pytest.mark.parametrize('kind', [*MODELS, 'qwen3'])
def test_packed_weights_change_nothing_and_end_with_the_call(kind, monkeypatch):
    model = make(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))                                      # norms that are not 1, biases that are not 0
    plain = lambda: all(not {'forward', 'project'} & vars(m).keys() for m in model.modules()) and 'logits' not in vars(model)  # noqa: E731
    monkeypatch.setattr(sample, 'free_memory', lambda device: 300_000)  # little memory: no copies
    expected = Sampler(model, [3]).generate(PROMPTS, 4, 12, 1.0, seed=5)
    monkeypatch.setattr(sample, 'free_memory', lambda device: 2**40)
    calls = []
    for few in (0, 900, packed.FEWEST):
        monkeypatch.setattr(packed, 'FEWEST', few)
        got = Sampler(model, [3]).generate(PROMPTS, 4, 12, 1.0, seed=5, on_token=lambda *a: calls.append(plain()))
        assert plain() and not any(calls) and calls
        for a, b in zip((c for group in expected for c in group), (c for group in got for c in group)):
            assert a.tokens == b.tokens and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    monkeypatch.setattr(packed, 'FEWEST', 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)                                                             # an update: packed anew
    new = Sampler(model).generate([PROMPTS[0]], 16, 4, 0.7, seed=5)[0][0]
    assert (new.tokens, new.logprobs) == (lambda tokens, logps: (tokens, pytest.approx(logps, abs=1e-4)))(*without_cache(model, PROMPTS[0], 0, 0, 4, 0.7, 5, []))
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float('nan')
    with pytest.raises(FloatingPointError):
        Sampler(model).generate(PROMPTS, 4, 4)
    assert plain()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
@pytest.mark.parametrize('kind', [*MODELS, 'qwen3'])
def test_packed_weights_in_bfloat16_round_as_autocast_does(kind, monkeypatch):
    """The second token's log-prob against float32: no worse than without packing; the head's
    product of bf16 numbers is float32"""
    model, errors, exact = make(kind), {}, make(kind)
    monkeypatch.setattr(packed, 'FEWEST', 0)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        for free in (2**40, 0):
            monkeypatch.setattr(packed, 'worth_it', lambda *args: free > 0)
            got = Sampler(model).generate(PROMPTS, 4, 2, 1.0, seed=5)
            with torch.autocast('cpu', enabled=False):
                errors[free] = sum(abs(exact(torch.tensor([prompt + c.tokens[:1]]))[0, -1].log_softmax(-1)[c.tokens[1]].item() - c.logprobs[1])
                                   for prompt, group in zip(PROMPTS, got) for c in group) / 16
    assert 0 < errors[2**40] < 1.5 * errors[0] + 1e-3
    monkeypatch.setattr(packed, 'worth_it', lambda *args: True)
    with torch.autocast('cpu', torch.bfloat16), packed.packed(model, 16, 2**40), torch.no_grad():
        h = torch.randn(3, 32)
        for few in (0, 2**40):
            monkeypatch.setattr(packed, 'FEWEST', few)
            exact = h.double() @ model.head_weight.bfloat16().double().T
            assert (model.logits(h).double() - exact).abs().max() < 1e-5


def test_fp8_models_are_not_packed():
    """The sampler multiplies as the trainer does, at any number of rows."""
    model = fp8.convert(make('gqa'))
    prompts = [[3, 4, 5]] * 20
    for p, (c,) in zip(prompts, Sampler(model, {1}, slots=20).generate(prompts, 1, 6, 1.0, seed=1)):
        ids = torch.tensor([p + c.tokens])
        labels = torch.full_like(ids[:, :-1], -100)
        labels[:, len(p) - 1:] = ids[:, len(p):]
        assert torch.allclose(model.logprobs(ids[:, :-1], labels)[0], torch.tensor(c.logprobs), atol=1e-4)


def test_the_cache_holds_c_plus_r_numbers_a_token_and_layer():
    for kind, width in (('mla', 32 + 16), ('gqa', 2 * 2 * 8)):
        cfg = make(kind).cfg
        region = sample.Region(cfg, 2, 3, 10, torch.float32, torch.device('cpu'))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for parts in region.layers for t in parts}
        assert sum(storages.values()) == 4 * 2 * 3 * 10 * width


def test_an_instruction_is_the_users_last_line():
    assert instructed({'prompt': 'a', 'x': 1}, 'do') == {'prompt': 'a\ndo', 'x': 1}
    chat = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'a'}]
    asked = instructed({'prompt': chat}, 'do')['prompt']
    assert asked == [chat[0], {'role': 'user', 'content': 'a\ndo'}] and chat[1]['content'] == 'a'
    assert instructed({'prompt': 'a'}, '') == {'prompt': 'a'}


def test_the_evaluation_configs_name_keys_and_fit(monkeypatch):
    folder = Path(__file__).parents[1] / 'config'
    files = [str(folder / 'eval_aime24.py'), str(folder / 'eval_deepseek.py')]
    protocol = configurator.parse(evaluate.Config, files)
    assert (protocol.temperature, protocol.top_p, protocol.n, protocol.greedy) == (0.6, 0.95, 64, False) and 'aime24' in protocol.data[0]
    for path in folder.glob('eval_*.py'):
        cfg = configurator.parse(evaluate.Config, [str(path)])
        made = re.search(r'--dataset=(\w+)(?: --split=(\w+))?', path.read_text())
        if made:                                                            # the file that the command in its comment writes
            assert Path(cfg.data[0]).stem == '_'.join(filter(None, made.groups())), path
    assert len(list(folder.glob('eval_*.py'))) >= 10


def test_the_budget_plot_of_a_tiny_run(tmp_path):
    pytest.importorskip('matplotlib')
    model, tokenizer, _ = tiny_checkpoint(tmp_path)
    budget.main(budget.Config(run=str(tmp_path), stages=['m'], data=str(tmp_path / 'p.jsonl'), n=2, budgets=[3], prolong=[6], max_new_tokens=12, threads=1))
    points = json.loads((tmp_path / 'budget.json').read_text())
    assert [(p['way'], p['size']) for p in points] == [('vote', 1), ('vote', 2), ('best', 2), ('cut', 3), ('prolong', 6)]
    assert points[0]['tokens'] <= 12 and points[1]['tokens'] == points[2]['tokens'] == 2 * points[0]['tokens']
    assert (tmp_path / 'budget.png').stat().st_size > 5000


def test_the_best_of_k_is_drawn_from_groups_of_k():
    def s(right, judge):
        return {'answer': str(right), 'length': 5, 'rewards': {'accuracy': float(right), 'judge': judge}}
    scored = [[s(1, 0.9), s(0, 0.2), s(0, 0.8), s(1, 0.1)], [s(0, 0.5), s(1, 0.6), s(0, 0.0), s(0, 0.0)]]
    by = lambda weights: lambda groups: evaluate.best_of(groups, weights)  # noqa: E731
    best = budget.point('zero', 'best', scored, 2, 2, by({'judge': 1.0}))
    assert best['accuracy'] == (1 / 2 + 1 / 2) / 2 and best['tokens'] == 10
    assert budget.point('zero', 'best', scored, 4, 4, by({'judge': 1.0}))['accuracy'] == 1.0
    assert budget.point('zero', 'best', scored, 2, 2, by({'accuracy': 1.0}))['accuracy'] == (1 + 1 / 2) / 2     # pass@2 of these pairs


# ---- prompts and stops


def said_in_chat(monkeypatch, model, tokenizer, lines, **settings):
    """Chats; -> the text of each prompt, and of what was sampled after it"""
    turns, plain, lines = [], Sampler.generate, iter([*lines, ''])
    def generate(self, prompts, *args, **how):
        tokens = []
        hear = how.pop('on_token')
        def on_token(prompt, number, token):
            tokens.append(token)
            hear(prompt, number, token)
        out = plain(self, prompts, *args, on_token=on_token, **how)
        kept = [t for t in tokens if t not in tokenizer.stop_ids]
        turns.append((tokenizer.decode(prompts[0]), tokenizer.decode(kept)))
        return out
    monkeypatch.setattr(Sampler, 'generate', generate)
    monkeypatch.setattr('builtins.input', lambda _: next(lines))
    sample.chat(sample.Config(max_new_tokens=4, **settings), model, tokenizer)
    return turns


@pytest.mark.parametrize('own', ['', '<think>'])
def test_chat_remembers_what_its_answers_were_made_to_start_with(tmp_path, monkeypatch, own):
    model, tokenizer, _ = tiny_checkpoint(tmp_path)
    begins = "{% if add_generation_prompt %}{{ '<|assistant|>"
    tokenizer.chat_template = TOY_TEMPLATE.replace(begins, begins + own)
    (first, answer), (second, _) = said_in_chat(monkeypatch, model, tokenizer, [' 1 2', ' 3'],
                                                prefill=' yes', instruction=' big')
    assert first == f'<|user|> 1 2\n big<|assistant|>{own} yes'
    assert second == f'{first}{answer}<|end|><|user|> 3\n big<|assistant|>{own} yes'


class Says:
    """A sampler whose completions are all these tokens."""
    stop_strings = []

    def __init__(self, tokens, finished):
        self.tokens, self.finished = tokens, finished

    def generate(self, contexts, n, limits, *args, **how):
        drawn = [self.tokens[:limit] for limit in limits]
        return [[Completion(tokens, [0.0] * len(tokens), self.finished)] for tokens in drawn]


def test_forced_tokens_are_those_of_training():
    """Tags that are added tokens, as in Qwen3 and R1: in a row to train on each is one token."""
    special = ['<|user|>', '<|assistant|>', '<|end|>', '<think>', '</think>']
    tokenizer = Tokenizer.from_words(['Wait', '\n\n'], special, pattern='qwen2')
    text = '<think>so\nWait, no</think>\n\nyes'
    trained, _ = tokenizer.apply_chat_template([{'role': 'user', 'content': 'q'},
                                                {'role': 'assistant', 'content': text}])
    close = tokenizer.special_tokens['</think>']
    for sampler, how, at, pieces in (
            (Says(list(b'so so'), False), {'think_end': '</think>\n\n'}, 3, ['</think>', '\n\n']),
            (Says([close], True), {'think_at_least': 3}, 0, ['Wait', 'Wait', '</think>'])):
        ((c,),) = evaluate.forced(sampler, tokenizer, [[1]], 1, 9, 1.0, think_budget=3, **how)
        wrote = c.tokens[at:at + len(pieces)]
        assert [tokenizer.decode([t]) for t in wrote] == pieces
        assert set(wrote) < set(trained)
    with pytest.raises(ValueError, match='think_end'):
        evaluate.forced(sampler, tokenizer, [[1]], 1, 9, 1.0, think_budget=3, think_end='')


def test_an_answer_ends_with_its_stop_text_and_not_with_the_token_that_completes_it():
    assert sample.until_stop('a</x>\n', ['</x>']) == 'a</x>'
    assert sample.until_stop('a', ['</x>']) == 'a'
    assert sample.until_stop('a;b.', ['.', ';b', 'c']) == 'a;b'
    tokenizer = Tokenizer.from_words(['>\n'], ['<|end|>'])
    row = {'prompt': 'q', 'task': 'match', 'answer': '4', 'prefill': ' <think>'}
    completion = Completion(tokenizer.encode('x</think> <answer>4</answer>\n'), [], True)
    weights = {'accuracy': 1.0, 'format': 1.0}
    for stop, total in (([], 1.0), (['</answer>'], 2.0)):
        ((scored,),) = evaluate.score(tokenizer, [row], [[completion]], weights, stop)
        assert scored['total'] == total


class AnotherDay(datetime):
    @classmethod
    def now(cls):
        return cls(2031, 2, 3)


def test_an_evaluation_stopped_goes_on_with_the_date_of_its_start(tmp_path, monkeypatch):
    *_, settings = tiny_checkpoint(tmp_path)
    (tmp_path / 'today.jinja').write_text("{{ strftime_now('%d %B') }}" + TOY_TEMPLATE)
    settings |= dict(chat_template=str(tmp_path / 'today.jinja'), greedy=False,
                     out=str(tmp_path / 'o.jsonl'))
    prompts, plain = [], Sampler.generate
    def generate(self, some, *args, **how):
        prompts.append(some)
        if len(prompts) == 1:
            raise KeyboardInterrupt
        return plain(self, some, *args, **how)
    monkeypatch.setattr(Sampler, 'generate', generate)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(evaluate.Config(**settings))
    monkeypatch.setattr(data_tokenizer, 'datetime', AnotherDay)
    evaluate.main(evaluate.Config(**settings))
    assert prompts[0] == prompts[1]
    evaluate.main(evaluate.Config(**settings))                      # begun on that day
    assert bytes(prompts[2][0][:4]) == b'03 F' and prompts[2] != prompts[1]


def test_the_toys_evaluation_scores_a_perfect_answer_in_full():
    path = Path(__file__).parents[1] / 'config' / 'eval_countdown.py'
    cfg, rng = configurator.parse(evaluate.Config, [str(path)]), random.Random(0)
    row = prepare.rl_problem(rng, (2, 3, 4), 24)
    reasoning, expression = prepare.trace(rng, row['numbers'], 24, 'search', 'en')
    tokenizer = toy_tokenizer()
    answer = tokenizer.encode(prepare.respond(rng, reasoning, expression, broken=False))
    _, rows = encode_prompts(tokenizer, [row], cfg.prefill)
    completion = Completion([*answer, *tokenizer.stop_ids], [], True)
    ((score,),) = evaluate.score(tokenizer, rows, [[completion]], cfg.rewards, cfg.stop)
    assert score['total'] == sum(cfg.rewards.values())


def no_sandbox():
    try:
        sandbox.require()
    except sandbox.SandboxError as error:
        return str(error)


ASKS = {  # words of an instruction: a problem, and an answer in the form that it asks for
    'put your final answer': (
        {'prompt': 'What is 6 times 7?', 'task': 'math', 'answer': '42'}, 'It is \\boxed{42}.'),
    'the letter': (
        {'prompt': 'Which?\nA. this\nB. that', 'task': 'choice', 'answer': 'B'}, 'So \\boxed{B}.'),
    'python': (
        {'prompt': 'Double x.', 'task': 'code', 'entry_point': 'f', 'setup': '',
         'asserts': ['assert f(2) == 4']}, 'So:\n```python\ndef f(x):\n    return 2 * x\n```')}
EVALUATIONS = [path for path in sorted((Path(__file__).parents[1] / 'config').glob('eval_*.py'))
               if path.stem not in ('eval_countdown', 'eval_deepseek')]  # the toy's, and a protocol


@pytest.mark.parametrize('path', EVALUATIONS, ids=lambda path: path.stem)
def test_an_evaluation_preset_asks_for_what_its_reward_wants(path):
    cfg = configurator.parse(evaluate.Config, [str(path)])
    (row, answer), = [asked for words, asked in ASKS.items() if words in cfg.instruction]
    if row['task'] == 'code' and no_sandbox():
        pytest.skip(no_sandbox())
    tokenizer = toy_tokenizer()
    rows = [instructed(row, cfg.instruction)]
    (ids,), rows = encode_prompts(tokenizer, rows, cfg.prefill)
    print(tokenizer.decode(ids))
    completion = Completion(tokenizer.encode(answer), [], True)
    ((score,),) = evaluate.score(tokenizer, rows, [[completion]], cfg.rewards, cfg.stop)
    assert score['total'] == sum(cfg.rewards.values())


def test_the_script_scores_by_a_reward_file_and_refuses_what_cannot_be_scored(tmp_path):
    *_, settings = tiny_checkpoint(tmp_path)
    mine, data = tmp_path / 'my.py', tmp_path / 'p.jsonl'
    rows = [{'prompt': f' 1 2 {n} make 6', 'task': 'coin', 'side': n} for n in (3, 4)]
    settings.update(reward_file=str(mine), reward_workers=1, greedy=False)

    def scored(text, more=(), **changes):
        mine.write_text(text)
        data.write_text(''.join(json.dumps(row) + '\n' for row in [*rows, *more]))
        return evaluate.main(evaluate.Config(**{**settings, **changes}))[str(data)]
    try:
        got = scored('def coin_reward(response, row):\n    return (row["side"] - 2) / 2\n',
                     rewards={'coin': 1.0, 'overlong': 1.0}, best_of={'coin': 1.0})
        assert got['pass1'] == got['best_of2'] == 0.5 and got['accuracy'] == got['coin'] == 0.75
        rewards.EXAMPLES.clear()
        with pytest.raises(ValueError, match=rf"'accuracy' failed on all .*'no' \({mine}"):
            scored('def coin_reward(response, row):\n    return row["no"]\n')
        with pytest.raises(ValueError, match=rf"{data}:3: 'answer' is missing, which the"):
            bad = [{'prompt': '?', 'task': 'math'}]
            scored('def coin_reward(response, row):\n    return 1\n', bad)
    finally:
        rewards.use_file('')
        rewards.prepare({'format': 1.0}, ())


def test_the_samplers_script_answers_prompts_and_sends_evaluations_on(tmp_path):
    """Of the keys that evaluate.py alone has, the command to use is told."""
    *_, settings = tiny_checkpoint(tmp_path)
    own = {f.name for f in dataclasses.fields(evaluate.Config)}
    own -= {f.name for f in dataclasses.fields(sample.Config)}
    assert own == set(sample.OF_EVALUATE)

    def script(*flags):
        return subprocess.run([sys.executable, 'sample.py', *flags], capture_output=True, text=True,
                              cwd=Path(__file__).parents[1])
    (tmp_path / 'x.py').write_text('n = 2\n')
    got = script('--seed=2', f'{tmp_path}/x.py')
    assert got.returncode == 2 and got.stdout == ''
    assert got.stderr == (f'sample.py: n is a key of evaluate.py: python evaluate.py --seed=2 '
                          f'{tmp_path}/x.py\n')
    got = script(f'--checkpoint={settings["checkpoint"]}', '--prompt= 1 2', '--samples=3',
                 '--max_new_tokens=4', '--threads=1')
    prompt, *answers = got.stdout.strip('\n').split('\n  ')
    assert prompt.startswith('⟦<|user|>⟧ 1 2') and len(answers) == 3
    assert 'nothing to answer' in script('--threads=1').stderr
