import builtins
import gzip
import itertools
import json
import operator
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import filter as filters
from data import mix, source
from data.code import prepare as code
from data.distill import prepare as distill
from data.logic import prepare as logic
from data.math import prepare as maths
from data.medical import prepare as medical
from data.source import read_rows
from rewards import accuracy_reward, check_row

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared' / 'data'
needs_files = pytest.mark.skipif(not SHARED.exists(), reason='needs the original files')
needs_sandbox = pytest.mark.skipif(not shutil.which('bwrap'), reason='needs bubblewrap')


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(path)


def lines(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


def manifest(path):
    return json.loads(source.manifest_path(path).read_text(encoding='utf-8'))


def text_of(row):
    return row['prompt'][-1]['content']


def prepare(script, tmp_path, rows, **settings):
    """Runs a prepare.py on a file r.jsonl with these rows, out to o/."""
    path = write(tmp_path / 'r.jsonl', rows)
    script.main(script.Config(source=path, out_dir=str(tmp_path / 'o'), **settings))


# ---- source.py ----

ROWS = [{'a': 1, 'text': 'x\ny'}, {'a': 2, 'text': 'é'}, {'a': 3, 'text': '[]{},'}]


@pytest.mark.parametrize('name, text', [
    ('r.jsonl', '\n'.join(map(json.dumps, ROWS))),
    ('r.json', '\n'.join(map(json.dumps, ROWS)) + '\n'),
    ('r.json', json.dumps(ROWS)),
    ('r.json', '\n' + json.dumps(ROWS, indent=2, ensure_ascii=False)),
    ('r.csv', 'a,text\n1,"x\ny"\n2,é\n3,"[]{},"\n'),
])
def test_read_every_form(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding='utf-8')
    with gzip.open(tmp_path / f'{name}.gz', 'wt', encoding='utf-8') as f:
        f.write(text)
    want = [{k: str(v) for k, v in row.items()} for row in ROWS] if name == 'r.csv' else ROWS
    for path in (tmp_path / name, tmp_path / f'{name}.gz'):
        assert [row for _, row in source.read([(str(path), str(path))])] == want


def test_read_says_where(tmp_path):
    def places(name, text):
        (tmp_path / name).write_text(text)
        return [where for where, _ in source.read([(name, str(tmp_path / name))])]
    assert places('r.jsonl', '{"a": 1}\n\n{"a": 2}\n') == ['r.jsonl:1', 'r.jsonl:3']
    assert places('r.json', json.dumps([{'a': 1}, {'a': 2}], indent=1)) == ['r.json:2', 'r.json:5']
    by_id = '{"p": {"a": 1},\n "q":\n {"a": 2, "id": 9}}'
    assert places('d.json', by_id) == ['d.json:1', 'd.json:3']
    assert [row['id'] for _, row in source.read([('d', str(tmp_path / 'd.json'))])] == ['p', 9]
    assert places('r.csv', 'a,b\n1,2\n3,4\n') == ['r.csv:2', 'r.csv:3']
    for name, text, message in [
        ('r.jsonl', '{"a": 1}\n{"a"\n', 'r.jsonl:2: no JSON'),
        ('r.jsonl', '{"a": 1}\n[1]\n', 'r.jsonl:2: a row must be'),
        ('r.json', '[{"a": 1},\n 7]', 'r.json:2: a row must be'),
        ('r.json', '"x"', 'r.json:1: neither'),
        ('r.json', '[{"a": 1},\n {"a"]', 'r.json: no JSON'),
        ('r.csv', 'a,b\n1,2,3\n', 'r.csv:2: 2 columns'),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            places(name, text)
    with gzip.open(tmp_path / 'r.jsonl.gz', 'wb') as f:
        f.write(b'{"a": 1}\n' * 5000)
    damaged = (tmp_path / 'r.jsonl.gz').read_bytes()
    (tmp_path / 'r.jsonl.gz').write_bytes(damaged[:len(damaged) // 2])
    with pytest.raises(ValueError, match='damaged'):
        list(source.read([('r', str(tmp_path / 'r.jsonl.gz'))]))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name, text in (('a.jsonl', '{"x": "1"}'), ('a.json', '[{"x": "1"}]'), ('a.csv', 'x\n1\n')):
        (tmp_path / name).write_text(text, encoding='utf-8-sig')
        assert [row for _, row in source.read([(name, tmp_path / name)])] == [{'x': '1'}]


def test_a_csv_field_may_be_as_long_as_a_trace(tmp_path):
    (tmp_path / 'a.csv').write_text(f'x,y\n{"a" * 400_000},b\n')
    (_, row), = source.read([('a', tmp_path / 'a.csv')])
    assert (len(row['x']), row['y']) == (400_000, 'b')


HALVES = (r'{"prompt": "fine \ud83d", "messages": ['
          r'{"role": "user", "content": "\ud83d\ude00 \ude00"}, '
          r'{"role": "assistant", "content": "\uDBFF"}]}')


@pytest.mark.parametrize('name, text', [
    ('a.jsonl', f'{HALVES}\n'), ('a.json', f'[{HALVES}]'), ('b.json', f'{{"1": {HALVES}}}')])
def test_half_a_character_is_replaced_and_a_whole_one_joined(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (_, row), = source.read([(name, tmp_path / name)])
    assert row['prompt'] == 'fine \ufffd'
    assert [m['content'] for m in row['messages']] == ['😀 \ufffd', '\ufffd']


def test_half_a_character_stops_no_script(tmp_path):
    trace = r'{"prompt": "fine \ud83d", "reasoning": "hm \udc00", "content": "5"}'
    (tmp_path / 'r.jsonl').write_text(f'{trace}\n{trace}\n')
    distill.main(distill.Config(source=str(tmp_path / 'r.jsonl'), out_dir=str(tmp_path)))
    assert len(lines(tmp_path / 'traces.jsonl')) == 2
    (tmp_path / 'm.jsonl').write_text(HALVES + '\n')
    _, rows = mixed(tmp_path, {'m': {'path': str(tmp_path / 'm.jsonl'), 'licence': 'MIT'}})
    assert rows[0]['prompt'] == 'fine \ufffd'
    data, against = [str(tmp_path / 'm.jsonl')], [str(tmp_path / 'r.jsonl')]
    out = str(tmp_path / 'f.jsonl')
    filters.main(filters.Config(data=data, against=against, out=out, near=0.8))
    assert read_rows(tmp_path / 'm.jsonl')[0]['messages'][1]['content'] == '\ufffd'


def test_sharegpt_and_content_in_parts_are_messages():
    said = [('human', 'user', 'Q'), ('gpt', 'assistant', 'A'), ('observation', 'tool', 'T'),
            ('Assistant', 'assistant', 'B')]
    turns = [{'from': speaker, 'value': text} for speaker, _, text in said]
    asked = [{'role': role, 'content': text} for _, role, text in said]
    assert source.chat_of({'conversations': turns}, 'messages') == asked
    system = {'role': 'system', 'content': 'S'}
    assert source.chat_of({'conversations': turns, 'system': 'S'}, 'messages') == [system, *asked]
    assert source.chat_of({'conversations': asked, 'system': None}, 'messages') == asked
    parts = [{'type': 'text', 'text': 'A '}, 'B', {'text': ' C'}]
    chat = source.chat_of({'messages': [{'role': 'user', 'content': parts}]}, 'messages')
    assert chat == [{'role': 'user', 'content': 'A B C'}]


@pytest.mark.parametrize('row, message', [
    ({'conversations': []}, "'conversations' must be a list of turns"),
    ({'conversations': ['Q']}, r'conversations\[0\] must be {"from"'),
    ({'conversations': [{'from': 'human', 'value': 'Q'}, {'from': 'martian', 'value': 'A'}]},
     r'conversations\[1\] must be {"from"'),
    ({'conversations': [{'from': 'human', 'value': None}]},
     r'conversations\[0\] must have a string as value'),
    ({'conversations': [{'from': 'user', 'value': 'Q'}], 'system': 3}, "'system' must be a string"),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'x'}]}]},
     'part 0 of its content is of type .image_url'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'text'}]}]}, 'part 0 of its content must'),
])
def test_what_is_no_conversation_is_named(tmp_path, row, message):
    path = write(tmp_path / 'x.jsonl', [row])
    with pytest.raises(ValueError, match='x.jsonl:1: .*' + message):
        read_rows(path)


def test_parquet_and_the_hub(tmp_path, monkeypatch):
    pa = pytest.importorskip('pyarrow')
    import huggingface_hub
    import pyarrow.parquet
    problems = [{'problem': f'p{i}', 'answer': str(i), 'level': 'Level 3'} for i in range(700)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(problems), tmp_path / 'x.parquet')
    names = ['README.md', 'algebra/test-0.parquet', 'number_theory/train-0.parquet',
             'algebra/train-0.parquet']
    asked = []

    def list_repo_files(self, repo, repo_type, revision):
        return names

    def hf_hub_download(repo, name, repo_type, revision):
        asked.append(name)
        return str(tmp_path / 'x.parquet')

    def offline(*args, **kwargs):
        raise ConnectionError('no route')

    monkeypatch.setattr(huggingface_hub.HfApi, 'list_repo_files', list_repo_files)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
    config = maths.Config(dataset='math', out_dir=str(tmp_path))
    maths.main(config)
    assert asked == ['algebra/train-0.parquet', 'number_theory/train-0.parquet']
    rows = lines(tmp_path / 'math.jsonl')
    assert len(rows) == 1400 and rows[700]['answer'] == '0' and rows[0]['level'] == 3
    assert manifest(tmp_path / 'math.jsonl')['source'].endswith('@main')
    with pytest.raises(ValueError, match='x.parquet: row 1: .*is missing'):
        medical.main(medical.Config(dataset='medqa', source=str(tmp_path / 'x.parquet'),
                                    out_dir=str(tmp_path)))
    names[:] = ['README.md']
    with pytest.raises(ValueError, match='EleutherAI/hendrycks_math at revision main has no file'):
        maths.main(config)
    monkeypatch.setattr(huggingface_hub.HfApi, 'list_repo_files', offline)
    message = ('hendrycks_math cannot be downloaded .ConnectionError: no route.; give a local copy '
               'as --source=')
    with pytest.raises(ValueError, match=message):
        maths.main(config)


def test_parquet_without_pyarrow_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def without_pyarrow(name, *args):
        return real('absent' if 'pyarrow' in name else name, *args)
    monkeypatch.setattr(builtins, '__import__', without_pyarrow)
    (tmp_path / 'x.parquet').write_bytes(b'PAR1')
    for path in (None, str(tmp_path / 'x.parquet')):
        with pytest.raises(ValueError, match=r"pip install -e '.\[data\]', or give --source="):
            maths.main(maths.Config(source=path, out_dir=str(tmp_path)))


@pytest.mark.parametrize('script', ['math', 'code', 'medical', 'distill'])
def test_scripts_end_in_one_line(tmp_path, script):
    path = str(ROOT / 'data' / script / 'prepare.py')
    command = [sys.executable, path, f'--source={tmp_path}/absent', f'--out_dir={tmp_path}']
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and run.stdout == ''
    assert run.stderr == f'prepare.py: {tmp_path}/absent: no such file or folder\n'


def test_three_rows_are_shown(tmp_path, capsys):
    prepare(maths, tmp_path, [{'problem': f'problem {i}', 'answer': '1'} for i in range(9)])
    shown = capsys.readouterr().out
    assert 'math.jsonl: 9 rows' in shown
    assert [f'problem {i}' in shown for i in range(4)] == [True, True, True, False]


def test_mbpp_without_a_number_has_no_split(tmp_path):
    row = {'text': 'Add.', 'code': 'def f(): return 1', 'test_list': ['assert f() == 1']}
    with pytest.raises(ValueError, match="r.jsonl:1: 'task_id' must be a whole number"):
        prepare(code, tmp_path, [row])


def test_never_over_its_source_and_never_half(tmp_path):
    path = write(tmp_path / 'math.jsonl', [{'problem': 'p', 'answer': '1'}])
    with pytest.raises(ValueError, match='would be overwritten'):
        maths.main(maths.Config(source=path, out_dir=str(tmp_path)))
    rows = [{'problem': 'p', 'answer': '1'}, {'problem': ' ', 'answer': '1'}]
    write(tmp_path / 'in' / 'b.jsonl', rows)
    with pytest.raises(ValueError, match=r"b.jsonl:2: 'problem' must be a string with text in it"):
        maths.main(maths.Config(source=str(tmp_path / 'in'), out_dir=str(tmp_path / 'out')))
    assert not list((tmp_path / 'out').iterdir())


# ---- math ----


def test_math_by_hand(tmp_path, capsys):
    solution = r'First \boxed{1}, so \boxed{\frac{1}{\{2\}}}.'
    rows = [
        {'problem': ' What? ', 'solution': solution, 'type': 'Algebra', 'level': 'Level 5'},
        {'problem': 'Q', 'answer': '', 'difficulty': 2.0},
        {'problem': 'Prove it', 'answer': 'proof'},
        {'problem': 'Q2', 'answer': '7', 'problem_is_valid': 'No'},
        {'question': 'Q3', 'answer': 12},
        {'problem': 'Q4', 'answer': 'x}'},
        {'problem': 'Q5', 'answer': r'$18\$$'},
        {'problem': 'Q6', 'answer': r' $\$18$ '},
        {'problem': 'Q7', 'answer': r'18\$'},
    ]
    prepare(maths, tmp_path, rows, dataset='numina')

    def expected(question, answer, number, **more):
        prompt = [{'role': 'user', 'content': question}]
        return {'prompt': prompt, 'answer': answer, 'task': 'math', 'id': f'numina/{number}',
                **more}
    assert lines(tmp_path / 'o' / 'numina.jsonl') == [
        expected('What?', r'\frac{1}{\{2\}}', 0, level=5, subject='Algebra'),
        expected('Q3', '12', 4),
        expected('Q5', r'18\$', 6),
        expected('Q6', r'\$18', 7),
        expected('Q7', r'18\$', 8),
    ]
    about = manifest(tmp_path / 'o' / 'numina.jsonl')
    assert about['rows_in'] == 9 and about['rows_out'] == 5 and about['licence'] == 'Apache-2.0'
    assert about['dropped'] == {'no answer': 1, 'a proof': 1, 'marked as invalid': 1,
                                'an answer that does not fit in a box': 1}
    assert about['read'][str(tmp_path / 'r.jsonl')] == source.sha256(tmp_path / 'r.jsonl')
    out = capsys.readouterr().out
    assert '5 rows' in out and '1 dropped: a proof' in out and 'What?' in out


@pytest.mark.parametrize('row, message', [
    ({'answer': '1'}, 'is missing'),
    ({'problem': 'p', 'answer': ['1']}, 'must be a string'),
    ({'problem': 'p', 'answer': '1000'}, 'integer from 0 to 999'),
    ({'problem': 'p', 'answer': '-1'}, '0 to 999'),
])
def test_aime_refuses(tmp_path, row, message):
    with pytest.raises(ValueError, match='r.jsonl:1: .*' + message):
        prepare(maths, tmp_path, [row], dataset='aime25')


def test_openr1_traces(tmp_path):
    def trace(k):
        return f'<think>\nthought {k}\n</think>\n\n\\boxed{{5}}'
    row = {
        'problem': 'Q',
        'answer': '5',
        'generations': [trace(0), trace(1), 'cut <think>', trace(3)],
        'correctness_math_verify': [False, True, True, True],
        'correctness_llama': None,
        'is_reasoning_complete': [True, True, True, False],
    }
    wrong = {**row, 'correctness_math_verify': [False] * 4}
    rows = [row, wrong, {**wrong, 'correctness_llama': [True] * 4}]
    prepare(maths, tmp_path, rows, dataset='openr1', traces=2)
    assert len(lines(tmp_path / 'o' / 'openr1.jsonl')) == 3
    found = lines(tmp_path / 'o' / 'openr1_sft.jsonl')
    assert [(r['id'], r['messages'][1]['content']) for r in found] == [
        ('openr1/0', trace(1)), ('openr1/2', trace(0)), ('openr1/2', trace(1))]
    dropped = manifest(tmp_path / 'o' / 'openr1_sft.jsonl')['dropped']
    assert dropped == {'no verified trace': 1}
    assert all(accuracy_reward(r['messages'][1]['content'], r) == 1.0 for r in found)
    message = r'r.jsonl:1: 4 generations, but verdicts on \[4, 1, 4\]'
    with pytest.raises(ValueError, match=message):
        prepare(maths, tmp_path, [{**row, 'correctness_llama': [True]}], dataset='openr1')


@needs_files
def test_math_on_the_real_files(tmp_path):
    for dataset, path, count in [('math', 'math_train', 7470), ('math500', 'math500', 500),
                                 ('aime24', 'aime24', 30), ('aime25', 'aime25', 30)]:
        maths.main(maths.Config(dataset=dataset, source=str(SHARED / path), out_dir=str(tmp_path)))
        rows = lines(tmp_path / f'{dataset}.jsonl')
        assert len(rows) == count == len({r['id'] for r in rows})
    assert manifest(tmp_path / 'math.jsonl')['dropped'] == {'no answer': 4}
    given = [json.loads(line) for line in open(SHARED / 'math500' / 'test.jsonl')]
    rows = lines(tmp_path / 'math500.jsonl')
    assert [r['answer'] for r in rows] == [g['answer'] for g in given]
    assert [text_of(r) for r in rows] == [g['problem'].strip() for g in given]
    # the published answers are the last boxes
    assert sum(maths.last_box(g['solution']) == g['answer'] for g in given) >= 495
    assert lines(tmp_path / 'aime25.jsonl')[19]['answer'] == '336'   # written as an angle there


# ---- medicine, science ----

MCQ = {'question': 'Which?', 'opa': 'one', 'opb': 'two', 'opc': 'three', 'opd': 'four', 'id': 'x',
       'subject_name': 'Anatomy'}


def test_medmcqa_counts_from_0_or_1(tmp_path):
    for cops in [(1, 4, 2), (0, 3, 1)]:
        rows = [{**MCQ, 'cop': cop} for cop in cops]
        rows += [{**MCQ, 'cop': cops[0], 'opd': 'ONE '}, {**MCQ, 'cop': None}]
        prepare(medical, tmp_path, rows)
        found = lines(tmp_path / 'o' / 'medmcqa_train.jsonl')
        assert [r['answer'] for r in found] == ['A', 'D', 'B']
        dropped = manifest(tmp_path / 'o' / 'medmcqa_train.jsonl')['dropped']
        assert dropped == {'two equal options': 1, 'no answer': 1}
    text = 'Which?\n\nA. one\nB. two\nC. three\nD. four'
    assert found[0] == {
        'prompt': [{'role': 'user', 'content': text}],
        'question': 'Which?\none\ntwo\nthree\nfour',
        'answer': 'A',
        'choices': ['one', 'two', 'three', 'four'],
        'task': 'choice',
        'id': 'medmcqa/x',
        'subject': 'Anatomy',
    }
    for cops in [(1, 2), (0, 4)]:
        with pytest.raises(ValueError, match='neither 0 to 3 nor 1 to 4'):
            prepare(medical, tmp_path, [{**MCQ, 'cop': cop} for cop in cops])


def test_an_empty_option_leaves_out_its_row_alone(tmp_path):
    row = {'question': 'Q', 'opa': 'a', 'opb': 'b', 'opc': 'c', 'opd': 'd', 'id': '1'}
    changes = [{'cop': 1}, {'cop': 2, 'opd': ''}, {'cop': 3, 'opb': None}, {'cop': 4}]
    rows = [{**row, **change} for change in changes]
    path = write(tmp_path / 'r.jsonl', rows)
    medical.main(medical.Config(dataset='medmcqa', source=path, out_dir=str(tmp_path)))
    assert [r['answer'] for r in lines(tmp_path / 'medmcqa_train.jsonl')] == ['A', 'D']
    assert manifest(tmp_path / 'medmcqa_train.jsonl')['dropped'] == {'an empty option': 2}


def test_medqa_and_gpqa(tmp_path):
    row = {'question': 'Q', 'options': {'A': 'a', 'B': 'b', 'C': 'c', 'D': 'd'}, 'answer': 'c',
           'answer_idx': 'C', 'meta_info': 'step1'}
    prepare(medical, tmp_path, [row, {**row, 'answer_idx': None}], dataset='medqa')
    assert [r['answer'] for r in lines(tmp_path / 'o' / 'medqa_train.jsonl')] == ['C', 'C']
    with pytest.raises(ValueError, match="the answer 'b' .C. is none of the options"):
        prepare(medical, tmp_path, [{**row, 'answer': 'b'}], dataset='medqa')

    text = ('Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,'
            'Incorrect Answer 3,High-level domain\n')
    text += ''.join(f'r{i},"Question, {i}?",right,w1,w2,w3,Physics\n' for i in range(200))
    (tmp_path / 'gpqa.csv').write_text(text)
    found = {}
    for seed in (1, 1, 2):
        medical.main(medical.Config(dataset='gpqa', source=str(tmp_path / 'gpqa.csv'),
                                    out_dir=str(tmp_path / 'o'), seed=seed))
        rows = lines(tmp_path / 'o' / 'gpqa.jsonl')
        assert all(r['choices']['ABCD'.index(r['answer'])] == 'right' for r in rows)
        # 50 each expected, standard deviation 6
        assert min(Counter(r['answer'] for r in rows).values()) > 30
        assert found.setdefault(seed, rows) == rows
    assert found[1] != found[2]


@needs_files
def test_medicine_on_the_real_files(tmp_path):
    medical.main(medical.Config(source=str(SHARED / 'medmcqa'), split='validation',
                                out_dir=str(tmp_path)))
    rows = {r['id']: r for r in lines(tmp_path / 'medmcqa_validation.jsonl')}
    given = [json.loads(line) for line in open(SHARED / 'medmcqa' / 'dev.json')]
    assert len(rows) == 4162 and len(given) == 4183
    dropped = manifest(tmp_path / 'medmcqa_validation.jsonl')['dropped']
    assert dropped == {'two equal options': 21}
    for g in given:
        r = rows.get(f'medmcqa/{g["id"]}')
        if r is not None:
            assert r['choices']['ABCD'.index(r['answer'])] == g['op' + 'abcd'[g['cop'] - 1]].strip()
            assert accuracy_reward(f'<think>x</think><answer>{r["answer"]}</answer>', r) == 1.0
    truth = json.load(open(SHARED / 'pubmedqa' / 'test_ground_truth.json'))
    for split in ('train', 'test'):
        medical.main(medical.Config(dataset='pubmedqa', source=str(SHARED / 'pubmedqa'),
                                    split=split, out_dir=str(tmp_path)))
        rows = {r['id'].split('/')[1]: r for r in lines(tmp_path / f'pubmedqa_{split}.jsonl')}
        assert len(rows) == 500
        if split == 'test':
            assert rows.keys() == truth.keys()
        else:
            assert not rows.keys() & truth.keys()
    assert all(r['choices']['ABC'.index(r['answer'])] == truth[name] for name, r in rows.items())


# ---- logic ----

ATOM = re.compile(r'(\w+) is a (knight|knave)$')


CONNECTIVES = {
    ' if and only if ': lambda a, b: a == b,
    ', then ': lambda a, b: not a or b,
    ' or ': lambda a, b: a or b,
    ' and ': lambda a, b: a and b,
}


def true_in(sentence, kinds):
    """The truth of an English sentence under {name: kind}; reads the words, knows nothing of how
    they were made."""
    for word, function in CONNECTIVES.items():
        if word in sentence:
            first, second = sentence.removeprefix('if ').removesuffix(', or both').split(word)
            return function(true_in(first, kinds), true_in(second, kinds))
    if sentence.startswith('it is not true that '):
        return not true_in(sentence.removeprefix('it is not true that '), kinds)
    if m := re.fullmatch(r'among us there (?:is|are) exactly (\d+) (knight|knave)s?', sentence):
        return list(kinds.values()).count(m[2]) == int(m[1])
    m = ATOM.match(sentence)
    return kinds[m[1]] == m[2]


SHAPES = ('if and only if', 'then', 'both', 'not true', 'exactly')


def consistent(said):
    """{name: sentence} -> the ways to be knights and knaves in which exactly the knights' are
    true"""
    ways = []
    for way in itertools.product(('knight', 'knave'), repeat=len(said)):
        kinds = dict(zip(said, way))
        if all(true_in(said[name], kinds) == (kinds[name] == 'knight') for name in said):
            ways.append(way)
    return ways


def test_puzzles_have_one_solution(tmp_path):
    logic.main(logic.Config(out_dir=str(tmp_path), train_rows=300, test_rows=60, max_people=5))
    rows = lines(tmp_path / 'train.jsonl') + lines(tmp_path / 'test.jsonl')
    shapes = Counter()
    for row in rows:
        said = dict(re.findall(r'^(\w+) says: "(.*)\."$', text_of(row), re.MULTILINE))
        names = list(said)
        listed = ', '.join(names[:-1]) + ' and ' + names[-1]
        assert re.search(r'What are (.*)\?', text_of(row))[1] == listed
        assert row['people'] == len(names)
        assert [', '.join(way) for way in consistent(said)] == [row['answer']]
        assert accuracy_reward(f'<answer> {row["answer"]} </answer>', row) == 1.0
        assert accuracy_reward('<answer>knight</answer>', row) == 0.0
        shapes.update(word for word in SHAPES if word in row['question'])
    assert all(shapes[word] > 30 for word in SHAPES)

    def nameless(row):   # the puzzle with its people numbered in their order
        names = re.findall(r'^(\w+) says', text_of(row), re.MULTILINE)
        any_name = r'\b(' + '|'.join(names) + r')\b'
        return re.sub(any_name, lambda m: str(names.index(m[1])), text_of(row))
    assert len({nameless(row) for row in rows}) == 360


def test_logic_is_the_seeds_and_ends(tmp_path):
    for out, seed in [('a', 1), ('b', 1), ('c', 2)]:
        logic.main(logic.Config(out_dir=str(tmp_path / out), train_rows=40, test_rows=10,
                                seed=seed))
    a, b, c = (lines(tmp_path / out / 'train.jsonl') for out in 'abc')
    assert a == b != c
    with pytest.raises(ValueError, match='different puzzles found for 5010 rows: raise max_people'):
        logic.main(logic.Config(out_dir=str(tmp_path), train_rows=5000, test_rows=10, max_people=2))
    with pytest.raises(ValueError, match='must rise'):
        logic.Config(min_people=5, max_people=4)


def test_published_puzzles_are_checked(tmp_path):
    """A says: B is a liar; B says: we are both knights -> A knight, B knave, the only solution."""
    row = {
        'quiz': 'A and B ...',
        'names': ['A', 'B'],
        'statements': "(('lying', 1), ('and', ('telling-truth', 0), ('telling-truth', 1)))",
        'solution': [True, False],
    }
    paradox = [['lying', 0], ['<=>', ['telling-truth', 0], ['not', ['lying', 0]]]]
    rows = [
        row,
        {**row, 'solution': [False, True]},
        {**row, 'statements': "(('telling-truth', 1), ('telling-truth', 0))"},
        {**row, 'statements': paradox},
    ]
    prepare(logic, tmp_path, rows)
    found = lines(tmp_path / 'o' / 'puzzles.jsonl')
    assert [r['answer'] for r in found] == ['knight, knave']
    assert text_of(found[0]).endswith('for each of A, B, in this order, separated by commas.')
    assert manifest(tmp_path / 'o' / 'puzzles.jsonl')['dropped'] == {
        'another solution than it claims': 1, 'more than one solution': 1, 'no solution': 1}
    for change, message in [
        ({'statements': "(('lying', 2), ('lying', 0))"}, r"unknown sentence \('lying', 2\)"),
        ({'statements': '__import__("os")'}, 'r.jsonl:1'),
        ({'names': ['A']}, 'must be lists'),
        ({'statements': "(('lying', 1),)"}, '2 names, but 1 statements'),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(logic, tmp_path, [{**row, **change}])


# ---- code ----


def test_stdin_in_three_forms(tmp_path):
    tests = [{'input': '1\n2\n', 'output': '3\n'}, {'input': '1', 'output': '1'}]
    apps = {'inputs': ['1\n2\n', ['1']], 'outputs': ['3\n', ['1']]}
    calls = {'fn_name': 'add', 'inputs': [[1, [2, 'x']]], 'outputs': [3]}
    openr1 = {'language': 'python', 'test_cases': [{'type': 'stdin_stdout', **t} for t in tests]}
    solution = 'import sys\nprint(sum(map(int, sys.stdin.read().split())))'
    rows = [
        {'problem': 'Add.', 'tests': tests, 'solution': solution},
        {'question': 'Add.', 'input_output': json.dumps(apps)},
        {'question': 'Add.', 'input_output': calls},
        {'prompt': 'Add.', 'verification_info': json.dumps(openr1),
         'gold_standard_solution': 'So:\n```python\nprint(1)\n```'},
        {'problem': 'Untested', 'tests': []},
    ]
    prepare(code, tmp_path, rows, dataset='stdin')
    found = lines(tmp_path / 'o' / 'stdin.jsonl')
    assert [r.get('tests') for r in found] == [tests[::-1], tests[::-1], None, tests[::-1]]
    assert found[2]['asserts'] == ["assert same(add(*[1, [2, 'x']]), 3)"]
    assert found[2]['entry_point'] == 'add'
    assert found[3]['solution'] == 'print(1)\n'
    assert manifest(tmp_path / 'o' / 'stdin.jsonl')['dropped'] == {'no tests': 1}
    for row, message in [
        ({'problem': 'p', 'tests': [{'input': '1'}]}, 'must be a list of'),
        ({'problem': 'p', 'input_output': '{'}, 'no JSON'),
        ({'problem': 'p', 'input_output': {'inputs': ['1'], 'outputs': []}},
         '1 inputs, but 0 outputs'),
    ]:
        with pytest.raises(ValueError, match='r.jsonl:1: .*' + message):
            prepare(code, tmp_path, [row], dataset='stdin')


def test_a_wanted_result_may_be_in_a_list_of_one():
    call = {'type': 'function_call', 'fn_name': 'f', 'input': '[[1, null]]', 'output': '[true]'}
    row = code.stdin({'prompt': 'p', 'verification_info': {'test_cases': [call]}}, 0, 5)

    def run(function):
        exec(row['asserts'][0], {'f': function, 'same': lambda a, b: a == b})
    run(lambda x: x == [1, None])
    run(lambda x: [x == [1, None]])
    with pytest.raises(AssertionError):
        run(lambda x: False)


STARTER = 'class Solution:\n    def twice(self, words: List[str], limit=inf) -> int:\n        '


@needs_sandbox
def test_functions_of_apps_and_taco(tmp_path):
    """Starter code and the function's name reach the prompt; class Solution and function score."""
    solved = STARTER + 'return sum(Counter(words).values()) if limit == inf else limit'
    rows = [{'question': 'Count.', 'starter_code': STARTER, 'solutions': json.dumps([solved, 'no']),
             'input_output': '{"fn_name": "twice", "inputs": [[["a", "b"]], [["a"], Infinity], '
                             '[[], -Infinity], [[], NaN]], "outputs": [2, [1], -Infinity, NaN]}'},
            {'problem': 'Add.', 'starter_code': '',
             'tests': [{'fn_name': 'add', 'input': '1\n[2]', 'output': '3'}]},
            {'problem': 'Write gcd.', 'tests': [{'fn_name': 'gcd', 'input': [4, 6], 'output': 2}]}]
    files = write(tmp_path / 'r.jsonl', rows)
    code.main(code.Config(dataset='stdin', source=files, out_dir=str(tmp_path / 'o')))
    first, add, gcd = lines(tmp_path / 'o' / 'stdin.jsonl')
    shown = f'Count.\n\nComplete this code:\n```python\n{STARTER.rstrip()}\n```'
    assert text_of(first) == shown and first['question'] == 'Count.'
    assert text_of(add) == 'Add.\n\nWrite a function `add`.' and text_of(gcd) == 'Write gcd.'
    assert first['entry_point'] == 'twice' and first['solution'] == solved
    function = ('from __future__ import annotations\ndef twice(words: List[str], limit=1e999):\n'
                '    return len(words) if limit == 1e999 else limit')
    wrong = solved.replace('values', 'keys').replace('sum', 'max')
    for program, score in ((solved, 1), (function, 1), (wrong, 0), (STARTER + 'return 2', 0)):
        assert accuracy_reward(f'```python\n{program}\n```', first) == score
    assert accuracy_reward('```python\ndef add(a, b): return a + b[0]\n```', add) == 1
    assert accuracy_reward('```python\npass\n```', gcd) == 0   # the starter has math's, elsewhere
    assert accuracy_reward('```python\nfrom math import gcd\n```', gcd) == 1
    for change, message in [({'starter_code': 5}, "'starter_code' must be a string"),
                            ({'fn_name': 'a b'}, 'name of a function'),
                            ({'fn_name': '__import__("os")'}, 'name of a function')]:
        row = {'problem': 'p', 'tests': [{'input': [1], 'output': 1}], **change}
        files = write(tmp_path / 'r.jsonl', [row])
        with pytest.raises(ValueError, match='r.jsonl:1: .*' + message):
            code.main(code.Config(dataset='stdin', source=files, out_dir=str(tmp_path / 'o')))


def test_integers_past_4300_digits_stop_nothing(tmp_path):
    huge = 10 ** 5000 + 7
    path = tmp_path / 'r.jsonl'
    path.write_text('{"problem": "p", "tests": [{"fn_name": "f", "input": [%d], "output": %d}]}\n'
                    '{"problem": "q", "tests": [{"input": %d, "output": "%d"}]}\n' % ((huge,) * 4))
    code.main(code.Config(dataset='stdin', source=str(path), out_dir=str(tmp_path / 'o')))
    found = lines(tmp_path / 'o' / 'stdin.jsonl')
    assert found[0]['asserts'] == [f'assert same(f(*[{huge}]), {huge})']
    assert found[1]['tests'] == [{'input': str(huge), 'output': str(huge)}]
    path.write_text('{"problem": "p", "answer": %d}\n' % huge
                    + '{"problem": "q", "answer": "%d"}\n' % huge)
    maths.main(maths.Config(source=str(path), out_dir=str(tmp_path / 'm')))
    rows = lines(tmp_path / 'm' / 'math.jsonl')
    assert [row['answer'] for row in rows] == [str(huge)] * 2
    check_row({**rows[0], 'answer': huge}, {'accuracy': 1.0})
    assert accuracy_reward(f'\\boxed{{{huge}}}', rows[0]) == 1
    assert accuracy_reward(f'\\boxed{{{huge + 1}}}', rows[0]) == 0


def test_a_tolerance_is_kept_where_decimals_are_printed(tmp_path):
    tests = [[{'input': '1', 'output': output}] for output in ('0.5', '5', '0.5')]
    rows = [{'problem': 'p', 'tests': t} for t in tests]
    rows[2]['tolerance'] = 0.01
    files = write(tmp_path / 'r.jsonl', rows)
    out = str(tmp_path / 'o')
    code.main(code.Config(dataset='stdin', source=files, out_dir=out, tolerance=1e-6))
    found = lines(tmp_path / 'o' / 'stdin.jsonl')
    assert [row.get('tolerance') for row in found] == [1e-6, None, 0.01]


@needs_sandbox
def test_stdin_verified(tmp_path):
    tests = [{'input': '1\n2\n', 'output': '3\n'}]
    apps = {'fn_name': 'add', 'inputs': [[1, [2]]], 'outputs': [[1, 2]]}
    rows = [
        {'problem': 'a', 'tests': tests, 'solution': 'print(int(input()) + int(input()))'},
        {'problem': 'b', 'tests': tests, 'solution': 'print(4)'},
        {'problem': 'c', 'tests': tests},
        {'problem': 'd', 'input_output': apps,
         'solution': 'def add(a, b):\n    return (a, *b)'},
    ]
    prepare(code, tmp_path, rows, dataset='stdin', verify=True)
    assert [r['question'] for r in lines(tmp_path / 'o' / 'stdin.jsonl')] == ['a', 'd']
    assert manifest(tmp_path / 'o' / 'stdin.jsonl')['dropped'] == {
        'its own solution fails': 1, 'no solution to verify the tests with': 1}


@needs_files
@pytest.mark.filterwarnings('ignore::DeprecationWarning')   # escapes in the problems' own strings
@pytest.mark.filterwarnings('ignore::SyntaxWarning')
def test_code_on_the_real_files(tmp_path):
    """Every reference solution passes the asserts that were made of its tests, run here as they
    are."""
    code.main(code.Config(dataset='humaneval', source=str(SHARED / 'humaneval'),
                          out_dir=str(tmp_path)))
    rows = lines(tmp_path / 'humaneval.jsonl')
    assert len(rows) == 164
    for split, count in (('train', 374), ('validation', 90), ('test', 500), ('prompt', 10)):
        code.main(code.Config(source=str(SHARED / 'mbpp'), split=split, out_dir=str(tmp_path)))
        found = lines(tmp_path / f'mbpp_{split}.jsonl')
        assert len(found) == count
        rows += found
    for row in rows:
        if row['id'] in ('mbpp/461', 'HumanEval/83'):   # the slowest, some seconds each
            continue
        space = {'__name__': 'tests', 'same': operator.eq}
        exec(row['solution'], space)
        exec(row['setup'], space)
        for text in row['asserts']:
            exec(text, space)
        if row['id'].startswith('mbpp'):
            assert callable(space[row['entry_point']])
            assert text_of(row).count('assert') <= 1
    cyclic = next(r for r in rows if r['id'] == 'HumanEval/38')
    assert 'def encode_cyclic' in cyclic['setup'] and 'def encode_cyclic' in cyclic['starter']
    assert 'def decode_cyclic' not in cyclic['starter']
    assert not any('assert True' in text for r in rows for text in r['asserts'])


@needs_files
@needs_sandbox
@pytest.mark.slow
def test_reference_solutions_get_full_marks(tmp_path):
    out = {'out_dir': str(tmp_path), 'verify': True}
    code.main(code.Config(dataset='humaneval', source=str(SHARED / 'humaneval'), **out))
    code.main(code.Config(source=str(SHARED / 'mbpp'), split='train', **out))
    assert len(lines(tmp_path / 'humaneval.jsonl')) == 164
    assert len(lines(tmp_path / 'mbpp_train.jsonl')) == 374


# ---- distill ----


def test_traces_in_every_form(tmp_path):
    user = [{'role': 'user', 'content': 'Q'}]
    good = {'role': 'assistant', 'content': '<think>\nhm\n</think>\n\n\\boxed{5}'}
    samples = ['\nhm\n</think>\\boxed{5}', 'no end', 'hm</think>\n\\boxed{5}\n']
    told = {'prompt': 'Q', 'reasoning': 'hm'}

    def assistant(text):
        return {'role': 'assistant', 'content': text}
    rows = [
        {'messages': [*user, good], 'num_tokens': 9, 'source': 'open-r1'},
        {**told, 'content': '\\boxed{5}', 'answer': '5', 'id': 'a'},
        {'problem': 'Q', 'gtruth_answer': 5, 'message_thinking': ' hm ',
         'message_content': '\\boxed{5}'},
        {'prompt': user, 'prefill': '<think>', 'task': 'math', 'answer': '5', 'id': 'b',
         'samples': [{'response': text} for text in samples]},
        {'messages': [*user, assistant('no thought')]},
        {**told, 'content': ' '},
        {**told, 'content': 'x', 'finish_reason': 'length'},
        {'messages': [*user, assistant('<think>a</think>b<think>c</think>d')]},
    ]
    prepare(distill, tmp_path, rows, name='t', task='math')
    found = lines(tmp_path / 'o' / 't.jsonl')
    assert [r['id'] for r in found] == ['t/0', 't/a', 't/2', 't/b/0', 't/b/2']
    assert all(r['messages'] == [*user, good] for r in found) and found[0]['source'] == 'open-r1'
    assert all(accuracy_reward(r['messages'][-1]['content'], r) == 1.0 for r in found[1:])
    assert manifest(tmp_path / 'o' / 't.jsonl')['dropped'] == {
        'cut short in the reasoning': 1, 'no reasoning': 1, 'no answer after the reasoning': 1,
        'cut short': 1, 'tags of the reasoning inside it or after it': 1}
    for row, message in [
        ({'messages': user}, 'the last message'),
        ({'messages': [{'role': 'x', 'content': ''}]}, 'with a role of system'),
        ({'prompt': 'Q', 'reasoning': 3, 'content': 'x'}, 'must be strings'),
        ({'x': 1}, 'is missing'),
    ]:
        with pytest.raises(ValueError, match='r.jsonl:1: .*' + message):
            prepare(distill, tmp_path, [row])


def test_traces_keep_all_that_their_rewards_read(tmp_path):
    code_row = {'prompt': 'Q', 'reasoning': 'hm', 'content': 'c', 'task': 'code', 'seconds': 2,
                'asserts': ['assert f()'], 'starter': 'import math\n',
                'tolerance': 0.1, 'partial': True}
    number = {'prompt': 'Q', 'reasoning': 'hm', 'content': 'c', 'task': 'math', 'answer': '5',
              'form': 'number'}
    path = write(tmp_path / 'r.jsonl', [code_row, number])
    distill.main(distill.Config(source=path, out_dir=str(tmp_path)))
    for row, found in zip((code_row, number), lines(tmp_path / 'traces.jsonl'), strict=True):
        read = row.keys() - {'prompt', 'reasoning', 'content'}
        assert {key: found.get(key) for key in read} == {key: row[key] for key in read}


@pytest.mark.parametrize('bad, message', [
    ({'task': 'math', 'answer': ['70']}, "'answer' must be text or a number"),
    ({'task': 'match', 'answer': True}, "'answer' must be text or a number"),
    ({'task': 'choice', 'answer': 'F'}, "'answer' must be one letter"),
    ({'task': 'code', 'tests': '[{"input": "1", "output": "1"}]'}, "'tests' must be a list of")])
def test_what_no_reward_could_read_is_named_when_traces_are_made_or_mixed(tmp_path, bad, message):
    chat = [{'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': '<think>a</think>b'}]
    free = {'messages': chat, 'task': 'mine', 'answer': ['70']}   # of a reward file
    path = write(tmp_path / 'r.jsonl', [free, {'messages': chat, **bad}])
    with pytest.raises(ValueError, match=f'r.jsonl:2: {message}'):
        distill.main(distill.Config(source=path, out_dir=str(tmp_path / 'o')))
    with pytest.raises(ValueError, match=f'r.jsonl:2: {message}'):
        mixed(tmp_path, {'r': {'path': path, 'licence': 'MIT'}})


def test_reasoning_beside_the_content_is_kept(tmp_path):
    asked, answer = {'role': 'user', 'content': 'Q'}, '<think>\nhm\n</think>\n\n5'
    beside = [{key: 'hm', 'content': '5'} for key in ('reasoning_content', 'reasoning', 'thinking')]
    thought = {'type': 'thinking', 'thinking': 'hm'}
    beside.append({'content': [thought, {'type': 'text', 'text': '5'}]})
    beside.append({'reasoning_details': [{'type': 'reasoning.text', 'text': 'hm'}], 'content': '5'})
    rows = [{'messages': [asked, {'role': 'assistant', **message}]} for message in beside]
    said = {'role': 'assistant', 'thinking': 'hm', 'content': '5'}
    rows.append({'messages': [asked, said, asked, said]})
    turns = [{'from': 'human', 'value': 'Q'}, {'from': 'gpt', 'value': '5', 'reasoning': 'hm'}]
    rows.append({'conversations': turns})
    distill.main(distill.Config(source=write(tmp_path / 'r.jsonl', rows), out_dir=str(tmp_path)))
    found = [[m['content'] for m in row['messages']] for row in lines(tmp_path / 'traces.jsonl')]
    assert found == [['Q', answer]] * 5 + [['Q', answer, 'Q', answer], ['Q', answer]]


@pytest.mark.parametrize('reason, kept', [
    ('stop', 1), ('EOS_TOKEN', 1), ('end_turn', 1), ('max_tokens', 0), ('abort', 0),
    ('content_filter', 0), ('error', 0), ('insufficient_system_resource', 0)])
def test_only_traces_that_the_model_ended_are_whole(tmp_path, reason, kept):
    row = {'prompt': 'Q', 'reasoning': 'hm', 'content': '5'}
    rows = [{**row, 'id': 'old'}, {**row, 'id': 'new', 'finish_reason': reason}]
    distill.main(distill.Config(source=write(tmp_path / 'r.jsonl', rows), out_dir=str(tmp_path)))
    assert len(lines(tmp_path / 'traces.jsonl')) == 1 + kept


@needs_files
def test_real_traces(tmp_path):
    distill.main(distill.Config(source=str(SHARED / 'r1_traces_sample'), task='math',
                                out_dir=str(tmp_path)))
    rows = lines(tmp_path / 'traces.jsonl')
    assert len(rows) == 10
    assert all(accuracy_reward(r['messages'][-1]['content'], r) == 1.0 for r in rows)


# ---- mix ----


def mixed(tmp_path, sources, **settings):
    numbers = mix.main(mix.Config(sources=sources, out=str(tmp_path / 'mix.jsonl'), **settings))
    return numbers, lines(tmp_path / 'mix.jsonl')


@pytest.fixture
def files(tmp_path):
    for name, count in (('a', 100), ('b', 50), ('c', 10)):
        write(tmp_path / f'{name}.jsonl', [{'prompt': f'{name} {i}'} for i in range(count)])
    return {name: {'path': str(tmp_path / f'{name}.jsonl'), 'licence': 'MIT'} for name in 'abc'}


def test_mix_by_weight_and_count(tmp_path, files):
    sources = {
        'a': {**files['a'], 'weight': 0.7},
        'b': {**files['b'], 'weight': 0.3, 'licence': 'CC-BY-4.0'},
        'c': {**files['c'], 'count': 7},
    }
    numbers, rows = mixed(tmp_path, sources, rows=100)
    # 93 by 7 : 3 = 65.1 : 27.9
    assert Counter(r['source'] for r in rows) == {'a': 65, 'b': 28, 'c': 7}
    assert len({r['prompt'] for r in rows}) == 100
    assert all(r['prompt'].startswith(r['source']) for r in rows)
    order = [r['source'] for r in rows]
    assert 20 < order[:50].count('a') < 45   # shuffled
    part = numbers['sources']['b']
    assert (part['rows'], part['drawn'], part['not_drawn']) == (50, 28, 22)
    assert part['licence'] == 'CC-BY-4.0' and numbers['licence'] == 'CC-BY-4.0, MIT'
    assert part['sha256'] == source.sha256(tmp_path / 'b.jsonl')
    assert numbers['sha256'] == source.sha256(tmp_path / 'mix.jsonl')
    assert manifest(tmp_path / 'mix.jsonl') == numbers
    again, same = mixed(tmp_path, sources, rows=100)
    assert same == rows and again == numbers
    _, other = mixed(tmp_path, sources, rows=100, seed=2)
    assert sorted(map(str, other)) != sorted(map(str, rows))
    _, without = mixed(tmp_path, {'a': {**files['a'], 'count': 65}})
    # other sources do not change the draw
    assert {r['prompt'] for r in without} == {r['prompt'] for r in rows if r['source'] == 'a'}


def test_mix_repeats_and_takes_all(tmp_path, files):
    _, rows = mixed(tmp_path, {'a': files['a'], 'c': {**files['c'], 'count': 25, 'repeat': True}})
    counts = Counter(r['prompt'] for r in rows if r['source'] == 'c')
    assert len(rows) == 125 and len(counts) == 10
    assert sorted(counts.values()) == [2] * 5 + [3] * 5
    _, rows = mixed(tmp_path, {'a': {**files['a'], 'weight': 1}, 'b': {**files['b'], 'weight': 3}})
    # b allows 66 rows; 16.5 and 49.5, the tie by name
    assert Counter(r['source'] for r in rows) == {'a': 17, 'b': 49}


@pytest.mark.parametrize('change, rows, message', [
    ({'c': {'count': 11}}, 0, "source 'c': 11 rows wanted, .*c.jsonl has 10"),
    ({'c': {'weight': 1, 'count': 1}}, 0, 'a weight or a count'),
    ({'c': {'wieght': 1}}, 0, 'wieght=1; known are'),
    ({'c': {'count': True}}, 0, 'count=True'),
    ({'c': {'licence': None}}, 0, 'licence=None'),
    ({'c': {'count': 5}}, 9, 'rows=9, but the counts make 155'),
    ({'c': {'weight': 1}}, 100, 'rows=100: the sources with a count alone have 150'),
])
def test_mix_refuses(tmp_path, files, change, rows, message):
    sources = {name: {**spec, **change.get(name, {})} for name, spec in files.items()}
    with pytest.raises(ValueError, match=message):
        mixed(tmp_path, sources, rows=rows)


def test_mix_carries_manifests(tmp_path, files):
    prepare(maths, tmp_path, [{'problem': 'p', 'answer': '1'}, {'problem': 'q', 'answer': ''}])
    path = tmp_path / 'o' / 'math.jsonl'
    numbers, _ = mixed(tmp_path, {'math': {'path': str(path)}})
    part = numbers['sources']['math']
    assert part['licence'] == 'MIT'
    assert part['from']['dropped'] == {'no answer': 1} and part['from']['rows_in'] == 2
    with open(path, 'a') as f:
        f.write('{"prompt": "x"}\n')
    message = 'math.jsonl is not the file that math.manifest.json beside it describes'
    with pytest.raises(ValueError, match=message):
        mixed(tmp_path, {'math': {'path': str(path)}})
    message = "no a.manifest.json beside the file, so give its 'licence'"
    with pytest.raises(ValueError, match=message):
        mixed(tmp_path, {'a': {'path': files['a']['path']}})
    write(tmp_path / 'a.jsonl', [{'prompt': 'x'}, {'text': 'y'}])
    with pytest.raises(ValueError, match="a.jsonl:2: a row of 'a' needs"):
        mixed(tmp_path, {'a': files['a']})
