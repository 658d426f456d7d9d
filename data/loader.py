"""
Rows from JSONL files, and batches of packed documents.

    rows = read_rows('out/data/sft.jsonl')                       # every row checked, mistakes with file and line
    docs = [(ids, mask), ...]                                    # tokenised by the script; mask: tokens with loss
    batches = PackedBatches(docs, batch_size=64, row_len=1024, seed=1, rank=rank, world=world)
    batch = next(batches)                                        # endless; batches.state() is the checkpoint's cursor
"""
import bisect
import codecs
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from data.source import chat_of, from_json, missing


def read_rows(path, require: tuple = ('messages',)) -> list[dict]:
    """
    The rows of a .jsonl or .jsonl.gz file, one JSON object a line, so row i is line i + 1. require: keys each row
    must have, not null; `messages` must be a chat, `prompt` a chat or a string, where a chat is a non-empty list of
    {"role": "system" | "user" | "assistant" | "tool", "content": str}; content in parts is joined,
    and ShareGPT's "conversations" become "messages" (chat_of in data/source.py).
    Raises ValueError with file and line for a row that is anything else, for a file without rows or a damaged .gz.
    FileNotFoundError names the command that makes the file, where one does.
    """
    path, rows, number = Path(path), [], 0
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                rows.append(parse_row(line, require))
    except ValueError as error:
        raise ValueError(f'{path}:{number}: {error}') from error
    except FileNotFoundError:
        raise missing(path) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path}: damaged after line {number}: {error}') from error
    if not rows:
        raise ValueError(f'{path}: no rows in it')
    return rows


def parse_row(line: bytes, require: tuple) -> dict:
    """One row; ValueError says what is wrong with it."""
    if not line.strip():
        raise ValueError('blank line')
    try:
        row = from_json(line.rstrip().decode('utf-8'))
    except json.JSONDecodeError as error:
        raise ValueError(f'no JSON: {error.msg} at column {error.colno}') from error
    except RecursionError:
        raise ValueError('no row: nested too deep') from None
    if not isinstance(row, dict):
        raise ValueError(f'a row must be a JSON object, not {type(row).__name__}')
    for key in require:
        named = 'conversations' if key == 'messages' and row.get(key) is None else key
        if row.get(named) is None:
            raise ValueError(f'{key!r} is missing; the row has {", ".join(map(repr, row)) or "no keys"}')
    for key in {'messages', 'prompt'}.intersection(require):
        chat = chat_of(row, key)
        if not isinstance(row.get(key), str):   # a prompt that is text stays so
            row[key] = chat
    return row


def best_fit(lengths: list[int], row_len: int) -> list[list[int]]:
    """Best-fit decreasing: rows of positions in lengths, which descend; each goes into the fullest row with room left, of equally
    full ones into that opened last."""
    rows, room = [], []   # room: sorted distinct amounts left over; open_rows: amount -> rows with it
    open_rows = {}
    for i, length in enumerate(lengths):
        at = bisect.bisect_left(room, length)
        if at == len(room):
            rows.append([])
            row, left = rows[-1], row_len
        else:
            left = room[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del room[at], open_rows[left]
        row.append(i)
        left -= length
        if left and left not in open_rows:
            bisect.insort(room, left)
        if left:
            open_rows.setdefault(left, []).append(row)
    return rows


class PackedBatches:
    """
    Endless batches of rows of packed documents, best-fit decreasing. Each epoch holds every document once and shuffles,
    by (seed, epoch), which of the equally long documents share a row and the order of the rows; a batch may span two.

    docs: [(ids, mask), ...], sequences of equal length: token ids, and whether to learn to predict that token (a
    document's first token is never predicted). batch_size: rows of the batch over all ranks, of which this one yields
    rows rank·B to (rank + 1)·B, B = batch_size / world: the whole batch is the same for any world.
    A batch is a dict of int64 tensors [B, row_len]:
        input_ids    tokens, then pad_id
        labels       the token that follows in the same document; -100 where mask says no loss, at the last token of a
                     document, and in the padding
        positions    from 0 in each document; 0 in the padding
        doc_ids      0, 1, ... along the row, -1 in the padding (whose tokens so see each other: no empty softmax)
    Attributes: rows, the rows of an epoch; fill, the share of their tokens that is no padding; epoch, of the next row.
    Raises ValueError for a document that is empty or longer than row_len, a mask that is not as long as its ids or asks
    for no loss, and a batch_size that world does not divide.
    """

    def __init__(self, docs: list, batch_size: int, row_len: int, seed: int = 0, rank: int = 0, world: int = 1,
                 pad_id: int = 0):
        if batch_size <= 0 or batch_size % world or not 0 <= rank < world:
            raise ValueError(f'batch_size={batch_size} must be a multiple of world={world}, and rank={rank} below it')
        if not docs:
            raise ValueError('no documents to pack')
        for i, (ids, mask) in enumerate(docs):
            if not 0 < len(ids) <= row_len:
                raise ValueError(f'document {i} (from 0) has {len(ids)} tokens, a row {row_len}')
            if len(ids) != len(mask):
                raise ValueError(f'document {i} (from 0) has {len(ids)} tokens and a mask of {len(mask)}')
        self.lengths = np.array([len(ids) for ids, _ in docs], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in docs])
        self.mask = np.concatenate([np.asarray(mask, dtype=bool) for _, mask in docs])
        self.mask[self.starts] = False
        learnt = np.add.reduceat(self.mask, self.starts, dtype=np.int64)
        if learnt.min() == 0:
            raise ValueError(f'document {learnt.argmin()} (from 0) has no token to learn after its first')
        self.slots = best_fit(np.sort(self.lengths)[::-1].tolist(), row_len)   # the same in every epoch: only lengths
        self.rows, self.fill = len(self.slots), float(self.lengths.sum() / (len(self.slots) * row_len))
        self.batch_size, self.row_len, self.seed, self.pad_id = batch_size, row_len, seed, pad_id
        self.rank, self.world = rank, world
        self.data = zlib.crc32(self.mask.tobytes(), zlib.crc32(self.ids.tobytes(), zlib.crc32(self.lengths.tobytes())))
        self.start_epoch(0)

    def start_epoch(self, epoch: int):
        """The documents of each of the epoch's rows."""
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self.lengths))
        ranking = shuffled[np.argsort(-self.lengths[shuffled], kind='stable')]
        self.epoch, self.row = epoch, 0
        self.order = [ranking[self.slots[row]] for row in rng.permutation(self.rows)]

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        chosen, mine = [], self.batch_size // self.world
        for _ in range(self.batch_size):
            chosen.append(self.order[self.row])
            self.row += 1
            if self.row == self.rows:
                self.start_epoch(self.epoch + 1)
        return self.build(chosen[self.rank * mine:(self.rank + 1) * mine])

    def build(self, rows: list) -> dict[str, torch.Tensor]:
        """The batch whose rows hold these documents."""
        shape = (len(rows), self.row_len)
        batch = {key: np.full(shape, fill, dtype=np.int64) for key, fill in
                 [('input_ids', self.pad_id), ('labels', -100), ('positions', 0), ('doc_ids', -1)]}
        for b, row in enumerate(rows):
            end = 0
            for d, doc in enumerate(row):
                n, start = self.lengths[doc], self.starts[doc]
                here, end, ids = slice(end, end + n), end + n, self.ids[start:start + n]
                batch['input_ids'][b, here] = ids
                batch['labels'][b, here][:-1] = np.where(self.mask[start + 1:start + n], ids[1:], -100)
                batch['positions'][b, here] = np.arange(n)
                batch['doc_ids'][b, here] = d
        return {key: torch.from_numpy(array) for key, array in batch.items()}

    def state(self) -> dict:
        """The cursor before the next batch, with what identifies data and order; the same on every rank."""
        return {'epoch': self.epoch, 'row': self.row, 'seed': self.seed, 'row_len': self.row_len, 'data': self.data}

    def load_state(self, state: dict):
        """Goes to the cursor, with any batch_size and world. ValueError where seed, row_len or documents differ."""
        own = self.state()
        for key, name in [('seed', 'seed'), ('row_len', 'row_len'), ('data', 'checksum of the documents')]:
            if state[key] != own[key]:
                raise ValueError(f'the data cursor does not fit: {name} was {state[key]}, now it is {own[key]}')
        self.start_epoch(state['epoch'])
        self.row = state['row']
