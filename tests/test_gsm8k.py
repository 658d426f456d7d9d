import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.gsm8k import prepare
from data.gsm8k.prepare import Config, convert, main
from data.source import read_rows

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared' / 'data' / 'gsm8k'
ROW = {'question': ' How many?\n',
       'answer': 'There are 4 = $<<2+2=4>>4 here.\nSo 4*300 = <<4*300=1200>>1,200.\n#### 1,200'}


def test_convert_by_hand():
    rl, sft = convert(ROW, 'gsm8k/train/7')
    user = {'role': 'user', 'content': 'How many?'}
    assert rl == {'prompt': [user], 'answer': '1200', 'task': 'math', 'id': 'gsm8k/train/7'}
    text = '<think>\nThere are 4 = $4 here.\nSo 4*300 = 1,200.\n</think>\n<answer>1200</answer>'
    turn = {'role': 'assistant', 'content': text}
    assert sft == {'messages': [user, turn], 'answer': '1200', 'task': 'math',
                   'id': 'gsm8k/train/7'}
    assert convert({**ROW, 'answer': 'Down.\n#### -3'}, 'x')[0]['answer'] == '-3'
    _, sft = convert({**ROW, 'answer': 'Since 2 < 3 and 4 > 3\n#### 3'}, 'x')
    text = '<think>\nSince 2 < 3 and 4 > 3\n</think>\n<answer>3</answer>'
    assert sft['messages'][1]['content'] == text


@pytest.mark.parametrize('row, message', [
    ({'question': 'q'}, 'must be strings'),
    ({'question': ' ', 'answer': 'a\n#### 1'}, 'must be strings'),
    ({'question': 'q', 'answer': 3}, 'must be strings'),
    ({'question': 'q', 'answer': 'It is 3.'}, 'it ends in \'It is 3.\''),
    ({'question': 'q', 'answer': '#### 3'}, 'last line "#### number"'),
    ({'question': 'q', 'answer': ' \n#### 3'}, 'last line "#### number"'),
    ({'question': 'q', 'answer': 'a\n#### three'}, 'last line "#### number"'),
    ({'question': 'q', 'answer': 'a\n#### 1,20'}, 'last line "#### number"'),
    ({'question': 'q', 'answer': 'a\n#### 3\nb'}, 'last line "#### number"'),
    ({'question': 'q', 'answer': 'a <<1+1=2 2\n#### 3'}, 'not closed'),
])
def test_convert_refuses(row, message):
    with pytest.raises(ValueError, match=message):
        convert(row, 'x')


def write(folder, train, test):
    folder.mkdir(exist_ok=True)
    for name, rows in [('train', train), ('test', test)]:
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(folder)


def rows_of(count, start=0):
    return [{**ROW, 'question': f'question {i}'} for i in range(start, start + count)]


def test_order_is_the_seeds(tmp_path, capsys):
    source = write(tmp_path / 'in', rows_of(20), rows_of(5, 20))
    files = {}
    for out, seed in [('a', 1), ('b', 1), ('c', 2)]:
        main(Config(out_dir=str(tmp_path / out), source=source, seed=seed))
        files[out] = {name: (tmp_path / out / f'{name}.jsonl').read_text()
                      for name in ('train', 'test', 'sft')}
    a, b, c = files.values()
    assert a == b and a['train'] != c['train'] and a['test'] == c['test']
    assert sorted(a['train'].splitlines()) == sorted(c['train'].splitlines())
    rl = read_rows(tmp_path / 'a' / 'train.jsonl', ('prompt', 'answer'))
    sft = read_rows(tmp_path / 'a' / 'sft.jsonl')
    assert [row['id'] for row in rl] == [row['id'] for row in sft]
    assert all(row['id'] == 'gsm8k/train/' + row['prompt'][0]['content'].split()[1] for row in rl)
    out = capsys.readouterr().out
    assert 'train.jsonl: 20 rows' in out and 'test.jsonl: 5 rows' in out
    assert out.count('"id": "gsm8k/train/') == 3 * 2 * 3   # three runs, two files, three rows


def test_bad_input_is_named_and_nothing_written(tmp_path):
    def refuses(message, source):
        with pytest.raises((ValueError, OSError), match=message):
            main(Config(out_dir=str(tmp_path / 'out'), source=source))
        assert not (tmp_path / 'out').exists()

    broken = rows_of(2) + [{'question': 'q', 'answer': 'no number'}]
    refuses(r'train.jsonl:3: the answer must be', write(tmp_path / '1', broken, rows_of(1, 5)))
    unanswered = [{'question': 'q'}]
    refuses(r"test.jsonl:1: 'answer' is missing", write(tmp_path / '2', rows_of(2), unanswered))
    refuses('gsm8k/test/0 is the same question as gsm8k/train/2',
            write(tmp_path / '3', rows_of(3), rows_of(2, 2)))
    refuses(r'absent', str(tmp_path / 'absent'))
    source = write(tmp_path / '4', rows_of(3), rows_of(2, 3))
    before = (tmp_path / '4' / 'train.jsonl').read_text()
    with pytest.raises(ValueError, match='would be overwritten'):
        main(Config(out_dir=source + '/.', source=source))
    assert (tmp_path / '4' / 'train.jsonl').read_text() == before


def test_script_ends_in_one_line(tmp_path):
    script = str(ROOT / 'data' / 'gsm8k' / 'prepare.py')
    command = [sys.executable, script, f'--source={tmp_path}/absent', f'--out_dir={tmp_path}/out']
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and run.stdout == '' and run.stderr.count('\n') == 1
    assert run.stderr.startswith('prepare.py: ') and 'absent' in run.stderr


def test_download_reads_parquet(tmp_path, monkeypatch):
    pa = pytest.importorskip('pyarrow')
    import huggingface_hub
    import pyarrow.parquet

    rows = {'main/train-00000-of-00001.parquet': rows_of(3),
            'main/test-00000-of-00001.parquet': rows_of(2, 3)}

    def list_repo_files(self, repo, repo_type, revision):
        return ['README.md', *rows]

    def download(repo, name, repo_type, revision):
        assert (repo, repo_type, revision) == ('openai/gsm8k', 'dataset', 'main')
        path = tmp_path / name.replace('/', '_')
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows[name]), path)
        return str(path)
    monkeypatch.setattr(huggingface_hub.HfApi, 'list_repo_files', list_repo_files)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    main(Config(out_dir=str(tmp_path / 'out')))
    assert len(read_rows(tmp_path / 'out' / 'sft.jsonl')) == 3


def test_download_without_pyarrow_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def without_pyarrow(name, *args):
        return real('absent' if 'pyarrow' in name else name, *args)
    monkeypatch.setattr(builtins, '__import__', without_pyarrow)
    message = r"pip install -e '.\[data\]', or give a folder .* as --source="
    with pytest.raises(ValueError, match=message):
        prepare.originals(Config(out_dir=str(tmp_path)), 'train')


@pytest.mark.skipif(not SHARED.exists(), reason='needs the original files')
def test_all_of_gsm8k(tmp_path):
    main(Config(out_dir=str(tmp_path), source=str(SHARED)))
    keys = ('prompt', 'answer', 'task', 'id')
    train, test = (read_rows(tmp_path / f'{split}.jsonl', keys) for split in ('train', 'test'))
    sft = read_rows(tmp_path / 'sft.jsonl')
    assert (len(train), len(test), len(sft)) == (7473, 1319, 7473)
    original = [json.loads(line) for line in open(SHARED / 'train.jsonl', encoding='utf-8')]
    for rl, row in zip(train, sft):
        source = original[int(rl['id'].split('/')[-1])]
        question = source['question'].strip()
        assert question == rl['prompt'][0]['content'] == row['messages'][0]['content']
        assert int(source['answer'].split('####')[1].replace(',', '')) == int(rl['answer'])
        text = row['messages'][1]['content']
        assert '<<' not in text and text.startswith('<think>\n')
        assert text.endswith(f'\n</think>\n<answer>{rl["answer"]}</answer>')
    first = next(row for row in sft if row['id'] == 'gsm8k/train/0')
    assert first['messages'][1]['content'] == (
        '<think>\nNatalia sold 48/2 = 24 clips in May.\n'
        'Natalia sold 48+24 = 72 clips altogether in April and May.\n'
        '</think>\n<answer>72</answer>')
