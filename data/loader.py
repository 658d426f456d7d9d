"""
Batches of packed documents.

    docs = tokenise(['out/data/sft.jsonl'], tokenizer)           # data/tokens.py
    batches = PackedBatches(docs, batch_size=64, row_len=1024, seed=1, rank=rank, world=world)
    batch = next(batches)                                        # endless
    batches.state()                                              # the cursor for a checkpoint
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
    rows = np.empty(len(lengths), dtype=np.int32)
    count = 0
    room = []         # the different amounts of room that rows have left, sorted
    open_rows = {}    # amount -> rows with it
    for i in range(len(lengths)):
        length = int(lengths[i])
        at = bisect.bisect_left(room, length)
        if at == len(room):   # no row has room enough: a new one
            row = count
            left = row_len
            count += 1
        else:
            left = room[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del room[at], open_rows[left]
        rows[i] = row

        left -= length
        if left:
            if left not in open_rows:
                bisect.insort(room, left)
            open_rows.setdefault(left, []).append(row)
    return rows


class PackedBatches:
    """
    Endless batches of rows of packed documents, best-fit decreasing. Each epoch holds every
    document once and shuffles, by (seed, epoch), which of the equally long documents share a row
    and the order of the rows; a batch may span two.

    docs: Documents, or [(ids, mask), ...], sequences of equal length: token ids, and whether to
    learn to predict that token (a document's first token is never predicted; with learn_all every
    other one is, whatever the mask says).
    batch_size: rows of the batch over all ranks, of which this one yields rows rank·B to
    (rank + 1)·B, B = batch_size / world: the whole batch is the same for any world.

    A batch is a dict of int64 tensors [B, row_len]:
        input_ids    tokens, then 0
        labels       the token that follows in the same document; -100 where mask says no loss, at
                     the last token of a document, and in the padding
        positions    from 0 in each document; 0 in the padding
        doc_ids      0, 1, ... along the row, -1 in the padding (whose tokens so see each other: no
                     empty softmax)
    Attributes: rows, the rows of an epoch; epoch, of the next row.

    Raises ValueError for a document that is empty or longer than row_len, a mask that is not as
    long as its ids or asks for no loss, and a batch_size that world does not divide.
    """

    def __init__(self, docs: Documents | list, batch_size: int, row_len: int, seed: int = 0,
                 rank: int = 0, world: int = 1, learn_all: bool = False):
        if batch_size <= 0 or batch_size % world or not 0 <= rank < world:
            raise ValueError(f'batch_size={batch_size} must be a multiple of world={world}, and '
                             f'rank={rank} below it')
        if not len(docs):
            raise ValueError('no documents to pack')
        if not isinstance(docs, Documents):
            docs = Documents.of(docs)
        self.docs = docs
        self.batch_size = batch_size
        self.row_len = row_len
        self.seed = seed
        self.rank = rank
        self.world = world
        self.learn_all = learn_all
        self.data = docs.identity + (' learn all' if learn_all else '')

        lengths = docs.lengths
        unfit = np.flatnonzero((lengths == 0) | (lengths > row_len))
        if len(unfit):
            i = unfit[0]
            raise ValueError(f'{docs.where(i)} has {lengths[i]} tokens, a row {row_len}')
        learnt = lengths - 1 if learn_all else docs.learnt()
        if learnt.min() <= 0:
            raise ValueError(f'{docs.where(learnt.argmin())} has no token to learn after its first')

        # Rows of places for documents, longest first: the same in every epoch, for only lengths
        # matter. A row's places lie together in `places`, and end at its number in `ends`.
        row_of_place = best_fit(np.sort(lengths)[::-1], row_len)
        self.places = np.argsort(row_of_place, kind='stable').astype(np.int32)
        self.ends = np.cumsum(np.bincount(row_of_place), dtype=np.int64)
        self.rows = len(self.ends)
        self.start_epoch(0)

    def start_epoch(self, epoch: int):
        """Draws the order of the epoch's rows, and which of the equally long documents go where."""
        rng = np.random.default_rng([self.seed, epoch])
        lengths = self.docs.lengths
        shuffled = rng.permutation(len(lengths))
        longest_first = np.argsort(-lengths[shuffled], kind='stable')
        self.document_at = shuffled[longest_first].astype(np.int32)   # place -> document
        self.order = rng.permutation(self.rows).astype(np.int32)
        self.epoch = epoch
        self.row = 0

    def documents_of(self, row: int) -> np.ndarray:
        """The numbers of the documents in the epoch's row."""
        row = self.order[row]
        begin = self.ends[row - 1] if row else 0
        return self.document_at[self.places[begin:self.ends[row]]]

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        rows = []
        for _ in range(self.batch_size):
            rows.append(self.documents_of(self.row))
            self.row += 1
            if self.row == self.rows:
                self.start_epoch(self.epoch + 1)
        mine = self.batch_size // self.world
        return self.build(rows[self.rank * mine:(self.rank + 1) * mine])

    def build(self, rows: list) -> dict[str, torch.Tensor]:
        """The batch whose rows hold these documents."""
        shape = (len(rows), self.row_len)
        input_ids = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, -100, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        doc_ids = np.full(shape, -1, dtype=np.int64)
        for b, row in enumerate(rows):
            start = 0
            for d, doc in enumerate(row):
                ids, mask = self.docs[doc]
                end = start + len(ids)
                learn = np.ones(len(ids), dtype=bool) if self.learn_all else mask.astype(bool)
                following = np.where(learn[1:], ids[1:].astype(np.int64), -100)
                input_ids[b, start:end] = ids
                labels[b, start:end - 1] = following
                positions[b, start:end] = np.arange(len(ids))
                doc_ids[b, start:end] = d
                start = end
        return {'input_ids': torch.from_numpy(input_ids),
                'labels': torch.from_numpy(labels),
                'positions': torch.from_numpy(positions),
                'doc_ids': torch.from_numpy(doc_ids)}

    def state(self) -> dict:
        """The cursor before the next batch, with what identifies data and order; the same on every
        rank."""
        return {'epoch': self.epoch, 'row': self.row, 'seed': self.seed, 'row_len': self.row_len,
                'data': self.data}

    def load_state(self, state: dict):
        """Goes to the cursor, with any batch_size and world. ValueError where seed, row_len or
        documents differ."""
        own = self.state()
        names = {'seed': 'seed', 'row_len': 'row_len', 'data': 'checksum of the documents'}
        for key, name in names.items():
            if state[key] != own[key]:
                raise ValueError(f'the data cursor does not fit: {name} was {state[key]}, now it '
                                 f'is {own[key]}')
        self.start_epoch(state['epoch'])
        self.row = state['row']
