"""
Curves of a run, drawn from its metrics.jsonl with matplotlib (the [plot] extra). The trainers
redraw out_dir/curve.png at every evaluation; tools/metrics.py draws every number, or several runs.
"""

import json
import os
from pathlib import Path

# what curve.png shows, as far as there is any of it; the 95% interval of NAME stands in NAME_ci
SHOWN = ('eval_pass1', 'eval_accuracy', 'eval_loss', 'reward', 'eval_length', 'entropy', 'loss',
         'grad_norm')
PANELS = 4


def read_metrics(folder):
    """-> list of dicts, the lines of metrics.jsonl; one that a kill cut short is left out.
    ValueError: there is no such file."""
    path = Path(folder) / 'metrics.jsonl'
    if not path.exists():
        raise ValueError(f'{path} does not exist; run= is the out_dir of sft.py or grpo.py')
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')]


def curve(lines, key, smooth):
    """-> steps, values averaged over the last `smooth` of them"""
    steps = []
    values = []
    means = []
    for line in lines:
        if isinstance(line.get(key), (int, float)):
            steps.append(line['step'])
            values.append(line[key])
            last = values[-smooth:]
            means.append(sum(last) / len(last))
    return steps, means


def band(lines, key):
    """-> steps, low, high of the 95% intervals of a key, where there are any"""
    found = [(line['step'], *line[f'{key}_ci']) for line in lines if line.get(f'{key}_ci')]
    return list(zip(*found)) or [(), (), ()]


def draw(runs, keys, smooth, path):
    """A panel for each key, in it a line for each run, complete or not at all.
    runs: {folder: lines}"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg   # half a second, once
    from matplotlib.figure import Figure
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, key in zip(axes.flat, keys):
        for folder, lines in runs.items():
            steps, values = curve(lines, key, smooth)
            style = '.-' if len(steps) < 50 else '-'
            axis.plot(steps, values, style, label=Path(folder).name, linewidth=1)
            axis.fill_between(*band(lines, key), alpha=0.2, linewidth=0)
        axis.set_title(key, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(keys):]:
        axis.axis('off')
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    temp = Path(f'{path}.tmp')
    FigureCanvasAgg(figure).print_figure(temp, dpi=110, format='png')
    os.replace(temp, path)


def redraw(folder):
    """Draws the first PANELS of SHOWN that the run in this folder has, as folder/curve.png; False
    where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401 (asks only whether it is there)
    except ImportError:
        return False
    lines = read_metrics(folder)
    keys = [key for key in SHOWN if any(line.get(key) is not None for line in lines)]
    if keys:
        draw({str(folder): lines}, keys[:PANELS], 1, Path(folder) / 'curve.png')
    return True
