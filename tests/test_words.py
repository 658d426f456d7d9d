import csv
import hashlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import rewards
from data import source
from data.source import Skip, read_rows
from data.words import prepare
from data.words.prepare import (Config, Problem, capitalised, decimal, detokenised, from_infix,
                                from_prefix, joined, main, names_in, near_pairs, read_gsm8k,
                                read_svamp, read_train, work_out)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared' / 'data'
FILES = ('cold', 'sft', 'rl', 'test', 'svamp')


# ---- Equations ----

@pytest.mark.parametrize('equation, numbers, steps', [
    ('+ number0 number1', ['5', '4'], ['5 + 4 = 9']),
    ('- number0 * number1 number2', ['25000', '1500', '8'],
     ['1500 * 8 = 12000', '25000 - 12000 = 13000']),
    ('* + number0 number1 - number1 2.0', ['1', '6'], ['1 + 6 = 7', '6 - 2 = 4', '7 * 4 = 28']),
    ('* number0 0.01', ['3.50'], ['3.50 * 0.01 = 0.035']),
    ('/ number0 8', ['1'], ['1 / 8 = 0.125']),
    ('- number0 number1', ['4', '8'], ['4 - 8 = -4']),
])
def test_an_equation_is_written_out_in_the_order_of_its_evaluation(equation, numbers, steps):
    found = []
    work_out(from_prefix(equation, numbers), found)
    assert found == steps


def test_infix_equations_have_the_values_that_python_gives_them():
    rng = random.Random(0)
    for _ in range(200):
        text = str(rng.randint(1, 9))
        for _ in range(rng.randint(1, 4)):
            text = f'{text} {rng.choice("+-*/")} {rng.choice((2, 4, 5, 10, 0.5))}'
            if rng.random() < 0.5:
                text = f'( {text} )'
        steps = []
        value = work_out(from_infix(text), steps)
        assert float(value) == pytest.approx(eval(text))
        assert steps[-1].endswith(f' = {value}') and len(steps) == len(re.findall(' [-+*/] ', text))
    assert from_infix('.5*1,200') == ('*', '0.5', '1200')
    assert from_infix('-3+5.0') == ('+', '-3', '5')


def test_decimals_are_exact():
    for numerator, denominator, text in ((3, 8, '0.375'), (50000, 2, '25000'), (-7, 2, '-3.5'),
                                         (1, 10**7, '0.0000001'), (10**20 + 1, 10, '1' + '0' * 19
                                                                   + '.1'), (0, 5, '0')):
        assert decimal(Fraction(numerator, denominator)) == text
    for denominator in range(1, 300):
        while denominator % 2 == 0:
            denominator //= 2
        while denominator % 5 == 0:
            denominator //= 5
        if denominator > 1:
            with pytest.raises(Skip, match='no decimal'):
                decimal(Fraction(1, denominator))


@pytest.mark.parametrize('function, arguments, message', [
    (from_prefix, ('+ number0', ['1']), 'lacks an operand'),
    (from_prefix, ('+ number0 number1', ['1']), 'more numbers than the problem'),
    (from_prefix, ('+ number0 number0 3', ['1']), 'goes on'),
    (from_prefix, ('^ number0 number0', ['1']), 'no number'),
    (from_infix, ('3 +',), 'no equation'),
    (from_infix, ('2**9**9',), 'no equation of numbers'),
    (from_infix, ('__import__("os")',), 'no equation of numbers'),
    (from_infix, ('1 % 2',), 'no equation of numbers'),
    (from_infix, ('(' * 5000,), 'no equation'),
])
def test_what_is_no_equation_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# ---- Text ----

@pytest.mark.parametrize('raw, text', [
    ('Bryan looked at his books as well . If he has 5 ,', 'Bryan looked at his books as well. If '
     'he has 5,'),
    ("He ca n't pay $ 3 for Carson ’ s cat , did n't he ?", "He can't pay $3 for Carson's cat, "
     "didn't he?"),
    ('At a pie - eating contest 3 % of t - shirts', 'At a pie-eating contest 3% of t-shirts'),
    ("the ' crazy silly school ' series and the boys ' dog", "the 'crazy silly school' series and "
     "the boys' dog"),
    ("call them `` earth keepers '' .", 'call them "earth keepers".'),
    ('in a year ( a year = 365 days ) ?', 'in a year (a year = 365 days)?'),
])
def test_text_is_typed_as_people_type(raw, text):
    assert detokenised(raw) == text


def test_capitals_come_back_at_heads_of_sentences_and_for_known_names():
    cased = ['If Julia and Mrs. Hilt have a dog, will Julia go? Ned may.', 'Tess has one, if any.']
    lower = 'mrs. hilt met mr. peter at 5 p.m. on the hill. what did julia, tess and i do? one dog'
    names = names_in([*cased, lower])
    assert {'julia', 'hilt', 'ned', 'tess', 'peter'} <= names
    assert not {'if', 'dog', 'will', 'have', 'met', 'hill'} & names
    assert capitalised(lower, names) == ('Mrs. Hilt met Mr. Peter at 5 p.m. on the hill. What did '
                                         'Julia, Tess and I do? One dog')
    assert capitalised('A dog of julia ran.', names) == 'A dog of julia ran.'


@pytest.mark.parametrize('body, question, text', [
    ('If there are 5', 'How many are left?', 'If there are 5, how many are left?'),
    ('There are 5.', 'How many are left?', 'There are 5. How many are left?'),
    ('He has 40 what', "'s the difference?", "He has 40, what 's the difference?"),
    ('For', 'how much is it sold?', 'For how much is it sold?'),
    ('', 'How many?', 'How many?'),
])
def test_a_question_is_joined_to_its_condition(body, question, text):
    assert joined(body, question) == text


# ---- Rows ----

TRAIN = {'Question': 'if tom has number0 bags of number1 and number2 pen how many has he ?',
         'Numbers': '3.0 2.50 1', 'Equation': '* number0 number1', 'Answer': '7.5',
         'Body': 'if tom has number0 bags of number1 and number2 pen', 'Ques': 'how many has he ?'}


def test_rows_by_hand():
    problem = read_train(TRAIN, 7)
    assert problem == Problem('if tom has 3 bags of 2.50 and one pen, how many has he?',
                              ['3 * 2.50 = 7.5'], '7.5', 'words/train/7')
    svamp = {'ID': 'chal-9', 'Body': 'If Dan had $ 8', 'Question': 'How much is left?',
             'Equation': '( ( 8.0 - 5.0 ) + 2.0 )', 'Answer': 5.0}
    assert read_svamp(svamp, {}) == Problem('If Dan had $8, how much is left?',
                                            ['8 - 5 = 3', '3 + 2 = 5'], '5', 'words/svamp/chal-9')
    gsm8k = {'question': 'How many?', 'answer': 'So 48/2 = <<48/2=24>>24 and 1,200*.5 = '
             '<<1,200*.5+24=624>>624.\n#### 624'}
    assert read_gsm8k(gsm8k, 'gsm8k/train/0').steps == ['48 / 2 = 24', '1200 * 0.5 = 600',
                                                        '600 + 24 = 624']
    row = prepare.sft_row(problem)
    assert row['messages'][1]['content'] == '<think>3 * 2.50 = 7.5</think><answer>7.5</answer>'


@pytest.mark.parametrize('change, reason', [
    ({'Answer': '7.4'}, 'does not give the answer'),
    ({'Equation': '/ number0 7', 'Answer': '0.43'}, 'no decimal'),
    ({'Equation': '/ number0 0'}, 'divides by zero'),
    ({'Equation': 'number0', 'Answer': '3'}, 'no step'),
    ({'Numbers': '0.3333333333333333 2 1'}, 'more than four decimals'),
])
def test_a_row_that_does_not_compute_is_left_out(change, reason):
    with pytest.raises(Skip, match=reason):
        read_train({**TRAIN, **change}, 0)


def test_what_gsm8k_does_not_work_out_is_left_out():
    for answer, reason in (('Four.\n#### 4', 'no calculator mark'),
                           ('<<2+2=5>>5\n#### 5', 'does not compute'),
                           ('<<2+2=4>>4, so five\n#### 5', 'do not end in the answer'),
                           ('<<2x=4>>\n#### 4', 'is no equation'),
                           ('<<4=4>>\n#### 4', 'do not end in the answer'),
                           ('<<1/3=.33>>\n#### 4', 'no decimal')):
        with pytest.raises(Skip, match=reason):
            read_gsm8k({'question': 'q', 'answer': answer}, 'x')
    other = {'dan8left': Fraction(4)}
    row = {'ID': 'chal-1', 'Body': 'Dan 8.', 'Question': 'Left?', 'Equation': '5 - 2', 'Answer': 3}
    with pytest.raises(Skip, match='different answers'):
        read_svamp(row, other)


# ---- The split ----

def grams(text: str) -> set:
    """Four words in a row, each such sequence once."""
    words = text.split()
    return {tuple(words[i:i + 4]) for i in range(max(1, len(words) - 3))}


def test_near_pairs_are_those_of_all_pairs():
    rng = random.Random(1)
    texts = [' '.join(rng.choice('ab#') for _ in range(rng.randint(1, 14))) for _ in range(150)]
    expected = set()
    for i in range(len(texts)):
        for j in range(i):
            for one, other in ((texts[i], texts[j]),
                               (texts[i].replace('#', ''), texts[j].replace('#', ''))):
                one, other = grams(one), grams(other)
                if len(one & other) / len(one | other) >= prepare.NEAR:
                    expected.add((i, j))
    assert set(near_pairs(texts)) == expected
    assert set(near_pairs(texts, 40)) == {(i, j) for i, j in expected if j < 40}
    assert 100 < len(expected) < 150 * 149 / 4


def text_in(row: dict) -> str:
    return (row.get('prompt') or row['messages'])[0]['content']


def masks_of(texts: list[str], way: str) -> list[set]:
    """The grams of each text, masked without prepare.py: numbers are N, names X; with 'persons'
    pronouns are names, too; with 'removed' both are taken out."""
    inside = Counter()
    small = Counter()
    for text in texts:
        for sentence in re.split(r'[.?!]+\s+', text):
            first, *others = re.findall('[A-Za-z]+', sentence) or ['']
            inside.update(word.lower() for word in others if word[0].isupper())
            small.update(word for word in others if word[0].islower())
    names = {word for word, n in inside.items() if n > small[word]}
    if way == 'persons':
        names |= set('he she his her him hers they their them'.split())

    masked = []
    for text in texts:
        words = re.findall(r'[a-z]+|\d[\d.,]*', text.lower())
        words = ['N' if word[0].isdigit() else 'X' if word in names else word for word in words]
        if way == 'removed':
            words = [word for word in words if word not in ('N', 'X')]
        masked.append(grams(' '.join(words)))
    return masked


def nearest(train: list[str], test: list[str], way: str) -> float:
    """The largest Jaccard index of a training and a test text, over all pairs."""
    masked = masks_of(train + test, way)
    held_out = masked[len(train):]
    sizes = np.array([len(one) for one in masked[:len(train)]])
    holders = defaultdict(list)   # gram -> the training texts that have it
    for i, one in enumerate(masked[:len(train)]):
        for gram in one:
            holders[gram].append(i)

    most = 0.0
    for one in held_out:
        both = [i for gram in one for i in holders.get(gram, ())]
        common = np.bincount(both, minlength=len(train))
        most = max(most, (common / (sizes + len(one) - common)).max())
    return most


def test_nearest_is_the_largest_index_of_all_pairs():
    rng = random.Random(2)
    words = 'Tom has 5 red cats and 6 dogs'.split()
    texts = [' '.join(rng.choices(words, k=9)) for _ in range(60)]
    masked = masks_of(texts, 'masked')
    expected = max(len(one & other) / len(one | other)
                   for one in masked[:30] for other in masked[30:])
    assert nearest(texts[:30], texts[30:], 'masked') == expected
    assert nearest(['Then Ann ate 5 of my 12 figs today.'],
                   ['Then Bo ate 44 of my 3 figs today!'], 'masked') == 1
    assert nearest(['He ate my figs today and yesterday.'],
                   ['She ate my figs today and yesterday.'], 'masked') == 3 / 5
    assert nearest(['He ate my figs today and yesterday.'],
                   ['She ate my figs today and yesterday.'], 'persons') == 1
    assert nearest(['He ate my Kiwi figs today with Bo.'], ['He ate my figs today with.'],
                   'removed') == 1


NAMES = ('Ann', 'Ben', 'Cleo', 'Dora', 'Emil', 'Finn', 'Gwen', 'Hugo', 'Iris', 'Jonas')
THINGS = ('apples', 'books', 'cards', 'dogs', 'eggs', 'figs', 'games', 'hats', 'jars', 'kites',
          'lamps', 'maps', 'nuts', 'oars', 'pens', 'rugs', 'shells', 'toys', 'urns', 'vans')
SHAPES = (
    'When {a} came home there were number0 {t} on every one of the number1 shelves and {a} counted '
    'all {t} twice . How many {t} did {a} count ?',
    'A trader of {t} told {a} that a crate holds number0 {t} and sold {a} number1 crates . How '
    'many {t} did {a} buy from the trader ?',
    '{a} wants to know how much number1 {t} weigh when a scale says that one of the {t} weighs '
    'number0 pounds . What do they weigh ?',
)


def made_up(folder: Path, rows: int = 240) -> str:
    """A folder with the three files, of few texts with many names and numbers each."""
    rng = random.Random(3)

    def problem(things):
        shape = rng.choice(SHAPES)
        text = shape.format(a=rng.choice(NAMES), t=rng.choice(things))
        if rng.random() < 0.3:
            text = text.lower()
        one, other = rng.randint(2, 99), rng.randint(2, 99)
        return text, one, other

    folder.mkdir(exist_ok=True)
    columns = ('Question', 'Numbers', 'Equation', 'Answer', 'Body', 'Ques')
    for name in ('train', 'dev'):
        with open(folder / f'{name}.csv', 'w', newline='', encoding='utf-8') as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            for _ in range(rows if name == 'train' else 3):
                text, one, other = problem(THINGS)
                body, _, question = text.rpartition(' . ')
                writer.writerow({'Question': text, 'Numbers': f'{one}.0 {other}.0',
                                 'Equation': '* number0 number1', 'Answer': f'{one * other}.0',
                                 'Body': f'{body} .', 'Ques': question})
    svamp = []
    for i in range(20):
        text, one, other = problem(THINGS[:4])
        body, _, question = text.rpartition(' . ')
        body = body.replace('number0', str(one)).replace('number1', str(other))
        svamp.append({'ID': f'chal-{i}', 'Body': f'{body}.', 'Question': question,
                      'Equation': f'( {one}.0 * {other}.0 )', 'Answer': float(one * other)})
    (folder / 'SVAMP.json').write_text(json.dumps(svamp))
    return str(folder)


def read_all(folder: Path, names=FILES) -> dict[str, list[dict]]:
    rows = {}
    for name in names:
        key = 'messages' if name in ('cold', 'sft', 'gsm8k_sft') else 'prompt'
        rows[name] = read_rows(folder / f'{name}.jsonl', (key, 'answer', 'task', 'id'))
    return rows


def check_texts(rows: list[dict]):
    """No mark of the original files is left, and a capital begins."""
    for row in rows:
        text = text_in(row)
        assert not re.search(r'number\d| [.,?!]|\$ | n\'t|’|  ', text), text
        assert text[0].isupper() or not text[0].isalpha(), text


def check_traces(rows: list[dict]):
    """Each trace holds by an arithmetic of the test's own and ends in the answer."""
    value = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '*': lambda a, b: a * b,
             '/': lambda a, b: a / b}
    for row in rows:
        trace, answer = re.fullmatch('<think>(.+)</think><answer>(.+)</answer>',
                                     row['messages'][1]['content']).groups()
        for step in trace.split('; '):
            a, op, b, equals, c = step.split(' ')
            assert equals == '=' and value[op](Fraction(a), Fraction(b)) == Fraction(c), step
            assert not c.endswith('.0') and not re.search(r'\.\d*0$|[,e]', c), step
        assert answer == row['answer'] == c


def test_made_up_files_are_split_by_text(tmp_path, capsys):
    folder = made_up(tmp_path / 'in')
    main(Config(out_dir=str(tmp_path / 'out'), source=folder, test_rows=8, cold_rows=20))
    rows = read_all(tmp_path / 'out')
    check_texts([row for part in rows.values() for row in part])
    check_traces(rows['cold'] + rows['sft'])
    assert len(rows['cold']) == 20 and len(rows['test']) == 8 and len(rows['svamp']) == 20
    assert [row['id'] for row in rows['rl']] == [row['id'] for row in rows['sft']]
    assert {row['id'] for row in rows['cold']} <= {row['id'] for row in rows['sft']}

    train = [text_in(row) for row in rows['rl']]
    held_out = [text_in(row) for row in rows['test'] + rows['svamp']]
    for way in ('masked', 'persons', 'removed'):
        assert nearest(train, held_out, way) < 0.5
    # what every split by row would have mixed
    everything = [text_in(row) for row in rows['rl'] + rows['test']]
    assert nearest(everything[::2], everything[1::2], 'masked') == 1

    # the test has a text once, training at most four times
    def without_numbers_and_names(text):
        return re.sub(rf'{"|".join(NAMES)}|\d+', '_', text, flags=re.IGNORECASE)
    times = Counter(map(without_numbers_and_names, map(text_in, rows['test'])))
    assert max(times.values()) == 1
    times = Counter(without_numbers_and_names(text).lower() for text in train)
    assert max(times.values()) == 4

    manifest = json.loads((tmp_path / 'out' / 'rl.manifest.json').read_text())
    assert manifest['rows_in'] == 240 and manifest['rows_out'] == len(rows['rl'])
    assert sum(manifest['dropped'].values()) + len(rows['rl']) + len(rows['test']) == 240
    out = capsys.readouterr().out
    assert f'rl.jsonl: {len(rows["rl"])} rows' in out and 'near a problem of SVAMP' in out


def test_files_are_the_seeds(tmp_path):
    folder = made_up(tmp_path / 'in')
    files = {}
    for out, seed in (('a', 1), ('b', 1), ('c', 2)):
        main(Config(out_dir=str(tmp_path / out), source=folder, test_rows=8, seed=seed))
        files[out] = [(tmp_path / out / f'{name}.jsonl').read_text() for name in FILES]
    assert files['a'] == files['b']
    assert all(one != other for one, other in zip(files['a'], files['c']))


def gsm8k_row(text: str, one: int, other: int) -> dict:
    text = text.replace('number0', str(one)).replace('number1', str(other))
    return {'question': detokenised(text),
            'answer': f'So <<{one}*{other}={one * other}>>it is.\n#### {one * other}'}


def test_gsm8k_joins_without_touching_the_split(tmp_path):
    folder = made_up(tmp_path / 'in')
    plain = Config(out_dir=str(tmp_path / 'plain'), source=folder, test_rows=8)
    main(plain)
    ours = read_all(tmp_path / 'plain')

    # near a training problem, near a test's, and new; in training and in the test of GSM8K
    new = ['Uma walks number0 miles a day for number1 days . How far does Uma walk ?',
           'Vic bakes number1 cakes of number0 eggs each . How many eggs does Vic need ?']
    near_train = re.sub(r'\d+', '7', text_in(ours['rl'][0]))
    near_test = re.sub(r'\d+', '7', text_in(ours['test'][0]))
    parts = {'train': [new[0], near_train, near_test], 'test': [new[1], near_train, near_test]}
    for part, texts in parts.items():
        rows = [json.dumps(gsm8k_row(text, 3, 4)) + '\n' for text in texts]
        (tmp_path / 'in' / f'{part}.jsonl').write_text(''.join(rows))

    main(Config(out_dir=str(tmp_path / 'out'), source=folder, test_rows=8, gsm8k=folder))
    assert read_all(tmp_path / 'out') == ours
    rows = read_all(tmp_path / 'out', ('gsm8k_train', 'gsm8k_sft', 'gsm8k_test'))
    check_traces(rows['gsm8k_sft'])
    assert [row['id'] for row in rows['gsm8k_test']] == ['gsm8k/test/0', 'gsm8k/test/2']
    assert {row['id'] for row in rows['gsm8k_train']} == {'gsm8k/train/0', 'gsm8k/train/1'}


def test_an_absent_gsm8k_names_its_key(tmp_path, monkeypatch):
    folder = made_up(tmp_path / 'in')
    with pytest.raises(OSError, match='nowhere'):
        main(Config(out_dir=str(tmp_path / 'out'), source=folder, test_rows=8, gsm8k='nowhere'))

    def absent(cfg, split):
        raise ValueError('openai/gsm8k cannot be downloaded; give a local copy as --source=')
    monkeypatch.setattr(prepare.gsm8k, 'originals', absent)
    with pytest.raises(ValueError, match='give a local copy as --gsm8k=$'):
        main(Config(out_dir=str(tmp_path / 'out'), source=folder, test_rows=8, gsm8k=True))


def test_a_split_that_cannot_be_is_refused(tmp_path):
    folder = made_up(tmp_path / 'in')
    with pytest.raises(ValueError, match='test_rows=4000: the split by text'):
        main(Config(out_dir=str(tmp_path / 'out'), source=folder, test_rows=4000))
    assert not (tmp_path / 'out').exists()


def test_bad_files_are_named(tmp_path):
    folder = tmp_path / 'in'
    made_up(folder)

    def refuses(name, old, new, message):
        path = folder / name
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            main(Config(out_dir=str(tmp_path / 'out'), source=str(folder), test_rows=8))
        path.write_text(before)
        assert not (tmp_path / 'out').exists()

    refuses('train.csv', '* number0 number1', '* number0 number5', r'train.csv:2: the equation')
    refuses('train.csv', 'number0', 'number7', r'train.csv:2: .* has more numbers than')
    refuses('train.csv', 'Equation', 'Formula', r"train.csv:2: 'Equation' is missing")
    refuses('SVAMP.json', '.0 * ', '.0 ^ ', r'SVAMP.json:1: .* is no equation of numbers')
    refuses('dev.csv', '.0 ', 'x ', r'dev.csv:2: .* is no number')
    (folder / 'dev.csv').unlink()
    with pytest.raises(ValueError, match='dev.csv: no such file; source is a folder with'):
        main(Config(out_dir=str(tmp_path / 'out'), source=str(folder)))


# ---- Downloads ----

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        self.server.asked.append(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[:self.server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that has the three made-up files where the repository's are expected."""
    made_up(tmp_path / 'in')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.files = {}
    server.asked = []
    server.cut = None
    wanted = {}
    for name, (place, _) in prepare.FILES.items():
        content = (tmp_path / 'in' / name).read_bytes()
        server.files[f'/{place}'] = content
        wanted[name] = (place, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(prepare, 'FILES', wanted)
    monkeypatch.setattr(prepare, 'ADDRESS', f'http://127.0.0.1:{server.server_port}')
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_is_kept_and_not_asked_for_again(server, tmp_path):
    cfg = Config(out_dir=str(tmp_path / 'out'), test_rows=8)
    main(cfg)
    assert len(server.asked) == 3 and len(read_all(tmp_path / 'out')['test']) == 8
    main(cfg)
    assert len(server.asked) == 3
    manifest = json.loads((tmp_path / 'out' / 'rl.manifest.json').read_text())
    assert manifest['source'] == f'arkilpatel/SVAMP@{prepare.COMMIT}'
    assert manifest['read'] == {'arkilpatel/SVAMP/data/mawps-asdiv-a_svamp/train.csv':
                                prepare.FILES['train.csv'][1]}
    # a damaged copy is replaced
    (tmp_path / 'out' / 'original' / 'dev.csv').write_text('x')
    main(cfg)
    assert len(server.asked) == 4


@pytest.mark.parametrize('harm, message', [
    ('other', 'is another file than expected: its sha256 is'),
    ('absent', r'cannot be downloaded \(HTTPError: HTTP Error 404'),
    ('cut', r'cannot be downloaded \(IncompleteRead'),
    ('closed', r'cannot be downloaded \(URLError'),
])
def test_a_failed_download_says_what_to_do(server, harm, message, tmp_path, monkeypatch):
    place = f'/{prepare.FILES["dev.csv"][0]}'
    if harm == 'other':
        server.files[place] += b'\n'
    elif harm == 'absent':
        del server.files[place]
    elif harm == 'cut':
        server.cut = 100
    else:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        monkeypatch.setattr(prepare, 'ADDRESS', f'http://127.0.0.1:{port}')
    with pytest.raises(ValueError, match=message) as error:
        main(Config(out_dir=str(tmp_path / 'out'), test_rows=8))
    assert str(error.value).endswith('give a folder with train.csv, dev.csv, SVAMP.json as '
                                     '--source=')
    assert not (tmp_path / 'out' / 'original' / 'dev.csv').exists()
    assert not list(tmp_path.glob('out/*.jsonl'))


def test_the_script_ends_in_one_line(tmp_path):
    script = str(ROOT / 'data' / 'words' / 'prepare.py')
    command = [sys.executable, script, f'--source={tmp_path}', f'--out_dir={tmp_path}/out']
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and run.stdout == '' and run.stderr.count('\n') == 1
    assert run.stderr.startswith('prepare.py: ') and 'train.csv: no such file' in run.stderr


# ---- What makes the files ----

@pytest.mark.parametrize('path, command', [
    ('data/words/svamp.jsonl', 'python data/words/prepare.py'),
    ('data/words/gsm8k_sft.jsonl', 'python data/words/prepare.py --gsm8k=True'),
    ('out/words/rl.jsonl', 'python data/words/prepare.py --out_dir=out/words'),
    ('out/smol/data/rl.jsonl', 'make smol'),
    ('out/smol/cold', 'make smol'),
])
def test_an_absent_file_names_the_command(path, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv('RUN', raising=False)
    monkeypatch.delenv('CHAIN', raising=False)
    assert source.made_by(path) == command


def test_an_absent_file_of_another_run_names_its_recipe(monkeypatch):
    monkeypatch.setenv('CHAIN', 'smol')
    monkeypatch.setenv('RUN', 'out/smol-2')
    assert source.made_by('out/smol-2/data/rl.jsonl') == 'make smol RUN=out/smol-2'
    assert source.made_by('out/r1/zero') == 'make r1'
    monkeypatch.setenv('RUN', 'out/smol')
    assert source.made_by('out/smol/rl') == 'make smol'


# ---- The original files ----

@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """{name of a file: rows} from the original files."""
    if not (SHARED / 'svamp').exists() or not (SHARED / 'gsm8k').exists():
        pytest.skip('needs the original files')
    folder = tmp_path_factory.mktemp('words')
    main(Config(out_dir=str(folder), source=str(SHARED / 'svamp'), gsm8k=str(SHARED / 'gsm8k')))
    return read_all(folder, (*FILES, 'gsm8k_train', 'gsm8k_sft', 'gsm8k_test'))


def test_the_original_files_are_those_of_the_hashes(original):
    for name, (_, wanted) in prepare.FILES.items():
        assert source.sha256(SHARED / 'svamp' / name) == wanted


def test_the_original_rows_hold(original):
    ours = [row for name in FILES for row in original[name]]
    check_texts(ours)
    check_traces(original['cold'] + original['sft'] + original['gsm8k_sft'])
    assert len(original['cold']) == 1000 and len(original['test']) == 400
    assert len(original['rl']) >= 1800 and len(original['svamp']) >= 980
    assert len(original['gsm8k_train']) >= 6500 and len(original['gsm8k_test']) >= 1100

    # answers are those of the files
    with open(SHARED / 'svamp' / 'train.csv', newline='', encoding='utf-8') as f:
        train = list(csv.DictReader(f))
    svamp = {row['ID']: row for row in json.loads((SHARED / 'svamp' / 'SVAMP.json').read_text())}
    for row in ours:
        _, kind, key = row['id'].split('/')
        answer = svamp[key]['Answer'] if kind == 'svamp' else train[int(key)]['Answer']
        assert float(row['answer']) == float(answer)


@pytest.mark.parametrize('way', ['masked', 'persons', 'removed'])
def test_no_training_text_is_near_a_test_text(original, way):
    train = [text_in(row) for row in original['rl'] + original['gsm8k_train']]
    tests = [text_in(row) for name in ('test', 'svamp', 'gsm8k_test') for row in original[name]]
    assert {text_in(row) for row in original['sft']} == {text_in(row) for row in original['rl']}
    assert {text_in(row) for row in original['cold']} <= {text_in(row) for row in original['rl']}
    assert nearest(train, tests, way) < 0.5


def test_gold_answers_are_right_and_echoes_are_not(original):
    rng = random.Random(4)
    rows = [row for name in ('rl', 'test', 'svamp', 'gsm8k_test')
            for row in rng.sample(original[name], 5)]
    weights = {'accuracy': 1.0, 'format': 1.0}
    for row in rows:
        rewards.check_row(row, weights)
        traced = f'<think>x</think><answer>{row["answer"]}</answer>'
        assert rewards.combined(traced, row, weights)[0] == 2.0
        assert rewards.math_reward(f'<answer>{text_in(row)}</answer>', row) == 0.0
        assert rewards.math_reward(f'<answer>{row["answer"]} + 0</answer>', row) == 0.0
