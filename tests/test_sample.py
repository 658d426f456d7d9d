"""sample.py against a sampler without a cache, closed forms, and enumeration."""
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import sample
from data.countdown.prepare import toy_tokenizer
from data.tokenizer import TOY_TEMPLATE
from kernels import cpu_sampling, fp8
from model import ModelConfig, Transformer
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
        sampler = Sampler(model, [3], slots=40)   # 32 rows: reordered weights; 4: with drafts
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


def tiny_checkpoint(folder, rows=3):
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**MODELS['gqa'], 'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': 96}))
    model.save_pretrained(folder / 'm')
    tokenizer.save_pretrained(folder / 'm')
    rows = [{'prompt': f' 1 2 {i + 1} make 6', 'task': 'countdown', 'numbers': [1, 2, i + 1], 'target': 6, 'language': 'en'} for i in range(rows)]
    (folder / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return model, tokenizer, dict(checkpoint=str(folder / 'm'), data=[str(folder / 'p.jsonl')], n=2, max_new_tokens=12, slots=2, threads=1)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
@pytest.mark.parametrize('kind', [*MODELS, 'qwen3'])
def test_reordered_weights_change_nothing_and_end_with_the_call(kind, monkeypatch):
    model = make(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))                                      # norms that are not 1, biases that are not 0
    plain = lambda: all(not {'forward', 'project'} & vars(m).keys() for m in model.modules()) and 'logits' not in vars(model)  # noqa: E731
    monkeypatch.setattr(sample, 'free_memory', lambda device: 300_000)  # little memory: no copies
    expected = Sampler(model, [3]).generate(PROMPTS, 4, 12, 1.0, seed=5)
    monkeypatch.setattr(sample, 'free_memory', lambda device: 2**40)
    calls = []
    for few in (0, 900, cpu_sampling.FEWEST):
        monkeypatch.setattr(cpu_sampling, 'FEWEST', few)
        got = Sampler(model, [3]).generate(PROMPTS, 4, 12, 1.0, seed=5, on_token=lambda *a: calls.append(plain()))
        assert plain() and not any(calls) and calls
        for a, b in zip((c for group in expected for c in group), (c for group in got for c in group)):
            assert a.tokens == b.tokens and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    monkeypatch.setattr(cpu_sampling, 'FEWEST', 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)        # an update: reordered anew
    new = Sampler(model).generate([PROMPTS[0]], 16, 4, 0.7, seed=5)[0][0]
    assert (new.tokens, new.logprobs) == (lambda tokens, logps: (tokens, pytest.approx(logps, abs=1e-4)))(*without_cache(model, PROMPTS[0], 0, 0, 4, 0.7, 5, []))
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float('nan')
    with pytest.raises(FloatingPointError):
        Sampler(model).generate(PROMPTS, 4, 4)
    assert plain()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
@pytest.mark.parametrize('kind', [*MODELS, 'qwen3'])
def test_reordered_weights_in_bfloat16_round_as_autocast_does(kind, monkeypatch):
    """The second token's log-prob against float32: no worse than without; the head's
    product of bf16 numbers is float32"""
    model, errors, exact = make(kind), {}, make(kind)
    monkeypatch.setattr(cpu_sampling, 'FEWEST', 0)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        for free in (2**40, 0):
            monkeypatch.setattr(cpu_sampling, 'worth_it', lambda *args: free > 0)
            got = Sampler(model).generate(PROMPTS, 4, 2, 1.0, seed=5)
            with torch.autocast('cpu', enabled=False):
                errors[free] = sum(abs(exact(torch.tensor([prompt + c.tokens[:1]]))[0, -1].log_softmax(-1)[c.tokens[1]].item() - c.logprobs[1])
                                   for prompt, group in zip(PROMPTS, got) for c in group) / 16
    assert 0 < errors[2**40] < 1.5 * errors[0] + 1e-3
    monkeypatch.setattr(cpu_sampling, 'worth_it', lambda *args: True)
    reordered = cpu_sampling.onednn_weights(model, 16, 2**40)
    with torch.autocast('cpu', torch.bfloat16), reordered, torch.no_grad():
        h = torch.randn(3, 32)
        for few in (0, 2**40):
            monkeypatch.setattr(cpu_sampling, 'FEWEST', few)
            exact = h.double() @ model.head_weight.bfloat16().double().T
            assert (model.logits(h).double() - exact).abs().max() < 1e-5


def test_weights_of_fp8_models_are_not_reordered():
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


# ---- the script


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
