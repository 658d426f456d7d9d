import json
import random
import re
import subprocess
import sys
from collections import Counter
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


def run(tmp_path, rows, evaluations=(), **settings):
    against = [write(tmp_path / f'eval{i}.jsonl', texts) for i, texts in enumerate(evaluations)]
    numbers = main(Config(data=[write(tmp_path / 'in.jsonl', rows)], against=against, out=str(tmp_path / 'out.jsonl'), **settings))
    kept = lines(tmp_path / 'out.jsonl')
    assert numbers['rows_out'] == len(kept) and numbers['rows_in'] == len(rows) == len(kept) + sum(numbers['dropped'].values())
    assert json.loads((tmp_path / 'out.manifest.json').read_text()) == numbers
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith('.')) == []   # nothing temporary left
    return numbers, [r['prompt'] if isinstance(r.get('prompt'), str) else r for r in kept]


def words(rng, n):
    return ' '.join(''.join(rng.choices('abcdefgh', k=5)) for _ in range(n))


def jaccard(a, b):
    """of word 3-grams, plainly"""
    def three(text):
        w = text.lower().split()
        return {tuple(w[i:i + 3]) for i in range(len(w) - 2)}
    return len(three(a) & three(b)) / len(three(a) | three(b))


# ---------------------------------------------------------------------------------------------------------------------


def test_grams_are_those_of_the_words():
    rng = random.Random(1)
    for _ in range(50):
        text = ' '.join(rng.choices('a b c d'.split(), k=rng.randint(0, 40)))
        w = text.split()
        for n in (1, 3, 8):
            plain = [tuple(w[i:i + n]) for i in range(len(w) - n + 1)]
            hashed = grams(word_hashes(text), n).tolist()
            assert len(hashed) == len(plain) and len(set(hashed)) == len(set(plain))
            assert all((a == b) == (g == h) for a, g in zip(plain, hashed) for b, h in zip(plain, hashed))
    assert len(word_hashes('求1加2的和 now')) == 5 + 2   # 求 1 加 2的和 -> each Han character a word: 求,1,加,2,的,和,now


def test_normalised_by_hand():
    assert normalised('What is  $1+2$ ?') == normalised('what is 1 + 2') == normalised('WHAT IS １+２?')
    assert normalised('What is 1-2?') != normalised('What is 1+2?') and normalised('1.5') != normalised('15')
    assert normalised('Is (1, 2)\n in  “A”?') == normalised("Is (1,2) in 'A'") == normalised('is ( 1, 2 ) in a.')
    for one, other in [('Write $1 1/2$ as a decimal.', 'Write $11/2$ as a decimal.'), ('1 23', '12 3'), ('x 2', 'x²'), ('x2', 'x²'), ('x₂', 'x2'), ('5!?', '5?'),
                       ('1½', '11/2'), ('1½', '11⁄2'), ('the rapist', 'therapist'), ('10⁻¹²', '10⁻¹ 2'), ('1$ 2', '12'), ('x² 3', 'x²³')]:
        assert normalised(one) != normalised(other), (one, other)
    assert normalised('\\log_8 2') == normalised('\\log_82') and normalised('1 ½') == normalised('1½')


def test_minhash_agrees_with_jaccard():
    """The share of pairs that meet in a band is 1 - (1 - s^4)^16, and the similarity is the plain one."""
    rng, met = random.Random(2), {}
    for changed in (2, 5, 9, 15):
        for _ in range(150):
            w = words(rng, 60).split()
            other = list(w)
            for i in rng.sample(range(60), changed):
                other[i] = 'changed'
            a, b = ' '.join(w), ' '.join(other)
            s = jaccard(a, b)
            assert similarity(shingles(a), shingles(b)) == pytest.approx(s, abs=1e-12)
            met.setdefault(changed, []).append((bool((bands_of(shingles(a)) == bands_of(shingles(b))).any()), 1 - (1 - s ** 4) ** 16))
    for pairs in met.values():
        found, expected = (np.mean([p[i] for p in pairs]) for i in (0, 1))
        assert abs(found - expected) < 4 * (0.25 / len(pairs)) ** 0.5 * max(0.3, 2 * (expected * (1 - expected)) ** 0.5)


def test_duplicates_against_all_pairs(tmp_path):
    """By comparing each row with every other: exact ones are those, no two kept rows are alike, each near one is like an earlier row."""
    rng, texts = random.Random(3), []
    for i in range(250):
        if texts and rng.random() < 0.4:
            w = rng.choice(texts).split()
            for _ in range(rng.choice((0, 1, 2, 12))):
                w[rng.randrange(len(w))] = f'new{i}'
            texts.append(' '.join(w) + rng.choice(('', '.', ' ?')))
        else:
            texts.append(words(rng, rng.randint(20, 60)))
    exact = {i for i, text in enumerate(texts) if any(normalised(text) == normalised(t) for t in texts[:i])}
    earlier = {i: max((jaccard(text, t) for t in texts[:i]), default=0) for i, text in enumerate(texts)}
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
    """A large family of rows that are 0.7 to 1 alike: the first 8 of those that share a key are not all that can be alike."""
    rng = random.Random(8)
    frame = [words(rng, 17) for _ in range(5)]
    fill = lambda: ' '.join(f'{part} n{rng.randrange(20)}' for part in frame)  # noqa: E731
    _, kept = run(tmp_path, [fill() for _ in range(400)], near=0.8)
    assert 60 < len(kept) < 200 and all(jaccard(a, b) < 0.8 for i, a in enumerate(kept) for b in kept[:i])


def test_alike_against_all_pairs():
    rng = np.random.default_rng(9)
    for near in (0.5, 0.8, 1.0):
        sets = [np.unique(rng.integers(0, 9, rng.integers(0, 9))).astype(np.uint64) for _ in range(150)]
        kept, expected = [], []
        for mine in sets:
            expected.append(any(similarity(mine, other) >= near for other in kept))
            kept += [] if expected[-1] else [mine]
        assert filters.alike(sets, near) == expected and any(expected) and not all(expected)


def test_duplicates_by_prompt_or_row(tmp_path):
    chat = lambda q, a: {'messages': [{'role': 'user', 'content': q}, {'role': 'assistant', 'content': a}]}  # noqa: E731
    rows = [chat('q', 'one'), chat('q', 'two'), chat('Q ?', 'one'), chat('r', 'one')]
    assert run(tmp_path, rows)[1] == [rows[0], rows[1], rows[3]]
    assert run(tmp_path, rows, by='prompt')[1] == [rows[0], rows[3]]


def test_blocks_are_one_stream(tmp_path, monkeypatch):
    rng = random.Random(4)
    texts = [words(rng, 12) for _ in range(300)]
    texts += [t + ' x' for t in texts[::7]] + texts[::5]
    whole = run(tmp_path, texts, near=0.6)
    monkeypatch.setattr(filters, 'BLOCK', 7)
    assert run(tmp_path, texts, near=0.6)[1] == whole[1] and whole[0]['dropped'].keys() == {'exact duplicate', 'near duplicate'}


# ---------------------------------------------------------------------------------------------------------------------


def test_contamination_by_both_tests(tmp_path):
    rng = random.Random(5)
    long, other, short = words(rng, 30), words(rng, 25), 'two plus two'
    inside = ' '.join(other.split()[9:17])
    rows = [f'Before it, {long.upper()} and after.', f'x {inside} y', 'x ' + ' '.join(other.split()[9:16]) + ' y', 'Two plus  two?', 'two plus three', words(rng, 30)]
    numbers, kept = run(tmp_path, rows, [[long, short], [other, long]])
    assert kept == [rows[2], rows[4], rows[5]] and numbers['dropped'] == {'contaminated': 3}
    c, (first, second) = numbers['contamination'], numbers['contamination']['evaluation_sets'].values()
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
    """GSM8K's solutions: "5 miles per hour ... per day" and "as many as" are no Italian or Portuguese."""
    rows = [json.loads(line) for line in open(SHARED / 'gsm8k' / 'test.jsonl')]
    numbers, kept = run(tmp_path, [r['answer'].split('####')[0] for r in rows], languages=['en'])
    assert len(kept) >= 0.999 * len(rows)


@needs_files
def test_the_known_counts_of_math(tmp_path):
    """Published: 619 of MATH's training problems share an 8-gram with MATH-500, none is equal; 529 and 32 are too short for one."""
    for dataset, folder in (('math', 'math_train'), ('math500', 'math500')):
        maths.main(maths.Config(dataset=dataset, source=str(SHARED / folder), out_dir=str(tmp_path)))
    numbers = main(Config(data=[str(tmp_path / 'math.jsonl')], against=[str(tmp_path / 'math500.jsonl')], out=str(tmp_path / 'o' / 'out.jsonl')))
    c = numbers['contamination']
    assert (c['rows_by_ngram'], c['rows_by_exact_match'], c['rows_too_short']) == (619, 0, 529)
    assert c['evaluation_sets'][str(tmp_path / 'math500.jsonl')]['too_short'] == 32
    assert numbers['from'][0]['dropped'] == {'no answer': 4} and numbers['licence'] == 'MIT'
    texts = lambda path: [tuple(r['prompt'][0]['content'].lower().split()) for r in lines(path)]  # noqa: E731
    eight = {t[i:i + 8] for t in texts(tmp_path / 'math500.jsonl') for i in range(len(t) - 7)}
    assert not any(t[i:i + 8] in eight for t in texts(tmp_path / 'o' / 'out.jsonl') for i in range(len(t) - 7))


# ---------------------------------------------------------------------------------------------------------------------


def test_length_language_band(tmp_path):
    assert run(tmp_path, ['ab', 'abcd', 'abcdef'], min_chars=3, max_chars=5)[1] == ['abcd']
    english, german, chinese = 'This is the sum of the two numbers and it is even.', 'Das ist die Summe der Zahlen und sie ist nicht gerade.', '这两个数的和是多少'
    rows = [english, german, chinese, '12 + 13 = 25', f'{english} {chinese}']
    assert run(tmp_path, rows, languages=['en'])[1] == [english, '12 + 13 = 25']
    assert run(tmp_path, rows, languages=['en', 'zh'])[1] == [english, chinese, '12 + 13 = 25']
    assert run(tmp_path, rows, languages=['en'], language_share=0.5)[1] == [english, '12 + 13 = 25', rows[4]]
    samples = lambda right, n: {'prompt': [{'role': 'user', 'content': f'{right} of {n}'}],  # noqa: E731
                                'samples': [{'rewards': {'accuracy': float(i < right)}} for i in range(n)]}
    rows = [samples(0, 8), samples(1, 8), samples(7, 8), samples(8, 8), {'prompt': [{'role': 'user', 'content': 'given'}], 'pass_rate': 0.5}]
    numbers, kept = run(tmp_path, rows, min_pass=0.1, max_pass=0.9)
    assert kept == [rows[1], rows[2], rows[4]] and numbers['dropped'] == {'pass rate outside the band': 2}
    with pytest.raises(ValueError, match='in.jsonl:2: a pass-rate band needs'):
        run(tmp_path, [rows[1], 'no samples'], min_pass=0.1)


def test_other_languages_in_latin_letters_are_dropped(tmp_path):
    foreign = ['Najpierw dodajemy dwie liczby, a potem mnożymy wynik',
    'Eerst tellen we de twee getallen bij elkaar op',
               'Önce iki sayıyı toplayalım ve sonra ikiyle çarpalım',
               'Trước tiên chúng ta cộng hai số với nhau',
               'Pertama kita jumlahkan kedua bilangan itu lalu kalikan hasilnya',
               'Först lägger vi ihop de två talen noga',
               'Pehle hum teen aur char ko jodte hain', 'women xian ba san he qi jia qilai']
    english = ['First, 3 + 4 = 7.', 'So x = 5.', 'We add the two numbers and multiply.',
    '3 + 4 = 7']
    rows = [{'messages': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant',
    'content': text}]} for i, text in enumerate(foreign + english)]
    kept = run(tmp_path, rows, languages=['en'])[1]
    assert [row['messages'][1]['content'] for row in kept] == english


def test_verified_by_reward(tmp_path):
    def row(answer, said, task='math'):
        return {'messages': [{'role': 'user', 'content': f'{answer} {said}'}, {'role': 'assistant', 'content': said}], 'task': task, 'answer': answer}
    rows = [row('1/2', '<think>x</think>\\boxed{0.5}'), row('1/2', '<think>\\boxed{0.5}</think>no'), row('B', '<think>x</think><answer>B</answer>', 'choice'),
            row('B', '<think>x</think><answer>A or B</answer>', 'choice')]
    numbers, kept = run(tmp_path, rows, verify=1)
    assert kept == [rows[0], rows[2]] and numbers['dropped'] == {'wrong': 2}
    for bad, message in [({**rows[0], 'task': 'maths'}, "unknown task 'maths'"), ({'messages': rows[0]['messages'], 'task': 'math'}, 'cannot be verified'),
                         ({'prompt': 'Q', 'task': 'math', 'answer': '1'}, 'nothing to verify'), ({**rows[0], 'answer': ' '}, 'answer is empty')]:
        with pytest.raises(ValueError, match='in.jsonl:2: .*' + message):
            run(tmp_path, [rows[0], bad], verify=1)


def test_verified_in_processes(tmp_path):
    rows = [{'messages': [{'role': 'user', 'content': f'What is {i}?'}, {'role': 'assistant', 'content': f'<think>x</think>\\boxed{{{i % 7}}}'}],
             'task': 'math', 'answer': str(i)} for i in range(600)]
    numbers, kept = run(tmp_path, rows, verify=1, workers=2)
    assert kept == rows[:7] and numbers['dropped'] == {'wrong': 593}
    with pytest.raises(ValueError, match="in.jsonl:301: cannot be verified: unknown task 'x'"):
        run(tmp_path, [*rows[:300], {**rows[0], 'task': 'x'}, *rows[300:]], verify=1, workers=2)


def test_each_row_counts_once_at_the_first_check(tmp_path):
    rng = random.Random(6)
    text = words(rng, 20)
    numbers, _ = run(tmp_path, [text, text, 'x', words(rng, 20)], [[text]], min_chars=5, near=0.8)
    assert numbers['dropped'] == {'contaminated': 2, 'too short': 1}


def test_bad_input_is_named_and_leaves_nothing(tmp_path):
    for rows, message in [(['a', {'messages': [{'role': 'user', 'content': 3}]}], 'in.jsonl:2: messages[0] must have a string'),
                          (['a', {'prompt': [{'role': 'system', 'content': 'x'}]}], 'in.jsonl:2: no user message'),
                          (['a', {'prompt': 'x', 'question': 5}], 'in.jsonl:2: "question" must be')]:
        with pytest.raises(ValueError, match=re.escape(message)):
            run(tmp_path, rows)
    with pytest.raises(ValueError, match='eval0.jsonl:1: no user message'):
        run(tmp_path, ['a'], [[{'prompt': [{'role': 'system', 'content': 'x'}]}]])
    assert not (tmp_path / 'out.jsonl').exists() and not [p for p in tmp_path.iterdir() if p.name.startswith('.filter')]
    for bad in (dict(data=[]), dict(data=['x'], near=0.3), dict(data=['x'], min_pass=0.9, max_pass=0.1)):
        with pytest.raises(ValueError):
            Config(**bad)
    with pytest.raises(ValueError, match='would be overwritten'):
        main(Config(data=[write(tmp_path / 'out.jsonl', ['a'])], out=str(tmp_path / 'out.jsonl')))
    script = subprocess.run([sys.executable, str(ROOT / 'data' / 'filter.py'), "--data=['absent.jsonl']", f'--out={tmp_path}/x/y.jsonl'],
                            capture_output=True, text=True, cwd=tmp_path)
    assert script.returncode == 1 and script.stderr.startswith('filter.py: ') and script.stderr.count('\n') == 1


def test_everything_dropped_is_no_error(tmp_path):
    numbers, kept = run(tmp_path, ['a', 'b'], min_chars=5, near=0.8)
    assert kept == [] and numbers['dropped'] == {'too short': 2}


MEASURE = '''
import sys
sys.path.insert(0, {root!r})
from data.filter import Config, Survivors, main
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])   # ru_maxrss would be inherited from the parent
leaked, add = [], Survivors.add
if {leak}:
    Survivors.add = lambda self, row: leaked.append(row) or add(self, row)
before = peak()
main(Config(data=[sys.argv[1]], near=0.8, out=sys.argv[1] + '.out'))
print('KiB', peak() - before)
'''


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
@pytest.mark.parametrize('leak', [False, True])
def test_memory_does_not_grow_with_the_rows(tmp_path, leak):
    """Twelve times the rows, 12 MB more of them: a few MiB more, mostly the blocks that the small run does not fill. Kept rows would show."""
    rng, grown = random.Random(7), {}
    pool = [words(rng, 10) for _ in range(500)]
    for count in (1000, 12000):
        path = tmp_path / f'{count}.jsonl'
        write(path, [' '.join(rng.choices(pool, k=17)) + f' {i}' for i in range(count)])
        done = subprocess.run([sys.executable, '-c', MEASURE.format(root=str(ROOT), leak=leak), str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[count] = int(done.stdout.split('KiB')[1]) / 1024
    assert (tmp_path / '12000.jsonl').stat().st_size > 11 * 2**20
    assert (grown[12000] - grown[1000] < 8) != leak, grown


def test_manifest_names_hashes_and_settings(tmp_path):
    numbers, _ = run(tmp_path, ['a', 'b'], near=0.9)
    assert numbers['read'] == {str(tmp_path / 'in.jsonl'): source.sha256(tmp_path / 'in.jsonl')} and numbers['sha256'] == source.sha256(tmp_path / 'out.jsonl')
    assert numbers['settings']['near'] == 0.9 and numbers['licence'] == 'unknown' and Counter(numbers['dropped']) == {}
