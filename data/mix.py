"""
Mixes files of rows: so many of each, or by weight, in one shuffled file with a manifest that says where every row is from.

    python data/mix.py config/mix.py

with in config/mix.py
    rows = 10000
    sources = {'math':  {'path': 'out/math.jsonl', 'weight': 0.7},
               'gsm8k': {'path': 'data/gsm8k/train.jsonl', 'weight': 0.3, 'licence': 'MIT'},
               'toy':   {'path': 'out/r1/data/rl.jsonl', 'count': 200, 'licence': 'MIT'}}
    out = 'out/mix.jsonl'

A source gives `count` rows, or its share by weight of what the counts leave of `rows` (largest remainders; without `rows`, as many
as the smallest source in proportion allows), or without either all it has. Rows are drawn without replacement; a source that
has too few is refused, unless it says 'repeat': True: then it is drawn whole as often as it takes and the rest from one more round.
'licence' is needed where no manifest lies beside the file.

Which rows, and their order, is a function of seed, the sources' names and their line numbers: another source does not change the
draw of this one. Lines are copied as they are, with "source" added where the row has none. The files are read twice; memory holds 16
bytes a drawn row. The manifest beside `out`: for each source path, licence, hash, rows there, drawn and not drawn, and the
manifest of its file, with the rows dropped before and why.
"""
import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run  # noqa: E402

import numpy as np  # noqa: E402

from data import source  # noqa: E402
from rewards import check_answer  # noqa: E402

ROWS = ('messages', 'prompt', 'conversations')   # a row has one of these
KEYS = {'path': str, 'weight': (int, float), 'count': int, 'licence': str, 'repeat': bool}


@dataclass
class Config:
    sources: dict = field(default_factory=dict)   # name -> {'path', 'weight' or 'count', 'licence', 'repeat'}
    rows: int = 0                                 # rows in all; 0: as many as the weights allow
    out: str = 'out/mix.jsonl'                    # the mixed rows; the manifest lies beside it
    seed: int = 1                                 # of the draw and the order


def check(cfg: Config):
    if not cfg.sources:
        raise ValueError("no sources: give {'name': {'path': ..., 'weight': ...}, ...}")
    for name, spec in cfg.sources.items():
        if not isinstance(spec, dict) or 'path' not in spec:
            raise ValueError(f"source {name!r} must be {{'path': ..., ...}}, not {spec!r}")
        for key, value in spec.items():
            if key not in KEYS or not isinstance(value, KEYS[key]) or isinstance(value, bool) != (key == 'repeat'):
                raise ValueError(f'source {name!r}: {key}={value!r}; known are path (text), weight (number), count (whole number), licence '
                                 '(text) and repeat (True or False)')
        if 'weight' in spec and 'count' in spec or spec.get('weight', 1) <= 0 or spec.get('count', 1) <= 0:
            raise ValueError(f'source {name!r}: give a weight or a count, and a positive one')
        if Path(spec['path']).resolve() == Path(cfg.out).resolve():
            raise ValueError(f'{cfg.out} would be overwritten: choose another out')


def quotas(cfg: Config, have: dict[str, int]) -> dict[str, int]:
    """Rows of each source. have: rows that each one has."""
    want = {name: spec.get('count', have[name]) for name, spec in cfg.sources.items() if 'weight' not in spec}
    weights = {name: spec['weight'] for name, spec in cfg.sources.items() if 'weight' in spec}
    total = sum(weights.values())
    if weights:
        left = cfg.rows - sum(want.values()) if cfg.rows else int(min(have[name] * total / w for name, w in weights.items()) + 1e-9)
        if left <= 0:
            raise ValueError(f'rows={cfg.rows}: the sources with a count alone have {sum(want.values())}')
        exact = {name: left * w / total for name, w in weights.items()}
        want.update({name: int(x) for name, x in exact.items()})
        short = left - sum(want[name] for name in weights)
        for name in sorted(weights, key=lambda name: (want[name] - exact[name], name))[:short]:
            want[name] += 1
    elif cfg.rows and cfg.rows != sum(want.values()):
        raise ValueError(f'rows={cfg.rows}, but the counts make {sum(want.values())} and no source has a weight')
    for name, count in want.items():
        if count > have[name] and not cfg.sources[name].get('repeat'):
            raise ValueError(f"source {name!r}: {count} rows wanted, {cfg.sources[name]['path']} has {have[name]}; ask for fewer, or allow "
                             "'repeat': True")
    return {name: want[name] for name in cfg.sources}


def scan(name: str, path: str) -> tuple[np.ndarray, str]:
    """Checks every row -> (byte at which each line begins [rows] int64, hash of the file)"""
    starts, at, digest = [], 0, hashlib.sha256()
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            try:
                row = source.from_json(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{path}:{number}: no JSON: {error}') from None
            if not isinstance(row, dict) or not any(row.get(key) is not None for key in ROWS):
                raise ValueError(f'{path}:{number}: a row of {name!r} needs {" or ".join(ROWS)}')
            try:
                check_answer(row)
            except ValueError as error:
                raise ValueError(f'{path}:{number}: {error}') from error
            starts.append(at)
            at += len(line)
            digest.update(line)
    if not starts:
        raise ValueError(f'{path}: no rows in it')
    return np.array(starts, dtype=np.int64), digest.hexdigest()


def generator(cfg: Config, *of) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(repr((cfg.seed, *of)).encode()).digest()))


def main(cfg: Config) -> dict:
    check(cfg)
    scanned = {name: scan(name, spec['path']) for name, spec in cfg.sources.items()}
    want = quotas(cfg, {name: len(starts) for name, (starts, _) in scanned.items()})
    manifests = {name: source.manifest_path(spec['path']) for name, spec in cfg.sources.items()}
    origin = {name: json.loads(p.read_text(encoding='utf-8')) if p.exists() else None for name, p in manifests.items()}
    parts = []
    for i, (name, (starts, digest)) in enumerate(scanned.items()):
        if cfg.sources[name].get('licence') is None and origin[name] is None:
            raise ValueError(f"source {name!r}: no {manifests[name].name} beside the file, so give its 'licence'")
        if origin[name] is not None and origin[name].get('sha256', digest) != digest:
            raise ValueError(f'{cfg.sources[name]["path"]} is not the file that {manifests[name].name} beside it describes: prepare it '
                             'again')
        rounds, rest = divmod(want[name], len(starts))
        drawn = np.concatenate([np.tile(starts, rounds), starts[generator(cfg, name).permutation(len(starts))[:rest]]])
        parts.append(np.stack([np.full(len(drawn), i), drawn], axis=1))
    order = np.concatenate(parts)
    order = order[generator(cfg).permutation(len(order))]

    out, names = Path(cfg.out), list(cfg.sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    temp, shown = out.with_name(out.name + '.tmp'), Counter()
    files = [open(spec['path'], 'rb') for spec in cfg.sources.values()]
    try:
        with open(temp, 'w', encoding='utf-8') as f:
            for i, at in order.tolist():
                files[i].seek(at)
                line = files[i].readline().decode('utf-8-sig' if at == 0 else 'utf-8')
                row = {'source': names[i], **source.from_json(line)}
                f.write(json.dumps(row, ensure_ascii=False) + '\n')
                shown[names[i]] += 1
    finally:
        for file in files:
            file.close()
    os.replace(temp, out)
    manifest = {'rows_out': len(order), 'sha256': source.sha256(out), 'seed': cfg.seed,
                'licence': ', '.join(sorted({cfg.sources[n].get('licence') or origin[n]['licence'] for n in names})),
                'sources': {n: {'path': cfg.sources[n]['path'], 'licence': cfg.sources[n].get('licence') or origin[n]['licence'],
                                'sha256': scanned[n][1], 'rows': len(scanned[n][0]), 'drawn': shown[n],
                                'not_drawn': max(0, len(scanned[n][0]) - shown[n]), 'from': origin[n]} for n in names}}
    source.write_json(source.manifest_path(out), manifest)
    print(f'{out}: {len(order)} rows')
    for name, part in manifest['sources'].items():
        before = (part['from'] or {}).get('dropped', {})
        print(f'  {name}: {part["drawn"]} ({part["drawn"] / len(order):.1%}) of {part["rows"]}, {part["licence"]}'
              + ''.join(f'; before: {n} dropped: {reason}' for reason, n in before.items()))
    with open(out, encoding='utf-8') as f:
        print(f'row 1: {f.readline(1000).rstrip()}')
    return manifest


if __name__ == '__main__':
    run(main, Config)
