"""
Filters rows: verified, of a length, in a language, of a difficulty, not in an evaluation set, no
duplicates.

    python data/filter.py --data="['data/math/math.jsonl']" \\
        --against="['data/math/math500.jsonl']" --near=0.8 --out=out/math.jsonl
    python data/filter.py --data="['data/distill/traces.jsonl']" \\
        --verify=1 --languages="['en']" --out=out/sft.jsonl

Checks in this order; a row is dropped, and counted, at the first that fails:
    length        characters of prompt and response between min_chars and max_chars
    language      at least language_share of the words (rewards.language_reward) in one of
                  `languages`
    pass rate     "pass_rate", or the share of "samples" with accuracy 1, between min_pass and
                  max_pass: neither trivial nor hopeless
    contaminated  the question shares 8 consecutive words with a row of an evaluation set, or is
                  equal to one, normalised. Words are lower-cased and split at white space (each
                  Han, kana or hangul character is one); both counts are reported, each by itself,
                  and so are the questions too short to hold an 8-gram, which only the second can
                  find
    wrong         the response earns less than `verify` from rewards.accuracy_reward
    duplicates    exact: normalised text (Unicode form, case, most white space, $, quotes and final
                  punctuation aside) equal to an earlier row's; near: Jaccard similarity of word
                  3-grams with an earlier row at least `near`. No two kept rows are alike, and every
                  dropped one is like an earlier one, so the first of a family always stays
The text that duplicates are looked for in is prompt and response, or only the prompt with
by='prompt'. Near duplicates are proposed by MinHash (64 hashes, 16 bands of 4: a pair of similarity
0.8 is missed once in 5,000) and then compared exactly.

It reads once, row by row, and keeps what it must remember on disk beside `out` (the surviving rows,
17 keys of 12 bytes each, removed at the end). Memory: the evaluation sets, a 64th of the keys, one
byte a row, and the 3-grams of the largest family. The kept rows stay in their order and are written
with a manifest: sources and hashes, rows in and out, dropped by reason, contamination by evaluation
set.
"""
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from anywhere
from configurator import run

import numpy as np

from data import source
from graders.pool import Died, Pool
from progress import Bar
from rewards import accuracy_reward, check_row, language_reward


@dataclass
class Config:
    # files
    data: list[str] = field(default_factory=list)      # rows with "messages", or "prompt"
    against: list[str] = field(default_factory=list)   # evaluation sets, whose questions may not
                                                       # occur
    out: str = 'out/filtered.jsonl'   # the kept rows; the manifest lies beside it

    # what a row must be
    min_chars: int = 1                # fewest characters of prompt and response
    max_chars: int = 0                # most of them; 0: no limit
    languages: list[str] = field(default_factory=list)   # allowed languages, e.g. ['en', 'zh'];
                                                         # none: all
    language_share: float = 0.8       # least share of words in one of them
    min_pass: float = 0.0             # least share of samples that were right
    max_pass: float = 1.0             # largest share of them
    verify: float = 0.0               # least accuracy reward of the response; 0: responses are
                                      # not graded
    workers: int = 0                  # processes that grade; 0: this one
    ngram: int = 8                    # words that may not be shared with an evaluation set

    # duplicates
    exact: bool = True                # drop exact ones
    near: float = 0.0                 # drop near ones from this similarity, e.g. 0.8; 0: keep them
    by: Literal['row', 'prompt'] = 'row'   # text that they are looked for in

    def __post_init__(self):
        if not self.data:
            raise ValueError('no data: give files, --data="[\'rows.jsonl\']"')
        if not 0 <= self.near <= 1 or 0 < self.near < 0.5:
            raise ValueError(f'near={self.near} must be 0 (off) or lie in 0.5 to 1: below, MinHash '
                             'proposes too many pairs')
        if self.ngram < 1 or not 0 <= self.min_pass <= self.max_pass <= 1:
            raise ValueError(f'ngram={self.ngram} must be positive, and 0 <= min_pass='
                             f'{self.min_pass} <= max_pass={self.max_pass} <= 1')


# ---- Text ----

EACH_A_WORD = re.compile(r'([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3])')   # Han, kana, hangul

RAISED = re.compile('[⁰¹²³⁴-⁹]+|[₀-₉]+|[¼-¾⅐-⅞]')
MARKS = {'<super>': '↑', '<sub>': '↓', '<fraction>': ' '}   # put before what RAISED finds
QUOTES = re.compile(r'["$\'`“”‘’]+')
# A space stays between two letters, and between two digits (1 1/2 is not 11/2) but for TeX's x_1 2
LOOSE_SPACE = re.compile(r' (?!(?<=\d )(?<![_^]\d )\d|(?<=[^\W\d_] )[^\W\d_])')


def texts_of(row: dict) -> tuple[str, str]:
    """-> (question, response). The question is row["question"], or else the last user message; the
    response may be ''."""
    has_messages = row.get('messages', row.get('conversations')) is not None
    key = 'messages' if has_messages else 'prompt'
    chat = source.chat_of(row, key)
    user = [m['content'] for m in chat if m['role'] == 'user']
    if not user:
        raise ValueError(f'no user message in {key!r}')
    question = row.get('question', user[-1])
    if not isinstance(question, str):
        raise ValueError('"question" must be a string')
    response = chat[-1]['content'] if chat[-1]['role'] == 'assistant' else ''
    return question, response


def normalised(text: str) -> str:
    """One spelling of what is one text."""
    def marked(m):
        kind = unicodedata.decomposition(m[0][0]).split()[0]
        return MARKS[kind] + m[0]
    text = RAISED.sub(marked, text)
    text = unicodedata.normalize('NFKC', text).casefold()
    text = QUOTES.sub('', text)
    text = re.sub(r'\s+', ' ', text)
    return LOOSE_SPACE.sub('', text).rstrip('.?:;,')


def word_hashes(text: str) -> np.ndarray:
    """[words] uint64, a hash of each lower-cased word"""
    text = text.lower()
    if not text.isascii():
        text = EACH_A_WORD.sub(r' \1 ', text)
    return np.array([zlib.crc32(word.encode()) for word in text.split()], dtype=np.uint64)


def odd_numbers(seed: int, size) -> np.ndarray:
    """Random odd uint64, to multiply hashes with"""
    drawn = np.random.default_rng(seed).integers(1, 2**63, size=size, dtype=np.uint64)
    return drawn * np.uint64(2) + np.uint64(1)


MIX = odd_numbers(0, 64)


def grams(words: np.ndarray, n: int) -> np.ndarray:
    """[words - n + 1] uint64, a hash of each n consecutive words; fewer than n words: none"""
    count = max(0, len(words) - n + 1)
    total = np.zeros(count, dtype=np.uint64)
    if count == 0:
        return total
    for i in range(n):
        total = (total ^ words[i:i + count]) * MIX[i % 8]
        total ^= total >> np.uint64(29)
    return total


# ---- Contamination ----

class Evaluation:
    """The questions of the evaluation files: n-grams and normalised texts, each with the files it
    occurs in, as bits of a number."""

    def __init__(self, paths: list[str], n: int):
        if len(paths) > 63:
            raise ValueError(f'{len(paths)} evaluation files: give at most 63')
        self.paths = paths
        self.n = n
        self.texts = {}              # normalised question -> files
        self.rows = Counter()        # path -> rows of the file
        self.too_short = Counter()   # path -> those too short for an n-gram

        # Of the data: by each test, 'ngram' or 'exact', rows found in a file, and in any
        self.hits = {'ngram': Counter(), 'exact': Counter()}
        self.rows_hit = Counter()
        self.data_too_short = 0

        # The n-grams of all files, sorted, and the files of each
        found = [np.zeros(0, dtype=np.uint64)]
        files = [np.zeros(0, dtype=np.int64)]
        for number, path in enumerate(paths):
            for question in self.questions(path):
                some = np.unique(grams(word_hashes(question), n))
                found.append(some)
                files.append(np.full(len(some), 1 << number, dtype=np.int64))
                key = normalised(question)
                self.texts[key] = self.texts.get(key, 0) | 1 << number
                self.rows[path] += 1
                if not len(some):
                    self.too_short[path] += 1
            if not self.rows[path]:
                raise ValueError(f'{path}: no rows in it')
        self.grams, where = np.unique(np.concatenate(found), return_inverse=True)
        self.files = np.zeros(len(self.grams), dtype=np.int64)
        np.bitwise_or.at(self.files, where, np.concatenate(files))

    def questions(self, path: str):
        for where, row in source.read([(path, path)]):
            try:
                question, _ = texts_of(row)
            except ValueError as error:
                raise ValueError(f'{where}: {error}') from error
            yield question

    def contaminated(self, question: str) -> bool:
        """Whether the question is in an evaluation set by either test; counts both, by file."""
        if not self.paths:
            return False
        mine = grams(word_hashes(question), self.n)
        if not len(mine):
            self.data_too_short += 1
        files = {
            'ngram': self.files_with(mine),
            'exact': self.texts.get(normalised(question), 0),
        }
        for test, bits in files.items():
            if bits:
                self.rows_hit[test] += 1
            for number, path in enumerate(self.paths):
                self.hits[test][path] += bits >> number & 1
        return any(files.values())

    def files_with(self, mine: np.ndarray) -> int:
        """The files that share an n-gram with these."""
        if not len(self.grams):
            return 0
        at = np.searchsorted(self.grams, mine)
        at[at == len(self.grams)] = 0
        same = at[self.grams[at] == mine]
        return int(np.bitwise_or.reduce(self.files[same]))

    def report(self) -> dict:
        by_ngram, by_exact = self.hits['ngram'], self.hits['exact']
        sets = {path: {'rows': self.rows[path],
                       'too_short': self.too_short[path],
                       'hits_by_ngram': by_ngram[path],
                       'hits_by_exact_match': by_exact[path]} for path in self.paths}
        return {'rows_by_ngram': self.rows_hit['ngram'],
                'rows_by_exact_match': self.rows_hit['exact'],
                'ngram': self.n,
                'rows_too_short': self.data_too_short,
                'evaluation_sets': sets}


# ---- Duplicates ----

BANDS = 16     # MinHash: bands, each of so many
ROWS = 4       # hashes
PARTS = 64     # files that the keys are spread over
BLOCK = 4096   # rows, or hashes, at a time
KEY = np.dtype([('hash', 'u8'), ('row', 'u4')])
SLOPE, SHIFT = odd_numbers(1, (2, BANDS * ROWS))


def shingles(text: str) -> np.ndarray:
    """Sorted different hashes of the text's word 3-grams; of a shorter text, of its words."""
    words = word_hashes(text)
    return np.unique(grams(words, min(3, max(1, len(words)))))


def bands_of(shingle: np.ndarray) -> np.ndarray:
    """[BANDS] uint64: texts of similarity s share a given one with probability s^ROWS."""
    least = np.full(BANDS * ROWS, 2**32 - 1, dtype=np.uint64)
    for i in range(0, len(shingle), BLOCK):
        hashed = (shingle[i:i + BLOCK, None] >> np.uint64(20)) * SLOPE + SHIFT
        least = np.minimum(least, (hashed >> np.uint64(32)).min(axis=0))
    total = np.arange(BANDS, dtype=np.uint64)
    for column in least.reshape(BANDS, ROWS).T:
        total = (total ^ column) * MIX[8]
        total ^= total >> np.uint64(31)
    return total


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets"""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def alike(sets: list[np.ndarray], near: float) -> list[bool]:
    """
    For each sorted set whether its similarity with an earlier one, which is like none before it, is
    at least `near`.

    Sets a, b with |a| <= |b| that are share near |b| hashes at least, and 2 near / (1 + near) |a|;
    so one of the rarest of each, all but so many and one more. The sets of a template need not all
    be compared then, as what they share is not rare.
    """
    every, counts = np.unique(np.concatenate([*sets, np.zeros(0, np.uint64)]), return_counts=True)
    as_smaller = defaultdict(list)   # hash -> sets that have it among their rarest, where they are
    as_larger = defaultdict(list)    # the smaller of two, or the larger
    found = []
    for i, mine in enumerate(sets):
        by_rarity = mine[np.argsort(counts[np.searchsorted(every, mine)], kind='stable')]
        few = rarest(by_rarity, 2 * near / (1 + near))
        many = rarest(by_rarity, near)
        others = set()
        for x in many:
            others.update(as_smaller.get(x, ()))
        for x in few:
            others.update(as_larger.get(x, ()))

        found.append(any(similarity(mine, sets[j]) >= near for j in others))
        if not found[-1]:
            for x in few:
                as_smaller[x].append(i)
            for x in many:
                as_larger[x].append(i)
    return found


def rarest(by_rarity: np.ndarray, share: float) -> list[int]:
    """Of a set sorted by rarity, all but `share` of it and one more."""
    shared = math.ceil(share * len(by_rarity) - 1e-9)
    return by_rarity[:len(by_rarity) - shared + 1].tolist()


class Survivors:
    """Rows kept so far, on disk: their lines, where each begins, and the keys that duplicates
    share, in PARTS files by hash."""

    def __init__(self, folder: str, near: bool, by: str):
        self.folder = Path(folder)
        self.near = near
        self.by = by
        self.count = 0
        self.end = 0   # of the lines, in bytes
        self.lines = open(self.folder / 'lines', 'wb+')
        self.starts = open(self.folder / 'starts', 'wb+')
        self.files = {}   # 'exact', 'near' -> PARTS files with keys
        self.block = {}   # and hashes of rows that are not yet in them
        for kind in ('exact', 'near') if near else ('exact',):
            names = [self.folder / f'{kind}.{part}' for part in range(PARTS)]
            self.files[kind] = [open(name, 'wb') for name in names]
            self.block[kind] = []

    def texts(self, row: dict) -> tuple[str, ...]:
        """What duplicates are looked for in."""
        question, response = texts_of(row)
        return (question,) if self.by == 'prompt' else (question, response)

    def add(self, row: dict):
        texts = self.texts(row)
        line = json.dumps(row, ensure_ascii=False).encode() + b'\n'
        self.lines.write(line)
        self.starts.write(self.end.to_bytes(8, 'little'))
        whole = '\n'.join(map(normalised, texts)).encode()
        digest = hashlib.blake2b(whole, digest_size=8).digest()
        self.block['exact'].append(np.frombuffer(digest, dtype=np.uint64))
        if self.near:
            self.block['near'].append(bands_of(shingles(' '.join(texts))))
        self.end += len(line)
        self.count += 1
        if len(self.block['exact']) == BLOCK:
            self.flush()

    def flush(self):
        """Brings the block to the files of keys."""
        for kind, rows in self.block.items():
            if not rows:
                continue
            hashes = np.stack(rows)
            numbers = np.arange(self.count - len(rows), self.count)
            keys = np.empty(hashes.size, dtype=KEY)
            keys['hash'] = hashes.ravel()
            keys['row'] = np.repeat(numbers, hashes.shape[1])
            part_of = keys['hash'] % np.uint64(PARTS)
            for part, file in enumerate(self.files[kind]):
                file.write(keys[part_of == part].tobytes())
            rows.clear()

    def groups(self, kind: str, part: int, gone: np.ndarray):
        """Yields the rows (ascending) that share a key, of those not gone."""
        keys = np.fromfile(self.folder / f'{kind}.{part}', dtype=KEY)
        keys = keys[gone[keys['row']] == 0]
        keys = keys[np.argsort(keys['hash'], kind='stable')]
        edges = np.flatnonzero(keys['hash'][1:] != keys['hash'][:-1]) + 1
        starts = np.concatenate([[0], edges])
        ends = np.concatenate([edges, [len(keys)]])
        for i in np.flatnonzero(ends - starts > 1):
            yield keys['row'][starts[i]:ends[i]]

    def row(self, number: int) -> dict:
        start = int.from_bytes(os.pread(self.starts.fileno(), 8, 8 * number), 'little')
        self.lines.seek(start)
        return json.loads(self.lines.readline())

    def duplicates(self, exact: bool, near: float) -> np.ndarray:
        """[count] uint8: 1 for an exact duplicate of an earlier row, 2 for a near one. The first of
        a group is never dropped."""
        self.flush()
        self.close_keys()
        self.starts.flush()
        gone = np.zeros(self.count, dtype=np.uint8)
        if exact and self.count:
            for part in range(PARTS):
                for rows in self.groups('exact', part, gone):
                    gone[rows[1:]] = 1
        if near and self.count:
            with Bar('comparing', PARTS, 'parts') as bar:
                for part in range(PARTS):
                    for rows in self.groups('near', part, gone):
                        rows = rows[gone[rows] == 0]
                        texts = [' '.join(self.texts(self.row(number))) for number in rows.tolist()]
                        gone[rows[alike([shingles(text) for text in texts], near)]] = 2
                    bar.update()
        return gone

    def write(self, path: Path, gone: np.ndarray):
        self.lines.seek(0)
        temp = path.with_name(path.name + '.tmp')
        with open(temp, 'wb') as f:
            f.writelines(line for line, g in zip(self.lines, gone) if not g)
        os.replace(temp, path)

    def close_keys(self):
        for files in self.files.values():
            for f in files:
                f.close()

    def close(self):
        self.lines.close()
        self.starts.close()
        self.close_keys()


# ---- Rows ----

def pass_rate(row: dict) -> float:
    if isinstance(row.get('pass_rate'), (int, float)):
        return float(row['pass_rate'])
    samples = row.get('samples')
    graded = isinstance(samples, list) and samples and all(map(has_accuracy, samples))
    if not graded:
        raise ValueError('a pass-rate band needs rows with "pass_rate", or with "samples" with '
                         'rewards.accuracy, as evaluate.py writes them')
    return sum(s['rewards']['accuracy'] >= 1 for s in samples) / len(samples)


def has_accuracy(sample) -> bool:
    return isinstance(sample, dict) and 'accuracy' in sample.get('rewards', ())


def in_language(text: str, languages: list[str], share: float) -> bool:
    """Whether at least `share` of the words is in one of the languages; a text without words is in
    every language."""
    text = re.sub(r'</?(?:think|answer)>', ' ', text)
    if not re.search(r'[^\W\d_]{2}', text):
        return True
    response = f'<think>{text}</think>'
    return any(language_reward(response, {'language': name}) >= share for name in languages)


def reason_to_drop(cfg: Config, row: dict, question: str, response: str,
                   evaluation: Evaluation) -> str | None:
    size = len(question) + len(response)
    if size < cfg.min_chars:
        return 'too short'
    if cfg.max_chars and size > cfg.max_chars:
        return 'too long'
    if cfg.languages and not in_language(response or question, cfg.languages, cfg.language_share):
        return 'another language'
    has_band = cfg.min_pass > 0 or cfg.max_pass < 1
    if has_band and not cfg.min_pass <= pass_rate(row) <= cfg.max_pass:
        return 'pass rate outside the band'
    if evaluation.contaminated(question):
        return 'contaminated'
    return None


def graded(cfg: Config, samples: list, pool: Pool) -> list[str | None]:
    """[(where, row, response)] -> for each a reason to drop it, or None. ValueError names a row
    that cannot be graded at all."""
    for where, row, response in samples:
        if not response:
            raise ValueError(f'{where}: nothing to verify: no assistant message at the end')
        try:
            check_row(row, {'accuracy': 1.0})
        except ValueError as error:
            raise ValueError(f'{where}: cannot be verified: {error}') from error

    asked = [(response, row) for _, row, response in samples]
    if cfg.workers:
        values = pool.map('rewards', 'accuracy_reward', asked)
    else:
        values = [accuracy_or_error(*sample) for sample in asked]

    reasons = []
    for (where, _, _), value in zip(samples, values):
        if isinstance(value, (KeyError, ValueError)):
            what = value.args[0] if value.args else value
            raise ValueError(f'{where}: cannot be verified: {what} (the row needs "task" and what '
                             'its reward reads)')
        if isinstance(value, (TimeoutError, Died)):
            reasons.append('grading took too long or died')
        elif isinstance(value, Exception):
            raise value
        else:
            reasons.append('wrong' if value < cfg.verify else None)
    return reasons


def accuracy_or_error(response: str, row: dict):
    try:
        return accuracy_reward(response, row)
    except (KeyError, ValueError) as error:
        return error


def passing(cfg: Config, evaluation: Evaluation, pool: Pool, dropped: Counter):
    """Yields the rows that pass the checks of single rows; counts all, and those that do not."""
    for batch in batches_of(cfg, evaluation, dropped):
        reasons = graded(cfg, batch, pool) if cfg.verify else [None] * len(batch)
        for (_, row, _), reason in zip(batch, reasons):
            if reason:
                dropped[reason] += 1
            else:
                yield row


def batches_of(cfg: Config, evaluation: Evaluation, dropped: Counter):
    """Yields lists of (where, row, response), 256 at a time, of the rows that pass all checks but
    the verification."""
    batch = []
    for where, row in source.read([(path, path) for path in cfg.data]):
        dropped['rows in'] += 1
        try:
            question, response = texts_of(row)
            reason = reason_to_drop(cfg, row, question, response, evaluation)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error
        if reason:
            dropped[reason] += 1
        else:
            batch.append((where, row, response))
        if len(batch) == 256:
            yield batch
            batch = []
    yield batch


# ---- The whole ----

def main(cfg: Config) -> dict:
    start = time.perf_counter()
    out = Path(cfg.out)
    for path in (*cfg.data, *cfg.against):
        if Path(path).resolve() == out.resolve():
            raise ValueError(f'{out} would be overwritten: choose another out')
    evaluation = Evaluation(cfg.against, cfg.ngram)
    out.parent.mkdir(parents=True, exist_ok=True)

    dropped = Counter()
    workers = Pool(cfg.workers if cfg.verify else 0, 120.0)   # seconds a row
    with tempfile.TemporaryDirectory(prefix='.filter-', dir=out.parent) as folder, workers as pool:
        survivors = Survivors(folder, cfg.near > 0, cfg.by)
        try:
            for row in passing(cfg, evaluation, pool, dropped):
                survivors.add(row)
            gone = survivors.duplicates(cfg.exact, cfg.near)
            survivors.write(out, gone)
        finally:
            survivors.close()
    for reason, number in (('exact duplicate', 1), ('near duplicate', 2)):
        if n := int((gone == number).sum()):
            dropped[reason] = n

    rows_in = dropped.pop('rows in', 0)
    if not rows_in:
        raise ValueError(f'{", ".join(cfg.data)}: no rows in it')
    origin = [manifest_of(path) for path in cfg.data]
    manifest = {
        'source': ', '.join(cfg.data),
        'licence': ', '.join(sorted({m['licence'] for m in origin})),
        'read': {path: source.sha256(path) for path in cfg.data},
        'sha256': source.sha256(out),
        'rows_in': rows_in,
        'rows_out': int((gone == 0).sum()),
        'dropped': dict(dropped),
        'contamination': evaluation.report(),
        'settings': asdict(cfg),
        'from': origin,
    }
    source.write_json(source.manifest_path(out), manifest)
    tell(out, manifest, seconds=time.perf_counter() - start)
    return manifest


def manifest_of(path: str) -> dict:
    """The manifest beside a file; without one its licence is unknown."""
    beside = source.manifest_path(path)
    if not beside.exists():
        return {'licence': 'unknown'}
    return json.loads(beside.read_text(encoding='utf-8'))


def tell(out: Path, manifest: dict, seconds: float):
    """Prints what became of the rows, and the first that was kept."""
    rows_in, kept = manifest['rows_in'], manifest['rows_out']
    reasons = ''.join(f'; {n} dropped: {reason}' for reason, n in manifest['dropped'].items())
    print(f'{out}: {kept} of {rows_in} rows{reasons}')
    found = manifest['contamination']
    if found['evaluation_sets']:
        n = found['ngram']
        print(f'contamination: {found["rows_by_ngram"]} rows by {n}-grams, '
              f'{found["rows_by_exact_match"]} by exact match; {found["rows_too_short"]} too short '
              f'for an {n}-gram')
    for path, of_set in found['evaluation_sets'].items():
        print(f'  {path}: {of_set["hits_by_ngram"]} and {of_set["hits_by_exact_match"]}; '
              f'{of_set["too_short"]} of its {of_set["rows"]} rows too short')
    print(f'{seconds:.1f} s, {rows_in / seconds:,.0f} rows/s')
    if kept:
        with open(out, encoding='utf-8') as f:
            print(f'row 1: {f.readline(1000).rstrip()}')


if __name__ == '__main__':
    # RuntimeError: programs cannot be contained here
    run(main, Config, (ValueError, OSError, RuntimeError))
