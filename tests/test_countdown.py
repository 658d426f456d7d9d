"""data/countdown: traces checked with independent arithmetic, determinism, disjointness, the documented shares."""
import itertools
import json
import random
import re
from fractions import Fraction

import pytest

import rewards
from data.countdown import prepare
from data.countdown.prepare import Config, problems, toy_tokenizer, trace
from data.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('countdown')
    prepare.main(Config(out_dir=str(folder), corpus_rows=4000))
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def brute_force(numbers):
    """Every value of three numbers under + - * in any order and bracketing (no use of the module's search)."""
    out = set()
    for a, b, c in itertools.permutations(map(Fraction, numbers)):
        for x in (a + b, a - b, a * b):
            out |= {x + c, x - c, c - x, x * c}
    return out


def test_every_problem_is_solvable_and_few_solvable_ones_are_missed():
    found = set(problems(7))
    for numbers, target in found:
        assert target in brute_force(numbers)
    every = {(n, int(v)) for n in itertools.combinations_with_replacement(range(1, 8), 3) for v in brute_force(n)
             if v.denominator == 1 and 1 <= v <= prepare.LARGEST}
    assert len(found) / len(every) > 0.98   # missed: those whose first step passes the largest number


def number(text):
    return {'big': None, '大': None}.get(text, text) and int(text)


@pytest.mark.parametrize('notation', ['en', 'zh', 'mixed'])
def test_every_step_of_a_search_is_right_and_its_answer_earns_the_reward(notation):
    rng = random.Random(3)
    names = {w[k]: k for w in prepare.WORDS.values() for k in '+-*'}
    for numbers, target in rng.sample(problems(12), 200):
        numbers = rng.sample(numbers, 3)
        text, expression = trace(rng, numbers, target, 'search', notation)
        assert text.split()[-1] in ('yes', '对')
        for line in text.split(' , '):
            words = line.replace(' search', '').replace(' 找', '').split()
            a, b, c = int(words[0]), int(words[2]), None
            first = {'+': a + b, '-': a - b, '*': a * b}[names[words[1]]]
            assert first >= 0 and (number(words[4]) == first if first <= prepare.LARGEST else number(words[4]) is None)
            if first <= prepare.LARGEST:
                c = int(words[6])
                assert sorted([a, b, c]) == sorted(numbers)
                said = [number(w) for w in words[8:] if w not in ('yes', '对', ',')]
                right = [first * c, first + c, abs(first - c)][:len(said)]
                assert said == [v if v <= prepare.LARGEST else None for v in right]
        row = {'numbers': numbers, 'target': target, 'task': 'countdown', 'language': 'en'}
        response = f'<think>{text}</think><answer> {expression}</answer>'
        assert rewards.countdown_reward(response, row) == 1.0 and rewards.format_reward(response, row) == 1.0
        if notation != 'mixed':
            assert rewards.language_reward(response, row) == float(notation == 'en') and not rewards.language_mixed(response, row)


def test_a_seed_fixes_every_file_and_another_changes_them(files, tmp_path):
    prepare.main(Config(out_dir=str(tmp_path / 'again'), corpus_rows=4000))
    prepare.main(Config(out_dir=str(tmp_path / 'other'), corpus_rows=4000, seed=2))
    names = ['corpus.jsonl', 'rl.jsonl', 'test.jsonl', 'distill.jsonl', 'sort_judged.jsonl', 'sort_sft.jsonl', 'sort_test.jsonl', 'sort_pairs.jsonl']
    for name in names:
        assert (files / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()
        assert (files / name).read_bytes() != (tmp_path / 'other' / name).read_bytes()


def test_corpus_rl_and_test_share_no_problem(files):
    key = lambda row: (tuple(sorted(row['numbers'])), row['target'])  # noqa: E731
    rl, test, distill = ({key(row) for row in rows(files / f'{name}.jsonl')} for name in ('rl', 'test', 'distill'))
    corpus, hopeless = set(), set()
    for row in rows(files / 'corpus.jsonl'):
        if row['mode'] != 'sort':
            *numbers, target = map(int, re.findall(r'\d+', row['messages'][0]['content']))
            (hopeless if row['mode'] == 'hopeless' else corpus).add((tuple(sorted(numbers)), target))
    assert len(test) == 512 and len(rl) == 512
    assert not test & rl and not test & corpus and not rl & corpus and distill >= corpus
    assert hopeless and not hopeless & set(problems(10))


def test_the_shares_are_those_of_the_settings_and_guesses_are_mostly_wrong(files):
    cfg, corpus = Config(), rows(files / 'corpus.jsonl')
    share = lambda test: sum(map(test, corpus)) / len(corpus)  # noqa: E731
    wanted = {'guess': cfg.guess, 'quick': cfg.quick, 'search': cfg.search * (1 - cfg.hopeless), 'hopeless': cfg.search * cfg.hopeless}
    for mode, part in wanted.items():
        assert share(lambda row: row['mode'] == mode) == pytest.approx((1 - cfg.sort) * part, abs=0.02)
    assert share(lambda row: row['notation'] == 'mixed') == pytest.approx(cfg.mixed, abs=0.03)
    assert share(lambda row: row['broken']) == pytest.approx(cfg.broken, abs=0.02)

    def right(row):
        *numbers, target = map(int, re.findall(r'\d+', row['messages'][0]['content']))
        return rewards.countdown_reward(row['messages'][1]['content'], {'numbers': numbers, 'target': target})
    guesses = [row for row in corpus if row['mode'] == 'guess' and not row['broken']]
    searches = [row for row in corpus if row['mode'] == 'search' and not row['broken']]
    assert sum(map(right, guesses)) / len(guesses) < 0.12 and all(map(right, searches))
    formats = [rewards.format_reward(row['messages'][1]['content'], {}) for row in corpus]
    assert formats == [float(not row['broken']) for row in corpus]


def test_numbers_and_words_are_single_tokens_and_text_survives(files):
    tokenizer = Tokenizer.from_pretrained(files / 'tokenizer')
    assert tokenizer.vocab_size == toy_tokenizer().vocab_size
    for row in rows(files / 'corpus.jsonl')[:200]:
        for message in row['messages']:
            ids = tokenizer.encode(message['content'])
            assert tokenizer.decode(ids) == message['content'] and min(ids) >= 256   # no byte is left over
    assert len(tokenizer.encode(' 10 plus 7 is 17 with 3 : 20 14 big')) == 11


def test_too_few_problems_are_refused_with_the_key_to_turn(tmp_path):
    with pytest.raises(ValueError, match='raise max_number'):
        prepare.main(Config(out_dir=str(tmp_path), max_number=4))


# ---------------------------------------------------------------------------------------------------------------------
# three to six numbers


def every_value(numbers):
    """Every value of the numbers under + - * / in any order and bracketing, fractions included (no use of the module's search)."""
    if len(numbers) == 1:
        return {numbers[0]}
    out = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest, (a, b) = [n for k, n in enumerate(numbers) if k not in (i, j)], (numbers[i], numbers[j])
        for value in {a + b, a - b, a * b, *([a / b] if b else [])}:
            out |= every_value([*rest, value])
    return out


def test_problems_of_three_to_six_numbers_carry_a_solution_that_earns_the_reward(tmp_path):
    cfg = dict(max_numbers=6, max_number=99, rl_rows=300, test_rows=200, seed=5)
    for name in ('a', 'b'):
        prepare.main(Config(out_dir=str(tmp_path / name), **cfg))
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['rl.jsonl', 'rl.manifest.json', 'test.jsonl', 'test.manifest.json']
    for name in ('rl.jsonl', 'test.jsonl'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    rl, test = rows(tmp_path / 'a' / 'rl.jsonl'), rows(tmp_path / 'a' / 'test.jsonl')
    key = lambda row: (tuple(sorted(row['numbers'])), row['target'])  # noqa: E731
    assert len(rl) == 900 and len({key(row) for row in rl}) == 300 and len({key(row) for row in test}) == 200
    assert not {key(row) for row in rl} & {key(row) for row in test} and len({row['id'] for row in rl + test}) == 1100
    assert sum(row['numbers'] != sorted(row['numbers']) for row in test) > 150   # in any order
    counts = [len(row['numbers']) for row in test]
    assert all(counts.count(n) > 25 for n in (3, 4, 5, 6))
    for row in rl + test:
        text = row['prompt'][0]['content']
        assert 1 <= row['target'] <= 100 and all(1 <= n <= 99 for n in row['numbers'])
        assert [*map(int, re.findall(r'\d+', text))][:len(row['numbers']) + 1] == [row['target'], *row['numbers']]
        assert rewards.countdown_reward(f'<think>x</think><answer>{row["solution"]}</answer>', row) == 1
        assert rewards.countdown_reward('<think>x</think><answer>(1 + 2) / 3</answer>', row) == 0
    for row in [row for row in test if len(row['numbers']) < 5][:40]:
        assert row['target'] in every_value([*map(Fraction, row['numbers'])])


def test_solve_finds_what_there_is_and_nothing_else():
    rng = random.Random(2)
    for n, tries in ((3, 60), (4, 15)):
        for _ in range(tries):
            numbers, target = [rng.randint(1, 12) for _ in range(n)], rng.randint(1, 40)
            solution, possible = prepare.solve(numbers, target), target in every_value([*map(Fraction, numbers)])
            assert possible or solution is None
            if solution:
                assert rewards.countdown_reward(f'<answer>{solution}</answer>', {'numbers': numbers, 'target': target}) == 1
    assert prepare.solve([1, 1, 1], 50) is None and prepare.solve([8, 8, 3, 3], 24) is None   # only 8/(3 - 8/3), through a fraction
    assert prepare.solve([75, 50, 2, 3, 8, 7], 812) and prepare.solve([2, 2, 2, 2, 2, 2], 997) is None


def test_published_problems_are_solved_or_left_out(tmp_path):
    given = tmp_path / 'in.jsonl'
    given.write_text('{"nums": [95, 36, 32], "target": 99}\n{"numbers": [1, 1, 1], "target": 50}\n{"nums": [3, 7, 8, 2], "target": 24}\n')
    prepare.main(Config(out_dir=str(tmp_path / 'out'), source=str(given)))
    found = rows(tmp_path / 'out' / 'rl.jsonl')
    assert [row['target'] for row in found] == [99, 24]
    assert all(rewards.countdown_reward(f'<answer>{row["solution"]}</answer>', row) == 1 for row in found)
    manifest = json.loads((tmp_path / 'out' / 'rl.manifest.json').read_text())
    assert (manifest['rows_in'], manifest['rows_out'], manifest['dropped']) == (3, 2, {'no solution in whole numbers': 1})


@pytest.mark.parametrize('row', ['{"nums": [1, 2], "target": 3}', '{"nums": [1, 2, 0], "target": 3}', '{"nums": "123", "target": 3}',
                                 '{"nums": [1, 2, 3], "target": 0}', '{"nums": [1, 2, 3]}', '{"target": 3}', '{"nums": [1, 2, true], "target": 3}'])
def test_a_bad_row_is_named_by_file_and_line(row, tmp_path):
    given = tmp_path / 'in.jsonl'
    given.write_text('{"nums": [95, 36, 32], "target": 99}\n' + row + '\n')
    with pytest.raises(ValueError, match=r'in\.jsonl:2: "(nums|target)" .*must be'):
        prepare.main(Config(out_dir=str(tmp_path / 'out'), source=str(given)))
    assert not (tmp_path / 'out' / 'rl.jsonl').exists()


@pytest.mark.parametrize('numbers', [(2, 3), (3, 7), (5, 4)])
def test_other_counts_of_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match='3 to 6'):
        Config(min_numbers=numbers[0], max_numbers=numbers[1])
