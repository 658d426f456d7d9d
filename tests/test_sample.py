"""sample.py and kv_cache.py against a sampler without a cache, closed forms, and frequencies."""
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import kv_cache
import sample
from data.countdown.prepare import toy_tokenizer
from data.tokenizer import TOY_TEMPLATE
from kernels import cpu_sampling, fp8
from kv_cache import KVBuffer
from model import ModelConfig, Transformer
from sample import Completion, Sampler, pick, uniform

SMALL = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48)
GQA = dict(**SMALL, head_dim=8, num_key_value_heads=2)
MODELS = {
    'mla': dict(**SMALL, model_type='deepseek_v3', moe_intermediate_size=16),
    'gqa': dict(**GQA, model_type='qwen2'),
}
KINDS = {**MODELS, 'qwen3': dict(**GQA, model_type='qwen3')}   # no biases, norms on q and k
PROMPTS = [[5, 6, 7], [9] * 11, [1, 2], [30, 31, 32, 33, 34]]


def make(kind, **more):
    torch.manual_seed(1)
    shape = dict(vocab_size=40, max_position_embeddings=64, initializer_range=0.2)
    return Transformer(ModelConfig(**{**shape, **KINDS[kind], **more}))


def tokens_of(results):
    return [[c.tokens for c in completions] for completions in results]


def flat(results):
    return list(itertools.chain.from_iterable(results))


def labels_of(prompt, completion):
    """-> ids [1, T] of prompt and completion, labels [1, T] of the completion's tokens"""
    ids = torch.tensor([prompt + completion.tokens])
    labels = torch.full_like(ids, -100)
    labels[0, len(prompt) - 1:-1] = torch.tensor(completion.tokens)
    return ids, labels


class Letters:
    """A tokenizer whose tokens are letters"""

    def decode(self, ids):
        return ''.join(chr(97 + i % 26) for i in ids)


def without_cache(model, prompt, number, index, n, temperature, seed, stop):
    """The same noise, but the whole sequence forward for every token"""
    ids = list(prompt)
    logprobs = []
    for position in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1].double()
        logp = (logits / (temperature or 1.0)).log_softmax(-1)
        u = uniform(seed, *(torch.tensor([key]) for key in (number, index, position))).item()
        if temperature == 0:
            token = int(logp.argmax())
        else:
            token = min(int((logp.exp().cumsum(0) <= u).sum()), len(logp) - 1)
        ids.append(token)
        logprobs.append(logp[token].item())
        if token in stop:
            break
    return ids[len(prompt):], logprobs


@pytest.mark.parametrize('temperature', [0.0, 0.7, 1.0])
@pytest.mark.parametrize('kind', MODELS)
def test_equals_sampling_without_a_cache(kind, temperature):
    model = make(kind)
    stop = [3, 4]
    got = Sampler(model, stop, slots=5).generate(PROMPTS, 3, 16, temperature, seed=11)
    for p, prompt in enumerate(PROMPTS):
        for s in range(3):
            tokens, logprobs = without_cache(model, prompt, p, s, 16, temperature, 11, stop)
            assert got[p][s].tokens == tokens
            assert got[p][s].logprobs == pytest.approx(logprobs, abs=1e-4)
            assert got[p][s].finished == (tokens[-1] in stop)
            assert len(tokens) == 16 or tokens[-1] in stop


@pytest.mark.parametrize('kind', MODELS)
def test_a_sample_does_not_depend_on_slots_or_company(kind):
    model = make(kind)
    reference = Sampler(model, [3], slots=100).generate(PROMPTS, 3, 10, 1.0, seed=5)
    for slots, check in [(1, 4), (3, 1), (7, 16)]:
        got = Sampler(model, [3], slots, check).generate(PROMPTS, 3, 10, 1.0, seed=5)
        assert tokens_of(got) == tokens_of(reference)
    alone = Sampler(model, [3]).generate([PROMPTS[2]], 3, 10, 1.0, seed=5, keys=[2])
    assert tokens_of(alone) == tokens_of([reference[2]])
    other = Sampler(model, [3]).generate(PROMPTS, 3, 10, 1.0, seed=6)
    assert tokens_of(other)[0] != tokens_of(reference)[0]


@pytest.mark.parametrize('kind', MODELS)
def test_ids_without_a_token_are_never_sampled_and_count_in_no_log_prob(kind):
    """Whatever their logits, here the largest by far; as if the vocabulary had no such rows, in
    every way of sampling."""
    model = make(kind, num_nextn_predict_layers=int(kind == 'mla'))
    absent = [0, 17, 36, 37, 38, 39]
    there = [i for i in range(40) if i not in absent]
    with torch.no_grad():
        model.head_weight[absent] = 30 * torch.randn(len(absent), 32)
    model.use_tokens(SimpleNamespace(ids_without_token=lambda vocab_size: absent))
    drafted = 0
    filters = {'top_k': 9, 'top_p': 0.95, 'min_p': 0.02}
    for n, temperature, more in [(1, 0.0, {}), (8, 0.8, {}), (1, 1.0, filters)]:
        sampler = Sampler(model, [3], slots=40)        # 32 rows: reordered weights; 4: with drafts
        got = sampler.generate(PROMPTS, n, 20, temperature, seed=1, **more)
        assert not set(itertools.chain(*flat(tokens_of(got)))) & set(absent)
        for prompt, completions in zip(PROMPTS, got):
            for c in completions[:2]:
                check_log_probs(model, prompt, c, temperature, there)
        drafted += sampler.drafted
    assert bool(drafted) == (kind == 'mla')


def check_log_probs(model, prompt, completion, temperature, there):
    """The sampler's and the trainer's against a softmax over the ids that are there"""
    tau = temperature or 1.0
    ids, labels = labels_of(prompt, completion)
    with torch.no_grad():
        logp, entropy, _ = model.logprobs(ids, labels, temperature=tau, entropy=True)
        logits = model(ids)[0, len(prompt) - 1:-1, there] / tau
    truth = torch.distributions.Categorical(logits=logits)
    tokens = [there.index(t) for t in completion.tokens]
    expected = truth.log_prob(torch.tensor(tokens))
    assert torch.allclose(logp, expected, atol=1e-5)
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5)
    assert torch.allclose(entropy, truth.entropy(), atol=1e-5)
    if temperature == 0:
        assert logits.argmax(-1).tolist() == tokens


def test_logprobs_are_the_training_forwards():
    model = make('mla')
    got = Sampler(model, [3]).generate(PROMPTS, 2, 24, 0.8, seed=1)
    for prompt, completions in zip(PROMPTS, got):
        for c in completions:
            ids, labels = labels_of(prompt, c)
            with torch.no_grad():
                logp = model.logprobs(ids, labels, temperature=0.8)[0]
            assert torch.allclose(logp, torch.tensor(c.logprobs), atol=1e-4)


@pytest.mark.parametrize('prompts, arguments, said', [
    ([[]], {}, 'prompt 0 has 0 tokens'),
    ([[1], [2] * 60], {}, 'prompt 1 has 60 tokens; with max_new_tokens=10 the context of 64 leaves '
     'room for 1 to 54'),
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


def test_what_was_finished_before_a_bad_logit_is_kept():
    model = make('gqa')
    heard = []
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = float('nan')

    def on_done(p, s, completion):
        heard.append((p, completion.tokens))
    with pytest.raises(FloatingPointError, match='prompt 2, sample 0 are not finite') as error:
        Sampler(model, slots=1).generate([[5, 6], [7], [8, 39]], 1, 6, on_done=on_done)
    kept = error.value.completions
    assert heard == [(0, kept[0][0].tokens), (1, kept[1][0].tokens)]
    assert kept[2] == [None]


def test_tokens_are_reported_as_they_appear():
    heard = []

    def on_token(p, s, token):
        heard.append(token)
    sampler = Sampler(make('gqa'), [3], slots=1, check_every=1)
    got = sampler.generate([[5, 6]], 1, 12, seed=2, on_token=on_token)
    assert heard == got[0][0].tokens


@pytest.mark.parametrize('kind', MODELS)
def test_each_request_has_its_own_length(kind):
    model = make(kind)
    limits = [[1, 5], [9, 2], [3, 3], [12, 1]]
    whole = Sampler(model, slots=3).generate(PROMPTS, 2, 12, 1.0, seed=5)
    cut = Sampler(model, slots=3).generate(PROMPTS, 2, limits, 1.0, seed=5)
    for a, b, limit in zip(flat(whole), flat(cut), flat(limits)):
        assert b.tokens == a.tokens[:limit]
        assert not b.finished
        assert b.logprobs == pytest.approx(a.logprobs[:limit], abs=1e-5)


@pytest.mark.parametrize('slots, check', [(1, 1), (5, 4), (50, 16)])
def test_a_stop_string_ends_at_the_token_that_completes_it(slots, check):
    model = make('gqa')
    stops = ['ab', 'q']
    free = Sampler(model, [3]).generate(PROMPTS, 4, 24, 1.0, seed=9)
    stopping = Sampler(model, [3], slots, check, stop_strings=stops, tokenizer=Letters())
    got = stopping.generate(PROMPTS, 4, 24, 1.0, seed=9)
    ended = 0
    for a, b in zip(flat(free), flat(got)):
        text = Letters().decode(a.tokens)
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert b.tokens == a.tokens[:min(ends, default=None)]
        assert b.finished == (bool(ends) or a.finished)
        assert len(b.logprobs) == len(b.tokens)
        ended += bool(ends)
    assert ended > 2
    with pytest.raises(ValueError, match='stop strings need the tokenizer'):
        Sampler(model, stop_strings='x').generate([[1]], 1, 4)


def test_policy_gradients_can_refuse_a_changed_distribution():
    for change in ({'top_p': 0.9}, {'top_k': 5}, {'min_p': 0.1}):
        with pytest.raises(ValueError, match='biases the ratio'):
            Sampler(make('gqa')).generate([[1]], 1, 4, unbiased=True, **change)


@pytest.mark.parametrize('slots', [2, 50])
def test_routes_are_those_of_the_training_forward(slots):
    model = make('mla')
    got = Sampler(model, [3], slots).generate(PROMPTS, 3, 12, 1.0, seed=2, routes=True)
    for prompt, completions in zip(PROMPTS, got):
        for c in completions:
            ids = torch.tensor([prompt + c.tokens])[:, :-1]
            routes = []
            rope, mask = model.context(ids)
            with torch.no_grad():
                model.hidden(ids, rope, mask, routes)
            expected = torch.stack([chosen for _, chosen in routes], 1)
            assert c.routes.shape == (ids.shape[1], 1, 2)
            assert not c.routes.is_inference()      # a trainer can save them for its backward pass
            assert torch.equal(c.routes.long().sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize('temperature, slots', [(1.0, 5), (0.0, 50)])
def test_entropies_are_those_of_the_softmax_that_was_drawn_from(temperature, slots):
    model = make('mla')
    sampler = Sampler(model, [3], slots, stop_strings=['ab', 'q'], tokenizer=Letters())
    got = sampler.generate(PROMPTS, 3, 12, temperature, top_p=0.9, seed=2, entropy=True)
    plain = sampler.generate(PROMPTS, 3, 12, temperature, top_p=0.9, seed=2)
    for prompt, completions, others in zip(PROMPTS, got, plain):
        for c, other in zip(completions, others):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + c.tokens]))[0, len(prompt) - 1:-1].double()
            logits = logits / (temperature or 1.0)
            H = torch.distributions.Categorical(logits=logits).entropy()
            assert c.entropy == pytest.approx(H.sum().item(), rel=1e-4)
            assert (c.tokens, c.logprobs) == (other.tokens, other.logprobs)
            assert other.entropy is None


# ---- drawing a token


def test_frequencies_follow_the_softmax_and_the_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    n = 20000
    nothing = torch.zeros(n, dtype=torch.int64)
    u = uniform(3, torch.arange(n), nothing, nothing)
    p = (logits / 0.8).softmax(-1)
    tolerance = 4 * 0.5 / n ** 0.5

    x, logp, _ = pick(logits.expand(n, -1), u, temperature=0.8, top_p=1.0)
    share = torch.bincount(x, minlength=5) / n
    assert (share - p).abs().max() < tolerance
    assert torch.allclose(logp, p.log()[x], atol=1e-5)

    x, logp, _ = pick(logits.expand(n, -1), u, temperature=0.8, top_p=0.8)
    inside = 2 if p[:2].sum() >= 0.8 else 3
    assert x.max().item() == inside - 1
    share = torch.bincount(x, minlength=5)[:inside] / n
    assert (share - p[:inside] / p[:inside].sum()).abs().max() < tolerance
    assert torch.allclose(logp, p.log()[x], atol=1e-5)  # before the filter, as the trainer's are


@pytest.mark.parametrize('filters, inside', [
    ({'top_k': 2}, 2),
    ({'min_p': 0.3}, 2),
    ({'min_p': 0.9}, 1),
    ({'top_k': 4, 'top_p': 0.9}, 3),
    ({'top_k': 9}, 5),
])
def test_frequencies_follow_the_filters(filters, inside):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    n = 20000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    p = logits.softmax(-1)
    x, logp, _ = pick(logits.expand(n, -1), u, 1.0, **filters)
    expected = p.clone()
    expected[inside:] = 0
    assert torch.allclose(torch.bincount(x, minlength=5) / n, expected / expected.sum(), atol=1e-4)
    assert torch.allclose(logp, p.log()[x], atol=1e-5)


def test_uniform_numbers_are_uniform_and_unrelated():
    a = torch.arange(30000)
    keys = a % 50, a // 50 % 20, a // 1000
    u = uniform(1, *keys)
    v = uniform(2, *keys)
    assert 0 <= u.min() and u.max() < 1 and len(u.unique()) == len(u)
    chi_square = ((torch.histc(u.float(), 20, 0, 1) - 1500).square() / 1500).sum()
    assert chi_square < 45                                          # 19 degrees: p = 0.001
    for other in (v, u.roll(1), u.roll(50), u.roll(1000)):
        assert torch.corrcoef(torch.stack([u, other]))[0, 1].abs() < 0.025


@pytest.mark.parametrize('V', [1, 40, 512, 513, 5000])
def test_the_largest_in_blocks_is_the_first_largest(V):
    z = torch.randint(0, 1 + V // 3, (300, V)).float()
    x = sample.first_largest(z)
    largest = z.amax(-1, keepdim=True)
    assert torch.equal(z.gather(1, x[:, None]), largest)
    assert torch.equal(x, (z == largest).int().argmax(-1))


@pytest.mark.parametrize('V', [40, 512, 513, 5000])
def test_inversion_in_blocks_equals_the_plain_cumulative_sum(V):
    torch.manual_seed(V)
    p = (3 * torch.randn(300, V)).softmax(-1)
    p[:, V // 3:V // 2] = 0
    u = torch.rand(300, dtype=torch.float64)
    x = sample.invert_cdf(p, u)
    cdf = p.double().cumsum(-1)
    plain = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1)
    assert (x == plain).float().mean() > 0.99
    assert (cdf.gather(1, x[:, None])[:, 0] - u * cdf[:, -1] > -1e-6).all()
    last = sample.invert_cdf(p, torch.full((300,), 1 - 2**-53, dtype=torch.float64))
    assert (p.gather(1, last[:, None]) > 0).all()


# ---- drafts, graphs, kernels, memory


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_speculation_gives_the_stream_of_plain_decoding(temperature, monkeypatch):
    model = make('mla', vocab_size=12, num_nextn_predict_layers=1)
    prompts = [[t % 12 for t in prompt] for prompt in PROMPTS]
    limits = [20, 11, 20, 2]
    how = dict(seed=4, routes=True, entropy=True)
    plain = Sampler(model, [3], speculate=0).generate(prompts, 3, limits, temperature, **how)

    def pays(self, queue):                         # however bad this model's drafts are
        return not queue and self.slots.B > 0
    monkeypatch.setattr(sample.Speculation, 'pays', pays)
    for slots, check in [(100, 4), (5, 1), (1, 9)]:
        drafting = Sampler(model, [3], slots, check, speculate=100)
        got = drafting.generate(prompts, 3, limits, temperature, **how)
        for a, b in zip(flat(plain), flat(got)):
            assert (a.tokens, a.finished) == (b.tokens, b.finished)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert torch.equal(a.routes, b.routes)
            assert a.entropy == pytest.approx(b.entropy, rel=1e-4)
        assert drafting.accepted < drafting.drafted
        assert drafting.accepted or slots < 100


def test_drafting_stops_where_it_does_not_pay():
    model = make('mla', max_position_embeddings=128, num_nextn_predict_layers=1)
    sampler = Sampler(model, speculate=4)
    sampler.generate([[1, 2, 3]], 4, 40, seed=1)
    assert 64 <= sampler.drafted < 90
    assert sampler.accepted < sampler.drafted / 2
    without = make('gqa')
    assert not without.cfg.num_nextn_predict_layers
    assert Sampler(without, speculate=9).speculate == 0


@pytest.mark.parametrize('kind', MODELS)
def test_sizes_rounded_for_graphs_change_nothing(kind, monkeypatch):
    model = make(kind)
    expected = Sampler(model, [3], slots=9).generate(PROMPTS, 4, 12, 1.0, seed=5)
    for module in (sample, kv_cache):
        monkeypatch.setattr(module, 'graph_size', lambda n, device: kv_cache.bucket(n))
    got = Sampler(model, [3], slots=9).generate(PROMPTS, 4, 12, 1.0, seed=5)
    assert tokens_of(got) == tokens_of(expected)
    buckets = [kv_cache.bucket(n) for n in (1, 4, 5, 8, 9, 17, 33, 100)]
    assert buckets == [1, 4, 5, 8, 10, 20, 40, 112]


def test_the_kernel_is_given_rows_and_prompts_in_order(monkeypatch):
    model = make('mla')  # mla_decode takes its PyTorch reference on CPU
    expected = Sampler(model, [3], slots=7).generate(PROMPTS, 4, 12, 1.0, seed=5)
    monkeypatch.setattr(kv_cache, 'fused', lambda x: True)
    got = Sampler(model, [3], slots=7).generate(PROMPTS, 4, 12, 1.0, seed=5)
    assert tokens_of(got) == tokens_of(expected)


def test_memory_is_planned_and_the_slots_that_fit_are_named(monkeypatch):
    model = make('gqa')
    monkeypatch.setattr(sample, 'free_memory', lambda device: 100_000)
    with pytest.raises(ValueError, match=r'slots=\d+ fit') as error:
        Sampler(model, slots=1000).generate(PROMPTS, 100, 40)
    fit = int(str(error.value).split('slots=')[1].split()[0])
    Sampler(model, slots=fit).check_memory(PROMPTS, 100, 40)
    monkeypatch.setattr(sample, 'free_memory', lambda device: 1000)
    with pytest.raises(ValueError, match='slots=0 fit: shorten'):
        Sampler(model, slots=2).generate(PROMPTS, 100, 40)


def test_the_cache_holds_c_plus_r_numbers_a_token_and_layer():
    for kind, width in (('mla', 32 + 16), ('gqa', 2 * 2 * 8)):
        buffer = KVBuffer(make(kind).cfg, 2, 3, 10, torch.float32, torch.device('cpu'))
        storages = [part.untyped_storage() for part in itertools.chain(*buffer.layers)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        assert sum(sizes.values()) == 4 * 2 * 3 * 10 * width


def is_plain(model):
    """Whether no layer works on other weights than its own"""
    changed = [module for module in model.modules() if {'forward', 'project'} & vars(module).keys()]
    return not changed and 'logits' not in vars(model)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
@pytest.mark.parametrize('kind', KINDS)
def test_reordered_weights_change_nothing_and_end_with_the_call(kind, monkeypatch):
    model = make(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))        # norms that are not 1, biases that are not 0
    monkeypatch.setattr(sample, 'free_memory', lambda device: 300_000)  # little memory: no copies
    expected = Sampler(model, [3]).generate(PROMPTS, 4, 12, 1.0, seed=5)
    monkeypatch.setattr(sample, 'free_memory', lambda device: 2**40)
    plain_within = []

    def on_token(*_):
        plain_within.append(is_plain(model))
    for few in (0, 900, cpu_sampling.FEWEST):
        monkeypatch.setattr(cpu_sampling, 'FEWEST', few)
        got = Sampler(model, [3]).generate(PROMPTS, 4, 12, 1.0, seed=5, on_token=on_token)
        assert is_plain(model)
        assert plain_within and not any(plain_within)
        for a, b in zip(flat(expected), flat(got)):
            assert a.tokens == b.tokens
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)

    # an update: reordered anew
    monkeypatch.setattr(cpu_sampling, 'FEWEST', 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    new = Sampler(model).generate([PROMPTS[0]], 16, 4, 0.7, seed=5)[0][0]
    tokens, logprobs = without_cache(model, PROMPTS[0], 0, 0, 4, 0.7, 5, [])
    assert new.tokens == tokens
    assert new.logprobs == pytest.approx(logprobs, abs=1e-4)

    # an error ends them as well
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float('nan')
    with pytest.raises(FloatingPointError):
        Sampler(model).generate(PROMPTS, 4, 4)
    assert is_plain(model)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
@pytest.mark.parametrize('kind', KINDS)
def test_reordered_weights_in_bfloat16_round_as_autocast_does(kind, monkeypatch):
    """The second token's log-prob against float32: no worse than without; the head's product of
    bf16 numbers is float32"""
    model = make(kind)
    exact = make(kind)
    errors = {}
    monkeypatch.setattr(cpu_sampling, 'FEWEST', 0)
    for worth_it in (True, False):
        monkeypatch.setattr(cpu_sampling, 'worth_it', lambda *args, worth_it=worth_it: worth_it)
        with torch.autocast('cpu', torch.bfloat16):
            got = Sampler(model).generate(PROMPTS, 4, 2, 1.0, seed=5)
        total = 0.0
        for prompt, completions in zip(PROMPTS, got):
            for c in completions:
                with torch.no_grad():
                    logits = exact(torch.tensor([prompt + c.tokens[:1]]))[0, -1]
                logp = logits.log_softmax(-1)[c.tokens[1]].item()
                total += abs(logp - c.logprobs[1])
        errors[worth_it] = total / 16
    assert 0 < errors[True] < 1.5 * errors[False] + 1e-3

    monkeypatch.setattr(cpu_sampling, 'worth_it', lambda *args: True)
    reordered = cpu_sampling.onednn_weights(model, 16, 2**40)
    with torch.autocast('cpu', torch.bfloat16), reordered, torch.no_grad():
        h = torch.randn(3, 32)
        for few in (0, 2**40):
            monkeypatch.setattr(cpu_sampling, 'FEWEST', few)
            product = h.double() @ model.head_weight.bfloat16().double().T
            assert (model.logits(h).double() - product).abs().max() < 1e-5


def test_weights_of_fp8_models_are_not_reordered():
    """The sampler multiplies as the trainer does, at any number of rows."""
    model = fp8.convert(make('gqa'))
    prompts = [[3, 4, 5]] * 20
    got = Sampler(model, {1}, slots=20).generate(prompts, 1, 6, 1.0, seed=1)
    for prompt, (c,) in zip(prompts, got):
        ids, labels = labels_of(prompt, c)
        logp = model.logprobs(ids[:, :-1], labels[:, :-1])[0]
        assert torch.allclose(logp, torch.tensor(c.logprobs), atol=1e-4)


# ---- the script


def toy_model(tokenizer, **more):
    torch.manual_seed(0)
    shape = {'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': 64}
    return Transformer(ModelConfig(**{**MODELS['gqa'], **shape, **more}))


def tiny_checkpoint(folder, rows=3):
    """A new model and its tokenizer in folder/m, problems in folder/p.jsonl. -> both, and settings
    of an evaluation"""
    tokenizer = toy_tokenizer()
    model = toy_model(tokenizer, max_position_embeddings=96)
    model.save_pretrained(folder / 'm')
    tokenizer.save_pretrained(folder / 'm')
    with open(folder / 'p.jsonl', 'w') as f:
        for i in range(1, rows + 1):
            row = {'prompt': f' 1 2 {i} make 6', 'task': 'countdown', 'numbers': [1, 2, i],
                   'target': 6, 'language': 'en'}
            f.write(json.dumps(row) + '\n')
    settings = dict(checkpoint=str(folder / 'm'), data=[str(folder / 'p.jsonl')], n=2,
                    max_new_tokens=12, slots=2, threads=1)
    return model, tokenizer, settings


def type_lines(monkeypatch, *lines):
    """What is typed in a chat; an empty line ends it."""
    lines = iter([*lines, ''])
    monkeypatch.setattr('builtins.input', lambda _: next(lines))


def test_chat_streams_an_answer(monkeypatch, capsys):
    tokenizer = toy_tokenizer()
    model = toy_model(tokenizer)
    type_lines(monkeypatch, ' 1 2 3 make 6')
    sample.chat(sample.Config(max_new_tokens=8), model, tokenizer)
    said = capsys.readouterr().out
    messages = [{'role': 'user', 'content': ' 1 2 3 make 6'}]
    prompt, _ = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ((expected,),) = Sampler(model, tokenizer.stop_ids).generate([prompt], 1, 8, seed=2)
    assert isinstance(expected, Completion)
    text = tokenizer.decode([t for t in expected.tokens if t not in tokenizer.stop_ids])
    assert text.split('�')[0] in said.replace('\x1b[0m', '')
    assert 'no word' not in said


@pytest.mark.parametrize('line, told', [
    (' 3 7 99 make =29', "no word for '9' and reads bytes"),
    ('3 7 8 make =29', 'no word for \'3\' and reads bytes, which it was not trained on: do not '
     'believe the answer; begin with a space, as in " 3 7 8 make =29"'),
    ('What is 2 plus 2?', "no word for 'What', '?' and reads bytes"),
])
def test_chat_of_the_toy_says_what_it_has_no_words_for(line, told, monkeypatch, capsys):
    tokenizer = toy_tokenizer()
    type_lines(monkeypatch, line)
    sample.chat(sample.Config(max_new_tokens=2), toy_model(tokenizer), tokenizer)
    assert told in capsys.readouterr().out


def said_in_chat(monkeypatch, model, tokenizer, lines, **settings):
    """Chats; -> the text of each prompt, and of what was sampled after it"""
    turns = []
    plain = Sampler.generate

    def generate(self, prompts, *args, on_token, **how):
        tokens = []

        def hear(prompt, number, token):
            tokens.append(token)
            on_token(prompt, number, token)
        out = plain(self, prompts, *args, on_token=hear, **how)
        kept = [t for t in tokens if t not in tokenizer.stop_ids]
        turns.append((tokenizer.decode(prompts[0]), tokenizer.decode(kept)))
        return out
    monkeypatch.setattr(Sampler, 'generate', generate)
    type_lines(monkeypatch, *lines)
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
