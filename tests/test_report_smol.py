"""tools/report_smol.py on made-up runs of `make smol` whose report is known by hand."""
import json
import math
import re
from pathlib import Path

import pytest

import evaluate
from configurator import parse
from tools import report_smol as report

RIGHT = '<think>2 + 3 = 5; 5 * 2 = 10</think><answer>10</answer>'
WRONG = '<think>2 * 3 = 6</think><answer>6</answer>'
TEXTS = {
    'test': ['Tom has 2 pens and buys 3. How many has he?',
             'Ann reads 4 of 9 pages. How many are left?',
             'A box holds 7 red and 4 blue balls. 3 are lost. How many are there?',
             'Max has 1,200 coins and finds 30. How many has he?'],
    'svamp': ['Kim had 8 cards, gave 3 away. How many are left?',
              'Lou bakes 6 trays of 5. How many?'],
}
ANSWERS = {'test': ['5', '5', '8', '1230'], 'svamp': ['5', '30']}


def sample(is_right):
    return {'response': RIGHT if is_right else WRONG, 'answer': '10' if is_right else '6',
            'rewards': {'accuracy': float(is_right), 'format': 1.0}, 'length': 30 - 10 * is_right,
            'finished': True, 'mixed': False, 'task': 'math'}


def problems(test, count=None):
    rows = []
    for i in range(count or len(TEXTS[test])):
        text = TEXTS[test][i % len(TEXTS[test])]
        answer = ANSWERS[test][i % len(TEXTS[test])]
        rows.append({'prompt': [{'role': 'user', 'content': text}], 'answer': answer,
                     'task': 'math', 'id': f'{test}/{i}'})
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def write_stage(run, stage, right, greedy, n=8):
    """The evaluation of a stage. right: {test: how many samples of each problem are right};
    greedy: {test: 0 or 1 of each}"""
    summary = {}
    written = []
    for test, counts in right.items():
        scored = [[sample(i < count) for i in range(n)] for count in counts]
        numbers = evaluate.statistics(scored)
        numbers['greedy'], numbers['greedy_ci'] = evaluate.mean_ci([float(g) for g in greedy[test]])
        summary[f'somewhere/data/{test}.jsonl'] = numbers
        for row, samples, answer in zip(problems(test, len(counts)), scored, greedy[test]):
            written.append({**row, 'samples': samples, 'greedy': sample(answer)})
    write(run / stage / 'eval.jsonl', written)
    write(run / stage / 'eval.json', [summary])


def write_training(run, stage, steps, sampled=None):
    """metrics.jsonl and config.run.json of a trainer, 3 s a step; sampled: of those of an RL"""
    lines = []
    for step in range(1, steps + 1):
        line = {'step': step, 'seconds': 3.0 * step, 'memory_gib': 5.0 if step == 2 else 4.0}
        if sampled:
            line |= {'right': 0.2 + 0.1 * step, 'length': 30.0 + step, 'entropy': 0.5 / step,
                     'seconds_sampling': sampled, 'seconds_training': 3.0 - sampled}
        lines.append(line)
    if sampled:
        for step in (0, steps):
            evaluation = {'eval_pass1': 0.25, 'eval_pass1_ci': [0.2, 0.3], 'eval_length': 31.0,
                          'eval_problems': 128}
            lines.insert(step + (step > 0), {'step': step, **evaluation})
    write(run / stage / 'metrics.jsonl', lines)
    settings = {'init_from': 'hub/model', 'seed': 7, 'threads': 2, 'dtype': 'float32',
                'steps': steps}
    write(run / stage / 'config.run.json', [settings])


SAME = {'test': [1, 0, 1, 0], 'svamp': [0, 1]}


def make_run(run):
    """A chain in which the first RL only doubles the share of right samples of each problem, and
    the last raises that of SVAMP's. The control control_sft was run, the other was not."""
    for test in TEXTS:
        write(run / 'data' / f'{test}.jsonl', problems(test))
    none = {'test': [0, 0, 0, 0], 'svamp': [0, 0]}
    write_stage(run, 'before', none, none)
    write_stage(run, 'cold', {'test': [2, 2, 2, 2], 'svamp': [2, 2]}, SAME)
    write_stage(run, 'rl', {'test': [4, 4, 4, 4], 'svamp': [2, 2]}, SAME)
    write_stage(run, 'reject', {'test': [4, 4, 2, 2], 'svamp': [2, 2]}, SAME)
    write_stage(run, 'final', {'test': [4, 4, 4, 2], 'svamp': [3, 3]}, SAME)
    write_stage(run, 'control_sft', {'test': [2, 2, 3, 1], 'svamp': [0, 8]}, SAME)
    for stage, steps, sampled in (('cold', 4, None), ('rl', 3, 1.0), ('reject', 4, None),
                                  ('final', 2, 1.0), ('control_sft', 4, None)):
        write_training(run, stage, steps, sampled)
    spans = ['data/test.jsonl 0 2', 'before/eval.json 2 12', 'cold/config.json 12 30',
             'rl/config.json 30 35', 'rl/config.json 100 110', 'rl/samples.jsonl 110 130',
             'reject/config.json 130 150', 'final/config.json 150 160', 'rl/eval.json 160 180',
             'final/eval.json 165 190', 'control_sft/config.json 200 900']
    (run / 'seconds.txt').write_text(''.join(f'elsewhere/smol/{span}\n' for span in spans))
    return run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('made') / 'smol')


@pytest.fixture(scope='module')
def of_run(run):
    """report.json and report.md of the run."""
    return reported(run)


def reported(run):
    report.main(report.Config(run=str(run)))
    return json.loads((run / 'report.json').read_text()), (run / 'report.md').read_text()


def test_the_numbers_of_a_stage_are_those_of_its_samples(of_run):
    out, text = of_run
    assert list(out['stages']) == ['before', 'cold', 'rl', 'reject', 'final', 'control_sft']
    rl = out['stages']['rl']
    assert (rl['pass1'], rl['greedy'], rl['pass8'], rl['maj8']) == (0.5, 0.5, 1.0, 1.0)
    assert (rl['svamp'], rl['svamp_greedy'], rl['svamp_pass8']) == (0.25, 0.5, 1.0)
    assert (rl['length'], rl['format'], rl['memory_gib']) == (25.0, 1.0, 5.0)
    assert rl['entropy'] == 0.5 / 3 and out['stages']['cold']['entropy'] is None
    # Wilson's interval of four problems that all have a right sample: n / (n + z²) to 1
    low, high = rl['pass8_ci']
    assert low == pytest.approx(4 / (4 + 1.96 ** 2)) and high == pytest.approx(1.0)
    for stage, numbers in out['stages'].items():
        assert re.search(rf'^\| {stage} \|.*\| {numbers["pass1"]:.3f} \|', text, re.M)
        for key in report.MEASURES:
            low, high = numbers[f'{key}_ci']
            assert 0 <= low <= numbers[key] <= high <= 1
    assert 'control_zero' not in text
    heads = text[text.index('| stage |'):].split('\n')[0].strip('| ').split(' | ')
    explained = ', '.join(report.COLUMNS)
    assert [head for head in heads[2:] if head not in explained] == []


def test_differences_are_paired_and_their_intervals_are_those_of_the_textbook(of_run):
    out, text = of_run
    assert out['differences']['cold to rl']['pass1'] == [0.25, 0.25, 0.25]
    mean, low, high = out['differences']['reject to final']['pass1']   # of 0, 0, 1/4, 0
    half = 1.96 * 0.125 / math.sqrt(4)                                 # s of one 1/4 in four
    assert (mean, low, high) == pytest.approx((0.0625, 0.0625 - half, 0.0625 + half))
    told = r'\+0\.062 \(−0\.060 to \+0\.185\)'
    assert re.search(rf'^\| reject → final \| {told} \|.*\| not settled \|', text, re.M)
    assert re.search(r'^\| cold → rl \|.*\| adds \|', text, re.M)
    assert re.search(r'^\| rl → reject \|.*\| costs \|', text, re.M) is None   # 0, 0, -1/4, -1/4
    assert 'control_sft to rl' in out['differences']


def test_an_rl_has_sharpened_or_learnt_by_the_rule(of_run):
    out, text = of_run
    assert out['verdicts'] == {'rl': {'verdict': 'sharpened', 'by': ['pass1']},
                               'final': {'verdict': 'learnt', 'by': ['svamp']}}
    assert '**rl**, from cold: **sharpened**, by T = 1. T = 1 +0.250 (+0.250 to +0.250)' in text
    up, zero, down = [0.1, 0.05, 0.15], [0.1, -0.01, 0.2], [-0.1, -0.2, -0.05]
    cases = [({'pass1': up, 'pass8': up, 'greedy': zero}, 'learnt', ['pass8']),
             ({'pass1': down, 'greedy': up, 'svamp': up}, 'learnt', ['greedy', 'svamp']),
             ({'pass1': up, 'greedy': None, 'svamp': down}, 'sharpened', ['pass1']),
             ({'pass1': zero, 'pass8': down, 'svamp': zero}, 'not settled', ['pass1']),
             ({'pass1': down, 'pass8': zero, 'svamp': zero}, 'lost', ['pass1'])]
    for differences, word, by in cases:
        assert report.verdict(differences) == (word, by)


def test_time_is_split_by_what_it_went_into_and_controls_are_no_part_of_it(of_run):
    out, text = of_run
    assert out['seconds'] == 35 + 90          # 65 s of waiting, and what overlaps counts once
    assert out['stages']['rl']['seconds'] == {'training': 15.0, 'rejection sampling': 20.0,
                                              'evaluation': 20.0}
    assert out['costs']['rl'] == {'steps': 3, 'sampling': 3.0, 'training': 6.0, 'rest': 6.0,
                                  'seconds_a_step': 3.0}
    assert out['costs']['cold'] == {'steps': 4, 'sampling': 0.0, 'training': 12.0, 'rest': 6.0,
                                    'seconds_a_step': 3.0}
    assert out['seconds_by_kind'] == {'data': 2.0, 'evaluation': 55.0, 'training': 63.0,
                                      'rejection sampling': 20.0}
    assert '125 s in all' in text


def test_the_configuration_is_told_without_paths_of_the_machine(of_run, tmp_path):
    cfg = of_run[0]['config']
    assert (cfg['model'], cfg['seed'], cfg['dtype'], cfg['threads']) == ('hub/model', 7, 'float32',
                                                                        2)
    assert cfg['stages']['rl']['steps'] == 3 and cfg['cpu'] and cfg['torch']
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'model.txt').write_text(f'{tmp_path}/weights\n')
    assert report.settings_of(tmp_path)['model'] == 'a folder: weights'


def test_the_same_three_problems_go_through_all_stages(of_run):
    out, text = of_run
    shown = text[text.index('## Three problems'):]
    for question in (TEXTS['test'][0], TEXTS['test'][2], TEXTS['svamp'][0]):
        assert f'> {question}' in shown
    for stage in out['stages']:
        assert len(re.findall(rf'^{stage} +(right|wrong) +<think>', shown, re.M)) == 3
    assert re.search(r'^before +wrong +<think>2 \* 3', shown, re.M)
    assert len(re.findall(r'^cold +right +<think>2 \+ 3', shown, re.M)) == 3
    long = report.short('a' * 400 + '\n```\n' + 'b' * 100 + '</answer>')
    assert len(long) < 220 and long.startswith('a' * 100) and long.endswith('b</answer>')


@pytest.mark.parametrize('text, answer, takes', [
    ('7 red and 4 blue, 3 are lost', '8', True),
    ('7 red and 4 blue, 3 are lost', '4', False),       # 7 - 3: one of its numbers is idle
    ('7 red and 4 blue', '28', False),
    ('1,200 coins, 30 and 3', '40', False),             # 1200 / 30
    ('1,200 coins, 30 and 3', '13.333', True)])
def test_a_problem_of_two_steps_has_an_answer_that_no_single_step_gives(text, answer, takes):
    assert report.takes_two_steps({'prompt': text, 'answer': answer}) is takes


def test_the_curves_are_drawn_and_kept(run, of_run):
    pytest.importorskip('matplotlib')
    out, text = of_run
    assert (run / 'curves.png').stat().st_size > 20_000 and '![curves](curves.png)' in text
    rl = out['curves']['rl']
    assert rl['step'] == [1, 2, 3] and rl['right'] == pytest.approx([0.3, 0.4, 0.5])
    assert rl['eval_step'] == [0, 3] and rl['eval_pass1'] == [0.25, 0.25]


def test_a_chain_under_way_is_reported_as_far_as_it_went(tmp_path):
    for test in TEXTS:
        write(tmp_path / 'data' / f'{test}.jsonl', problems(test))
    with pytest.raises(SystemExit, match='no stage has an eval.json'):
        reported(tmp_path)
    write_stage(tmp_path, 'before', {'test': [1, 0], 'svamp': [0, 0]}, SAME, n=2)
    out, text = reported(tmp_path)
    assert out['stages']['before']['pass1'] == 0.25 and out['stages']['before']['pass8'] is None
    assert re.search(r'^\| before \|.*\| – \| – \|', text, re.M)


def test_samples_that_cannot_be_told_apart_are_refused(tmp_path):
    run = make_run(tmp_path)
    rows = problems('test')
    for i, changed, message in ((1, {'id': rows[0]['id']}, 'test.jsonl:2: the id .* is taken'),
                                (2, {'id': None}, 'test.jsonl:3: the row has no "id"'),
                                (3, {'id': 'other'}, "'test/3' .* the data was made anew")):
        write(run / 'data' / 'test.jsonl', [{**row, **(changed if i == j else {})}
                                            for j, row in enumerate(rows)])
        with pytest.raises(ValueError, match=message):
            reported(run)


def test_reports_of_several_seeds_stand_side_by_side_with_the_bars(of_run, tmp_path, capsys):
    out, _ = of_run
    paths = []
    for seed, seconds in ((7, 5940.0), (8, 6061.0)):
        changed = {**out, 'config': {**out['config'], 'seed': seed}, 'seconds': seconds}
        paths.append(tmp_path / f'seed{seed}.json')
        write(paths[-1], [changed])
    capsys.readouterr()
    report.main(parse(report.Config, [f'--combine={list(map(str, paths))}']))
    text = capsys.readouterr().out
    assert '| T = 1 | seed 7 | seed 8 |' in text
    low, high = out['stages']['rl']['pass1_ci']
    share = f'0.500 ({low:.3f}–{high:.3f})'
    assert f'| rl | {share} | {share} |' in text
    assert '| cold → rl | +0.250 (+0.250 to +0.250) | +0.250 (+0.250 to +0.250) |' in text
    assert '| final | learnt, by SVAMP at T = 1 | learnt, by SVAMP at T = 1 |' in text
    assert '| whole chain ≤ 100 minutes | 99: met | 101: missed |' in text
    assert '| trainers ≤ 8 GiB | 5.0: met | 5.0: met |' in text
    assert '| ≥ 300 problems a test | 2: missed | 2: missed |' in text
    assert '| cold ≥ 0.25 at T = 1 | 0.250: met |' in text
    missed = '+0.250 (+0.250 to +0.250): missed'      # four problems: the intervals overlap
    assert f'| rl ≥ cold + 0.10, disjoint | {missed} |' in text
    for changed, message in (({'seed': 7}, 'a report of seed 7 already'),
                             ({'seed': 9, 'model': 'other'}, "its model is 'other'")):
        write(paths[1], [{**out, 'config': {**out['config'], **changed}}])
        with pytest.raises(ValueError, match=message):
            report.combined(paths)
    write(paths[1], [{'stages': {}}])
    with pytest.raises(ValueError, match='no report.json of `make smol`'):
        report.combined(paths)


def test_a_bar_of_disjoint_intervals_is_met_where_they_are_disjoint():
    def stage(pass1, ci):
        return {'pass1': pass1, 'pass1_ci': ci, 'memory_gib': 7.9}
    stages = {'cold': stage(0.3, [0.25, 0.35]), 'rl': stage(0.45, [0.36, 0.5]),
              'control_sft': stage(0.33, [0.3, 0.37]), 'final': stage(0.5, [0.45, 0.55])}
    differences = {'cold to rl': {'pass1': [0.15, 0.1, 0.2]},
                   'rl to final': {'pass1': [0.05, 0.01, 0.09]},
                   'control_sft to rl': {'pass1': [0.12, 0.1, 0.14]}}
    met = report.bars({'stages': stages, 'differences': differences, 'seconds': 0.0,
                       'problems': {'test': 400, 'svamp': 300}})
    assert [found for _, found in met.values()] == [True, True, True, True, True, True, False]


def test_the_chains_make_file_asks_for_this_report():
    text = (Path(report.__file__).parents[1] / 'config' / 'smol' / 'chain.mk').read_text()
    assert text.count('tools/report_smol.py --run=$(RUN)') == 2 and 'tools/report.py' not in text
