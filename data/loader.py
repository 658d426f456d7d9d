"""
Batches of packed documents.

    docs = tokenise(['out/data/sft.jsonl'], tokenizer)           # data/tokens.py
    batches = PackedBatches(docs, batch_size=64, row_len=1024, seed=1, rank=rank, world=world)
    batch = next(batches)                                        # endless; batches.state() is the checkpoint's cursor
"""
import bisect

import numpy as np
import torch

from data.tokens import Documents


def best_fit(lengths: np.ndarray, row_len: int) -> np.ndarray:
    """
    Best-fit decreasing: lengths [n], which descend -> the row of each [n] int32. Each goes into the
    fullest row with room left, of equally full ones into that opened last.
    """
    rows, count = np.empty(len(lengths), dtype=np.int32), 0
    room, open_rows = [], {}   # sorted distinct amounts left over; amount -> rows with it
    for i in range(len(lengths)):
        length = int(lengths[i])
        at = bisect.bisect_left(room, length)
        if at == len(room):
            row, left = count, row_len
            count += 1
        else:
            left = room[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del room[at], open_rows[left]
        rows[i] = row
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

    docs: Documents, or [(ids, mask), ...], sequences of equal length: token ids, and whether to
    learn to predict that token (a document's first token is never predicted; with learn_all every
    other one is, whatever the mask says).
    batch_size: rows of the batch over all ranks, of which this one yields
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

    def __init__(self, docs: Documents | list, batch_size: int, row_len: int, seed: int = 0,
                 rank: int = 0, world: int = 1, pad_id: int = 0, learn_all: bool = False):
        if batch_size <= 0 or batch_size % world or not 0 <= rank < world:
            raise ValueError(f'batch_size={batch_size} must be a multiple of world={world}, and rank={rank} below it')
        if not len(docs):
            raise ValueError('no documents to pack')
        self.docs = docs = docs if isinstance(docs, Documents) else Documents.of(docs)
        self.learn_all, lengths = learn_all, docs.lengths
        for i in np.flatnonzero((lengths == 0) | (lengths > row_len))[:1]:
            raise ValueError(f'{docs.where(i)} has {lengths[i]} tokens, a row {row_len}')
        learnt = lengths - 1 if learn_all else docs.learnt()
        if learnt.min() <= 0:
            raise ValueError(f'{docs.where(learnt.argmin())} has no token to learn after its first')
        slots = best_fit(np.sort(lengths)[::-1], row_len)   # the same in every epoch: only lengths
        self.slots = np.argsort(slots, kind='stable').astype(np.int32)   # row after row
        self.ends = np.cumsum(np.bincount(slots), dtype=np.int64)        # of each row in `slots`
        self.rows = len(self.ends)
        self.fill = float(lengths.sum(dtype=np.int64) / (self.rows * row_len))
        self.batch_size, self.row_len, self.seed, self.pad_id = batch_size, row_len, seed, pad_id
        self.rank, self.world = rank, world
        self.data = docs.identity + (' learn all' if learn_all else '')
        self.start_epoch(0)

    def start_epoch(self, epoch: int):
        """Draws the order of the epoch's rows, and which of the equally long documents go where."""
        rng, lengths = np.random.default_rng([self.seed, epoch]), self.docs.lengths
        shuffled = rng.permutation(len(lengths))
        longest_first = np.argsort(-lengths[shuffled], kind='stable')
        self.ranking = shuffled[longest_first].astype(np.int32)
        self.order = rng.permutation(self.rows).astype(np.int32)
        self.epoch, self.row = epoch, 0

    def documents_of(self, row: int) -> np.ndarray:
        """The numbers of the documents in the epoch's row."""
        slot = self.order[row]
        begin = self.ends[slot - 1] if slot else 0
        return self.ranking[self.slots[begin:self.ends[slot]]]

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        chosen, mine = [], self.batch_size // self.world
        for _ in range(self.batch_size):
            chosen.append(self.documents_of(self.row))
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
                ids, mask = self.docs[doc]
                n = len(ids)
                here, end = slice(end, end + n), end + n
                learn = np.ones(n, dtype=bool) if self.learn_all else mask.astype(bool)
                batch['input_ids'][b, here] = ids
                batch['labels'][b, here][:-1] = np.where(learn[1:], ids[1:].astype(np.int64), -100)
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
