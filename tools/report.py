"""
The last stage of `make r1`: reads what the other stages wrote and prints, plots and writes it up.

    python tools/report.py --run=out/r1      # -> report.md, report.json, curves.png ([plot] extra)

It computes nothing about models: what was sampled comes from each stage's eval.jsonl and eval.json
(evaluate.py), curves and costs from metrics.jsonl (sft.py, grpo.py), wall-clock from seconds.txt
(Makefile). Three kinds of test problems are told apart by the files in RUN/data: unseen number sets
(test.jsonl, the figure), seen sets with unseen targets (test_seen.jsonl), and numbers beyond the
training range (test_beyond.jsonl). Intervals are over number sets, whose problems go together.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run as start
from evaluate import average, mean_ci, write_jsonl
from rewards import right

STAGES = {
    'base': 'pretrained from nothing',
    'zero': 'GRPO from base (R1-Zero)',
    'cold': "SFT of base on zero's clean samples",
    'rl': 'GRPO from cold, language reward added',
    'reject': "SFT of base on rl's clean samples + sorting",
    'final': 'GRPO from reject, both tasks',
    'student_base': 'the student, pretrained on the same corpus',
    'distill': "SFT of the student on final's samples",
    'student_sft': "SFT of the student on the corpus's clean searches, no teacher",
    'student_rl': 'GRPO on the student',
}
ARMS = ('distill', 'student_sft', 'student_rl')     # of the student, at equal FLOPs of its own
TEACHER = ('base', 'zero', 'cold', 'rl', 'reject', 'reward', 'final')  # what distill's data took
COMPARED = [('base', 'zero'), ('zero', 'cold'), ('cold', 'rl'), ('rl', 'reject'),
            ('reject', 'final'), ('final', 'distill'), ('student_base', 'student_rl'),
            ('student_rl', 'distill'), ('student_sft', 'distill')]
BEFORE = {'rl': ('zero', 'cold')}   # what a stage's start cost beyond the base
TESTS = {'unseen': 'test.jsonl', 'seen': 'test_seen.jsonl', 'beyond': 'test_beyond.jsonl'}
COLUMNS = {
    'unseen': 'share of right samples at T = 1 on number sets that no training file has, in any '
              'order; the figure',
    '95%': 'its interval over number sets',
    'greedy, maj@8, pass@8': 'of the same problems: the most probable answer, the majority of 8 '
                             'samples, at least one right among 8',
    'seen': 'T = 1, number sets of the corpus with targets that it lacks',
    'beyond': 'T = 1, problems with a number that is larger than any in training',
    'tokens': 'mean length of a sample, unseen problems as the columns that follow',
    'format': 'share of samples with the tags where they belong',
    'mixing': 'share of samples whose reasoning holds both notations',
    'busiest expert': 'its load over the mean load, in training',
    's': "seconds of a stage's training, samples and evaluation; two stages run at a time",
}


@dataclass
class Config:
    run: str = 'out/r1'   # folder of the chain
    goal: float = 0.80    # accuracy on the rollouts whose cost is reported


# --------------------------------------------------------------------------------------------------
# what the stages wrote


def read_jsonl(path):
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def timings(run):
    """seconds.txt: lines "path-of-target start end" -> (stage, name of the file, start, end) of
    each, stage: the folder that the target lies in"""
    path = run / 'seconds.txt'
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        target, begun, ended = line.rsplit(' ', 2)
        found.append((Path(target).parent.name, Path(target).name, float(begun), float(ended)))
    return found


def wall_clock(spans):
    """spans: (start, end) -> the seconds in which any of them was under way"""
    wall = until = 0.0
    for begun, ended in sorted(spans):
        wall += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return wall


def seconds_by_stage(run):
    """-> {stage: seconds}, and the seconds in which anything of the chain ran"""
    seconds = defaultdict(float)
    spans = []
    for stage, _, begun, ended in timings(run):
        if stage not in (*STAGES, 'data', 'reward'):      # a control
            continue
        seconds[stage] += ended - begun
        spans.append((begun, ended))
    return dict(seconds), wall_clock(spans)


def last_of(run, stage, key):
    """The last value of a key in a stage's metrics, or None."""
    values = [m[key] for m in read_jsonl(run / stage / 'metrics.jsonl') if key in m]
    return values[-1] if values else None


def numbers_of(run, stage, data='test.jsonl', file='eval.json'):
    """The evaluation of a stage on one problem file, or None."""
    for summary in read_jsonl(run / stage / file):
        for path, numbers in summary.items():
            if Path(path).name == data:
                return numbers
    return None


def problem_of(row):
    return tuple(row['numbers']), row['target']


def number_set(problem):
    return tuple(sorted(problem[0]))


def tests_of(run):
    """{kind of test: {problem, ...}}"""
    return {kind: {problem_of(row) for row in read_jsonl(run / 'data' / file)}
            for kind, file in TESTS.items()}


def evaluated(rows, tests):
    """A stage's rows of eval.jsonl -> {kind of test: {problem: share of right samples}}"""
    shares = {kind: {} for kind in TESTS}
    for row in rows:
        problem = problem_of(row)
        for kind, problems in tests.items():
            if problem in problems:
                shares[kind][problem] = average([right(s) for s in row['samples']])
    return shares


# --------------------------------------------------------------------------------------------------
# statistics


def interval(shares):
    """{problem: share of right samples} -> mean and 95% interval over number sets; None, None of
    no problems"""
    if not shares:
        return None, None
    return mean_ci(list(shares.values()), [number_set(p) for p in shares])


def paired(before, after, group_of=number_set):
    """{problem: share} twice -> mean of after - before over the problems of both, its 95% interval
    over the groups of problems, see mean_ci"""
    differences = {p: after[p] - before[p] for p in before if p in after}
    n = len(differences)
    mean = sum(differences.values()) / n
    sums = defaultdict(float)
    for problem, difference in differences.items():
        sums[group_of(problem)] += difference - mean
    sets = max(2, len(sums))
    spread = sum(s * s for s in sums.values()) * sets / (sets - 1)
    half = 1.96 * spread ** 0.5 / n
    return mean, [mean - half, mean + half]


def cost_to(goal, metrics, window=3):
    """-> (step, seconds, FLOPs) at which the training accuracy, averaged over `window` steps,
    reaches goal; or None"""
    steps = [m for m in metrics if m.get('right') is not None]
    for i, step in enumerate(steps):
        recent = steps[max(0, i - window + 1):i + 1]
        if average([m['right'] for m in recent]) >= goal:
            return step['step'], step['seconds'], step['flops']
    return None


def flops_of(run):
    """{stage: FLOPs of its training}, and of the teacher's: all of its training, and what sampling
    its three files took: two a parameter and token, where a sample has the mean length."""
    stages = [*STAGES, 'reward']
    flops = {s: f for s in stages if (f := last_of(run, s, 'flops')) is not None}
    teacher = sum(flops.get(stage, 0.0) for stage in TEACHER)
    tokens = last_of(run, 'base', 'tokens')
    if tokens:
        active = flops['base'] / (6 * tokens)
        rl = len(read_jsonl(run / 'data' / 'rl.jsonl'))
        both = rl + len(read_jsonl(run / 'data' / 'distill.jsonl'))
        for stage, samples in (('zero', 4 * rl), ('rl', both), ('final', both)):
            if numbers := numbers_of(run, stage):
                teacher += 2 * active * samples * (numbers['length'] + 8)   # 8: of the prompt
    return flops, teacher


# --------------------------------------------------------------------------------------------------
# the report, part by part: each returns lines of markdown and notes its numbers in `out`


def show(value):
    if value is None:
        return '–'
    return f'{value:.3f}' if isinstance(value, float) and value < 10 else f'{value:.0f}'


def between(ci):
    return '–' if ci is None else '–'.join(map(show, ci))


def signed(value):
    return f'{value:+.3f}'.replace('-', '−')


def table(heads, rows):
    lines = [heads, ['---'] * len(heads), *rows]
    return ['| ' + ' | '.join(map(str, cells)) + ' |' for cells in lines]


def stage_table(run, shares, seconds, out):
    heads = ['stage', 'what', 'unseen', '95%', 'greedy', 'maj@8', 'pass@8', 'seen', 'beyond',
             'tokens', 'format', 'mixing', 'busiest expert', 's']
    rows = []
    for stage, by_kind in shares.items():
        numbers = numbers_of(run, stage)
        mean, ci = interval(by_kind['unseen'])
        kept = {key: numbers.get(key)
                for key in ('greedy', 'maj8', 'pass8', 'length', 'format', 'mixing', 'problems')}
        kept |= {'pass1': mean, 'pass1_ci': ci, 'seconds': seconds.get(stage)}
        for kind in ('seen', 'beyond'):
            if by_kind[kind]:
                kept[kind], kept[f'{kind}_ci'] = interval(by_kind[kind])
        kept['expert_max_load'] = last_of(run, stage, 'expert_max_load')
        out['stages'][stage] = kept
        rows.append([stage, STAGES[stage], show(mean), between(ci),
                     *(show(kept[key]) for key in ('greedy', 'maj8', 'pass8')),
                     show(kept.get('seen')), show(kept.get('beyond')), f'{kept["length"]:.0f}',
                     *(show(kept[key]) for key in ('format', 'mixing', 'expert_max_load')),
                     show(kept['seconds'])])
    legend = [f'- **{name}**: {meaning}.' for name, meaning in COLUMNS.items()]
    return [*table(heads, rows), '', *legend]


def difference_table(shares, out):
    rows = []
    for one, other in COMPARED:
        if not {one, other} <= shares.keys() or not shares[one]['unseen']:
            continue
        row = [f'{one} → {other}']
        for kind in ('unseen', 'seen'):
            if not shares[one][kind]:
                row.append('–')
                continue
            mean, (low, high) = paired(shares[one][kind], shares[other][kind])
            out['differences'].setdefault(f'{one} to {other}', {})[kind] = [mean, low, high]
            row.append(f'{signed(mean)} ({signed(low)} to {signed(high)})')
        _, low, high = out['differences'][f'{one} to {other}']['unseen']
        row.append('adds' if low > 0 else 'costs' if high < 0 else 'not settled')
        rows.append(row)
    told = ('What each stage adds or costs: differences of the share right at T = 1, problem by '
            'problem, with 95% intervals over number sets. Not settled: the interval on unseen '
            'sets holds 0.')
    return ['## What each stage adds', '', told, '',
            *table(['stages', 'unseen sets', 'seen sets', 'verdict'], rows)]


def student_table(run, shares, out):
    flops, teacher = flops_of(run)
    out['flops'] = flops
    out['teacher_flops'] = teacher
    rows = []
    for stage in ('student_base', *ARMS):
        if stage in shares and stage in flops:
            mean, ci = interval(shares[stage]['unseen'])
            rows.append([stage, STAGES[stage], show(mean), between(ci),
                         f'{flops[stage]:.2e}', f'{teacher:.2e}' if stage == 'distill' else '0'])
    if not rows:
        return []
    told = ("The student's arms take equal FLOPs after one pretraining. The teacher's: all "
            'training of the chain up to `final`, and the sampling of its data.')
    heads = ['arm', 'what', 'unseen', '95%', 'FLOPs', "teacher's FLOPs"]
    return ['## The student', '', told, '', *table(heads, rows)]


def other_numbers(run, seconds, goal, out):
    lines = []
    if forced := numbers_of(run, 'base', file='eval_search.json'):
        out['base_forced_search'] = forced['pass1']
        low, high = forced['pass1_ci']
        lines.append(f'- The base, made to begin with "search": {forced["pass1"]:.3f} right on '
                     f'unseen sets ({low:.3f}–{high:.3f}).')
    sorts = {stage: numbers_of(run, stage, 'sort_test.jsonl', 'eval_sort.json')
             for stage in ('reject', 'final')}
    sorts = {stage: numbers['pass1'] for stage, numbers in sorts.items() if numbers}
    if sorts:
        out['sort'] = sorts
        told = ', '.join(f'{stage} {share:.3f} right' for stage, share in sorts.items())
        lines.append(f'- The second task, sorting, at T = 1: {told}.')
    if (judged := last_of(run, 'reward', 'eval_accuracy')) is not None:
        low, high = last_of(run, 'reward', 'eval_accuracy_ci')
        out['reward_model'] = {'eval_accuracy': judged, 'eval_accuracy_ci': [low, high]}
        lines.append(f'- The reward model that scored sorting in the last RL: {judged:.3f} of its '
                     f'held-out pairs in the right order ({low:.3f}–{high:.3f}).')
    for stage in ('zero', 'rl', 'student_rl'):
        metrics = read_jsonl(run / stage / 'metrics.jsonl')
        begun = next((m['eval_pass1'] for m in metrics if 'eval_pass1' in m), None)
        cost = cost_to(goal, metrics)
        before = sum(seconds.get(s, 0.0) for s in BEFORE.get(stage, ()))
        out[f'{stage}_to_goal'] = {'start': begun, 'before': before,
                                   **dict(zip(('step', 'seconds', 'flops'), cost or ()))}
        told = f'{goal:.2f} on its rollouts not reached'
        if cost:
            told = (f'{goal:.2f} on its rollouts after step {cost[0]}, {cost[1]:.0f} s, '
                    f'{cost[2]:.2e} FLOPs')
        if before:
            told += f'; the stages that made its start took {before:.0f} s more'
        lines.append(f'- {STAGES[stage]}: starts at {show(begun)}, {told}.')
    return lines


def three_problems(run, sampled):
    """The same three problems, one of each kind, through all stages; sampled: {stage: rows}"""
    lines = ['## Three problems through all stages', '']
    what = {'unseen': 'numbers never seen', 'seen': 'numbers seen, the target not',
            'beyond': 'a number larger than any in training'}
    for kind, file in TESTS.items():
        rows = read_jsonl(run / 'data' / file)
        if not rows:
            continue
        problem = problem_of(rows[0])
        lines += [f'{what[kind]}: `{rows[0]["prompt"][0]["content"].strip()}`', '', '```']
        for stage, evaluations in sampled.items():
            for row in evaluations:
                if problem_of(row) == problem:
                    lines.append(f'{stage:12s} {row["samples"][0]["response"]}')
        lines += ['```', '']
    return lines


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
        for axis, key, eval_key in zip(axes, ('right', 'length'), ('eval_pass1', 'eval_length')):
            axis.plot([m['step'] for m in train], [m[key] for m in train],
                      color=f'C{color}', alpha=0.35, linewidth=1)
            axis.plot([m['step'] for m in evals], [m[eval_key] for m in evals],
                      'os^D'[color] + '-', color=f'C{color}', markersize=4, label=STAGES[stage],
                      markerfacecolor='none', alpha=0.8)
    axes[0].set(ylabel='right at T = 1', ylim=(0, 1.02),
                title='RL on Countdown: unseen number sets (marks; 128 problems), rollouts (thin)')
    axes[1].set(ylabel='tokens a completion', xlabel='RL step')
    axes[1].set_title('the last RL samples sorting too, whose completions are short: '
                      'marks are Countdown alone', fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8,
                  loc='outside lower center', ncols=2)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True


def main(cfg):
    run = Path(cfg.run)
    tests = tests_of(run)
    sampled = {stage: read_jsonl(run / stage / 'eval.jsonl')
               for stage in STAGES if numbers_of(run, stage)}
    shares = {stage: evaluated(rows, tests) for stage, rows in sampled.items()}
    if not shares:
        sys.exit(f'{run}: no stage has an eval.json; run `make r1` first')
    seconds, wall = seconds_by_stage(run)
    out = {'seconds': wall, 'stages': {}, 'differences': {}}

    problems = numbers_of(run, next(iter(shares)))['problems']
    text = ['# nanoR1: the R1 recipe on Countdown', '',
            f'{problems} problems of number sets that occur in no training file, 8 samples each at '
            f'T = 1. {wall:.0f} s in all.', '',
            *stage_table(run, shares, seconds, out), '',
            *other_numbers(run, seconds, cfg.goal, out), '',
            *difference_table(shares, out), '',
            *student_table(run, shares, out), '']
    if plot(run, run / 'curves.png'):
        text += ['![curves](curves.png)', '']
    text += three_problems(run, sampled)

    (run / 'report.md').write_text('\n'.join(text).rstrip() + '\n', encoding='utf-8')
    write_jsonl(run / 'report.json', [out])
    print('\n'.join(text))


if __name__ == '__main__':
    start(main, Config)
