"""
Test-time compute: accuracy against tokens spent on a problem, before and after RL, as RUN/budget.png and budget.json.

    python tools/budget.py --run=out/r1     # base and zero of `make r1`; needs the [plot] extra
    make plot-budget RUN=out/r1

Four ways to spend: thinking cut at a budget or prolonged to one (budget forcing, one sample), and of 1, 2, 4, ... samples whose thinking is
free the majority, or the best by a reward. A point is accuracy with its 95% interval over problems, at the mean number of tokens of all
samples it used. With the accuracy itself as the reward the best of n is what a perfect judge would reach: pass@n.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run as start  # noqa: E402

import torch  # noqa: E402

import rewards  # noqa: E402
from data.source import read_rows  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from evaluate import best_of, evaluate, majority, mean_ci  # noqa: E402
from judge import load_judges  # noqa: E402
from model import Transformer  # noqa: E402
from sample import device_of  # noqa: E402


@dataclass
class Config:
    run: str = 'out/r1'                    # folder with the stages, and where the results go
    stages: list = field(default_factory=lambda: ['base', 'zero'])  # checkpoints in it: before and after
    data: str | None = None                # problem file; None: RUN/data/test.jsonl
    limit: int = 128                       # problems
    n: int = 8                             # samples a problem
    best_of: dict = field(default_factory=lambda: {'format': 1.0})     # rewards and weights to choose the best of n by; {}: not drawn
    preference: dict = field(default_factory=dict)                     # reward models of the reward 'preference', {name: folder}
    budgets: list = field(default_factory=lambda: [4, 8, 16, 32, 64])  # tokens at which the thinking is cut
    prolong: list = field(default_factory=lambda: [48, 96])            # tokens up to which it is kept going
    think_end: str = '</think>'            # the text that ends the thinking
    wait: str = ' ,'                       # the text that keeps it going; in the toy's notation, another line
    max_new_tokens: int = 160              # longest completion
    temperature: float = 1.0               # of the samples
    slots: int = 1024                      # rows decoded at once
    seed: int = 1234                       # of the sampling noise
    threads: int = 2                       # CPU threads
    device: str = 'auto'                   # 'cpu', 'cuda' or 'auto'


def groups_of(scored, k, judge):
    """judge: groups of k samples -> 0 or 1 for each. -> each problem's share of right ones among its n // k groups"""
    values = [judge([samples[i:i + k] for i in range(0, len(samples) - k + 1, k)]) for samples in scored]
    return [sum(v) / len(v) for v in values]


def votes(groups):
    return [majority(g) for g in groups]


def point(stage, way, scored, k, size, judge=votes):
    right = groups_of(scored, k, judge)
    tokens = [s['length'] for samples in scored for s in samples]
    accuracy, interval = mean_ci(right)
    return {'stage': stage, 'way': way, 'size': size, 'tokens': k * sum(tokens) / len(tokens),
            'accuracy': accuracy, 'interval': interval}


def points(cfg, stage, model, tokenizer, rows):
    def run(**think):
        think = {'think_end': cfg.think_end, 'wait': cfg.wait, **think} if think else None
        return evaluate(model, tokenizer, rows, cfg.n, cfg.temperature, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, greedy=False,
                        slots=cfg.slots, weights={'accuracy': 1.0}, think=think, best=cfg.best_of)[1]
    free = run()
    for k in (2**i for i in range(cfg.n.bit_length()) if 2**i <= cfg.n):
        yield point(stage, 'vote', free, k, k)
        if cfg.best_of and k > 1:
            yield point(stage, 'best', free, k, k, lambda groups: best_of(groups, cfg.best_of))
    for budget in cfg.budgets:
        yield point(stage, 'cut', run(think_budget=budget), 1, budget)
    for least in cfg.prolong:
        yield point(stage, 'prolong', run(think_at_least=least), 1, least)


def draw(found, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    stages = list(dict.fromkeys(p['stage'] for p in found))
    marks = {'vote': ('o-', 'majority of k'), 'best': ('d-.', 'best of k'), 'cut': ('s--', 'thinking cut'), 'prolong': ('^:', 'thinking prolonged')}
    for color, stage in enumerate(stages):
        for way, (style, label) in marks.items():
            mine = sorted((p for p in found if p['stage'] == stage and p['way'] == way), key=lambda p: p['tokens'])
            if mine:
                x, y = [p['tokens'] for p in mine], [p['accuracy'] for p in mine]
                off = [[max(0.0, (p['accuracy'] - p['interval'][end]) * sign) for p in mine] for end, sign in ((0, 1), (1, -1))]
                axes.errorbar(x, y, off, fmt=style, color=f'C{color}', capsize=2, ms=4, label=f'{stage}: {label}')
    axes.set(xlabel='tokens a problem', ylabel='accuracy', ylim=(0, 1))
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:.0f}')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(cfg):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("budget.py: matplotlib is missing; pip install -e '.[plot]'")
    torch.set_num_threads(cfg.threads)
    device = device_of(cfg)
    run, found = Path(cfg.run), []
    path, weights = cfg.data or run / 'data' / 'test.jsonl', {'accuracy': 1.0, **cfg.best_of}
    rewards.check_names(weights)
    rows = rewards.checked(path, read_rows(path, require=('prompt', 'task'))[:cfg.limit], weights)
    tasks = {row['task'] for row in rows}
    if judged := sorted(tasks & rewards.JUDGED):
        raise ValueError(f'{path}: rows of the task {judged[0]!r}, which knows no right and wrong')
    rewards.prepare(weights, tasks, judges=load_judges(cfg.preference, device))
    for stage in cfg.stages:
        model, tokenizer = Transformer.from_pretrained(run / stage, device=device).eval(), Tokenizer.from_pretrained(run / stage)
        model.use_tokens(tokenizer)
        for p in points(cfg, stage, model, tokenizer, rows):
            found.append(p)
            print(f'{stage:10s} {p["way"]:8s} {p["size"]:4d}  tokens {p["tokens"]:7.1f}  accuracy {p["accuracy"]:.3f} '
                  f'({p["interval"][0]:.3f} to {p["interval"][1]:.3f})', flush=True)
    (run / 'budget.json').write_text(json.dumps(found, indent=1) + '\n')
    draw(found, run / 'budget.png')


if __name__ == '__main__':
    start(main, Config)
