"""sample.py against a sampler without a cache, closed forms, and enumeration."""
import itertools
import json
import math

import pytest
import torch

import sample
from data.countdown.prepare import toy_tokenizer
from decode import Completion, Sampler, pick, uniform
from model import ModelConfig, Transformer
from sample import pass_at_k

MODELS = {
    'mla': dict(model_type='deepseek_v3', num_hidden_layers=2, hidden_size=32, intermediate_size=48, moe_intermediate_size=16),
    'gqa': dict(model_type='qwen2', num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=8, num_key_value_heads=2),
}
PROMPTS = [[5, 6, 7], [9] * 11, [1, 2], [30, 31, 32, 33, 34]]


def make(kind):
    torch.manual_seed(1)
    return Transformer(ModelConfig(vocab_size=40, max_position_embeddings=64, initializer_range=0.2, **MODELS[kind]))


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
    reference = Sampler(model, [3], slots=100).generate(PROMPTS, 4, 20, 1.0, seed=5)
    tokens = lambda results: [[c.tokens for c in samples] for samples in results]  # noqa: E731
    for slots, check in [(1, 4), (3, 1), (7, 16)]:
        assert tokens(Sampler(model, [3], slots, check).generate(PROMPTS, 4, 20, 1.0, seed=5)) == tokens(reference)
    alone = Sampler(model, [3]).generate([PROMPTS[2]], 4, 20, 1.0, seed=5, keys=[2])
    assert [c.tokens for c in alone[0]] == [c.tokens for c in reference[2]]
    other = Sampler(model, [3]).generate(PROMPTS, 4, 20, 1.0, seed=6)
    assert [c.tokens for c in other[0]] != [c.tokens for c in reference[0]]


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
    got = sample.statistics(scored)
    assert got['pass1'] == pytest.approx(3 / 8) and got['length'] == 12.5 and got['truncated'] == 1 / 8 and got['mixing'] == 1 / 8
    assert got['maj4'] == 0.5 and got['pass2'] == pytest.approx((5 / 6 + 3 / 6) / 2) and got['pass4'] == 1.0
    half = 1.96 * math.sqrt(((0.5 - 0.375) ** 2 + (0.25 - 0.375) ** 2) / 1) / math.sqrt(2)
    assert got['pass1_ci'] == pytest.approx([0.375 - half, 0.375 + half])
    assert got['length_wrong'] == pytest.approx(70 / 5) and got['length_right'] == 10


def test_kept_samples_are_good_different_and_limited():
    cfg = sample.Config(keep={'accuracy': 1, 'format': 1}, keep_per_prompt=2, keep_rows=3)
    def s(text, accuracy=1.0, finished=True):
        return {'response': text, 'finished': finished, 'rewards': {'accuracy': accuracy, 'format': 1.0}}
    rows = [{'prompt': 'a', 'task': 'match'}, {'prompt': 'b', 'task': 'match', 'prefill': '<think>'}]
    scored = [[s('x'), s('x'), s('wrong', 0.0), s('cut', finished=False), s('y'), s('z')], [s('u'), s('v')]]
    texts = [row['messages'][-1]['content'] for row in sample.kept(cfg, rows, scored)]
    assert texts == ['x', '<think>u', 'y']


def test_the_script_evaluates_writes_samples_and_keeps(tmp_path):
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**MODELS['gqa'], 'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': 64}))
    model.save_pretrained(tmp_path / 'm')
    tokenizer.save_pretrained(tmp_path / 'm')
    rows = [{'prompt': ' 1 2 3 make 6', 'task': 'countdown', 'numbers': [1, 2, 3], 'target': 6, 'language': 'en'}] * 3
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    numbers = sample.main(sample.Config(checkpoint=str(tmp_path / 'm'), data=[str(tmp_path / 'p.jsonl')], n=2, max_new_tokens=12,
                                        out=str(tmp_path / 'o.jsonl'), summary=str(tmp_path / 's.json')))
    written = [json.loads(line) for line in (tmp_path / 'o.jsonl').read_text().splitlines()]
    assert len(written) == 3 and all(len(row['samples']) == 2 for row in written)
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
