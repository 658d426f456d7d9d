"""pool.py and rewards.grade: order, failures, workers that are killed or hang."""
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rewards
from graders import sandbox
from graders.pool import Died, Pool

MATH = [
    ('\\boxed{0.5}', {'task': 'math', 'answer': '1/2'}),
    ('\\boxed{0.4}', {'task': 'math', 'answer': '1/2'}),
    ('<answer>3+4</answer>', {'task': 'countdown', 'numbers': [3, 4], 'target': 7}),
    ('\\boxed{B}', {'task': 'choice', 'answer': 'B'}),
]


def totals(samples, weights):
    return [total for total, _ in rewards.grade(samples, weights)]


@pytest.fixture
def workers(monkeypatch):
    def start(n, seconds=60):
        monkeypatch.setattr(rewards, '_pool', Pool(n, seconds))
        return rewards._pool
    yield start
    if rewards._pool:
        rewards._pool.close()


def test_values_come_in_order_and_errors_as_values():
    with Pool(2) as pool:
        factorials = [math.factorial(n) for n in range(20)]
        assert pool.map('math', 'factorial', [(n,) for n in range(20)]) == factorials
        values = pool.map('operator', 'truediv', [(1, 2), (1, 0), (3, 4)])
        assert values[::2] == [0.5, 0.75] and isinstance(values[1], ZeroDivisionError)
        cannot_be_sent = pool.map('builtins', 'open', [(os.devnull,)])[0]
        assert isinstance(cannot_be_sent, TypeError)
        assert pool.map('builtins', 'print', [('not an answer',)] * 2) == [None, None]
        assert pool.map('math', 'gcd', []) == []


def test_a_call_that_hangs_is_ended_and_the_others_are_not():
    with Pool(2, seconds=5.0) as pool:
        start = time.monotonic()
        values = pool.map('time', 'sleep', [(0,), (1000,), (0,), (0.1,)])
        assert time.monotonic() - start < 100
        assert [type(v) for v in values] == [type(None), TimeoutError, type(None), type(None)]
        assert pool.map('math', 'gcd', [(4, 6)] * 3) == [2] * 3


def test_a_call_that_kills_its_process_is_tried_twice():
    with Pool(2) as pool:
        values = pool.map('os', 'abort', [()]) + pool.map('math', 'gcd', [(4, 6), (9, 12)])
        assert isinstance(values[0], Died) and values[1:] == [2, 3]


def test_a_killed_worker_loses_nothing(workers):
    """One is killed while it is idle, one in the middle of a program."""
    sandbox_or_skip()
    pool = workers(2)
    row = {'task': 'code', 'tests': [{'input': '', 'output': '7'}]}
    program = '```\nimport time\ntime.sleep(0.3)\nprint({})\n```'
    samples = [(program.format(n), row) for n in (7, 8, 7, 8, 7, 8)]
    rewards.grade(MATH, {'accuracy': 1.0})                          # all workers run
    os.kill(pool.workers[0].process.pid, signal.SIGKILL)
    victim = pool.workers[1].process.pid
    threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
    before = rewards.FAILURES.total()
    assert totals(samples, {'accuracy': 1.0}) == [1, 0, 1, 0, 1, 0]
    assert rewards.FAILURES.total() == before
    assert victim not in [worker.process.pid for worker in pool.workers]


def sandbox_or_skip():
    try:
        sandbox.require()
    except sandbox.SandboxError as error:
        pytest.skip(str(error))


def test_grading_elsewhere_is_grading_here(workers):
    weights = {'accuracy': 1.0, 'format': 0.5}
    here = rewards.grade(MATH * 3, weights)
    workers(2)
    one_by_one = [rewards.combined(*sample, weights) for sample in MATH * 3]
    assert rewards.grade(MATH * 3, weights) == here == one_by_one
    assert [total for total, _ in here] == [1, 0, 1, 1] * 3
    with pytest.raises(ValueError, match="'acuracy'.*'accuracy'"):
        rewards.grade(MATH, {'acuracy': 1.0})


def test_a_reward_that_takes_too_long_scores_zero_and_is_counted(workers):
    sandbox_or_skip()
    pool = workers(2)
    rewards.grade(MATH, {'accuracy': 1.0})   # both have imported sympy
    pool.seconds = 5
    before = rewards.FAILURES['worker', 'TimeoutError']
    row = {'task': 'code', 'tests': [{'input': '', 'output': ''}], 'seconds': 50}
    slow = ('```\nimport time\ntime.sleep(100)\n```', row)
    graded = rewards.grade([slow, *MATH], {'accuracy': 1.0, 'format': 0.5})
    assert graded[0] == (0.0, {'accuracy': 0.0, 'format': 0.0})
    assert [total for total, _ in graded[1:]] == [1, 0, 1, 1]
    assert rewards.FAILURES['worker', 'TimeoutError'] == before + 1


def test_failures_of_the_workers_are_counted_here(workers):
    workers(1)
    before = rewards.FAILURES['accuracy', 'ValueError']
    assert totals([MATH[0], ('x', {'task': 'chess'})], {'accuracy': 1.0}) == [1, 0]
    assert rewards.FAILURES['accuracy', 'ValueError'] == before + 1


def test_prepare_names_what_is_wrong_before_a_run():
    with pytest.raises(ValueError, match="'formt'.*'format'"):
        rewards.prepare({'formt': 1.0}, {'math'})
    with pytest.raises(ValueError, match='chess.*countdown'):
        rewards.prepare({'accuracy': 1.0}, {'math', 'chess'})
    rewards.prepare({'accuracy': 1.0}, {'math'})
    assert rewards._pool is None
    rewards.prepare({'accuracy': 1.0}, {'math'}, workers=1)
    try:
        assert totals(MATH, {'accuracy': 1.0}) == [1, 0, 1, 1]
    finally:
        rewards.prepare({'accuracy': 1.0}, {'math'})


def is_alive(pid):
    try:
        stat = Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return False
    return stat.rpartition(')')[2].split()[0] != 'Z'


def test_workers_end_with_their_parent():
    code = (
        'import os\n'
        'from graders.pool import Pool\n'
        'pool = Pool(2)\n'
        'pool.map("math", "gcd", [(4, 6)] * 4)\n'
        'print(*[w.process.pid for w in pool.workers], flush=True)\n'
        'os.kill(os.getpid(), 9)')
    root = Path(sandbox.__file__).parents[1]
    parent = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    pids = parent.stdout.split()
    assert len(pids) == 2
    end = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_where_every_call_hangs_the_later_ones_are_not_waited_for(capsys):
    with Pool(2, seconds=0.2) as pool:
        start = time.monotonic()
        values = pool.map('time', 'sleep', [(100,)] * 500)
        assert time.monotonic() - start < 50 and all(isinstance(v, TimeoutError) for v in values)
        assert 'not tried' in str(values[-1]) and len(values) == 500
        pool.seconds = 60
        assert pool.map('math', 'gcd', [(4, 6)] * 3) == [2] * 3
    assert capsys.readouterr().err.count('took more than 0.2 s; its process was ended') == 1


def test_a_reward_of_ones_own_is_graded_in_the_workers_and_may_hang_die_and_raise(
        tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, 'FAILURES', type(rewards.FAILURES)())
    monkeypatch.setattr(rewards, 'EXAMPLES', {})
    path = tmp_path / 'my.py'
    path.write_text('import os, time\n'
                    'def where_reward(response, row):\n'
                    '    if response == "hang":\n        time.sleep(1000)\n'
                    '    if response == "die":\n        os._exit(1)\n'
                    '    return {"worker": os.getpid(), "two": 2}[response]\n'
                    'def where_equal(one, other, row):\n    return one.lower() == other.lower()\n')
    rewards.use_file(str(path))
    try:
        rewards.prepare({'where': 1.0}, {'where', 'match'})
        assert rewards._pool.workers                              # without being asked for
        rewards.grade([('two', MATH[0][1])] * 4, {'where': 1.0, 'accuracy': 1.0})   # all imported
        rewards._pool.seconds = 4
        path.write_text('def where_reward(response, row):\n    return 7.0\n')   # changes nothing
        said = ['two', 'hang', 'worker', 'die', 'other', 'two']
        row = {'task': 'match', 'answer': '7'}
        graded = rewards.grade([(text, row) for text in said], {'where': 1.0, 'format': 1.0})
        values = [total for total, _ in graded]
        assert values[0] == values[5] == 2 and values[1] == values[3] == values[4] == 0
        assert values[2] not in (0, os.getpid())
        assert rewards.FAILURES == {('worker', 'TimeoutError'): 1, ('worker', 'Died'): 1,
                                    ('where', 'KeyError'): 1}
        assert f"where: KeyError 1 times (KeyError: 'other' ({path}:7))" in rewards.told()
        rewards._pool.seconds = 60
        problems = [(['A', 'a', 'B'], {'task': 'where'}), (['1', '1.0'], {'task': 'math'})]
        assert rewards.count_votes(problems) == [['A', 'A', 'B'], ['1', '1']]
    finally:
        rewards.use_file('')
        rewards.prepare({'format': 1.0}, ())
