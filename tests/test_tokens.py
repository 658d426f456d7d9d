import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import tokens
from data.loader import PackedBatches
from data.tokenizer import TOY_TEMPLATE, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SPECIALS = ['<|user|>', '<|assistant|>', '<|end|>']


def toy(template=TOY_TEMPLATE):
    return Tokenizer.from_words([str(n) for n in range(10, 100)], SPECIALS, chat_template=template)


def chat(i):
    return [{'role': 'user', 'content': f'{i} plus {i}?'},
            {'role': 'assistant', 'content': f'{i + i}'}]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / 'a.jsonl', [{'messages': chat(i)} for i in range(200)])


def folders(path):
    home = path.with_name(f'{path.name}.tokens')
    return sorted(entry.name for entry in home.iterdir() if entry.name != 'lock')


def test_documents_are_what_the_tokenizer_makes_of_each_row(tmp_path, corpus):
    other, tokenizer = write(tmp_path / 'b.jsonl', [{'messages': chat(7)}]), toy()
    documents = tokens.tokenise([corpus, other], tokenizer)
    wanted = [tokenizer.apply_chat_template(chat(i)) for i in [*range(200), 7]]
    found = [documents[i] for i in range(201)]
    assert [(ids.tolist(), mask.tolist()) for ids, mask in found] == wanted
    assert documents.lengths.tolist() == [len(ids) for ids, _ in wanted]
    assert documents.learnt().tolist() == [sum(mask[1:]) for _, mask in wanted]
    assert documents.where(0) == f"{corpus}, row 1" and documents.where(200) == f"{other}, row 1"
    assert (documents.tokens, documents.turns) == (sum(len(ids) for ids, _ in wanted), 201)
    assert documents[0][0].dtype == np.uint16


def test_large_vocabularies_take_uint32_and_six_bytes_a_token_are_enough(corpus):
    words = [f'w{i}' for i in range(70_000)]
    tokenizer = Tokenizer.from_words(words, SPECIALS, pattern='gpt2')
    documents = tokens.tokenise([corpus], tokenizer)
    assert documents[0][0].dtype == np.uint32
    assert documents[3][0].tolist() == tokenizer.apply_chat_template(chat(3))[0]
    folder = corpus.with_name('a.jsonl.tokens') / folders(corpus)[0]
    sizes = [(folder / name).stat().st_size for name in ('ids.bin', 'mask.bin')]
    assert sum(sizes) == 5 * documents.tokens


def test_batches_of_a_file_are_those_of_its_documents_in_memory(corpus):
    tokenizer = toy()
    documents = [tokenizer.apply_chat_template(chat(i)) for i in range(200)]
    mapped = PackedBatches(tokens.tokenise([corpus], tokenizer), 8, 64, seed=3)
    listed = PackedBatches(documents, 8, 64, seed=3)
    assert mapped.rows == listed.rows and mapped.docs.tokens == listed.docs.tokens
    for _ in range(mapped.rows // 4):
        a, b = next(mapped), next(listed)
        assert all(a[name].equal(b[name]) for name in b)


def test_learning_all_tokens_is_a_mask_of_ones(corpus):
    tokenizer = toy()
    every = [tokenizer.apply_chat_template(chat(i))[0] for i in range(200)]
    ones = [(ids, [1] * len(ids)) for ids in every]
    a = next(PackedBatches(tokens.tokenise([corpus], tokenizer), 8, 64, learn_all=True))
    b = next(PackedBatches(ones, 8, 64))
    assert a['labels'].equal(b['labels'])


def test_the_second_time_nothing_is_tokenised(corpus, monkeypatch):
    first = tokens.tokenise([corpus], toy())
    monkeypatch.setattr(tokens, 'encode_chunk', None)
    again = tokens.tokenise([corpus], toy())
    assert again.identity == first.identity and again[5][0].tolist() == first[5][0].tolist()


def test_what_changes_is_tokenised_anew(corpus):
    def identity(tokenizer):
        return tokens.token_folders([corpus], tokenizer)[0].name
    dated = toy(TOY_TEMPLATE + '{{ strftime_now("%Y") }}')
    argued = toy(TOY_TEMPLATE + '{{ x }}')
    seen = [identity(toy()), identity(dated), identity(argued)]
    dated.date = dated.date.replace(year=2001)
    argued.template_args = {'x': 'y'}
    seen += [identity(dated), identity(argued), identity(Tokenizer.from_words(['10'], SPECIALS))]
    corpus.write_text(corpus.read_text() + json.dumps({'messages': chat(3)}) + '\n')
    seen.append(identity(toy()))
    assert len(set(seen)) == len(seen)
    undated = toy()
    undated.date = undated.date.replace(year=2001)   # which its template does not read
    assert identity(undated) == seen[-1]


def test_processes_give_the_same_files(corpus, monkeypatch, tmp_path):
    one = tokens.tokenise([corpus], toy())
    monkeypatch.setattr(tokens, 'SMALL', 0)
    monkeypatch.setattr(tokens, 'CHUNK', 1000)
    copy = tmp_path / 'copy.jsonl'
    copy.write_bytes(corpus.read_bytes())
    many = tokens.tokenise([copy], toy(), workers=2, quiet=True)
    assert one.identity == many.identity
    names = ('ids.bin', 'mask.bin', 'ends.bin', 'about.json')
    a, b = (path.with_name(f'{path.name}.tokens') / folders(path)[0] for path in (corpus, copy))
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.mark.parametrize('row, message', [
    ('{', 'no JSON'), ('{"messages": []}', "'messages' must be a list of messages"),
    ('{"messages": [{"role": "system", "content": "x"}]}', 'the toy template has no role system')])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_row_is_named_and_leaves_nothing(corpus, monkeypatch, row, message, workers):
    if workers:
        monkeypatch.setattr(tokens, 'SMALL', 0)
        monkeypatch.setattr(tokens, 'CHUNK', 1000)
    corpus.write_text(corpus.read_text() + row + '\n')
    with pytest.raises(ValueError, match=rf'a.jsonl(:|, row )201: .*{message}'):
        tokens.tokenise([corpus], toy(), workers=workers, quiet=True)
    assert folders(corpus) == []


SLOW = """
import sys, time
from data import tokens
from data.tokenizer import Tokenizer
whole = tokens.encode_chunk
def slowly(*call):
    print('working', flush=True)
    time.sleep(float(sys.argv[2]))
    return whole(*call)
tokens.encode_chunk, tokens.CHUNK = slowly, 2000
tokenizer = Tokenizer.from_words(['10'], ['<|user|>', '<|assistant|>', '<|end|>'])
print('done', len(tokens.tokenise([sys.argv[1]], tokenizer)), flush=True)
"""


def slow_process(corpus, seconds):
    command = [sys.executable, '-c', SLOW, str(corpus), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_tokenisation_is_not_taken_for_whole(corpus):
    process = slow_process(corpus, 0.2)
    for _ in range(3):
        assert process.stdout.readline() == 'working\n'
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [name for name in folders(corpus) if not name.endswith('.tmp')] == []
    done = slow_process(corpus, 0).communicate()[0].splitlines()
    assert done[-1] == 'done 200' and len(done) > 3
    assert len(folders(corpus)) == 1 and not folders(corpus)[0].endswith('.tmp')


@pytest.mark.parametrize('name', ['ids.bin', 'mask.bin', 'ends.bin'])
def test_files_that_were_cut_are_refused(corpus, name):
    tokens.tokenise([corpus], toy())
    path = corpus.with_name('a.jsonl.tokens') / folders(corpus)[0] / name
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(OSError, match='its files are shorter than they were: remove the folder'):
        tokens.tokenise([corpus], toy())


def test_of_two_processes_one_writes(corpus):
    both = [slow_process(corpus, 0.05) for _ in range(2)]
    said = [process.communicate()[0].splitlines() for process in both]
    assert [lines[-1] for lines in said] == ['done 200'] * 2
    assert sorted('working' in lines for lines in said) == [False, True]


def test_a_folder_that_cannot_be_written_to_has_its_tokens_elsewhere(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens.os, 'access', lambda *_: False)   # root may write anywhere
    documents = tokens.tokenise([corpus], toy(), spare=tmp_path / 'out' / 'tokens')
    assert len(documents) == 200 and folders(corpus) == []
    home = tmp_path / 'out' / 'tokens' / 'a.jsonl.tokens'
    (folder,) = (entry for entry in home.iterdir() if entry.name != 'lock')
    assert (folder / 'about.json').exists()


def test_documents_left_out_change_the_identity_and_keep_their_places(corpus):
    documents = tokens.tokenise([corpus], toy())
    whole, sizes = documents.identity, documents.lengths
    documents.select(sizes > sizes.min())
    assert len(documents) < 200 and documents.identity != whole
    first = int(np.flatnonzero(sizes > sizes.min())[0])
    assert documents.where(0) == f"{corpus}, row {first + 1}"
    assert documents[0][0].tolist() == toy().apply_chat_template(chat(first))[0]
    assert documents.tokens == documents.lengths.sum()


MEMORY = """
import sys
from pathlib import Path
from data.loader import PackedBatches
from data.tokens import Documents
def own():
    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('Anonymous')) * 1024
before = own()
batches = PackedBatches(Documents.mapped([Path(sys.argv[1])], ['a.jsonl']), 8, 2048)
next(batches)
print((own() - before) / batches.docs.tokens)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'), reason='reads /proc')
def test_a_rank_keeps_less_than_a_byte_a_token(tmp_path):
    documents, length = 100_000, 100   # ten million tokens
    np.zeros(documents * length, dtype=np.uint16).tofile(tmp_path / 'ids.bin')
    np.ones(documents * length, dtype=np.uint8).tofile(tmp_path / 'mask.bin')
    (length * np.arange(1, documents + 1, dtype=np.int64)).tofile(tmp_path / 'ends.bin')
    about = {'dtype': 'uint16', 'turns': documents, 'silent': {}, 'without_turn': 0, 'sha256': ''}
    (tmp_path / 'about.json').write_text(json.dumps(about))
    command = [sys.executable, '-c', MEMORY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert float(done.stdout) < 1


def test_a_file_that_is_not_there_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.jsonl'):
        tokens.token_folders([tmp_path / 'nowhere.jsonl'], toy())
    assert list(tmp_path.iterdir()) == []
