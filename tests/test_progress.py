"""progress.py and Log of train.py: what a reader of a terminal and of a log file sees."""
import io
import json
import re
import sys

import pytest

import curves
import progress
import train
from progress import Bar, glance

EACH = 6.0   # seconds


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, 'time', clock)
    return clock


def work(bar, clock, times, seconds):
    for _ in range(times):
        clock.now += seconds
        bar.update()


def test_a_log_gets_a_line_every_half_minute_with_total_rate_and_time_left(clock, capsys):
    with Bar('sampling', 20, 'samples') as bar:
        work(bar, clock, 12, EACH)
    assert capsys.readouterr().err.splitlines() == [
        'sampling: 1/20 samples (5%), 6 s each, 01:54 left',     # 19 * 6 s
        'sampling: 6/20 samples (30%), 6 s each, 01:24 left',
        'sampling: 11/20 samples (55%), 6 s each, 00:54 left',
    ]


def test_short_work_says_nothing(clock, capsys):
    with Bar('sampling', 20, 'samples') as bar:
        work(bar, clock, 20, 0.1)
    assert capsys.readouterr().err == ''


def test_what_was_done_before_is_counted_and_is_no_part_of_the_rate(clock, capsys):
    bar = Bar('zero', 60, 'steps', done=50)     # a run that goes on
    work(bar, clock, 1, 24.0)
    assert capsys.readouterr().err == 'zero: 51/60 steps (85%), 24 s each, 03:36 left\n'
    bar = Bar('answers', 60, 'answers')
    bar.skip(40)                                # they are in the file already
    bar.say('2 failed')
    work(bar, clock, 1, 24.0)
    assert capsys.readouterr().err == (
        'answers: 41/60 answers (68%), 24 s each, 07:36 left, 2 failed\n')


def test_time_before_a_restart_and_a_change_of_the_total_are_taken_into_account(clock, capsys):
    bar = Bar('zero', 60, 'steps')
    clock.now += 600.0                          # the evaluation before the first step
    bar.restart()
    bar.expect(11)
    work(bar, clock, 1, 30.0)
    assert capsys.readouterr().err == 'zero: 1/11 steps (9%), 30 s each, 05:00 left\n'


def test_bytes_hours_and_unknown_totals_are_written_plainly(clock, capsys):
    bar = Bar('reading', 10**10, 'B')
    clock.now += 4.0
    bar.update(4 * 10**6)
    unknown = Bar('rows')
    clock.now += 4.0
    unknown.update(8)
    assert capsys.readouterr().err.splitlines() == [
        'reading: 4.0/10000.0 MB (0%), 1 MB/s, 2:46:36 left', 'rows: 8 rows, 2/s, after 00:04']


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    monkeypatch.setattr(progress, 'DELAY', 0.0)
    with Bar('sampling', 8, 'samples', done=2, leave=True) as bar:
        bar.say('1 failed')
        bar.update(2)
        progress.tell('a warning')
    last = terminal.getvalue().split('\r')[-1]
    assert re.search(r'sampling:  50%\|.*\| 4/8 \[00:00<00:00, .*sample/s, 1 failed\]', last)
    assert 'a warning\n' in terminal.getvalue()
    with Bar('rows') as bar:                       # of how many is not known
        bar.update()
    assert 'rows: 0row [' in terminal.getvalue()


def test_other_ranks_say_nothing(monkeypatch, clock, capsys):
    monkeypatch.setenv('RANK', '1')
    work(Bar('sampling', 8, 'samples'), clock, 8, 60.0)
    progress.tell('a warning')
    assert capsys.readouterr().err == ''


def test_a_glance_has_the_beginning_and_the_end():
    assert glance('one\n two\x1b[2J', 2) == '    one two[2J'
    text = ' '.join(map(str, range(1000)))
    lines = glance(text, 3).splitlines()
    assert len(lines) <= 3 and max(map(len, lines)) <= 100
    assert lines[0].startswith('    0 1 2') and lines[-1].endswith(' 999')
    assert len(glance('x' * 5000, 3).splitlines()) <= 3


# ---- the log of a run

def log_of(folder, step=0, steps=60):
    cfg = train.Training(out_dir=str(folder))
    return train.Log(cfg, 0, step, steps)


def test_the_step_line_of_a_run_that_goes_on_tells_the_steps_and_the_time_left(
        tmp_path, clock, capsys):
    log = log_of(tmp_path / 'zero', step=11)
    clock.now += 240.0
    log.start_clock()
    clock.now += 24.0
    log.write({'step': 12, 'reward': 0.5, 'kl': None}, ('reward', 'kl'))
    log.tick()
    clock.now += 24.0
    log.tick(expected=14)                       # as max_flops would have it
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        'zero: 12/60 steps (20%), 24 s each, 19:12 left, reward 0.5',
        'zero: 13/14 steps (93%), 24 s each, 00:24 left, reward 0.5']


def test_an_evaluation_is_told_and_the_curve_redrawn(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    log = log_of(tmp_path / 'zero')
    pictures = []
    for step in (5, 10):
        log.write({'step': step, 'reward': step / 20, 'entropy': 1.0})
        numbers = {'pass1': step / 40, 'pass1_ci': [0.1, 0.3], 'length': 48.2, 'judged': None}
        log.evaluation(step, numbers)
        log.samples(step, [('evaluation, problem 1', {'accuracy': 1.0}, 'What is 6 x 7?', '42')])
        pictures.append((tmp_path / 'zero' / 'curve.png').read_bytes())
    assert pictures[0][:4] == pictures[1][:4] == b'\x89PNG' and pictures[0] != pictures[1]
    assert not list((tmp_path / 'zero').glob('*.tmp'))
    assert capsys.readouterr().err.splitlines()[4:] == [
        'zero, step 10, evaluation: pass1 0.25 (0.1 to 0.3), length 48.2',
        'step 10, evaluation, problem 1: accuracy 1', '    What is 6 x 7?', '    42']
    line = json.loads((tmp_path / 'zero' / 'metrics.jsonl').read_text().splitlines()[-1])
    assert line == {'step': 10, 'eval_pass1': 0.25, 'eval_pass1_ci': [0.1, 0.3],
                    'eval_length': 48.2, 'eval_judged': None}


def test_without_matplotlib_there_is_no_curve_which_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)   # as if it were not installed
    log = log_of(tmp_path / 'zero')
    for step in (5, 10):
        log.evaluation(step, {'pass1': 0.5})
    assert not (tmp_path / 'zero' / 'curve.png').exists()
    assert capsys.readouterr().err.count('matplotlib is missing') == 1


def test_the_band_of_a_curve_is_its_interval():
    lines = [{'step': 0, 'eval_pass1': 0.2, 'eval_pass1_ci': [0.1, 0.3]}, {'step': 1, 'loss': 2.0},
             {'step': 5, 'eval_pass1': 0.4, 'eval_pass1_ci': [0.3, 0.5]}]
    assert curves.band(lines, 'eval_pass1') == [(0, 5), (0.1, 0.3), (0.3, 0.5)]
    assert curves.band(lines, 'loss') == [(), (), ()]
