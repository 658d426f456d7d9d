import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import source
from data.loader import PackedBatches, best_fit
from data.source import read_rows

ROOT = Path(__file__).resolve().parents[1]
CHAT = [{'role': 'user', 'content': '1+1?'}, {'role': 'assistant', 'content': '2'}]


# ---- rows ----

def write(tmp_path, *lines, name='x.jsonl'):
    path = tmp_path / name
    data = b'\n'.join(line if isinstance(line, bytes) else line.encode() for line in lines)
    path.write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
    return path


@pytest.mark.parametrize('name', ['x.jsonl', 'x.jsonl.gz'])
def test_read_rows(tmp_path, name):
    other = {'role': 'assistant', 'content': 'é\u2028“\n'}
    rows = [{'messages': CHAT, 'id': 1}, {'messages': [CHAT[0], other]}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    assert read_rows(write(tmp_path, lines[0], lines[1], '', name=name)) == rows


def test_require(tmp_path):
    rows = [{'prompt': CHAT, 'answer': 0}, {'prompt': 'raw', 'answer': '7'}]
    path = write(tmp_path, *map(json.dumps, rows))
    assert len(read_rows(path, require=('prompt', 'answer'))) == 2
    assert len(read_rows(path, require=())) == 2
    message = "x.jsonl:1: 'messages' is missing; the row has 'prompt', 'answer'"
    with pytest.raises(ValueError, match=message):
        read_rows(path)


@pytest.mark.parametrize('line, message', [
    ('', 'blank line'),
    (' \t\r', 'blank line'),
    ('{"messages": ', 'no JSON: Expecting value at column 13'),
    ("{'messages': []}", 'no JSON: '),
    ('{} {}', 'no JSON: Extra data at column 4'),
    (b'{"messages": "\xff"}', "'utf-8' codec can't decode"),
    ('[1, 2]', 'a row must be a JSON object, not list'),
    ('null', 'a row must be a JSON object, not NoneType'),
    ('[' * 100_000, 'no '),
    ('{}', "'messages' is missing; the row has no keys"),
    ('{"messages": null, "id": 3}', "'messages' is missing"),
    ('{"messages": []}', "'messages' must be a list of messages"),
    ('{"messages": "hello"}', "'messages' must be a list of messages"),
    ('{"messages": ["hello"]}', r'messages\[0\] must be {"role"'),
    ('{"messages": [{"role": "user", "content": ""}, {"role": "b", "content": ""}]}',
     r'messages\[1\] must be {"role"'),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', r'messages\[0\] must be {"role"'),
    ('{"messages": [{"role": "user"}]}', r'messages\[0\] must have a string as content'),
    ('{"messages": [{"role": "user", "content": 3}]}',
     r'messages\[0\] must have a string as content'),
])
def test_malformed_row_names_file_and_line(tmp_path, line, message):
    good = json.dumps({'messages': CHAT})
    path = write(tmp_path, good, good, line, good)
    with pytest.raises(ValueError, match=f'^{path}:3: {message}') as error:
        read_rows(path)
    assert '\n' not in str(error.value)


def test_prompt_must_be_chat_or_string(tmp_path):
    with pytest.raises(ValueError, match="x.jsonl:1: 'prompt' must be a list of messages"):
        read_rows(write(tmp_path, '{"prompt": 3}'), require=('prompt',))


def test_files_without_rows(tmp_path):
    with pytest.raises(ValueError, match='x.jsonl: no rows in it'):
        read_rows(write(tmp_path, ''))
    with pytest.raises(FileNotFoundError, match='absent.jsonl'):
        read_rows(tmp_path / 'absent.jsonl')
    lines = [json.dumps({'messages': CHAT, 'id': i * 7919 % 1000}) for i in range(5000)]
    path = write(tmp_path, *lines, name='cut.jsonl.gz')
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r'cut.jsonl.gz: damaged after line [1-9]\d+: '):
        read_rows(path)
    (tmp_path / 'plain.jsonl.gz').write_text(lines[0])
    with pytest.raises(ValueError, match='plain.jsonl.gz: damaged after line 0: '):
        read_rows(tmp_path / 'plain.jsonl.gz')


@pytest.mark.parametrize('path, command', [
    ('data/gsm8k/train.jsonl', 'python data/gsm8k/prepare.py'),
    ('data/math/math500.jsonl', 'python data/math/prepare.py --dataset=math500'),
    ('data/math/openr1_sft.jsonl', 'python data/math/prepare.py --dataset=openr1'),
    ('data/code/mbpp_test.jsonl', 'python data/code/prepare.py --dataset=mbpp --split=test'),
    ('data/code/humaneval.jsonl', 'python data/code/prepare.py --dataset=humaneval'),
    ('data/medical/medmcqa_validation.jsonl.gz',
     'python data/medical/prepare.py --dataset=medmcqa --split=validation'),
    ('data/countdown/rl.jsonl', 'python data/countdown/prepare.py'),
    ('out/gsm8k/train.jsonl', 'python data/gsm8k/prepare.py --out_dir=out/gsm8k'),
    ('out/math/aime24.jsonl', 'python data/math/prepare.py --out_dir=out/math --dataset=aime24'),
    ('out/r1/data/rl.jsonl', 'make r1'),
    ('out/r1/base', 'make r1'),
    ('out/r1', 'make r1'),
])
def test_an_absent_file_names_the_command_that_makes_it(path, command, monkeypatch, tmp_path):
    monkeypatch.delenv('RUN', raising=False)
    monkeypatch.chdir(tmp_path)
    for script in ROOT.glob('data/*/prepare.py'):
        made = tmp_path / script.relative_to(ROOT)
        made.parent.mkdir(parents=True)
        made.touch()
    if command == 'make r1':
        assert source.made_by(path) == command
        return
    with pytest.raises(FileNotFoundError) as error:
        read_rows(path)
    assert str(error.value) == f'{path} does not exist: run {command}'
    with pytest.raises(FileNotFoundError, match='does not exist: run python data'):
        next(source.read([(path, path)]))


def test_another_run_and_an_unknown_file(monkeypatch):
    monkeypatch.setenv('RUN', 'out/second')
    assert source.made_by('out/second/zero') == 'make r1 RUN=out/second'
    assert source.made_by('out/r1/zero') is None
    assert str(source.missing('absent.jsonl')) == 'absent.jsonl does not exist'
    assert str(source.missing('absent', 'init_from')) == 'absent does not exist: set init_from'
    told = str(source.missing('out/second', 'init_from'))
    assert told == 'out/second does not exist: run make r1 RUN=out/second, or set init_from'


# ---- packing ----

def slow_pack(lengths, row_len):
    """Best-fit decreasing as in a textbook: look at every open row."""
    rows, used = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [r for r in range(len(rows)) if used[r] + lengths[i] <= row_len]
        if not fits:
            rows.append([])
            used.append(0)
            fits = [len(rows) - 1]
        best = max(fits, key=lambda r: used[r])
        rows[best].append(i)
        used[best] += lengths[i]
    return rows, used


def test_best_fit_by_hand():
    assert best_fit(np.array([10, 7, 5, 3, 3, 2]), 10).tolist() == [0, 1, 2, 1, 2, 2]


@pytest.mark.parametrize('seed', range(20))
def test_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    row_len = int(rng.integers(1, 60))
    count = int(rng.integers(1, 200))
    lengths = sorted(rng.integers(1, row_len + 1, size=count).tolist(), reverse=True)
    row_of = best_fit(np.array(lengths), row_len)
    rows = [np.flatnonzero(row_of == row) for row in range(row_of.max() + 1)]
    _, used = slow_pack(lengths, row_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert sorted(filled) == sorted(used)   # equal up to ties between rows


def growth(function, *inputs):
    """How much longer the last input takes than the first, in time of the processor; the shortest
    of three runs each."""
    def seconds(x):
        start = time.process_time()
        function(x)
        return time.process_time() - start
    first, *_, last = (min(seconds(x) for _ in range(3)) for x in inputs)
    return last / first


def test_packing_is_fast():
    """Eight times the documents take nowhere near 64 times as long."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 40_000).astype(int).clip(1, 4096)
    lengths = np.sort(lengths)[::-1]
    assert growth(lambda x: best_fit(x, 4096), lengths[::8], lengths) < 24
    assert sum(lengths) / ((best_fit(lengths, 4096).max() + 1) * 4096) > 0.99


# ---- batches ----

def make_docs(count=23, row_len=16, seed=0):
    """Distinct tokens throughout, so that a token tells where it came from; a mask with some
    zeros."""
    rng = np.random.default_rng(seed)
    docs = []
    token = 1
    for _ in range(count):
        n = int(rng.integers(2, row_len + 1))
        mask = rng.integers(0, 2, n).tolist()
        mask[int(rng.integers(1, n))] = 1
        docs.append((list(range(token, token + n)), mask))
        token += n
    return docs


def documents_of(batch):
    """The documents of a batch, taken apart token by token: (ids, labels) each; checks positions,
    ids and padding."""
    found = []
    keys = ('input_ids', 'labels', 'positions', 'doc_ids')
    for row in zip(*(batch[key].tolist() for key in keys)):
        expected, last = 0, -1
        for token, label, position, doc in zip(*row):
            if doc == -1:
                assert (token, label, position) == (0, -100, 0)
                expected = None
                continue
            assert expected is not None   # padding only at the end of a row
            if doc != last:
                assert doc == last + 1
                found.append(([], []))
                last, expected = doc, 0
            assert position == expected
            expected += 1
            found[-1][0].append(token)
            found[-1][1].append(label)
    return found


def expected_labels(ids, mask):
    return [ids[t + 1] if t + 1 < len(ids) and mask[t + 1] else -100 for t in range(len(ids))]


def test_an_epoch_holds_every_document_once_with_its_labels():
    docs = make_docs()
    batches = PackedBatches(docs, batch_size=1, row_len=16, seed=3)
    expected = sorted((ids, expected_labels(ids, mask)) for ids, mask in docs)
    orders = []
    for epoch in range(3):
        assert batches.epoch == epoch
        rows = [next(batches) for _ in range(batches.rows)]
        tensors = [tensor for batch in rows for tensor in batch.values()]
        assert all(t.dtype == torch.int64 and t.shape == (1, 16) for t in tensors)
        found = [doc for batch in rows for doc in documents_of(batch)]
        assert sorted(found) == expected
        orders.append([ids[0] for ids, _ in found])
    assert orders[0] != orders[1] != orders[2]


def test_labels_by_hand():
    batch = next(PackedBatches([([5, 6, 7, 8], [1, 1, 0, 1]), ([9, 4], [0, True])], 1, 8))
    assert batch['input_ids'].tolist() == [[5, 6, 7, 8, 9, 4, 0, 0]]
    assert batch['labels'].tolist() == [[6, -100, 8, -100, 4, -100, -100, -100]]
    assert batch['positions'].tolist() == [[0, 1, 2, 3, 0, 1, 0, 0]]
    assert batch['doc_ids'].tolist() == [[0, 0, 0, 0, 1, 1, -1, -1]]


def test_masks_by_equality_leave_no_row_without_a_key():
    batch = next(PackedBatches(make_docs(), 4, 16))
    doc = batch['doc_ids']
    allowed = (doc[:, :, None] == doc[:, None, :]) & torch.ones(16, 16, dtype=torch.bool).tril()
    assert allowed.any(-1).all()


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize('world', [2, 3, 6])
def test_the_whole_batch_is_the_same_on_any_number_of_ranks(world):
    docs = make_docs()
    whole = PackedBatches(docs, 6, 16, seed=1)
    ranks = [PackedBatches(docs, 6, 16, seed=1, rank=rank, world=world) for rank in range(world)]
    for _ in range(7):
        parts = [next(batches) for batches in ranks]
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert_equal(next(whole), joined)
        assert all(batches.state() == whole.state() for batches in ranks)


def test_cursor_is_exact_at_every_batch_and_on_other_ranks():
    docs = make_docs()
    batches = PackedBatches(docs, 4, 16, seed=2)
    assert batches.rows % 4   # batches that span epochs
    states, seen = [batches.state()], []
    for _ in range(2 * batches.rows):
        seen.append(next(batches))
        states.append(json.loads(json.dumps(batches.state())))
    assert states[-1]['epoch'] == 8
    for i in range(len(seen)):
        other = PackedBatches(docs, 4, 16, seed=2)
        other.load_state(states[i])
        for batch in seen[i:i + 3]:
            assert_equal(next(other), batch)
    other = PackedBatches(docs, 4, 16, seed=2, rank=1, world=2)
    other.load_state(states[5])
    assert_equal(next(other), {key: tensor[2:] for key, tensor in seen[5].items()})


def test_order_depends_on_the_seed_and_on_nothing_else():
    docs = make_docs()
    torch.manual_seed(0)
    np.random.seed(0)
    one = PackedBatches(docs, 8, 16, seed=1)
    first = next(one)
    torch.manual_seed(1)
    np.random.seed(1)
    two = PackedBatches([(np.array(ids), np.array(mask)) for ids, mask in docs], 8, 16, seed=1)
    assert_equal(first, next(two))
    for _ in range(3):
        assert_equal(next(one), next(two))
    assert not first['input_ids'].equal(next(PackedBatches(docs, 8, 16, seed=2))['input_ids'])


@pytest.mark.parametrize('other, message', [
    (dict(seed=4), 'seed was 3, now it is 4'),
    (dict(row_len=17), 'row_len was 16, now it is 17'),
    (dict(docs=make_docs(22)), 'checksum of the documents was'),
    (dict(docs=[(ids, [1] * len(ids)) for ids, _ in make_docs()]), 'checksum of the documents was'),
])
def test_cursor_of_other_data_is_refused(other, message):
    args = dict(docs=make_docs(), batch_size=4, row_len=16, seed=3)
    state = PackedBatches(**args).state()
    with pytest.raises(ValueError, match=f'the data cursor does not fit: {message}'):
        PackedBatches(**{**args, **other}).load_state(state)


@pytest.mark.parametrize('docs, more, message', [
    ([([1, 2], [1])], {}, r'document 0 \(from 0\) has 2 tokens and a mask of 1'),
    ([([1, 2], [1, 1]), ([1, 2, 3], [1, 0, 0])], {},
     r'document 1 \(from 0\) has no token to learn'),
    ([([1], [1])], {}, 'no token to learn'),
    ([([1] * 9, [1] * 9)], {}, r'document 0 \(from 0\) has 9 tokens, a row 8'),
    ([([1, 2], [1, 1]), ([], [])], {}, r'document 1 \(from 0\) has 0 tokens, a row 8'),
    ([], {}, 'no documents'),
    ([([1, 2], [1, 1])], dict(batch_size=3, world=2), 'batch_size=3 must be a multiple of world=2'),
    ([([1, 2], [1, 1])], dict(rank=2, world=2), 'rank=2'),
])
def test_refused_documents_and_sizes(docs, more, message):
    with pytest.raises(ValueError, match=message):
        PackedBatches(docs, **{'batch_size': 2, 'row_len': 8, **more})


def test_many_short_documents_are_fast():
    docs = [([7] * n, [1] * n) for n in np.random.default_rng(0).integers(10, 60, 30_000).tolist()]
    def use(docs):
        batches = PackedBatches(docs, 64, 512)
        batches.start_epoch(1)
        for _ in range(len(docs) // 3000):
            next(batches)
        return batches
    assert growth(use, docs[::8], docs) < 24
    assert sum(len(ids) for ids, _ in docs) / (use(docs).rows * 512) > 0.99
