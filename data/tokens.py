"""
Rows tokenised once, into files that all ranks map: in parallel, and never in memory as a whole.

    documents = tokenise(['traces.jsonl'], tokenizer, workers=8)
    ids, mask = documents[0]                  # of the first row, as arrays over the mapped files

    traces.jsonl.tokens/                      beside the data; in `spare` where that is not writable
        KEY/ids.bin       the token ids of one row after another: uint16, or uint32 for larger ids
            mask.bin      uint8: 1 where the token is to be learnt
            ends.bin      int64: where each row's tokens end
            about.json    counts: documents, tokens, the assistant's turns, why some carry no loss;
                          the first row without any; a hash of the three files
        lock              held by the process that writes

KEY is a hash of the rows, of the tokenizer with its template and what it is given, and of the code
in CODE, so that whatever changes is tokenised anew. A folder is written as KEY.tmp and renamed when
it is whole. Of several processes that want the same one, one writes and the others wait.
"""
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from data.source import at_row, lines_of, parse_row
from graders.pool import Pool
from progress import Bar

# Files beside this one that decide on the tokens
CODE = ('tokens.py', 'tokenizer.py', 'bpe.py', 'library_bpe.py', 'source.py')
CHUNK = 2**20      # bytes of rows that a process tokenises at a time
SMALL = 8 * CHUNK  # a smaller file is tokenised by one process: others take longer to start
SECONDS = 600      # that a process may take over a chunk


class Documents:
    """
    Tokenised rows of several files, in order. documents[i] -> ids [n], mask [n] of document i;
    lengths [documents] int32; tokens: how many in all; identity: a hash of ids and masks;
    turns, silent: as in about.json, over all files; without_turn: where the first row without a
    turn of the assistant stands, '' if there is none.
    """

    def __init__(self, parts: list, names: list, identity: str):
        """parts: ids, mask and ends of each file, as arrays; names: of the files."""
        self.parts = parts
        self.names = names
        self.identity = identity
        self.turns = 0
        self.silent = Counter()
        self.without_turn = ''
        self.first = np.cumsum([0] + [len(ends) for _, _, ends in parts])   # document of each file
        self.tokens = sum(len(ids) for ids, _, _ in parts)
        self.chosen = None   # numbers of those that `keep` left; None: all
        lengths = [np.diff(ends, prepend=0).astype(np.int32) for _, _, ends in parts]
        self.lengths = np.concatenate(lengths)

    @classmethod
    def mapped(cls, folders: list[Path], names: list[str]) -> 'Documents':
        """Of the folders that `tokenise` wrote, one for each of the files `names`."""
        parts = []
        abouts = []
        for folder in folders:
            about = json.loads((folder / 'about.json').read_text(encoding='utf-8'))
            ids = np.memmap(folder / 'ids.bin', dtype=about['dtype'], mode='r')
            mask = np.memmap(folder / 'mask.bin', dtype=np.uint8, mode='r')
            ends = np.memmap(folder / 'ends.bin', dtype=np.int64, mode='r')
            if not len(ids) == len(mask) == ends[-1]:
                raise OSError(f'{folder}: its files are shorter than they were: remove the folder')
            parts.append((ids, mask, ends))
            abouts.append(about)

        documents = cls(parts, names, ' '.join(about['sha256'] for about in abouts))
        for name, about in zip(names, abouts):
            documents.turns += about['turns']
            documents.silent.update(about['silent'])
            if about['without_turn'] and not documents.without_turn:
                documents.without_turn = f'{name}, row {about["without_turn"]}'
        return documents

    @classmethod
    def of(cls, docs: list) -> 'Documents':
        """Of [(ids, mask), ...] in memory, sequences of equal length."""
        for i, (ids, mask) in enumerate(docs):
            if len(ids) != len(mask):
                raise ValueError(f'document {i} (from 0) has {len(ids)} tokens and a mask of '
                                 f'{len(mask)}')
        ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in docs])
        mask = np.concatenate([np.asarray(mask, dtype=np.uint8) for _, mask in docs])
        ends = np.cumsum([len(ids) for ids, _ in docs], dtype=np.int64)
        digest = hashlib.sha256(ids.tobytes() + mask.tobytes() + ends.tobytes())
        return cls([(ids, mask, ends)], [None], digest.hexdigest()[:32])

    def __len__(self) -> int:
        return len(self.lengths)

    def place(self, i: int) -> tuple[int, int]:
        """-> the number of the file that document i is from, and of its row there, both from 0"""
        if self.chosen is not None:
            i = int(self.chosen[i])
        file = int(np.searchsorted(self.first, i, side='right')) - 1
        return file, i - int(self.first[file])

    def where(self, i: int) -> str:
        """-> 'traces.jsonl, row 7', for messages"""
        file, row = self.place(i)
        if self.names[file] is None:
            return f'document {row} (from 0)'
        return f'{self.names[file]}, row {row + 1}'

    def __getitem__(self, i: int):
        if i >= len(self):
            raise IndexError(i)
        file, row = self.place(i)
        ids, mask, ends = self.parts[file]
        start = int(ends[row - 1]) if row else 0
        end = int(ends[row])
        return ids[start:end], mask[start:end]

    def learnt(self) -> np.ndarray:
        """-> [documents] int32, the tokens of each that are to be learnt: the first never is"""
        counts = []
        for _, mask, ends in self.parts:
            starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
            counts.append(np.add.reduceat(mask, starts, dtype=np.int32) - mask[starts])
        counts = np.concatenate(counts)
        return counts if self.chosen is None else counts[self.chosen]

    def select(self, chosen: np.ndarray):
        """Leaves only the documents that are True in chosen [documents]."""
        if chosen.all():
            return
        numbers = np.flatnonzero(chosen)
        self.chosen = numbers if self.chosen is None else self.chosen[numbers]
        self.lengths = self.lengths[chosen]
        self.tokens = int(self.lengths.sum())
        self.identity += ' ' + hashlib.sha256(self.chosen.tobytes()).hexdigest()[:16]


def tokenise(paths: list, tokenizer, workers=0, spare=None, quiet=False) -> Documents:
    """
    The Documents of JSONL files with "messages". workers: processes that tokenise (0: one a core);
    spare: folder for the token files where that of the data cannot be written to.
    ValueError with file and line for a row that is no chat or that the template refuses; OSError
    where the disk is full.
    """
    folders = token_folders(paths, tokenizer, workers, spare, quiet)
    return Documents.mapped(folders, [str(path) for path in paths])


def token_folders(paths: list, tokenizer, workers=0, spare=None, quiet=False) -> list[Path]:
    """The same, but -> the folders of the files, for Documents.mapped"""
    return [token_folder(Path(path), tokenizer, workers, spare, quiet) for path in paths]


def token_folder(path: Path, tokenizer, workers: int, spare, quiet: bool) -> Path:
    """-> the folder with the tokens of one file, written if it is not there"""
    key = key_of(path, tokenizer)      # first, so that a file that is not there leaves no folder
    home = home_of(path, spare)
    folder = home / key
    if (folder / 'about.json').exists():
        return folder
    with locked(home / 'lock'):
        if not (folder / 'about.json').exists():   # another process may have written it meanwhile
            temporary = folder.with_suffix('.tmp')
            shutil.rmtree(temporary, ignore_errors=True)   # of a process that was killed
            temporary.mkdir()
            try:
                write_tokens(path, tokenizer, temporary, workers, quiet)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            os.rename(temporary, folder)
    return folder


def home_of(path: Path, spare) -> Path:
    """The folder for the tokens of a file: beside it, or where that cannot be, in `spare`."""
    home = path.with_name(f'{path.name}.tokens')
    try:
        home.mkdir(exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    if spare is None or not path.parent.exists():
        return home
    home = Path(spare) / f'{path.name}.tokens'
    home.mkdir(parents=True, exist_ok=True)
    return home


def key_of(path: Path, tokenizer) -> str:
    """A hash of the rows in the file and of all that their tokens depend on."""
    digest = hashlib.sha256()
    for name in CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    digest.update(tokenizer.fingerprint().encode())
    for line in lines_of(path):
        digest.update(line)
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def locked(path: Path):
    """Waits until no other process on this machine is inside with the same file."""
    with open(path, 'ab') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_tokens(path: Path, tokenizer, folder: Path, workers: int, quiet: bool):
    """Tokenises the file into the folder, a few chunks at a time; about.json comes last."""
    small = path.stat().st_size < SMALL
    workers = 0 if small else workers or os.cpu_count() or 1
    pickled = folder / 'tokenizer.pickle'
    pickled.write_bytes(pickle.dumps(tokenizer))
    out = TokenFiles(folder, np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    size = sum(map(len, lines_of(path)))
    bar = Bar(f'tokenising {path.name}', size, 'B', show=not quiet)
    with out, bar, Pool(workers, SECONDS) as pool:
        for lines, part in encoded(path, pickled, out.dtype, workers, pool):
            if isinstance(part, Exception):
                raise part
            out.add(*part)
            bar.update(sum(map(len, lines)))
    if not out.about['documents']:
        raise ValueError(f'{path}: no rows in it')
    pickled.unlink()
    out.write_about()


def encoded(path: Path, pickled: Path, dtype: np.dtype, workers: int, pool: Pool):
    """Yields (lines, what encode_chunk makes of them or raises) of the chunks of a file, in order:
    by the processes of the pool, two chunks each at a time, or without workers by this one."""
    chunks = chunks_of(path)
    while some := list(itertools.islice(chunks, 2 * workers or 1)):
        calls = [(str(pickled), dtype.name, str(path), first, lines) for first, lines in some]
        if workers:
            parts = pool.map('data.tokens', 'encode_chunk', calls)
        else:
            parts = [encode_chunk(*call) for call in calls]
        for (_, lines), part in zip(some, parts):
            yield lines, part


class TokenFiles:
    """The files of a folder, while they are written."""
    NAMES = ('ids', 'mask', 'ends')

    def __init__(self, folder: Path, dtype):
        """dtype: of the ids"""
        self.folder = folder
        self.dtype = np.dtype(dtype)
        self.files = {name: open(folder / f'{name}.bin', 'wb') for name in self.NAMES}
        self.digests = {name: hashlib.sha256() for name in self.NAMES}
        self.silent = Counter()
        self.about = {'documents': 0, 'tokens': 0, 'dtype': self.dtype.name, 'turns': 0,
                      'without_turn': 0}

    def add(self, ids, mask, lengths, turns: int, silent: dict, without_turn: int):
        """Appends what encode_chunk returns."""
        ends = self.about['tokens'] + np.cumsum(lengths, dtype=np.int64)
        for name, array in (('ids', ids), ('mask', mask), ('ends', ends)):
            self.files[name].write(array.tobytes())
            self.digests[name].update(array.tobytes())
        self.about['documents'] += len(lengths)
        self.about['tokens'] += int(lengths.sum())
        self.about['turns'] += turns
        self.about['without_turn'] = self.about['without_turn'] or without_turn
        self.silent.update(silent)

    def write_about(self):
        self.about['silent'] = dict(self.silent)
        whole = b''.join(digest.digest() for digest in self.digests.values())
        self.about['sha256'] = hashlib.sha256(whole).hexdigest()[:32]
        with open(self.folder / 'about.json', 'w', encoding='utf-8') as file:
            file.write(json.dumps(self.about, indent=1))
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Closes the files; brings them to the disk where nothing went wrong."""
        for file in self.files.values():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()


def chunks_of(path: Path):
    """Yields (number of the first line, lines) of about CHUNK bytes each."""
    first = 1
    lines = []
    size = 0
    for number, line in enumerate(lines_of(path), 1):
        lines.append(line)
        size += len(line)
        if size >= CHUNK:
            yield first, lines
            first = number + 1
            lines = []
            size = 0
    if lines:
        yield first, lines


@functools.lru_cache(maxsize=1)
def tokenizer_from(pickled: str):
    return pickle.loads(Path(pickled).read_bytes())


def encode_chunk(pickled: str, dtype: str, name: str, first: int, lines: list[bytes]):
    """
    Lines of the file `name`, from its line `first` on -> ids [tokens] of `dtype`, mask [tokens]
    uint8, lengths [lines] int32, the assistant's turns, {why a turn carries no loss: turns}, the
    number of the first line without a turn (0: none).
    ValueError with file and line for a row that is none.
    """
    tokenizer = tokenizer_from(pickled)
    every_ids = []
    every_mask = []
    turns = 0
    silent = Counter()
    without_turn = 0
    for number, line in enumerate(lines, first):
        try:
            row = parse_row(line, ('messages',))
        except ValueError as error:
            raise ValueError(f'{name}:{number}: {error}') from error
        with at_row(name, number):
            ids, mask, reasons = tokenizer.document(row['messages'])
        every_ids.append(np.array(ids, dtype=dtype))
        every_mask.append(np.array(mask, dtype=np.uint8))
        turns += len(reasons)
        if not reasons and not without_turn:
            without_turn = number
        silent.update(reason for reason in reasons if reason is not None)
    lengths = np.array([len(ids) for ids in every_ids], dtype=np.int32)
    ids = np.concatenate(every_ids)
    mask = np.concatenate(every_mask)
    return ids, mask, lengths, turns, dict(silent), without_turn
