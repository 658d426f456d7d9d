"""data/countdown: traces checked with independent arithmetic, the same files from the same seed,
what is held out, the documented shares."""
import itertools
import json
import random
import re
from fractions import Fraction

import pytest

import rewards
from data.countdown import prepare
from data.countdown.prepare import Config, number_sets, problems, toy_tokenizer, trace
from data.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """All files of the default settings, but for the length of the corpus."""
    folder = tmp_path_factory.mktemp('countdown')
    prepare.main(Config(out_dir=str(folder), corpus_rows=4000))
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def brute_force(numbers):
    """Every value of three numbers under + - * in any order and bracketing (without the module's
    search)."""
    out = set()
    for a, b, c in itertools.permutations(map(Fraction, numbers)):
        for x in (a + b, a - b, a * b):
            out |= {x + c, x - c, c - x, x * c}
    return out


def test_every_problem_is_solvable_and_few_solvable_ones_are_missed():
    found = set(problems(number_sets(7)))
    for numbers, target in found:
        assert target in brute_force(numbers)
    every = set()
    for numbers in itertools.combinations_with_replacement(range(1, 8), 3):
        every |= {(numbers, int(v)) for v in brute_force(numbers)
                  if v.denominator == 1 and 1 <= v <= prepare.LARGEST}
    assert len(found) / len(every) > 0.98   # missed: the first step passes the largest number


def number(text):
    return {'big': None, '大': None}.get(text, text) and int(text)


@pytest.mark.parametrize('notation', ['en', 'zh', 'mixed'])
def test_every_step_of_a_search_is_right_and_its_answer_earns_the_reward(notation):
    rng = random.Random(3)
    names = {w[k]: k for w in prepare.WORDS.values() for k in '+-*'}
    for numbers, target in rng.sample(problems(number_sets(20)), 200):
        numbers = rng.sample(numbers, 3)
        text, expression = trace(rng, numbers, target, 'search', notation)
        assert text.split()[-1] in ('yes', '对')
        for line in text.split(' , '):
            words = line.replace(' search', '').replace(' 找', '').split()
            a, b, c = int(words[0]), int(words[2]), None
            first = {'+': a + b, '-': a - b, '*': a * b}[names[words[1]]]
            assert first >= 0
            assert number(words[4]) == (first if first <= prepare.LARGEST else None)
            if first <= prepare.LARGEST:
                c = int(words[6])
                assert sorted([a, b, c]) == sorted(numbers)
                said = [number(w) for w in words[8:] if w not in ('yes', '对', ',')]
                right = [first * c, first + c, abs(first - c)][:len(said)]
                assert said == [v if v <= prepare.LARGEST else None for v in right]
        row = {'numbers': numbers, 'target': target, 'task': 'countdown', 'language': 'en'}
        response = f'<think>{text}</think><answer> {expression}</answer>'
        assert rewards.countdown_reward(response, row) == 1.0
        assert rewards.format_reward(response, row) == 1.0
        if notation != 'mixed':
            assert rewards.language_reward(response, row) == float(notation == 'en')
            assert not rewards.language_mixed(response, row)


def test_a_seed_fixes_every_file_and_another_changes_them(files, tmp_path):
    prepare.main(Config(out_dir=str(tmp_path / 'again'), corpus_rows=4000))
    prepare.main(Config(out_dir=str(tmp_path / 'other'), corpus_rows=4000, seed=2))
    names = sorted(path.name for path in files.glob('*.jsonl'))
    assert len(names) == 11
    for name in names:
        assert (files / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()
        assert (files / name).read_bytes() != (tmp_path / 'other' / name).read_bytes()


TESTS = ('test', 'test_seen', 'test_beyond')


def user_numbers(row):
    """The numbers of a row's question, the target of countdown not among them."""
    text = row['messages' if 'messages' in row else 'prompt'][0]['content']
    return [int(word) for word in text.split() if word.isdigit()]


def user_target(row):
    text = row['messages' if 'messages' in row else 'prompt'][0]['content']
    return int(text.split('=')[1])


def number_set(row):
    return tuple(sorted(user_numbers(row)))


def test_no_file_for_training_has_the_numbers_of_a_held_out_problem_in_any_order(files):
    trained = [path for path in files.glob('*.jsonl') if path.stem not in (*TESTS, 'sort_test')]
    assert len(trained) == 7
    for name in ('test', 'test_beyond'):
        held_out = {number_set(row) for row in rows(files / f'{name}.jsonl')}
        for path in trained:
            assert not held_out & {number_set(row) for row in rows(path)}, (name, path.name)


def test_a_seen_test_has_numbers_of_the_corpus_and_targets_that_no_file_has(files):
    seen = rows(files / 'test_seen.jsonl')
    corpus = [row for row in rows(files / 'corpus.jsonl') if row['mode'] != 'sort']
    # the corpus is drawn from the problems of distill.jsonl
    of_corpus = {number_set(row) for row in rows(files / 'distill.jsonl')}
    assert {number_set(row) for row in seen} <= of_corpus
    asked = {(number_set(row), row['target']) for row in seen}
    for name in ('rl', 'distill'):
        trained = rows(files / f'{name}.jsonl')
        assert not asked & {(number_set(row), row['target']) for row in trained}
    assert not asked & {(number_set(row), user_target(row)) for row in corpus}


def test_numbers_beyond_the_training_range_occur_in_no_countdown_problem_but_their_tests(files):
    beyond = rows(files / 'test_beyond.jsonl')
    assert all(20 < max(row['numbers']) <= 22 for row in beyond)
    for name in ('corpus', 'searches', 'rl', 'distill', 'test', 'test_seen'):
        countdown = [row for row in rows(files / f'{name}.jsonl') if row.get('mode') != 'sort']
        assert max(max(user_numbers(row)) for row in countdown) == 20


def test_rl_and_the_corpus_share_no_numbers_and_the_teacher_is_asked_what_the_corpus_asks(files):
    corpus = [row for row in rows(files / 'corpus.jsonl') if row['mode'] != 'sort']
    solvable = {(number_set(row), user_target(row)) for row in corpus if row['mode'] != 'hopeless'}
    hopeless = {(number_set(row), user_target(row)) for row in corpus if row['mode'] == 'hopeless'}
    rl, distill = (rows(files / f'{name}.jsonl') for name in ('rl', 'distill'))
    assert not {number_set(row) for row in rl} & {number_set(row) for row in corpus}
    assert solvable <= {(number_set(row), row['target']) for row in distill}
    assert hopeless and not hopeless & set(problems(number_sets(20)))
    assert [len(rows(files / f'{name}.jsonl')) for name in TESTS] == [512, 256, 256]


def test_the_tests_are_the_same_whatever_the_corpus_is_made_of(files, tmp_path):
    prepare.main(Config(out_dir=str(tmp_path), corpus_rows=100, search=0.0, guess=0.94))
    for name in TESTS:
        assert (tmp_path / f'{name}.jsonl').read_bytes() == (files / f'{name}.jsonl').read_bytes()


def test_clean_searches_are_the_rows_of_the_corpus_that_are_right_english_and_well_formed(files):
    searches, corpus = rows(files / 'searches.jsonl'), rows(files / 'corpus.jsonl')
    assert len(searches) > 400 and all(row in corpus for row in searches[:50])
    for row in searches:
        text = row['messages'][1]['content']
        problem = {'numbers': user_numbers(row), 'target': user_target(row), 'language': 'en'}
        assert rewards.countdown_reward(text, problem) == 1
        assert rewards.format_reward(text, problem) == rewards.language_reward(text, problem) == 1


def test_the_shares_are_those_of_the_settings_and_guesses_are_mostly_wrong(files):
    cfg, corpus = Config(), rows(files / 'corpus.jsonl')

    def share(key, value):
        return sum(row[key] == value for row in corpus) / len(corpus)

    wanted = {'guess': cfg.guess, 'quick': cfg.quick, 'search': cfg.search * (1 - cfg.hopeless),
              'hopeless': cfg.search * cfg.hopeless}
    for mode, part in wanted.items():
        assert share('mode', mode) == pytest.approx((1 - cfg.sort) * part, abs=0.02)
    assert share('notation', 'mixed') == pytest.approx(cfg.mixed, abs=0.03)
    assert share('broken', True) == pytest.approx(cfg.broken, abs=0.02)

    def right(row):
        *numbers, target = map(int, re.findall(r'\d+', row['messages'][0]['content']))
        row_of = {'numbers': numbers, 'target': target}
        return rewards.countdown_reward(row['messages'][1]['content'], row_of)
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
            assert tokenizer.decode(ids) == message['content']
            assert min(ids) >= 256   # no byte is left over
    assert len(tokenizer.encode(' 10 plus 7 is 17 with 3 : 20 14 big')) == 11


def test_too_few_problems_are_refused_with_the_key_to_turn(tmp_path):
    with pytest.raises(ValueError, match='raise max_number'):
        prepare.main(Config(out_dir=str(tmp_path), max_number=8))


# --------------------------------------------------------------------------------------------------
# three to six numbers


def every_value(numbers):
    """Every value of the numbers under + - * / in any order and bracketing, fractions included
    (without the module's search)."""
    if len(numbers) == 1:
        return {numbers[0]}
    out = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in {a + b, a - b, a * b, *([a / b] if b else [])}:
            out |= every_value([*rest, value])
    return out


def sets_in(problem_rows):
    return {tuple(sorted(row['numbers'])) for row in problem_rows}


def problems_in(problem_rows):
    return {(tuple(sorted(row['numbers'])), row['target']) for row in problem_rows}


def test_problems_of_three_to_six_numbers_carry_a_solution_that_earns_the_reward(tmp_path):
    cfg = dict(max_numbers=6, max_number=99, rl_rows=300, test_rows=200, seed=5)
    for name in ('a', 'b'):
        prepare.main(Config(out_dir=str(tmp_path / name), **cfg))
    names = ['rl.jsonl', 'rl.manifest.json', 'test.jsonl', 'test.manifest.json']
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == names
    for name in ('rl.jsonl', 'test.jsonl'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    rl, test = rows(tmp_path / 'a' / 'rl.jsonl'), rows(tmp_path / 'a' / 'test.jsonl')
    assert len(rl) == 900 and len(problems_in(rl)) == 300 and len(problems_in(test)) == 200
    assert len({row['id'] for row in rl + test}) == 1100
    assert not sets_in(rl) & sets_in(test)
    assert sum(row['numbers'] != sorted(row['numbers']) for row in test) > 150   # in any order
    counts = [len(row['numbers']) for row in test]
    assert all(counts.count(n) > 25 for n in (3, 4, 5, 6))
    for row in rl + test:
        text = row['prompt'][0]['content']
        assert 1 <= row['target'] <= 100 and all(1 <= n <= 99 for n in row['numbers'])
        said = [int(word) for word in re.findall(r'\d+', text)]
        assert said[:len(row['numbers']) + 1] == [row['target'], *row['numbers']]
        answer = f'<think>x</think><answer>{row["solution"]}</answer>'
        assert rewards.countdown_reward(answer, row) == 1
        assert rewards.countdown_reward('<think>x</think><answer>(1 + 2) / 3</answer>', row) == 0
    for row in [row for row in test if len(row['numbers']) < 5][:40]:
        assert row['target'] in every_value([*map(Fraction, row['numbers'])])


def test_solve_finds_what_there_is_and_nothing_else():
    rng = random.Random(2)
    for n, tries in ((3, 60), (4, 15)):
        for _ in range(tries):
            numbers, target = [rng.randint(1, 12) for _ in range(n)], rng.randint(1, 40)
            solution = prepare.solve(numbers, target)
            possible = target in every_value([*map(Fraction, numbers)])
            assert possible or solution is None
            if solution:
                row = {'numbers': numbers, 'target': target}
                assert rewards.countdown_reward(f'<answer>{solution}</answer>', row) == 1
    assert prepare.solve([1, 1, 1], 50) is None
    assert prepare.solve([8, 8, 3, 3], 24) is None       # only 8/(3 - 8/3), through a fraction
    assert prepare.solve([75, 50, 2, 3, 8, 7], 812)
    assert prepare.solve([2, 2, 2, 2, 2, 2], 997) is None


def test_published_problems_are_solved_or_left_out(tmp_path):
    given = tmp_path / 'in.jsonl'
    given.write_text('{"nums": [95, 36, 32], "target": 99}\n'
                     '{"numbers": [1, 1, 1], "target": 50}\n'
                     '{"nums": [3, 7, 8, 2], "target": 24}\n')
    prepare.main(Config(out_dir=str(tmp_path / 'out'), source=str(given)))
    found = rows(tmp_path / 'out' / 'rl.jsonl')
    assert [row['target'] for row in found] == [99, 24]
    for row in found:
        assert rewards.countdown_reward(f'<answer>{row["solution"]}</answer>', row) == 1
    manifest = json.loads((tmp_path / 'out' / 'rl.manifest.json').read_text())
    assert (manifest['rows_in'], manifest['rows_out']) == (3, 2)
    assert manifest['dropped'] == {'no solution in whole numbers': 1}


@pytest.mark.parametrize('row', [
    '{"nums": [1, 2], "target": 3}',
    '{"nums": [1, 2, 0], "target": 3}',
    '{"nums": [1, 2, true], "target": 3}',
    '{"nums": "123", "target": 3}',
    '{"nums": [1, 2, 3], "target": 0}',
    '{"nums": [1, 2, 3]}',
    '{"target": 3}',
])
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
