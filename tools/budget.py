"""
Test-time compute: accuracy against tokens spent on a problem, before and after RL, as
RUN/budget.png and budget.json.

    python tools/budget.py --run=out/r1     # base and zero of `make r1`; needs the [plot] extra
    make plot-budget RUN=out/r1

Four ways to spend: thinking cut at a budget or prolonged to one (budget forcing, one sample), and
of 1, 2, 4, ... samples whose thinking is free the majority, or the best by a reward. A point is
accuracy with its 95% interval over problems, at the mean number of tokens of all samples it used.
With the accuracy itself as the reward the best of n is what a perfect judge would reach: pass@n.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run as start

import torch

import rewards
from data.source import read_rows
from data.tokenizer import Tokenizer
from evaluate import best_of, evaluate, majority, mean_ci
from judge import load_judges
from model import Transformer
from sample import device_of


@dataclass
class Config:
    run: str = 'out/r1'                    # folder with the stages, and where the results go
    stages: list = field(default_factory=lambda: ['base', 'zero'])  # checkpoints in it: before and
                                           # after
    data: str | None = None                # problem file; None: RUN/data/test.jsonl
    limit: int = 128                       # problems
    # ways to spend tokens
    n: int = 8                             # samples a problem
    best_of: dict = field(default_factory=lambda: {'format': 1.0})  # rewards and weights to choose
                                           # the best of n by; {}: not drawn
    preference: dict = field(default_factory=dict)  # reward models of the reward 'preference',
                                           # {name: folder}
    budgets: list = field(default_factory=lambda: [4, 8, 16, 32, 64])  # tokens at which the
                                           # thinking is cut
    prolong: list = field(default_factory=lambda: [48, 96])  # tokens up to which it is kept going
    think_end: str = '</think>'            # the text that ends the thinking
    wait: str = ' ,'                       # the text that keeps it going; in the toy's notation,
                                           # another line
    # sampling
    max_new_tokens: int = 160              # longest completion
    temperature: float = 1.0               # of the samples
    slots: int = 1024                      # rows decoded at once
    seed: int = 1234                       # of the sampling noise
    threads: int = 2                       # CPU threads
    device: str = 'auto'                   # 'cpu', 'cuda' or 'auto'


def points(cfg, stage, model, tokenizer, rows):
    """Yields the points of a stage, see `point`."""
    free = sampled(cfg, model, tokenizer, rows)
    k = 1
    while k <= cfg.n:
        yield point(stage, 'vote', free, k, k)
        if cfg.best_of and k > 1:
            yield point(stage, 'best', free, k, k, lambda groups: best_of(groups, cfg.best_of))
        k *= 2
    for budget in cfg.budgets:
        cut = sampled(cfg, model, tokenizer, rows, think_budget=budget)
        yield point(stage, 'cut', cut, 1, budget)
    for least in cfg.prolong:
        prolonged = sampled(cfg, model, tokenizer, rows, think_at_least=least)
        yield point(stage, 'prolong', prolonged, 1, least)


def sampled(cfg, model, tokenizer, rows, **forcing):
    """forcing: think_budget or think_at_least, or nothing where the thinking is free -> for each
    row a list of n scored samples, see evaluate.score"""
    think = None
    if forcing:
        think = {'think_end': cfg.think_end, 'wait': cfg.wait, **forcing}
    _, scored = evaluate(
        model, tokenizer, rows, cfg.n, cfg.temperature, max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed, greedy=False, slots=cfg.slots, weights={'accuracy': 1.0}, think=think,
        best=cfg.best_of)
    return scored


def majorities(groups):
    return [majority(group) for group in groups]


def point(stage, way, scored, k, size, judge=majorities):
    """
    -> dict of a point: "stage", "way", "size" (of the budget or the group), "tokens" of k samples
    in the mean, "accuracy" and its "interval"

    scored: n scored samples of each problem; judge: list of groups of k samples -> 0 or 1 for each
    """
    accuracy, interval = mean_ci(shares_of_right(scored, k, judge))
    lengths = [s['length'] for samples in scored for s in samples]
    return {'stage': stage, 'way': way, 'size': size, 'tokens': k * sum(lengths) / len(lengths),
            'accuracy': accuracy, 'interval': interval}


def shares_of_right(scored, k, judge):
    """-> each problem's share of right ones among its n // k groups of k samples"""
    shares = []
    for samples in scored:
        groups = [samples[i:i + k] for i in range(0, len(samples) - k + 1, k)]
        right = judge(groups)
        shares.append(sum(right) / len(right))
    return shares


STYLES = {   # way -> line and mark, label
    'vote': ('o-', 'majority of k'),
    'best': ('d-.', 'best of k'),
    'cut': ('s--', 'thinking cut'),
    'prolong': ('^:', 'thinking prolonged'),
}


def draw(found, path):
    """The points as a picture: a colour a stage, a line a way."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    stages = list(dict.fromkeys(p['stage'] for p in found))
    for color, stage in enumerate(stages):
        for way, (style, label) in STYLES.items():
            mine = [p for p in found if p['stage'] == stage and p['way'] == way]
            mine.sort(key=lambda p: p['tokens'])
            if not mine:
                continue
            tokens = [p['tokens'] for p in mine]
            accuracy = [p['accuracy'] for p in mine]
            below = [max(0.0, p['accuracy'] - p['interval'][0]) for p in mine]
            above = [max(0.0, p['interval'][1] - p['accuracy']) for p in mine]
            axes.errorbar(tokens, accuracy, [below, above], fmt=style, color=f'C{color}',
                          capsize=2, ms=4, label=f'{stage}: {label}')
    axes.set(xlabel='tokens a problem', ylabel='accuracy', ylim=(0, 1))
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:.0f}')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def read_problems(cfg, device):
    """-> rows of the problem file, with all that their rewards need prepared. ValueError: a row of
    a task without right and wrong."""
    path = cfg.data or Path(cfg.run) / 'data' / 'test.jsonl'
    weights = {'accuracy': 1.0, **cfg.best_of}
    rewards.check_names(weights)
    rows = rewards.checked(path, read_rows(path, require=('prompt', 'task'))[:cfg.limit], weights)
    tasks = {row['task'] for row in rows}
    judged = sorted(tasks & rewards.JUDGED)
    if judged:
        raise ValueError(f'{path}: rows of the task {judged[0]!r}, which knows no right and wrong')
    rewards.prepare(weights, tasks, judges=load_judges(cfg.preference, device))
    return rows


def main(cfg):
    try:
        import matplotlib  # noqa: F401 (before hours of sampling)
    except ImportError:
        sys.exit("budget.py: matplotlib is missing; pip install -e '.[plot]'")
    torch.set_num_threads(cfg.threads)
    device = device_of(cfg)
    run = Path(cfg.run)
    rows = read_problems(cfg, device)

    found = []
    for stage in cfg.stages:
        model = Transformer.from_pretrained(run / stage, device=device).eval()
        tokenizer = Tokenizer.from_pretrained(run / stage)
        model.use_tokens(tokenizer)
        for p in points(cfg, stage, model, tokenizer, rows):
            found.append(p)
            low, high = p['interval']
            print(f'{stage:10s} {p["way"]:8s} {p["size"]:4d}  tokens {p["tokens"]:7.1f}  '
                  f'accuracy {p["accuracy"]:.3f} ({low:.3f} to {high:.3f})', flush=True)

    (run / 'budget.json').write_text(json.dumps(found, indent=1) + '\n')
    draw(found, run / 'budget.png')


if __name__ == '__main__':
    start(main, Config)
