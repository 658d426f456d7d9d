"""
The last stage of `make smol`: reads what the other stages wrote and prints, plots and writes it up.

    python tools/report_smol.py --run=out/smol  # -> report.md, report.json, curves.png ([plot]
                                                #    extra)
    python tools/report_smol.py --combine="['dev/smol/seed1.json', 'dev/smol/seed2.json']"

It computes nothing about models: what was sampled comes from each stage's eval.jsonl and eval.json
(evaluate.py), curves and costs from metrics.jsonl and config.run.json (sft.py, grpo.py), wall-clock
from seconds.txt (Makefile). Two tests are told apart by the files in RUN/data: held-out problems of
the training's kind (test.jsonl, the figure) and SVAMP (svamp.jsonl). Intervals are over problems,
each of which is one number, whatever the number of its samples.

With `combine` it prints the report.json of several seeds side by side, and the bars.
"""

import json
import os
import platform
import re
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run as start

import torch

from evaluate import average, mean_ci, write_jsonl
from rewards import right
from tools.report import (between, last_of, numbers_of, paired, read_jsonl, show, signed, table,
                          timings, wall_clock)

STAGES = {
    'before': 'the released model, told in the prompt what to write',
    'cold': 'SFT on a thousand short traces',
    'rl': 'GRPO from cold: accuracy, format',
    'reject': "SFT of the released model on rl's right samples",
    'final': 'GRPO from reject',
}
CONTROLS = {   # reported where they were run, no part of the chain's wall-clock
    'control_zero': "GRPO from the released model with R1-Zero's template",
    'control_sft': 'SFT from cold, as many steps as rl',
}
STARTS = {'rl': 'cold', 'final': 'reject'}   # of each RL whose start is evaluated as it is
RL = (*STARTS, 'control_zero')
COMPARED = [('before', 'cold'), ('cold', 'rl'), ('rl', 'reject'), ('reject', 'final'),
            ('rl', 'final'), ('cold', 'control_sft'), ('control_sft', 'rl')]
TESTS = {'test': 'held out', 'svamp': 'SVAMP'}   # file in RUN/data -> what it is called
# key -> what it is called, test, number of evaluate.py
MEASURES = {
    'pass1': ('T = 1', 'test', 'pass1'),
    'greedy': ('greedy', 'test', 'greedy'),
    'maj8': ('maj@8', 'test', 'maj8'),
    'pass8': ('pass@8', 'test', 'pass8'),
    'svamp': ('SVAMP at T = 1', 'svamp', 'pass1'),
    'svamp_greedy': ('SVAMP greedy', 'svamp', 'greedy'),
    'svamp_pass8': ('SVAMP pass@8', 'svamp', 'pass8'),
}
LEARNT = ('pass8', 'greedy', 'svamp')   # what rises where an RL has taught something new
COLUMNS = {
    'T = 1': 'share of right samples at temperature 1 on held-out problems, whose texts are near '
             'none of training; the figure',
    '95%': 'the interval over problems of the column before it',
    'greedy, maj@8, pass@8': 'the most probable answer, the majority of 8 samples, at least one '
                             'right among 8',
    'SVAMP, SVAMP greedy, SVAMP pass@8': 'the same on problems that were varied to fool models',
    'tokens': 'mean length of a sample, held-out problems as the columns that follow',
    'format': 'share of samples with the tags where they belong',
    'entropy': 'nats a token of the last step of RL',
    's': 'seconds of training, with its own evaluations, loading and saving',
    'GiB': 'the largest memory of the process that trained',
}
SECONDS = {   # file that a command writes last -> what its time went into
    'config.json': 'training',
    'eval.json': 'evaluation',
    'samples.jsonl': 'rejection sampling',
}
SETTINGS = ('seed', 'dtype', 'threads', 'steps', 'learning_rate', 'schedule', 'batch_rows',
            'micro_rows', 'row_len', 'prompts', 'group', 'micro_tokens', 'max_new_tokens',
            'temperature', 'rewards')   # keys of a trainer that a report repeats


@dataclass
class Config:
    run: str = 'out/smol'                               # folder of the chain
    combine: list[str] = field(default_factory=list)    # instead: the report.json of several seeds


# --------------------------------------------------------------------------------------------------
# what the stages wrote


def tests_of(run):
    """-> {test: rows of its problem file}. ValueError: a row without an "id", or one id twice, so
    that samples could be those of another problem."""
    tests = {test: read_jsonl(run / 'data' / f'{test}.jsonl') for test in TESTS}
    seen = {}
    for test, rows in tests.items():
        for number, row in enumerate(rows, 1):
            where = f'{run}/data/{test}.jsonl:{number}'
            if row.get('id') is None:
                raise ValueError(f'{where}: the row has no "id" to know its samples by')
            if row['id'] in seen:
                raise ValueError(f'{where}: the id {row["id"]!r} is taken by {seen[row["id"]]}')
            seen[row['id']] = where
    return tests


def evaluated(rows, tests):
    """
    A stage's rows of eval.jsonl -> {measure: {id: value}}, the values that are averaged in each of
    MEASURES but the majorities: 0, 1, or a share of the samples. The greedy answers and pass@8 are
    not there where the file has them not.
    """
    keys_of = {}    # id -> the measures of its test
    for test, problems in tests.items():
        keys = {name: key for key, (_, of, name) in MEASURES.items() if of == test}
        keys_of |= {row['id']: keys for row in problems}
    values = defaultdict(dict)
    for row in rows:
        if row['id'] not in keys_of:
            raise ValueError(f'the problem {row["id"]!r} in an eval.jsonl is in no file of '
                             'RUN/data: the data was made anew; remove the stages, too')
        keys = keys_of[row['id']]
        scores = [float(right(sample)) for sample in row['samples']]
        values[keys['pass1']][row['id']] = average(scores)
        if len(scores) >= 8:
            values[keys['pass8']][row['id']] = max(scores[:8])
        if 'greedy' in row:
            values[keys['greedy']][row['id']] = float(right(row['greedy']))
    return dict(values)


def seconds_of(run):
    """-> {stage: {what its time went into: seconds}}, and the seconds in which anything of the
    chain ran, the controls left out"""
    seconds = defaultdict(lambda: defaultdict(float))
    spans = []
    for stage, file, begun, ended in timings(run):
        seconds[stage][SECONDS.get(file, 'data')] += ended - begun
        if stage not in CONTROLS:
            spans.append((begun, ended))
    return {stage: dict(kinds) for stage, kinds in seconds.items()}, wall_clock(spans)


def settings_of(run):
    """-> what the figures depend on: the model's name, {stage: SETTINGS of its trainer}, versions
    and processor"""
    stages = {}
    models = []
    for stage in (*STAGES, *CONTROLS):
        path = run / stage / 'config.run.json'
        if path.exists():
            cfg = json.loads(path.read_text())
            stages[stage] = {key: cfg[key] for key in SETTINGS if key in cfg}
            models.append(cfg['init_from'])
    path = run / 'model.txt'
    model = path.read_text().strip() if path.exists() else next(iter(models), None)
    if model and Path(model).is_dir():
        model = f'a folder: {Path(model).resolve().name}'   # of this machine, its path says nothing
    first = next(iter(stages.values()), {})
    return {
        'model': model,
        **{key: first.get(key) for key in ('seed', 'dtype', 'threads')},
        'stages': stages,
        'torch': torch.__version__,
        'python': platform.python_version(),
        'cpu': processor(),
        'cores': os.cpu_count(),
    }


def processor():
    """The name of the processor; Python's own says only x86_64 on Linux."""
    path = Path('/proc/cpuinfo')
    text = path.read_text() if path.exists() else ''
    named = re.search(r'^model name\s*: (.+)$', text, re.M)
    return named[1] if named else platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------------------
# statistics


def difference(before, after):
    """{id: value} twice -> [mean of after - before, low, high], paired; None of no problems"""
    if not before or not after or before.keys().isdisjoint(after):
        return None
    mean, (low, high) = paired(before, after, group_of=str)
    return [mean, low, high]


def verdict(differences):
    """{measure: [mean, low, high]} of an RL to its start -> (verdict, the measures that settle it),
    see RULE"""
    rises = [key for key in LEARNT if differences.get(key) and differences[key][1] > 0]
    if rises:
        return 'learnt', rises
    _, low, high = differences['pass1']
    if low > 0:
        return 'sharpened', ['pass1']
    return ('lost' if high < 0 else 'not settled'), ['pass1']


RULE = ('An RL has **learnt** where greedy, pass@8 or SVAMP at T = 1 rises, that is, the paired '
        'interval of the difference to its start lies above 0; it has **sharpened** where of these '
        'none rises but T = 1 does: what the model could say before it now says more often. It has '
        '**lost** where T = 1 falls; else it is **not settled**. Three chances at 2.5% each: of '
        'RLs that change nothing one in 14 would be called learnt.')


# --------------------------------------------------------------------------------------------------
# the report, part by part: each returns lines of markdown and notes its numbers in `out`


def stage_table(run, values, seconds, out):
    heads = ['stage', 'what', 'T = 1', '95%', 'greedy', 'maj@8', 'pass@8', 'SVAMP', '95%',
             'SVAMP greedy', 'SVAMP pass@8', 'tokens', 'format', 'entropy', 's', 'GiB']
    rows = []
    for stage in values:
        kept = stage_numbers(run, stage, values[stage])
        kept['seconds'] = seconds.get(stage, {})
        out['stages'][stage] = kept
        rows.append([stage, (STAGES | CONTROLS)[stage],
                     show(kept['pass1']), between(kept['pass1_ci']),
                     *(show(kept[key]) for key in ('greedy', 'maj8', 'pass8')),
                     show(kept['svamp']), between(kept['svamp_ci']),
                     *(show(kept[key]) for key in ('svamp_greedy', 'svamp_pass8')),
                     f'{kept["length"]:.0f}', show(kept['format']), show(kept['entropy']),
                     show(whole(kept['seconds'].get('training'))), tenths(kept['memory_gib'])])
    legend = [f'- **{name}**: {meaning}.' for name, meaning in COLUMNS.items()]
    return [*table(heads, rows), '', *legend]


def stage_numbers(run, stage, values):
    """-> the numbers of a stage: each of MEASURES with its interval under "..._ci", what else the
    table has; None where a number is not known"""
    kept = {}
    numbers = {test: numbers_of(run, stage, f'{test}.jsonl') or {} for test in TESTS}
    for key, (_, test, name) in MEASURES.items():
        kept[key] = numbers[test].get(name)
        kept[f'{key}_ci'] = numbers[test].get(f'{name}_ci')
        if kept[f'{key}_ci'] is None and values.get(key):   # evaluate.py gives none to pass@8
            _, kept[f'{key}_ci'] = mean_ci(list(values[key].values()))
    for key in ('length', 'format', 'truncated'):
        kept[key] = numbers['test'].get(key)
    kept['problems'] = {test: numbers[test].get('problems') for test in TESTS}
    kept['entropy'] = last_of(run, stage, 'entropy')
    memory = [m['memory_gib'] for m in read_jsonl(run / stage / 'metrics.jsonl')
              if 'memory_gib' in m]
    kept['memory_gib'] = max(memory, default=None)
    return kept


def whole(seconds):
    return None if seconds is None else round(seconds)


def tenths(value):
    return '–' if value is None else f'{value:.1f}'


def told(differences, key):
    """A difference in words of the table: +0.100 (+0.050 to +0.150)"""
    if not differences.get(key):
        return '–'
    mean, low, high = differences[key]
    return f'{signed(mean)} ({signed(low)} to {signed(high)})'


def difference_table(values, out):
    keys = ('pass1', 'greedy', 'pass8', 'svamp')
    rows = []
    for one, other in COMPARED:
        if not {one, other} <= values.keys():
            continue
        differences = {key: difference(values[one].get(key), values[other].get(key))
                       for key in MEASURES if key != 'maj8'}
        out['differences'][f'{one} to {other}'] = differences
        rows.append([f'{one} → {other}', *(told(differences, key) for key in keys),
                     effect(differences['pass1'])])
    text = ('Differences problem by problem, with 95% intervals over problems. The verdict is on '
            'T = 1: not settled where its interval holds 0.')
    heads = ['stages', *(MEASURES[key][0] for key in keys), 'verdict']
    return ['## What each stage adds', '', text, '', *table(heads, rows)]


def effect(found):
    """[mean, low, high] or None -> what the interval says"""
    if found is None:
        return '–'
    _, low, high = found
    return 'adds' if low > 0 else 'costs' if high < 0 else 'not settled'


def verdicts(out):
    lines = ['## Sharpened or learnt', '', RULE, '']
    for stage, begun in STARTS.items():
        differences = out['differences'].get(f'{begun} to {stage}')
        if not differences or not differences['pass1']:
            continue
        word, by = verdict(differences)
        out['verdicts'][stage] = {'verdict': word, 'by': by}
        because = ', '.join(MEASURES[key][0] for key in by)
        numbers = '; '.join(f'{MEASURES[key][0]} {told(differences, key)}'
                            for key in ('pass1', *LEARNT))
        lines.append(f'- **{stage}**, from {begun}: **{word}**, by {because}. {numbers}.'
                     + own_evaluations(out['curves'].get(stage)))
    if 'control_zero' in out['stages']:
        lines.append('- **control_zero**: no verdict, since its start was evaluated with another '
                     f'prompt. T = 1 {share_told(out["stages"]["control_zero"], "pass1")}.'
                     + own_evaluations(out['curves'].get('control_zero')))
    return lines


def own_evaluations(curve):
    """What an RL's first and last evaluation on the way say, which share their problems."""
    if not curve or len(curve['eval_step']) < 2:
        return ''
    first, last = (f'{curve["eval_pass1"][i]:.3f} at step {curve["eval_step"][i]}' for i in (0, -1))
    return f' On the way: {first}, {last} ({curve["eval_problems"][-1]} problems, one sample each).'


def costs(run, seconds, out):
    """Where the time of each training went. What its command took beyond sampling and training was
    evaluation, loading and saving."""
    rows = []
    for stage in out['stages']:
        metrics = read_jsonl(run / stage / 'metrics.jsonl')
        steps = [m for m in metrics if 'seconds' in m]
        if not steps:
            continue
        sampling = sum(m.get('seconds_sampling', 0.0) for m in steps)
        trained = steps[-1]['seconds'] - sampling
        of_all = seconds.get(stage, {}).get('training')
        rest = None if of_all is None else max(0.0, of_all - sampling - trained)
        out['costs'][stage] = {'steps': steps[-1]['step'], 'sampling': sampling,
                               'training': trained, 'rest': rest,
                               'seconds_a_step': steps[-1]['seconds'] / steps[-1]['step']}
        rows.append([stage, steps[-1]['step'], tenths(out['costs'][stage]['seconds_a_step']),
                     show(whole(sampling)) if sampling else '–', show(whole(trained)),
                     show(whole(rest)), tenths(out['stages'][stage]['memory_gib'])])
    heads = ['stage', 'steps', 's a step', 'sampling', 'training', 'the rest', 'GiB']
    parts = defaultdict(float)
    for stage, kinds in seconds.items():
        if stage not in CONTROLS:
            for kind, spent in kinds.items():
                parts[kind] += spent
    out['seconds_by_kind'] = dict(parts)
    spent = ', '.join(f'{kind} {s:.0f} s' for kind, s in parts.items())
    text = ('Seconds of each training: of a step, of all sampling, of all log-probs, gradients and '
            'updates, and what its command took beyond these: evaluations, loading, saving.')
    lines = ['## What it cost', '', text, '', *table(heads, rows)]
    return [*lines, '', f'The whole chain: {spent}.'] if parts else lines


def three_problems(tests, sampled):
    """The same three problems through all stages, the first sample of each. sampled: {stage:
    rows of eval.jsonl}"""
    lines = ['## Three problems through all stages', '',
             "The first of each stage's eight samples.", '']
    for what, row in chosen(tests).items():
        lines += [f'{what}, whose answer is {row["answer"]}:', '', *quoted(question_of(row)), '',
                  '```']
        for stage, rows in sampled.items():
            for sample in [r['samples'][0] for r in rows if r['id'] == row['id']]:
                mark = 'right' if right(sample) else 'wrong'
                lines += textwrap.wrap(short(sample['response']), 100,
                                       initial_indent=f'{stage:13s}{mark:7s}',
                                       subsequent_indent=' ' * 20)
        lines += ['```', '']
    return lines


def chosen(tests):
    """-> {what it is: row}, the same whatever the samples: the first held-out problem, the first
    one after it that takes two steps, the first of SVAMP"""
    found = {}
    test = tests['test']
    if test:
        found['The first held-out problem'] = test[0]
    two = [row for row in test[1:] if takes_two_steps(row)]
    if two:
        found['The first one of two steps'] = two[0]
    if tests['svamp']:
        found['The first one of SVAMP'] = tests['svamp'][0]
    return found


def takes_two_steps(row):
    """Whether the problem has three numbers or more, and its answer is none of + − × ÷ of two of
    them."""
    numbers = [Fraction(text.replace(',', ''))
               for text in re.findall(r'\d[\d,]*(?:\.\d+)?', question_of(row))]
    results = set(numbers)
    for a, b in permutations(numbers, 2):
        results |= {a + b, a - b, a * b}
        if b:
            results.add(a / b)
    return len(numbers) > 2 and Fraction(row['answer']) not in results


def question_of(row):
    prompt = row['prompt']
    return ' '.join((prompt if isinstance(prompt, str) else prompt[-1]['content']).split())


def quoted(text):
    return textwrap.wrap(text, 98, initial_indent='> ', subsequent_indent='> ')


def short(text, head=150, tail=60):
    """One line; of a long text its beginning and its end, where the answer stands."""
    text = ' '.join(text.split()) or '(nothing)'
    if len(text) <= head + tail + 5:
        return text
    return f'{text[:head]} […] {text[-tail:]}'


# --------------------------------------------------------------------------------------------------
# curves


def curves_of(run):
    """-> {RL stage: {"step", "right", "length", "entropy" of its rollouts, and "eval_step",
    "eval_pass1", "eval_pass1_ci", "eval_length" of its evaluations: a list each}}"""
    curves = {}
    for stage in RL:
        metrics = read_jsonl(run / stage / 'metrics.jsonl')
        steps = [m for m in metrics if m.get('right') is not None]
        evaluations = [m for m in metrics if m.get('eval_pass1') is not None]
        if steps:
            curves[stage] = {key: [m[key] for m in steps]
                             for key in ('step', 'right', 'length', 'entropy')}
            curves[stage]['eval_step'] = [m['step'] for m in evaluations]
            for key in ('eval_pass1', 'eval_pass1_ci', 'eval_length', 'eval_problems'):
                curves[stage][key] = [m[key] for m in evaluations]
    return curves


LOOKS = {   # of an RL's curves, to be told apart without colours: colour, mark, line
    'rl': ('C0', 'o', '-'),
    'final': ('C3', 's', '--'),
    'control_zero': ('0.35', '^', ':'),
}


def plot(curves, path):
    """Right at T = 1, tokens and entropy over RL steps. -> whether it was drawn"""
    if not curves:
        return False
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing; pip install -e '.[plot]'", file=sys.stderr)
        return False
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, 1, figsize=(7, 8.5), sharex=True, constrained_layout=True,
                                height_ratios=(5, 3, 3))
    for stage, found in curves.items():
        color, mark, line = LOOKS[stage]
        for axis, key in zip(axes, ('right', 'length', 'entropy')):
            thin = {'alpha': 0.5, 'linewidth': 0.8} if key != 'entropy' else {'linewidth': 1.4}
            axis.plot(found['step'], found[key], line, color=color, **thin)
        marks = {'fmt': mark + line, 'color': color, 'markersize': 6, 'markerfacecolor': 'white',
                 'linewidth': 1.8, 'capsize': 3, 'elinewidth': 0.8}
        shares = found['eval_pass1']
        bars = [[p - low for p, (low, _) in zip(shares, found['eval_pass1_ci'])],
                [high - p for p, (_, high) in zip(shares, found['eval_pass1_ci'])]]
        axes[0].errorbar(found['eval_step'], shares, bars, **marks,
                         label=f'{stage}: {(STAGES | CONTROLS)[stage]}')
        axes[1].errorbar(found['eval_step'], found['eval_length'], **marks)

    problems = {n for found in curves.values() for n in found['eval_problems']}
    axes[0].set_title('RL on word problems: held out (marks, '
                      f'{" or ".join(map(str, sorted(problems)))} problems, 95%), rollouts (thin)',
                      fontsize=11)
    axes[0].set(ylabel='right at T = 1', ylim=(0, None))
    axes[1].set(ylabel='tokens a sample', ylim=(0, None))
    axes[2].set(ylabel='entropy, nats a token', xlabel='RL step', ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc='outside lower center')
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


# --------------------------------------------------------------------------------------------------
# several seeds


# bar -> lower stage, higher stage, by how much at T = 1, whether their intervals must be disjoint
ABOVE = {
    'rl ≥ cold + 0.10, disjoint': ('cold', 'rl', 0.10, True),
    'final above rl, paired': ('rl', 'final', 0.0, False),
    'control_sft below rl, disjoint': ('control_sft', 'rl', 0.0, True),
}


def bars(report):
    """-> {bar: (what was reached, whether it was met)} of one report; '–', None where it was not
    run"""
    stages = report['stages']
    minutes = report['seconds'] / 60
    memory = max((numbers['memory_gib'] or 0.0 for numbers in stages.values()), default=0.0)
    problems = min(report['problems'].values())
    cold = stages['cold']['pass1'] if 'cold' in stages else None
    reached = {
        'whole chain ≤ 100 minutes': (f'{minutes:.0f}', minutes <= 100),
        'trainers ≤ 8 GiB': (f'{memory:.1f}', memory <= 8),
        '≥ 300 problems a test': (str(problems), problems >= 300),
        'cold ≥ 0.25 at T = 1': (show(cold), None if cold is None else cold >= 0.25),
    }
    for bar, (low_stage, high_stage, least, is_disjoint) in ABOVE.items():
        differences = report['differences'].get(f'{low_stage} to {high_stage}', {})
        reached[bar] = told(differences, 'pass1'), None
        if differences.get('pass1'):
            mean, low, _ = differences['pass1']
            is_above = low > 0
            if is_disjoint:
                is_above = stages[high_stage]['pass1_ci'][0] > stages[low_stage]['pass1_ci'][1]
            reached[bar] = told(differences, 'pass1'), mean >= least and is_above
    return reached


def combined(paths):
    """-> lines of markdown: each measure of each stage, the differences, verdicts and bars, a
    column a seed. ValueError: a report of another chain or model than the first, a seed twice."""
    reports = {}
    for path in paths:
        report = json.loads(Path(path).read_text(encoding='utf-8'))
        if 'verdicts' not in report:
            raise ValueError(f'{path} is no report.json of `make smol`')
        first = next(iter(reports.values()), report)
        for key in ('model', 'dtype'):
            if report['config'][key] != first['config'][key]:
                raise ValueError(f'{path}: its {key} is {report["config"][key]!r}, that of '
                                 f'{paths[0]} is {first["config"][key]!r}')
        name = f'seed {report["config"]["seed"]}'
        if name in reports:
            raise ValueError(f'{path}: there is a report of {name} already')
        reports[name] = report

    lines = []
    for key, (name, _, _) in MEASURES.items():
        rows = []
        for stage in (*STAGES, *CONTROLS):
            cells = [share_told(report['stages'].get(stage), key) for report in reports.values()]
            if set(cells) != {'–'}:
                rows.append([stage, *cells])
        lines += table([name, *reports], rows) + ['']

    rows = []
    for one, other in COMPARED:
        between_them = f'{one} to {other}'
        cells = [told(report['differences'].get(between_them, {}), 'pass1')
                 for report in reports.values()]
        if set(cells) != {'–'}:
            rows.append([f'{one} → {other}', *cells])
    lines += table(['T = 1, problem by problem', *reports], rows) + ['']

    rows = []
    for stage in STARTS:
        found = [report['verdicts'].get(stage) for report in reports.values()]
        if any(found):
            rows.append([stage, *(verdict_told(one) for one in found)])
    lines += table(['sharpened or learnt', *reports], rows) + ['']

    reached = [bars(report) for report in reports.values()]
    rows = []
    for bar in reached[0]:
        cells = [found[bar] for found in reached]
        rows.append([bar, *(f'{figure}{MET[is_met]}' for figure, is_met in cells)])
    return lines + table(['bar', *reports], rows)


MET = {True: ': met', False: ': missed', None: ''}


def share_told(numbers, key):
    """A measure of a stage with its interval, 0.318 (0.253–0.392); numbers: of the stage, or
    None"""
    if not numbers or numbers[key] is None:
        return '–'
    interval = numbers[f'{key}_ci']
    return show(numbers[key]) + (f' ({between(interval)})' if interval else '')


def verdict_told(found):
    if not found:
        return '–'
    return f'{found["verdict"]}, by {", ".join(MEASURES[key][0] for key in found["by"])}'


# --------------------------------------------------------------------------------------------------


def main(cfg):
    if cfg.combine:
        print('\n'.join(combined(cfg.combine)))
        return
    run = Path(cfg.run)
    tests = tests_of(run)
    sampled = {stage: read_jsonl(run / stage / 'eval.jsonl')
               for stage in (*STAGES, *CONTROLS) if numbers_of(run, stage)}
    if not sampled:
        sys.exit(f'{run}: no stage has an eval.json; run `make smol` first')
    values = {stage: evaluated(rows, tests) for stage, rows in sampled.items()}
    seconds, wall = seconds_of(run)
    first = next(iter(sampled))
    problems = {test: (numbers_of(run, first, f'{test}.jsonl') or {}).get('problems', 0)
                for test in TESTS}
    samples = numbers_of(run, first)['samples']
    out = {'chain': 'smol', 'config': settings_of(run), 'problems': problems, 'samples': samples,
           'seconds': wall, 'stages': {}, 'differences': {}, 'verdicts': {}, 'costs': {},
           'curves': curves_of(run)}

    text = ['# nanoR1: the R1 recipe on a released model', '',
            *textwrap.wrap(headline(out), 100, break_on_hyphens=False), '',
            *stage_table(run, values, seconds, out), '',
            *difference_table(values, out), '',
            *verdicts(out), '',
            *costs(run, seconds, out), '']
    if plot(out['curves'], run / 'curves.png'):
        text += ['![curves](curves.png)', '']
    text += three_problems(tests, sampled)

    (run / 'report.md').write_text('\n'.join(text).rstrip() + '\n', encoding='utf-8')
    write_jsonl(run / 'report.json', [out])
    print('\n'.join(text))


def headline(out):
    cfg = out['config']
    return (f'{cfg["model"]}, seed {cfg["seed"]}, {cfg["dtype"]}, {cfg["threads"]} of '
            f'{cfg["cores"]} cores ({cfg["cpu"]}), torch {cfg["torch"]}. {out["problems"]["test"]} '
            f'held-out problems and {out["problems"]["svamp"]} of SVAMP, {out["samples"]} samples '
            f'each at T = 1. {out["seconds"]:.0f} s in all, {out["seconds"] / 60:.0f} minutes.')


if __name__ == '__main__':
    start(main, Config)
