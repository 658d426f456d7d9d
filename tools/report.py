"""
The last stage of `make r1`: reads what the other stages wrote and prints, plots and writes it up.

    python tools/report.py --run=out/r1      # -> report.md, report.json, curves.png; needs the
                                             # [plot] extra

It computes nothing about models: accuracy, lengths and intervals come from each stage's eval.json
(evaluate.py), curves and costs from metrics.jsonl (sft.py, grpo.py), wall-clock from seconds.txt
(Makefile). A file of its own because it belongs to no script.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run as start  # noqa: E402
from evaluate import write_jsonl  # noqa: E402

STAGES = {
    'base': 'pretrained from nothing',
    'zero': 'GRPO from base (R1-Zero)',
    'cold': "SFT of base on zero's clean samples",
    'rl': 'GRPO from cold, language reward added',
    'reject': "SFT of base on rl's clean samples + sorting",
    'final': 'GRPO from reject, both tasks',
    'distill': "SFT of the student on final's samples",
    'student_rl': 'GRPO on the student, same FLOPs',
}
BEFORE = {'rl': ('zero', 'cold')}   # what a stage's start cost beyond the base
KEYS = ('pass1', 'pass1_ci', 'greedy', 'maj8', 'length', 'format', 'mixing')


@dataclass
class Config:
    run: str = 'out/r1'   # folder of the chain
    goal: float = 0.90    # accuracy whose cost is reported


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def seconds_by_stage(run):
    """seconds.txt: lines "path-of-target start end" -> {stage: seconds}, and the seconds in which anything ran"""
    out, spans = {}, []
    for line in (run / 'seconds.txt').read_text().splitlines() if (run / 'seconds.txt').exists() else ():
        target, start, end = line.rsplit(' ', 2)
        stage = Path(target).relative_to(run).parts[0]
        out[stage] = out.get(stage, 0.0) + float(end) - float(start)
        spans.append((float(start), float(end)))
    wall, until = 0.0, 0.0
    for start, end in sorted(spans):
        wall, until = wall + max(0.0, end - max(start, until)), max(until, end)
    return out, wall


def numbers_of(run, stage, data='test.jsonl', file='eval.json'):
    """The evaluation of a stage on one problem file, or None."""
    rows = read_jsonl(run / stage / file)
    return next((numbers for path, numbers in rows[0].items() if Path(path).name == data), None) if rows else None


def cost_to(goal, metrics, window=3):
    """-> (step, seconds, FLOPs) at which the training accuracy, averaged over `window` steps, reaches goal; or None"""
    steps = [m for m in metrics if m.get('right') is not None]
    for i in range(len(steps)):
        recent = steps[max(0, i - window + 1):i + 1]
        if sum(m['right'] for m in recent) / len(recent) >= goal:
            return steps[i]['step'], steps[i]['seconds'], steps[i]['flops']


def plot(run, path):
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing; pip install -e '.[plot]'", file=sys.stderr)
        return False
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 1, figsize=(8, 7), sharex=True, constrained_layout=True)
    for color, stage in enumerate(('zero', 'rl', 'final', 'student_rl')):
        metrics = read_jsonl(run / stage / 'metrics.jsonl')
        train = [m for m in metrics if m.get('right') is not None]
        evals = [m for m in metrics if 'eval_pass1' in m]
        for axis, key in zip(axes, ('right', 'length')):
            axis.plot([m['step'] for m in train], [m[key] for m in train], color=f'C{color}', alpha=0.35, linewidth=1)
        for axis, key in zip(axes, ('eval_pass1', 'eval_length')):
            axis.plot([m['step'] for m in evals], [m[key] for m in evals], 'os^D'[color] + '-', color=f'C{color}', markersize=4, label=STAGES[stage],
                      markerfacecolor='none', alpha=0.8)
    axes[0].set(ylabel='right at T = 1', ylim=(0, 1.02), title='RL on Countdown: held-out problems (marks; 128 of them), rollouts (thin)')
    axes[1].set(ylabel='tokens a completion', xlabel='RL step')
    axes[1].set_title('the last RL samples sorting too, whose completions are short: marks are Countdown alone', fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc='outside lower center', ncols=2)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True


def traces(run, stage, count=3):
    """The first samples of the first held-out problems, as a fenced block."""
    rows = read_jsonl(run / stage / 'eval.jsonl')[:count]
    lines = [f'{row["prompt"][0]["content"].strip()}  →  {row["samples"][0]["response"]}' for row in rows]
    return '```\n' + '\n'.join(lines) + '\n```'


def main(cfg):
    run = Path(cfg.run)
    (seconds, wall), stages = seconds_by_stage(run), {}
    for stage in STAGES:
        numbers = numbers_of(run, stage)
        if numbers:
            stages[stage] = {**{key: numbers.get(key) for key in KEYS}, 'seconds': seconds.get(stage), 'pass8': numbers.get('pass8'),
                             'problems': numbers['problems']}
            load = [m['expert_max_load'] for m in read_jsonl(run / stage / 'metrics.jsonl') if 'expert_max_load' in m]
            stages[stage]['expert_max_load'] = load[-1] if load else None
    if not stages:
        sys.exit(f'{run}: no stage has an eval.json; run `make r1` first')
    show = lambda v: '–' if v is None else f'{v:.3f}' if isinstance(v, float) and v < 10 else f'{v:.0f}'  # noqa: E731
    md = ['# nanoR1: the R1 recipe on Countdown', '',
          f'{next(iter(stages.values()))["problems"]} held-out problems, 8 samples each at T = 1; 95% intervals over problems. '
          f'{wall:.0f} s in all; a stage\'s seconds are those of its training, samples and evaluation, and two stages run at a time.', '',
          '| stage | what | right, T = 1 | 95% | greedy | maj@8 | pass@8 | tokens | format | mixing | busiest expert | s |',
          '|---|---|---|---|---|---|---|---|---|---|---|---|']
    for stage, n in stages.items():
        interval = '–'.join(map(show, n['pass1_ci'] or (None,)))
        md.append(f'| {stage} | {STAGES[stage]} | {show(n["pass1"])} | {interval} | '
                  f'{show(n["greedy"])} | {show(n["maj8"])} | {show(n["pass8"])} | '
                  f'{n["length"]:.0f} | {show(n["format"])} | {show(n["mixing"])} | {show(n["expert_max_load"])} | {show(n["seconds"])} |')
    md += ['', 'Busiest expert: its load over the mean load. Mixing: share of samples whose reasoning holds both notations.', '']
    extra = {}
    forced = numbers_of(run, 'base', file='eval_search.json')
    if forced:
        extra['base_forced_search'] = forced['pass1']
        md.append(f'The base, made to begin with "search": {forced["pass1"]:.3f} right ({forced["pass1_ci"][0]:.3f}–{forced["pass1_ci"][1]:.3f}).')
    sorts = {stage: numbers for stage in ('reject', 'final') if (numbers := numbers_of(run, stage, 'sort_test.jsonl', 'eval_sort.json'))}
    if sorts:
        extra['sort'] = {stage: n['pass1'] for stage, n in sorts.items()}
        md.append('The second task, sorting, at T = 1: ' + ', '.join(f'{stage} {n["pass1"]:.3f} right' for stage, n in sorts.items()) + '.')
    judge = [m for m in read_jsonl(run / 'reward' / 'metrics.jsonl') if 'eval_accuracy' in m]
    if judge:
        extra['reward_model'] = {key: judge[-1][key] for key in ('eval_accuracy', 'eval_accuracy_ci')}
        low, high = judge[-1]['eval_accuracy_ci']
        md.append(f'The reward model that scored sorting in the last RL: {judge[-1]["eval_accuracy"]:.3f} of its held-out pairs in the right order ({low:.3f}–{high:.3f}).')
    for stage in ('zero', 'rl', 'student_rl'):
        metrics = read_jsonl(run / stage / 'metrics.jsonl')
        start = next((m['eval_pass1'] for m in metrics if 'eval_pass1' in m), None)
        cost = cost_to(cfg.goal, metrics)
        before = sum(seconds.get(s, 0.0) for s in BEFORE.get(stage, ()))     # evaluations and sampling of those stages included
        extra[f'{stage}_to_goal'] = {'start': start, 'before': before, **dict(zip(('step', 'seconds', 'flops'), cost or ()))}
        md.append(f'{STAGES[stage]}: starts at {show(start)}, ' + (
            f'{cfg.goal:.2f} on its rollouts after {cost[0]} step{"s" * (cost[0] > 1)}, {cost[1]:.0f} s, {cost[2]:.2e} FLOPs' if cost else f'{cfg.goal:.2f} not reached')
            + (f'; the stages that made its start took {before:.0f} s more.' if before else '.'))
    flops = {stage: m[-1]['flops'] for stage in ('cold', 'distill', 'student_rl') if (m := [m for m in read_jsonl(run / stage / 'metrics.jsonl') if 'flops' in m])}
    if {'distill', 'student_rl'} <= set(flops):
        md.append(f'Compute of the two student arms: distillation {flops["distill"]:.2e} FLOPs (the teacher\'s sampling not counted), RL {flops["student_rl"]:.2e}.')
    extra['flops'] = flops
    if plot(run, run / 'curves.png'):
        md += ['', '![curves](curves.png)']
    for stage in ('base', 'final'):
        if (run / stage / 'eval.jsonl').exists():
            md += ['', f'Samples of {stage}:', '', traces(run, stage)]
    (run / 'report.md').write_text('\n'.join(md) + '\n', encoding='utf-8')
    write_jsonl(run / 'report.json', [{'seconds': wall, 'stages': stages, **extra}])
    print('\n'.join(md))


if __name__ == '__main__':
    start(main, Config)
