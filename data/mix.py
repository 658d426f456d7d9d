"""
Mixes files of rows: so many of each, or by weight, in one shuffled file with a manifest that says
where every row is from.

    python data/mix.py config/mix.py

with in config/mix.py
    rows = 10000
    sources = {'math':  {'path': 'out/math.jsonl', 'weight': 0.7},
               'gsm8k': {'path': 'data/gsm8k/train.jsonl', 'weight': 0.3, 'licence': 'MIT'},
               'toy':   {'path': 'out/r1/data/rl.jsonl', 'count': 200, 'licence': 'MIT'}}
    out = 'out/mix.jsonl'

A source gives `count` rows, or its share by weight of what the counts leave of `rows` (largest
remainders; without `rows`, as many as the smallest source in proportion allows), or without either
all it has. Rows are drawn without replacement; a source that has too few is refused, unless it says
'repeat': True: then it is drawn whole as often as it takes and the rest from one more round.
'licence' is needed where no manifest lies beside the file.

Which rows, and their order, is a function of seed, the sources' names and their line numbers:
another source does not change the draw of this one. Lines are copied as they are, with "source"
added where the row has none. The files are read twice; memory holds 16 bytes a drawn row. The
manifest beside `out`: for each source path, licence, hash, rows there, drawn and not drawn, and the
manifest of its file, with the rows dropped before and why.
"""
import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from anywhere
from configurator import run

import numpy as np

from data import source
from progress import Bar
from rewards import check_answer

ROWS = ('messages', 'prompt', 'conversations')   # a row has one of these
KEYS = {'path': str, 'weight': (int, float), 'count': int, 'licence': str, 'repeat': bool}


@dataclass
class Config:
    sources: dict = field(default_factory=dict)   # name -> {'path', 'weight' or 'count',
                                                  # 'licence', 'repeat'}
    rows: int = 0                # rows in all; 0: as many as the weights allow
    out: str = 'out/mix.jsonl'   # the mixed rows; the manifest lies beside it
    seed: int = 1                # of the draw and the order


def check(cfg: Config):
    """ValueError unless every source is {'path': ..., ...} as in KEYS."""
    if not cfg.sources:
        raise ValueError("no sources: give {'name': {'path': ..., 'weight': ...}, ...}")
    for name, spec in cfg.sources.items():
        if not isinstance(spec, dict) or 'path' not in spec:
            raise ValueError(f"source {name!r} must be {{'path': ..., ...}}, not {spec!r}")
        for key, value in spec.items():
            if not fits(key, value):
                raise ValueError(f'source {name!r}: {key}={value!r}; known are path (text), weight '
                                 '(number), count (whole number), licence (text) and repeat (True '
                                 'or False)')
        twice = 'weight' in spec and 'count' in spec
        if twice or spec.get('weight', 1) <= 0 or spec.get('count', 1) <= 0:
            raise ValueError(f'source {name!r}: give a weight or a count, and a positive one')
        if Path(spec['path']).resolve() == Path(cfg.out).resolve():
            raise ValueError(f'{cfg.out} would be overwritten: choose another out')


def fits(key: str, value) -> bool:
    if key not in KEYS or not isinstance(value, KEYS[key]):
        return False
    return isinstance(value, bool) == (key == 'repeat')   # for Python, True is a number too


def quotas(cfg: Config, have: dict[str, int]) -> dict[str, int]:
    """Rows of each source. have: rows that each one has."""
    want = {}
    weights = {}
    for name, spec in cfg.sources.items():
        if 'weight' in spec:
            weights[name] = spec['weight']
        else:
            want[name] = spec.get('count', have[name])
    counted = sum(want.values())
    if weights:
        want |= by_weight(weights, left_by(counted, cfg.rows, weights, have))
    elif cfg.rows and cfg.rows != counted:
        raise ValueError(f'rows={cfg.rows}, but the counts make {counted} and no source has a '
                         'weight')
    for name, count in want.items():
        if count > have[name] and not cfg.sources[name].get('repeat'):
            raise ValueError(f'source {name!r}: {count} rows wanted, {cfg.sources[name]["path"]} '
                             f"has {have[name]}; ask for fewer, or allow 'repeat': True")
    return {name: want[name] for name in cfg.sources}


def left_by(counted: int, rows: int, weights: dict[str, float], have: dict[str, int]) -> int:
    """How many rows the sources with a weight share."""
    if rows:
        left = rows - counted
    else:
        total = sum(weights.values())
        left = int(min(have[name] * total / weight for name, weight in weights.items()) + 1e-9)
    if left <= 0:
        raise ValueError(f'rows={rows}: the sources with a count alone have {counted}')
    return left


def by_weight(weights: dict[str, float], rows: int) -> dict[str, int]:
    """Shares of `rows` in proportion to the weights: whole parts, then one more each for those of
    the largest remainders."""
    total = sum(weights.values())
    exact = {name: rows * weight / total for name, weight in weights.items()}
    share = {name: int(x) for name, x in exact.items()}
    by_remainder = sorted(weights, key=lambda name: (share[name] - exact[name], name))
    for name in by_remainder[:rows - sum(share.values())]:
        share[name] += 1
    return share


def scan(name: str, path: str) -> tuple[np.ndarray, str]:
    """Checks every row -> (byte at which each line begins [rows] int64, hash of the file)"""
    starts = []
    at = 0
    digest = hashlib.sha256()
    with open(path, 'rb') as f, Bar(f'checking {path}', os.path.getsize(path), 'B') as bar:
        for number, line in enumerate(f, 1):
            try:
                check_row(line, first=number == 1, name=name)
            except ValueError as error:
                raise ValueError(f'{path}:{number}: {error}') from error
            starts.append(at)
            at += len(line)
            digest.update(line)
            bar.update(len(line))
    if not starts:
        raise ValueError(f'{path}: no rows in it')
    return np.array(starts, dtype=np.int64), digest.hexdigest()


def check_row(line: bytes, first: bool, name: str):
    try:
        row = row_of(line, first)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'no JSON: {error}') from None
    if not isinstance(row, dict) or all(row.get(key) is None for key in ROWS):
        raise ValueError(f'a row of {name!r} needs {" or ".join(ROWS)}')
    check_answer(row)


def row_of(line: bytes, first: bool):
    """The row on a line of a file; its first may begin with a byte order mark."""
    return source.from_json(line.decode('utf-8-sig' if first else 'utf-8'))


def generator(cfg: Config, *of) -> np.random.Generator:
    digest = hashlib.sha256(repr((cfg.seed, *of)).encode()).digest()
    return np.random.default_rng(list(digest))


def origin_of(name: str, spec: dict, digest: str) -> dict | None:
    """The manifest beside a source's file, or None; ValueError where it is of another file, or
    where nothing says the licence."""
    beside = source.manifest_path(spec['path'])
    if not beside.exists():
        if spec.get('licence') is None:
            raise ValueError(f"source {name!r}: no {beside.name} beside the file, so give its "
                             "'licence'")
        return None
    origin = json.loads(beside.read_text(encoding='utf-8'))
    if origin.get('sha256', digest) != digest:
        raise ValueError(f'{spec["path"]} is not the file that {beside.name} beside it describes: '
                         'prepare it again')
    return origin


def draw(cfg: Config, want: dict[str, int], starts: dict[str, np.ndarray]) -> np.ndarray:
    """[rows, 2]: number of the source, and byte at which the line begins there, of every row of the
    mix in its order"""
    parts = []
    for number, name in enumerate(cfg.sources):
        rounds, rest = divmod(want[name], len(starts[name]))
        shuffled = generator(cfg, name).permutation(len(starts[name]))
        drawn = np.concatenate([np.tile(starts[name], rounds), starts[name][shuffled[:rest]]])
        parts.append(np.stack([np.full(len(drawn), number), drawn], axis=1))
    rows = np.concatenate(parts)
    return rows[generator(cfg).permutation(len(rows))]


def write(cfg: Config, rows: np.ndarray) -> Counter:
    """Writes the rows to cfg.out -> how many are of each source"""
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(out.name + '.tmp')
    names = list(cfg.sources)
    drawn = Counter()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(spec['path'], 'rb')) for spec in cfg.sources.values()]
        f = stack.enter_context(open(temp, 'w', encoding='utf-8'))
        bar = stack.enter_context(Bar(f'writing {out}', len(rows)))
        for number, start in rows.tolist():
            files[number].seek(start)
            row = row_of(files[number].readline(), first=start == 0)
            row = {'source': names[number], **row}
            f.write(json.dumps(row, ensure_ascii=False) + '\n')
            drawn[names[number]] += 1
            bar.update()
    os.replace(temp, out)
    return drawn


def main(cfg: Config) -> dict:
    check(cfg)
    starts = {}
    digests = {}
    for name, spec in cfg.sources.items():
        starts[name], digests[name] = scan(name, spec['path'])
    want = quotas(cfg, {name: len(lines) for name, lines in starts.items()})
    origins = {name: origin_of(name, spec, digests[name]) for name, spec in cfg.sources.items()}
    rows = draw(cfg, want, starts)
    drawn = write(cfg, rows)

    about = {}
    for name, spec in cfg.sources.items():
        about[name] = {
            'path': spec['path'],
            'licence': spec.get('licence') or origins[name]['licence'],
            'sha256': digests[name],
            'rows': len(starts[name]),
            'drawn': drawn[name],
            'not_drawn': max(0, len(starts[name]) - drawn[name]),
            'from': origins[name],
        }
    manifest = {
        'rows_out': len(rows),
        'sha256': source.sha256(cfg.out),
        'seed': cfg.seed,
        'licence': ', '.join(sorted({part['licence'] for part in about.values()})),
        'sources': about,
    }
    source.write_json(source.manifest_path(cfg.out), manifest)
    tell(cfg.out, manifest)
    return manifest


def tell(out: str, manifest: dict):
    """Prints what the mix is made of, and its first row."""
    rows = manifest['rows_out']
    print(f'{Path(out)}: {rows} rows')
    for name, part in manifest['sources'].items():
        before = (part['from'] or {}).get('dropped', {})
        dropped = ''.join(f'; before: {n} dropped: {reason}' for reason, n in before.items())
        print(f'  {name}: {part["drawn"]} ({part["drawn"] / rows:.1%}) of {part["rows"]}, '
              f'{part["licence"]}{dropped}')
    with open(out, encoding='utf-8') as f:
        print(f'row 1: {f.readline(1000).rstrip()}')


if __name__ == '__main__':
    run(main, Config)
