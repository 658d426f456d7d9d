"""
Curves of a run: every number of its metrics.jsonl that changes, a panel each, as out_dir/metrics.png (needs the [plot] extra).

    python tools/metrics.py --run=out/r1/zero
    python tools/metrics.py --run="['out/a', 'out/b']" --keys="['reward', 'length']" --out=both.png
    make plot RUN=out/r1/zero
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run  # noqa: E402

FIRST = ('loss', 'reward', 'right', 'length', 'length_right', 'length_wrong', 'entropy', 'kl', 'grad_norm')   # panels that come first


@dataclass
class Config:
    run: str | list = 'out/grpo'                        # folder of a run, or several to draw over each other
    keys: list = field(default_factory=list)            # what to draw; empty: everything
    out: str = ''                                       # the picture; empty: metrics.png in the (first) folder
    smooth: int = 1                                     # steps averaged


def read_metrics(folder):
    path = Path(folder) / 'metrics.jsonl'
    if not path.exists():
        raise ValueError(f'{path} does not exist; run= is the out_dir of sft.py or grpo.py')
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')]


def curve(lines, key, smooth):
    """-> steps, values averaged over the last `smooth` of them"""
    points = [(line['step'], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    values = [value for _, value in points]
    return [step for step, _ in points], [sum(values[max(0, i + 1 - smooth):i + 1]) / min(smooth, i + 1) for i in range(len(values))]


def main(cfg):
    try:
        import matplotlib
    except ImportError:
        sys.exit("metrics.py: matplotlib is missing; pip install -e '.[plot]'")
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    runs = {folder: read_metrics(folder) for folder in ([cfg.run] if isinstance(cfg.run, str) else cfg.run)}
    seen = dict.fromkeys(key for lines in runs.values() for line in lines for key in line if key != 'step')
    varies = [key for key in seen if any(len(set(curve(lines, key, 1)[1])) > 1 for lines in runs.values())]
    keys = cfg.keys or sorted(varies, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    if not keys:
        sys.exit(f'metrics.py: nothing to draw in {", ".join(runs)}')
    for key in keys:
        if key not in seen:
            sys.exit(f'metrics.py: no {key!r} in the metrics; there are {", ".join(seen)}')
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False, constrained_layout=True)
    for axis, key in zip(axes.flat, keys):
        for folder, lines in runs.items():
            axis.plot(*curve(lines, key, cfg.smooth), label=Path(folder).name, linewidth=1)
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(keys):]:
        axis.axis('off')
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=7)
    out = Path(cfg.out or Path(next(iter(runs))) / 'metrics.png')
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(f'{len(keys)} panels -> {out}')
    return keys


if __name__ == '__main__':
    run(main, Config)
