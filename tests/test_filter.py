import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import filter as filters
from data import source
from data.filter import Config, bands_of, grams, main, normalised, shingles, similarity, word_hashes
from data.math import prepare as maths

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared' / 'data'
needs_files = pytest.mark.skipif(not SHARED.exists(), reason='needs the original files')


def write(path, rows):
    rows = [{'prompt': r} if isinstance(r, str) else r for r in rows]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(path)


def lines(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


def chat(question, said, **more):
    user = {'role': 'user', 'content': question}
    return {'messages': [user, {'role': 'assistant', 'content': said}], **more}


def run(tmp_path, rows, evaluations=(), **settings):
    against = [write(tmp_path / f'eval{i}.jsonl', texts) for i, texts in enumerate(evaluations)]
    numbers = main(Config(data=[write(tmp_path / 'in.jsonl', rows)], against=against,
                          out=str(tmp_path / 'out.jsonl'), **settings))
    kept = lines(tmp_path / 'out.jsonl')
    assert numbers['rows_in'] == len(rows) and numbers['rows_out'] == len(kept)
    assert len(rows) == len(kept) + sum(numbers['dropped'].values())
    assert json.loads((tmp_path / 'out.manifest.json').read_text()) == numbers
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]   # nothing temporary left
    return numbers, [r['prompt'] if isinstance(r.get('prompt'), str) else r for r in kept]


def words(rng, n):
    return ' '.join(''.join(rng.choices('abcdefgh', k=5)) for _ in range(n))


def jaccard(a, b):
    """of word 3-grams, plainly"""
    def three(text):
        w = text.lower().split()
        return {tuple(w[i:i + 3]) for i in range(len(w) - 2)}
    return len(three(a) & three(b)) / len(three(a) | three(b))


# ---- duplicates ----


def test_grams_are_those_of_the_words():
    rng = random.Random(1)
    for _ in range(50):
        text = ' '.join(rng.choices('a b c d'.split(), k=rng.randint(0, 40)))
        w = text.split()
        for n in (1, 3, 8):
            plain = [tuple(w[i:i + n]) for i in range(len(w) - n + 1)]
            hashed = grams(word_hashes(text), n).tolist()
            assert len(hashed) == len(plain) and len(set(hashed)) == len(set(plain))
            for (a, g), (b, h) in itertools.product(zip(plain, hashed), repeat=2):
                assert (a == b) == (g == h)
    assert len(word_hashes('求1加2的和 now')) == 7   # 求 1 加 2 的 和 now


def test_normalised_by_hand():
    plain = normalised('what is 1 + 2')
    assert normalised('What is  $1+2$ ?') == plain == normalised('WHAT IS １+２?')
    assert normalised('What is 1-2?') != normalised('What is 1+2?')
    assert normalised('1.5') != normalised('15')
    assert (normalised('Is (1, 2)\n in  “A”?') == normalised("Is (1,2) in 'A'")
            == normalised('is ( 1, 2 ) in a.'))
    for one, other in [
        ('Write $1 1/2$ as a decimal.', 'Write $11/2$ as a decimal.'),
        ('1 23', '12 3'), ('1$ 2', '12'), ('5!?', '5?'), ('the rapist', 'therapist'),
        ('x 2', 'x²'), ('x2', 'x²'), ('x₂', 'x2'), ('x² 3', 'x²³'),
        ('10⁻¹²', '10⁻¹ 2'),
        ('1½', '11/2'), ('1½', '11⁄2'),
    ]:
        assert normalised(one) != normalised(other), (one, other)
    assert normalised('\\log_8 2') == normalised('\\log_82')
    assert normalised('1 ½') == normalised('1½')


def test_minhash_agrees_with_jaccard():
    """The share of pairs that meet in a band is 1 - (1 - s^4)^16, and the similarity is the plain
    one."""
    rng = random.Random(2)
    for changed in (2, 5, 9, 15):
        met, odds = [], []
        for _ in range(150):
            w = words(rng, 60).split()
            other = list(w)
            for i in rng.sample(range(60), changed):
                other[i] = 'changed'
            a, b = ' '.join(w), ' '.join(other)
            s = jaccard(a, b)
            assert similarity(shingles(a), shingles(b)) == pytest.approx(s, abs=1e-12)
            met.append((bands_of(shingles(a)) == bands_of(shingles(b))).any())
            odds.append(1 - (1 - s ** 4) ** 16)
        found, expected = np.mean(met), np.mean(odds)
        deviation = (expected * (1 - expected)) ** 0.5
        assert abs(found - expected) < 4 * (0.25 / 150) ** 0.5 * max(0.3, 2 * deviation)


def test_duplicates_against_all_pairs(tmp_path):
    """By comparing each row with every other: exact ones are those, no two kept rows are alike,
    each near one is like an earlier row."""
    rng = random.Random(3)
    texts = []
    for i in range(250):
        if texts and rng.random() < 0.4:
            w = rng.choice(texts).split()
            for _ in range(rng.choice((0, 1, 2, 12))):
                w[rng.randrange(len(w))] = f'new{i}'
            texts.append(' '.join(w) + rng.choice(('', '.', ' ?')))
        else:
            texts.append(words(rng, rng.randint(20, 60)))
    plain = [normalised(text) for text in texts]
    exact = {i for i in range(len(texts)) if plain[i] in plain[:i]}
    earlier = [max((jaccard(text, t) for t in texts[:i]), default=0)
               for i, text in enumerate(texts)]
    numbers, kept = run(tmp_path, texts, near=0.8)
    at = [texts.index(t) for t in kept]
    near = set(range(len(texts))) - set(at) - exact
    assert len(exact) > 10 and len(near) > 10 and not exact & set(at)
    assert numbers['dropped'] == {'exact duplicate': len(exact), 'near duplicate': len(near)}
    assert at == sorted(at) and all(earlier[i] >= 0.8 for i in near)
    assert all(jaccard(texts[i], texts[j]) < 0.8 for i in at for j in at if j < i)
    assert run(tmp_path, texts)[0]['dropped'] == {'exact duplicate': len(exact)}
    assert run(tmp_path, texts, exact=False)[1] == texts


def test_no_two_of_a_template_are_alike(tmp_path):
    """A large family of rows that are 0.7 to 1 alike: the first 8 of those that share a key are not
    all that can be alike."""
    rng = random.Random(8)
    frame = [words(rng, 17) for _ in range(5)]

    def filled():
        return ' '.join(f'{part} n{rng.randrange(20)}' for part in frame)
    _, kept = run(tmp_path, [filled() for _ in range(400)], near=0.8)
    assert 60 < len(kept) < 200
    assert all(jaccard(a, b) < 0.8 for a, b in itertools.combinations(kept, 2))


def test_alike_against_all_pairs():
    rng = np.random.default_rng(9)
    for near in (0.5, 0.8, 1.0):
        sets = [np.unique(rng.integers(0, 9, rng.integers(0, 9))).astype(np.uint64)
                for _ in range(150)]
        kept, expected = [], []
        for mine in sets:
            expected.append(any(similarity(mine, other) >= near for other in kept))
            if not expected[-1]:
                kept.append(mine)
        assert filters.alike(sets, near) == expected and any(expected) and not all(expected)


def test_duplicates_by_prompt_or_row(tmp_path):
    rows = [chat('q', 'one'), chat('q', 'two'), chat('Q ?', 'one'), chat('r', 'one')]
    assert run(tmp_path, rows)[1] == [rows[0], rows[1], rows[3]]
    assert run(tmp_path, rows, by='prompt')[1] == [rows[0], rows[3]]


def test_blocks_are_one_stream(tmp_path, monkeypatch):
    rng = random.Random(4)
    texts = [words(rng, 12) for _ in range(300)]
    texts += [t + ' x' for t in texts[::7]] + texts[::5]
    whole = run(tmp_path, texts, near=0.6)
    monkeypatch.setattr(filters, 'BLOCK', 7)
    assert run(tmp_path, texts, near=0.6)[1] == whole[1]
    assert whole[0]['dropped'].keys() == {'exact duplicate', 'near duplicate'}


# ---- contamination ----


def test_contamination_by_both_tests(tmp_path):
    rng = random.Random(5)
    long, other, short = words(rng, 30), words(rng, 25), 'two plus two'
    inside = ' '.join(other.split()[9:17])
    seven = ' '.join(other.split()[9:16])
    rows = [
        f'Before it, {long.upper()} and after.',
        f'x {inside} y',
        f'x {seven} y',
        'Two plus  two?',
        'two plus three',
        words(rng, 30),
    ]
    numbers, kept = run(tmp_path, rows, [[long, short], [other, long]])
    assert kept == [rows[2], rows[4], rows[5]] and numbers['dropped'] == {'contaminated': 3}
    c = numbers['contamination']
    first, second = c['evaluation_sets'].values()
    assert (c['rows_by_ngram'], c['rows_by_exact_match'], c['rows_too_short']) == (2, 1, 2)
    assert first == {'rows': 2, 'too_short': 1, 'hits_by_ngram': 1, 'hits_by_exact_match': 1}
    assert second == {'rows': 2, 'too_short': 0, 'hits_by_ngram': 2, 'hits_by_exact_match': 0}
    assert run(tmp_path, rows, [[long, short], [other, long]], ngram=7)[1] == [rows[4], rows[5]]


def test_the_question_is_compared_not_what_is_around_it(tmp_path):
    frame = 'Answer with the letter of the right option and nothing else: '
    rows = [{'prompt': [{'role': 'user', 'content': frame + 'cats?'}], 'question': 'cats?'}]
    assert len(run(tmp_path, rows, [[{'prompt': frame + 'dogs?', 'question': 'dogs?'}]])[1]) == 1
    assert len(run(tmp_path, [{'prompt': frame + 'cats?'}], [[frame + 'dogs?']])[1]) == 0


@needs_files
def test_real_english_is_english(tmp_path):
    """GSM8K's solutions: "5 miles per hour ... per day" and "as many as" are no Italian or
    Portuguese."""
    rows = lines(SHARED / 'gsm8k' / 'test.jsonl')
    _, kept = run(tmp_path, [r['answer'].split('####')[0] for r in rows], languages=['en'])
    assert len(kept) >= 0.999 * len(rows)


@needs_files
def test_the_known_counts_of_math(tmp_path):
    """Published: 619 of MATH's training problems share an 8-gram with MATH-500, none is equal; 529
    and 32 are too short for one."""
    for dataset, folder in (('math', 'math_train'), ('math500', 'math500')):
        maths.main(maths.Config(dataset=dataset, source=str(SHARED / folder),
                                out_dir=str(tmp_path)))
    test = str(tmp_path / 'math500.jsonl')
    out = str(tmp_path / 'o' / 'out.jsonl')
    numbers = main(Config(data=[str(tmp_path / 'math.jsonl')], against=[test], out=out))
    c = numbers['contamination']
    assert (c['rows_by_ngram'], c['rows_by_exact_match'], c['rows_too_short']) == (619, 0, 529)
    assert c['evaluation_sets'][test]['too_short'] == 32
    assert numbers['from'][0]['dropped'] == {'no answer': 4} and numbers['licence'] == 'MIT'

    def eight_grams(path):
        for row in lines(path):
            w = row['prompt'][0]['content'].lower().split()
            yield from (tuple(w[i:i + 8]) for i in range(len(w) - 7))
    assert not set(eight_grams(test)) & set(eight_grams(out))


# ---- checks of one row ----


def test_length_and_language(tmp_path):
    assert run(tmp_path, ['ab', 'abcd', 'abcdef'], min_chars=3, max_chars=5)[1] == ['abcd']
    english = 'This is the sum of the two numbers and it is even.'
    german = 'Das ist die Summe der Zahlen und sie ist nicht gerade.'
    chinese = '这两个数的和是多少'
    rows = [english, german, chinese, '12 + 13 = 25', f'{english} {chinese}']
    assert run(tmp_path, rows, languages=['en'])[1] == [english, '12 + 13 = 25']
    assert run(tmp_path, rows, languages=['en', 'zh'])[1] == [english, chinese, '12 + 13 = 25']
    half = run(tmp_path, rows, languages=['en'], language_share=0.5)[1]
    assert half == [english, '12 + 13 = 25', rows[4]]


def test_a_band_of_pass_rates(tmp_path):
    def row(content, **more):
        return {'prompt': [{'role': 'user', 'content': content}], **more}

    def sampled(right):
        samples = [{'rewards': {'accuracy': float(i < right)}} for i in range(8)]
        return row(f'{right} of 8', samples=samples)
    rows = [sampled(0), sampled(1), sampled(7), sampled(8), row('given', pass_rate=0.5)]
    numbers, kept = run(tmp_path, rows, min_pass=0.1, max_pass=0.9)
    assert kept == [rows[1], rows[2], rows[4]]
    assert numbers['dropped'] == {'pass rate outside the band': 2}
    with pytest.raises(ValueError, match='in.jsonl:2: a pass-rate band needs'):
        run(tmp_path, [rows[1], 'no samples'], min_pass=0.1)


def test_other_languages_in_latin_letters_are_dropped(tmp_path):
    foreign = [
        'Najpierw dodajemy dwie liczby, a potem mnożymy wynik',
        'Eerst tellen we de twee getallen bij elkaar op',
        'Önce iki sayıyı toplayalım ve sonra ikiyle çarpalım',
        'Trước tiên chúng ta cộng hai số với nhau',
        'Pertama kita jumlahkan kedua bilangan itu lalu kalikan hasilnya',
        'Först lägger vi ihop de två talen noga',
        'Pehle hum teen aur char ko jodte hain',
        'women xian ba san he qi jia qilai',
    ]
    english = ['First, 3 + 4 = 7.', 'So x = 5.', 'We add the two numbers and multiply.',
               '3 + 4 = 7']
    rows = [chat(f'{i}?', text) for i, text in enumerate(foreign + english)]
    kept = run(tmp_path, rows, languages=['en'])[1]
    assert [row['messages'][1]['content'] for row in kept] == english


def test_verified_by_reward(tmp_path):
    def row(answer, said, task='math'):
        return chat(f'{answer} {said}', said, task=task, answer=answer)
    rows = [
        row('1/2', '<think>x</think>\\boxed{0.5}'),
        row('1/2', '<think>\\boxed{0.5}</think>no'),
        row('B', '<think>x</think><answer>B</answer>', 'choice'),
        row('B', '<think>x</think><answer>A or B</answer>', 'choice'),
    ]
    numbers, kept = run(tmp_path, rows, verify=1)
    assert kept == [rows[0], rows[2]] and numbers['dropped'] == {'wrong': 2}
    for bad, message in [
        ({**rows[0], 'task': 'maths'}, "unknown task 'maths'"),
        ({'messages': rows[0]['messages'], 'task': 'math'}, 'cannot be verified'),
        ({'prompt': 'Q', 'task': 'math', 'answer': '1'}, 'nothing to verify'),
        ({**rows[0], 'answer': ' '}, 'answer is empty'),
    ]:
        with pytest.raises(ValueError, match='in.jsonl:2: .*' + message):
            run(tmp_path, [rows[0], bad], verify=1)


def test_verified_in_processes(tmp_path):
    said = '<think>x</think>\\boxed{%d}'
    rows = [chat(f'What is {i}?', said % (i % 7), task='math', answer=str(i)) for i in range(600)]
    numbers, kept = run(tmp_path, rows, verify=1, workers=2)
    assert kept == rows[:7] and numbers['dropped'] == {'wrong': 593}
    rows.insert(300, {**rows[0], 'task': 'x'})
    with pytest.raises(ValueError, match="in.jsonl:301: cannot be verified: unknown task 'x'"):
        run(tmp_path, rows, verify=1, workers=2)


def test_each_row_counts_once_at_the_first_check(tmp_path):
    rng = random.Random(6)
    text = words(rng, 20)
    numbers, _ = run(tmp_path, [text, text, 'x', words(rng, 20)], [[text]], min_chars=5, near=0.8)
    assert numbers['dropped'] == {'contaminated': 2, 'too short': 1}


def test_bad_input_is_named_and_leaves_nothing(tmp_path):
    for row, message in [
        ({'messages': [{'role': 'user', 'content': 3}]}, 'messages[0] must have a string'),
        ({'prompt': [{'role': 'system', 'content': 'x'}]}, 'no user message'),
        ({'prompt': 'x', 'question': 5}, '"question" must be'),
    ]:
        with pytest.raises(ValueError, match=re.escape(f'in.jsonl:2: {message}')):
            run(tmp_path, ['a', row])
    with pytest.raises(ValueError, match='eval0.jsonl:1: no user message'):
        run(tmp_path, ['a'], [[{'prompt': [{'role': 'system', 'content': 'x'}]}]])
    assert not (tmp_path / 'out.jsonl').exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.filter')]
    for bad in (dict(data=[]), dict(data=['x'], near=0.3),
                dict(data=['x'], min_pass=0.9, max_pass=0.1)):
        with pytest.raises(ValueError):
            Config(**bad)
    with pytest.raises(ValueError, match='would be overwritten'):
        data = write(tmp_path / 'out.jsonl', ['a'])
        main(Config(data=[data], out=str(tmp_path / 'out.jsonl')))
    command = [sys.executable, str(ROOT / 'data' / 'filter.py'), "--data=['absent.jsonl']",
               f'--out={tmp_path}/x/y.jsonl']
    script = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert script.returncode == 1 and script.stderr.count('\n') == 1
    assert script.stderr.startswith('filter.py: ')


def test_everything_dropped_is_no_error(tmp_path):
    numbers, kept = run(tmp_path, ['a', 'b'], min_chars=5, near=0.8)
    assert kept == [] and numbers['dropped'] == {'too short': 2}


MEASURE = '''
import sys
sys.path.insert(0, {root!r})
from data.filter import Config, Survivors, main

def peak():   # ru_maxrss would be inherited from the parent
    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])

leaked = []
add = Survivors.add

def leaking(self, row):
    leaked.append(row)
    add(self, row)

if {leak}:
    Survivors.add = leaking
before = peak()
main(Config(data=[sys.argv[1]], near=0.8, out=sys.argv[1] + '.out'))
print('KiB', peak() - before)
'''


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
@pytest.mark.parametrize('leak', [False, True])
def test_memory_does_not_grow_with_the_rows(tmp_path, leak):
    """Twelve times the rows, 12 MB more of them: a few MiB more, mostly the blocks that the small
    run does not fill. Kept rows would show."""
    rng = random.Random(7)
    grown = {}
    pool = [words(rng, 10) for _ in range(500)]
    for count in (1000, 12000):
        path = tmp_path / f'{count}.jsonl'
        write(path, [' '.join(rng.choices(pool, k=17)) + f' {i}' for i in range(count)])
        command = [sys.executable, '-c', MEASURE.format(root=str(ROOT), leak=leak), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[count] = int(done.stdout.split('KiB')[1]) / 1024
    assert (tmp_path / '12000.jsonl').stat().st_size > 11 * 2**20
    assert (grown[12000] - grown[1000] < 8) != leak, grown


def test_manifest_names_hashes_and_settings(tmp_path):
    numbers, _ = run(tmp_path, ['a', 'b'], near=0.9)
    path = tmp_path / 'in.jsonl'
    assert numbers['read'] == {str(path): source.sha256(path)}
    assert numbers['sha256'] == source.sha256(tmp_path / 'out.jsonl')
    assert numbers['settings']['near'] == 0.9 and numbers['licence'] == 'unknown'
    assert numbers['dropped'] == {}
