"""evaluate.py: numbers by hand and by enumeration, whole evaluations on a tiny model."""
import itertools
import json
import math
import random
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

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
from model import ModelConfig, Transformer
from sample import Completion, Sampler
from test_sample import MODELS, tiny_checkpoint
from tools import budget


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, right, k in [(8, 3, 1), (8, 3, 4), (8, 0, 8), (6, 5, 2), (8, 1, 8), (4, 4, 1)]:
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_statistics_by_hand():
    def s(answer, right, length=10, finished=True, mixed=False):
        return {'answer': answer, 'rewards': {'accuracy': float(right), 'format': 1.0},
                'length': length, 'finished': finished, 'mixed': mixed}
    scored = [[s('1', 1), s('2', 0), s('1', 1), s('3', 0, 30, False)],
              [s('4', 0), s('4', 0), s('5', 1, mixed=True), s(None, 0)]]
    got = evaluate.statistics(scored)
    assert got['pass1'] == pytest.approx(3 / 8) and got['length'] == 12.5
    assert got['truncated'] == 1 / 8 and got['mixing'] == 1 / 8
    assert got['pass2'] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert got['maj4'] == 0.5 and got['pass4'] == 1.0
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
    assert mean == pytest.approx(x.mean().item())
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.02 * half)


def test_kept_samples_are_good_different_and_limited():
    cfg = evaluate.Config(keep={'accuracy': 1, 'format': 1}, keep_per_prompt=2, keep_rows=3)
    def s(text, accuracy=1.0, finished=True):
        return {'response': text, 'finished': finished,
                'rewards': {'accuracy': accuracy, 'format': 1.0}}
    rows = [{'prompt': 'a', 'task': 'match'},
            {'prompt': 'b', 'task': 'match', 'prefill': '<think>'}]
    scored = [[s('x'), s('x'), s('wrong', 0.0), s('cut', finished=False), s('y'), s('z')],
              [s('u'), s('v')]]
    texts = [row['messages'][-1]['content'] for row in evaluate.kept(cfg, rows, scored)]
    assert texts == ['x', '<think>u', 'y']


def test_the_script_evaluates_writes_samples_and_keeps(tmp_path):
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    shape = {**MODELS['gqa'], 'vocab_size': tokenizer.vocab_size, 'max_position_embeddings': 64}
    model = Transformer(ModelConfig(**shape))
    model.save_pretrained(tmp_path / 'm')
    tokenizer.save_pretrained(tmp_path / 'm')
    row = {'prompt': ' 1 2 3 make 6', 'task': 'countdown', 'numbers': [1, 2, 3], 'target': 6,
           'language': 'en'}
    rows = [row] * 3
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    cfg = evaluate.Config(
        checkpoint=str(tmp_path / 'm'), data=[str(tmp_path / 'p.jsonl')], n=2, max_new_tokens=12,
        out=str(tmp_path / 'o.jsonl'), summary=str(tmp_path / 's.json'))
    numbers = evaluate.main(cfg)
    written = [json.loads(line) for line in (tmp_path / 'o.jsonl').read_text().splitlines()]
    assert len(written) == 3 and all(len(row['samples']) == 2 for row in written)
    assert all({'vote', 'answer', 'rewards'} <= s.keys() for row in written for s in row['samples'])
    assert json.loads((tmp_path / 's.json').read_text()) == numbers
    (numbers,) = numbers.values()
    assert numbers['problems'] == 3 and 'greedy' in numbers
    ids, _ = encode_prompts(tokenizer, [row])
    completion = []
    while len(completion) < 12 and not {*tokenizer.stop_ids} & {*completion}:
        with torch.no_grad():
            logits = model(torch.tensor([ids[0] + completion]))[0, -1]
        completion.append(logits.argmax().item())
    expected = evaluate.text_of(tokenizer, completion)
    assert [row['greedy']['response'] for row in written] == [expected] * 3


def test_the_drafts_of_an_evaluation_are_those_of_both_its_passes(tmp_path, monkeypatch):
    tokenizer = toy_tokenizer()
    torch.manual_seed(1)
    shape = {**MODELS['mla'], 'num_nextn_predict_layers': 1, 'max_position_embeddings': 96}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.2,
                                    **shape))
    rows = [{'prompt': f' 1 2 {n} make 6', 'task': 'countdown', 'numbers': [1, 2, n], 'target': 6}
            for n in (1, 2)]
    counts = []
    plain = sample.Speculation.advance

    def advance(self, count):
        before = self.drafted, self.accepted
        plain(self, count)
        greedy = self.draw.temperature == 0
        counts.append((greedy, self.drafted - before[0], self.accepted - before[1]))
    monkeypatch.setattr(sample.Speculation, 'advance', advance)
    numbers, _ = evaluate.evaluate(model, tokenizer, rows, n=2, max_new_tokens=20, speculate=4)
    for greedy in (True, False):
        assert sum(drafted for g, drafted, _ in counts if g == greedy) > 0
    drafted, accepted = (sum(c[k] for c in counts) for k in (1, 2))
    assert numbers['drafts_accepted'] == accepted / drafted


# ---- evaluation


def test_a_stopped_evaluation_goes_on_to_the_same_samples(tmp_path, monkeypatch):
    *_, settings = tiny_checkpoint(tmp_path)
    evaluate.main(evaluate.Config(**settings, out=str(tmp_path / 'whole.jsonl')))
    whole = Sampler.generate
    drawn = []

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
    assert len((tmp_path / 'o.jsonl.partial').read_text().splitlines()) == 2
    assert not (tmp_path / 'o.jsonl').exists()
    with open(out + '.partial', 'a') as f:
        f.write('["samples", 2, [[[1, 2')                             # a line cut short
    drawn[:] = [10]
    evaluate.main(evaluate.Config(**settings, out=out))
    assert drawn == [10, 2, 3]
    assert (tmp_path / 'o.jsonl').read_text() == (tmp_path / 'whole.jsonl').read_text()
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
    def sampler():
        return Sampler(model, [], slots=3, tokenizer=tokenizer)
    free = sampler().generate(prompts, 2, 6, 1.0, seed=3, keys=[0, 1_000_000])
    got = evaluate.budget_forcing(sampler(), tokenizer, prompts, 2, 20, 1.0, seed=3, think_budget=6)
    for p, group in enumerate(got):
        for s, c in enumerate(group):
            keys = [p * 1_000_003 + s]
            ((alone,),) = sampler().generate([prompts[p]], 1, 6, 1.0, seed=3, keys=keys)
            alone = alone.tokens
            cut = alone + end if end[0] not in alone else alone[:alone.index(end[0]) + 1]
            assert c.tokens[:len(cut)] == cut and len(c.tokens) == 20 and not c.finished
            assert len(cut) < 7 or c.logprobs[6] == 0.0
    assert len(free[0][0].tokens) == 6
    # every token ends the thinking: it is replaced by `wait`, three tokens, until there are 8
    text = tokenizer.decode([int(t) for t in got[0][0].tokens[:1]])
    loud = type('Loud', (), {'encode_assistant': staticmethod(tokenizer.encode_assistant),
                             'decode': staticmethod(lambda ids: ''.join(f'[{i}]' for i in ids)),
                             'stop_ids': [], 'text': text})()
    ((c,),) = evaluate.budget_forcing(
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
        return {'response': text, 'finished': True, 'length': length,
                'rewards': {'accuracy': right}}
    rows = [{'prompt': name, 'task': 'match'} for name in 'abc']
    scored = [[s('a1'), s('a2')], [s('b1', 9), s('b2'), s('b3', right=0.0)],
              [s('c1', right=0.0), s('c2', right=0.0)]]

    def texts(**band):
        kept = evaluate.kept(evaluate.Config(**band), rows, scored)
        return [row['messages'][-1]['content'] for row in kept]
    assert texts(keep_pass_rate=[0.1, 0.9]) == ['b1', 'b2', 'b3']
    assert texts(keep_pass_rate=[0.0, 0.0]) == ['c1', 'c2']
    assert texts(keep_length=[6, 10]) == ['b1']
    assert texts(keep={'accuracy': 1}, keep_length=[1, 8]) == ['a1', 'b2', 'a2']


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
    config = ''.join(f'{key} = {value!r}\n' for key, value in settings.items())
    (tmp_path / 'settings.py').write_text(config)
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = ['evaluate.py', str(tmp_path / 'settings.py'),
               f'--out={tmp_path}/two.jsonl', f'--summary={tmp_path}/s.json']
    subprocess.run([*start, *command], check=True, cwd=Path(__file__).parents[1], timeout=240)
    def lines(name):
        return (tmp_path / name).read_text().splitlines()
    both = [lines('two-00000-of-00002.jsonl'), lines('two-00001-of-00002.jsonl')]
    assert [len(x) for x in both] == [4, 2]
    samples = [json.loads(both[i % 2][i // 2])['samples'] for i in range(5)]
    samples.append(json.loads(both[0][3])['samples'])
    assert samples == [json.loads(line)['samples'] for line in lines('one.jsonl')]
    two = json.loads((tmp_path / 's.json').read_text())
    for path in settings['data']:
        expected = {key: value for key, value in one[path].items() if key != 'drafts_accepted'}
        assert two[path].items() >= expected.items()


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
    assert (protocol.temperature, protocol.top_p) == (0.6, 0.95)
    assert (protocol.n, protocol.greedy) == (64, False) and 'aime24' in protocol.data[0]
    for path in folder.glob('eval_*.py'):
        cfg = configurator.parse(evaluate.Config, [str(path)])
        made = re.search(r'--dataset=(\w+)(?: --split=(\w+))?', path.read_text())
        if made:                # the file that the command in its comment writes
            assert Path(cfg.data[0]).stem == '_'.join(filter(None, made.groups())), path
    assert len(list(folder.glob('eval_*.py'))) >= 10


def test_the_budget_plot_of_a_tiny_run(tmp_path):
    pytest.importorskip('matplotlib')
    model, tokenizer, _ = tiny_checkpoint(tmp_path)
    budget.main(budget.Config(
        run=str(tmp_path), stages=['m'], data=str(tmp_path / 'p.jsonl'), n=2, budgets=[3],
        prolong=[6], max_new_tokens=12, threads=1))
    points = json.loads((tmp_path / 'budget.json').read_text())
    ways = [('vote', 1), ('vote', 2), ('best', 2), ('cut', 3), ('prolong', 6)]
    assert [(p['way'], p['size']) for p in points] == ways
    assert points[0]['tokens'] <= 12
    assert points[1]['tokens'] == points[2]['tokens'] == 2 * points[0]['tokens']
    assert (tmp_path / 'budget.png').stat().st_size > 5000


def test_the_best_of_k_is_drawn_from_groups_of_k():
    def s(right, judge):
        return {'answer': str(right), 'length': 5,
                'rewards': {'accuracy': float(right), 'judge': judge}}
    scored = [[s(1, 0.9), s(0, 0.2), s(0, 0.8), s(1, 0.1)],
              [s(0, 0.5), s(1, 0.6), s(0, 0.0), s(0, 0.0)]]
    def by(weights):
        return lambda groups: evaluate.best_of(groups, weights)
    best = budget.point('zero', 'best', scored, 2, 2, by({'judge': 1.0}))
    assert best['accuracy'] == (1 / 2 + 1 / 2) / 2 and best['tokens'] == 10
    assert budget.point('zero', 'best', scored, 4, 4, by({'judge': 1.0}))['accuracy'] == 1.0
    right = budget.point('zero', 'best', scored, 2, 2, by({'accuracy': 1.0}))
    assert right['accuracy'] == (1 + 1 / 2) / 2                 # pass@2 of these pairs


# ---- prompts and stops


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
        ((c,),) = evaluate.budget_forcing(sampler, tokenizer, [[1]], 1, 9, 1.0, think_budget=3,
                                          **how)
        wrote = c.tokens[at:at + len(pieces)]
        assert [tokenizer.decode([t]) for t in wrote] == pieces
        assert set(wrote) < set(trained)
    with pytest.raises(ValueError, match='think_end'):
        evaluate.budget_forcing(sampler, tokenizer, [[1]], 1, 9, 1.0, think_budget=3, think_end='')


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
    prompts = []
    plain = Sampler.generate
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


