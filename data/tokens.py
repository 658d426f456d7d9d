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
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.source import at_row, lines_of, parse_row
from graders.pool import Pool

CODE = ('tokens.py', 'tokenizer.py', 'source.py')   # beside this file: they decide on the tokens
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
        self.parts, self.names, self.identity = parts, names, identity
        self.turns, self.silent, self.without_turn = 0, Counter(), ''
        self.first = np.cumsum([0] + [len(ends) for _, _, ends in parts])   # document of each file
        self.tokens = sum(len(ids) for ids, _, _ in parts)
        self.chosen = None   # numbers of those that `keep` left; None: all
        lengths = [np.diff(ends, prepend=0).astype(np.int32) for _, _, ends in parts]
        self.lengths = np.concatenate(lengths)

    @classmethod
    def mapped(cls, folders: list[Path], names: list[str]) -> 'Documents':
        """Of the folders that `tokenise` wrote, one for each of the files `names`."""
        parts, abouts = [], []
        for folder in folders:
            about = json.loads((folder / 'about.json').read_text(encoding='utf-8'))
            abouts.append(about)
            kinds = (('ids', about['dtype']), ('mask', np.uint8), ('ends', np.int64))
            parts.append([np.memmap(folder / f'{name}.bin', dtype=dtype, mode='r')
                          for name, dtype in kinds])
            ids, mask, ends = parts[-1]
            if not len(ids) == len(mask) == ends[-1]:
                raise OSError(f'{folder}: its files are shorter than they were: remove the folder')
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

    def __len__(self):
        return len(self.lengths)

    def place(self, i: int) -> tuple[int, int]:
        """-> the number of the file that document i is from, and of its row there, both from 0"""
        i = i if self.chosen is None else int(self.chosen[i])
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
        span = slice(int(ends[row - 1]) if row else 0, int(ends[row]))
        return ids[span], mask[span]

    def learnt(self) -> np.ndarray:
        """-> [documents] int32, the tokens of each that are to be learnt: the first never is"""
        counts = []
        for _, mask, ends in self.parts:
            starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
            counts.append(np.add.reduceat(mask, starts, dtype=np.int32) - mask[starts])
        counts = np.concatenate(counts)
        return counts if self.chosen is None else counts[self.chosen]

    def keep(self, chosen: np.ndarray):
        """Leaves only the documents that are True in chosen [documents]."""
        if not chosen.all():
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
    home = home_of(path, spare)
    folder = home / key_of(path, tokenizer)
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
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    about = {'documents': 0, 'tokens': 0, 'dtype': dtype.name, 'turns': 0, 'without_turn': 0}
    digests = {name: hashlib.sha256() for name in ('ids', 'mask', 'ends')}
    silent, small = Counter(), path.stat().st_size < SMALL
    workers = 0 if small else workers or os.cpu_count() or 1
    (folder / 'tokenizer.pickle').write_bytes(pickle.dumps(tokenizer))
    chunks = chunks_of(path)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f'{name}.bin', 'wb'))
                 for name in ('ids', 'mask', 'ends')}
        pool = stack.enter_context(Pool(workers, SECONDS)) if workers else None
        bar = stack.enter_context(tqdm(desc=f'tokenising {path.name}', unit='B', unit_scale=True,
                                       disable=quiet or small))
        while some := [chunk for _, chunk in zip(range(2 * workers or 1), chunks)]:
            calls = [(str(folder / 'tokenizer.pickle'), dtype.name, str(path), *chunk)
                     for chunk in some]
            if pool:
                done = pool.map('data.tokens', 'encode_chunk', calls)
            else:
                done = [encode_chunk(*call) for call in calls]
            for (_, lines), part in zip(some, done):
                if isinstance(part, Exception):
                    raise part
                ids, mask, lengths, turns, reasons, without = part
                ends = about['tokens'] + np.cumsum(lengths, dtype=np.int64)
                for name, array in (('ids', ids), ('mask', mask), ('ends', ends)):
                    files[name].write(array.tobytes())
                    digests[name].update(array.tobytes())
                about['documents'] += len(lengths)
                about['tokens'] += int(lengths.sum())
                about['turns'] += turns
                about['without_turn'] = about['without_turn'] or without
                silent.update(reasons)
                bar.update(sum(map(len, lines)))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if not about['documents']:
        raise ValueError(f'{path}: no rows in it')
    (folder / 'tokenizer.pickle').unlink()
    about['silent'] = dict(silent)
    whole = b''.join(digest.digest() for digest in digests.values())
    about['sha256'] = hashlib.sha256(whole).hexdigest()[:32]
    with open(folder / 'about.json', 'w', encoding='utf-8') as file:
        file.write(json.dumps(about, indent=1))
        file.flush()
        os.fsync(file.fileno())


def chunks_of(path: Path):
    """Yields (number of the first line, lines) of about CHUNK bytes each."""
    first, lines, size = 1, [], 0
    for number, line in enumerate(lines_of(path), 1):
        lines.append(line)
        size += len(line)
        if size >= CHUNK:
            yield first, lines
            first, lines, size = number + 1, [], 0
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
    every_ids, every_mask, lengths, silent = [], [], [], Counter()
    turns = without = 0
    for number, line in enumerate(lines, first):
        try:
            row = parse_row(line, ('messages',))
        except ValueError as error:
            raise ValueError(f'{name}:{number}: {error}') from error
        with at_row(name, number):
            ids, mask, reasons = tokenizer.document(row['messages'])
        every_ids.append(np.array(ids, dtype=dtype))
        every_mask.append(np.array(mask, dtype=np.uint8))
        lengths.append(len(ids))
        turns += len(reasons)
        if not reasons:
            without = without or number
        silent.update(reason for reason in reasons if reason is not None)
    ids, mask = np.concatenate(every_ids), np.concatenate(every_mask)
    return ids, mask, np.array(lengths, dtype=np.int32), turns, dict(silent), without
