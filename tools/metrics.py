"""
Curves of a run: every number of its metrics.jsonl that changes, a panel each, as
out_dir/metrics.png (needs the [plot] extra).

    python tools/metrics.py --run=out/r1/zero
    python tools/metrics.py --run="['out/a', 'out/b']" --keys="['reward', 'length']" --out=both.png
    make plot RUN=out/r1/zero
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run
from curves import curve, draw, read_metrics

# panels that come first
FIRST = ('loss', 'reward', 'right', 'length', 'length_right', 'length_wrong', 'entropy', 'kl',
         'grad_norm')


@dataclass
class Config:
    run: str | list = 'out/grpo'           # folder of a run, or several to draw over each other
    keys: list = field(default_factory=list)  # what to draw; empty: everything
    out: str = ''                          # the picture; empty: metrics.png in the (first) folder
    smooth: int = 1                        # steps averaged


def changing(runs, keys):
    """-> those of the keys whose values in a run are not all the same, the important first"""
    found = []
    for key in keys:
        for lines in runs.values():
            _, values = curve(lines, key, 1)
            if len(set(values)) > 1:
                found.append(key)
                break
    return sorted(found, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))


def main(cfg):
    """-> the keys that were drawn"""
    try:
        import matplotlib  # noqa: F401 (says so before it reads)
    except ImportError:
        sys.exit("metrics.py: matplotlib is missing; pip install -e '.[plot]'")
    folders = [cfg.run] if isinstance(cfg.run, str) else cfg.run
    runs = {folder: read_metrics(folder) for folder in folders}
    seen = {}   # key -> None, in the order of appearance
    for lines in runs.values():
        for line in lines:
            seen.update(dict.fromkeys(line))
    seen.pop('step', None)

    keys = cfg.keys or changing(runs, seen)
    if not keys:
        sys.exit(f'metrics.py: nothing to draw in {", ".join(runs)}')
    for key in keys:
        if key not in seen:
            sys.exit(f'metrics.py: no {key!r} in the metrics; there are {", ".join(seen)}')
    out = Path(cfg.out or Path(folders[0]) / 'metrics.png')
    draw(runs, keys, cfg.smooth, out)
    print(f'{len(keys)} panels -> {out}')
    return keys


if __name__ == '__main__':
    run(main, Config)
