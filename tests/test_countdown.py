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
