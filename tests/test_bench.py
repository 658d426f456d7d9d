"""
tools/kernel_bench.py and tools/bench.py: they run, in small, and say what they compare.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kernels
from tools import bench, bench_smol, kernel_bench

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()


def run_tool(name, *args, **env):
    return subprocess.run([sys.executable, str(ROOT / 'tools' / name), *args],
                          env={**os.environ, **env}, capture_output=True, text=True)


# ---- the kernels ----

@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason='no GPU')
def test_kernel_checks_pass_on_the_gpu():
    run = run_tool('kernel_bench.py', '--phases=check')
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(GPU, reason='the real one is run there')
@pytest.mark.skipif(not kernels.installed(), reason='Triton is not installed')
def test_kernel_bench_runs_in_small():
    run = run_tool('kernel_bench.py', '--smoke=True', TRITON_INTERPRET='1')
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ('rms_norm', 'rope', 'swiglu', 'route', 'experts', 'fp8', 'linear_logprob',
                 'mla_attention', 'mla_decode'):
        assert name in run.stdout


def troubled(cfg, phase, names, known, pipe):
    """A stand-in for kernel_bench.work whose cases do as they are called"""
    for name in names:
        if name == 'dies':
            os._exit(1)
        if name == 'hangs':
            time.sleep(60)
        pipe.send(0)


def test_a_case_that_dies_or_hangs_costs_only_itself(monkeypatch, capfd):
    monkeypatch.setattr(kernel_bench, 'work', troubled)
    cfg = kernel_bench.Config(patience=5.0)
    names = ['one', 'dies', 'two', 'hangs', 'three']
    assert kernel_bench.each(cfg, 'check', names, None, time.time() + 600) == 2
    out = capfd.readouterr().out
    assert 'dies | | FAILED: its process died' in out
    assert 'hangs | | FAILED: no answer' in out
    assert out.count('FAILED') == 2

    assert kernel_bench.each(cfg, 'check', ['one', 'two'], None, time.time() - 1) == 0
    assert capfd.readouterr().out.count('not run') == 2


# ---- beside other code ----

def test_bench_tells_its_comparisons_and_refuses_what_they_do_not_take(capsys):
    bench.main(['--help'])
    told = capsys.readouterr().out
    assert 'python tools/bench.py train --rounds=7' in told and '--rounds=5' in told
    for function in [*bench.COMPARISONS, bench.gpu]:
        assert f'\n{function.__name__}: ' in told
    for argv, said in (
        (['trian'], "no comparison 'trian'; there are train"),
        (['train', '--rounds'], 'write --key=VALUE'),
        (['train', '--roundz=7'], 'rounds'),
        (['train', '--rounds=x'], "--rounds must be int, not 'x'"),
    ):
        with pytest.raises(SystemExit, match=said):
            bench.main(argv)


def test_the_gpu_benchmarks_run_in_small():
    flags = ['--models=tiny', '--rows=1', '--tokens=32', '--steps=1', '--batches=2', '--prompt=8',
             '--new=8', '--dtype=float32']
    run = run_tool('bench.py', 'gpu_train', 'decode', *flags, CUDA_VISIBLE_DEVICES='')
    assert run.returncode == 0 and '"failed"' not in run.stdout, run.stdout + run.stderr
    assert run.stdout.count('"mfu"') == 3 and run.stdout.count('"share_of_bound"') == 1


SMALL = {
    'train': ['--dtypes=float32', '--rows=1', '--tokens=32'],
    'sample': ['--prompts=2', '--samples=2', '--prompt=8', '--new=16', '--lengths=ragged'],
}


@pytest.mark.parametrize('comparison', ['train', pytest.param('sample', marks=pytest.mark.slow)])
def test_comparisons_compare_the_same_thing(comparison):
    pytest.importorskip('transformers')
    run = run_tool('bench.py', comparison, '--models=dense', '--rounds=1', *SMALL[comparison])
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows[-1]['ratio'] > 0
    if comparison == 'train':
        assert rows[1]['side'] == 'nanoR1' and abs(rows[1]['loss'] - rows[2]['loss']) < 1e-3
    else:
        assert rows[1]['first_tokens_agree'] == 1


# ---- a released model beside other code ----

def test_bench_hands_a_released_model_to_its_own_file(monkeypatch, capsys):
    started = []

    def run(command):
        started.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(bench.subprocess, 'run', run)
    with pytest.raises(SystemExit) as ended:
        bench.main(['smol', 'sft', '--rows=2'])
    assert ended.value.code == 3
    assert started[0][1:] == [str(ROOT / 'tools/bench_smol.py'), 'sft', '--rows=2']

    functions = [bench_smol.sample], [bench_smol.curves]
    bench.run_chosen(['--help'], *functions, bench_smol.__doc__)
    told = capsys.readouterr().out
    assert '\nsample: ' in told and '\ncurves: ' in told
    with pytest.raises(SystemExit, match="no comparison 'curve'; there are sample, curves"):
        bench.run_chosen(['curve'], *functions, bench_smol.__doc__)


def test_the_difference_of_two_ends_is_paired_by_problem():
    a = [1.0, 0.5, 0.75, 0.25]
    row = bench_smol.paired(a, [x - 0.25 for x in a])
    assert row == {'difference': 0.25, 'ci': [0.25, 0.25]}      # the same for each problem

    row = bench_smol.paired([1.0, 0.0, 1.0, 0.0], [0.0] * 4)
    half = 1.96 * (1 / 3) ** 0.5 / 2       # variance: four times 0.25, over 3
    assert row == {'difference': 0.5, 'ci': [round(0.5 - half, 4), round(0.5 + half, 4)]}


def test_a_log_goes_on_from_the_checkpoint(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    bench.write_rows(path, [{'step': step, 'seconds': 2.0 * step} for step in (1, 2, 3)])
    log = bench_smol.StepLog(path)
    log.begin(2)
    log.end_step(3, 5.0)
    steps = [(line['step'], line['seconds']) for line in map(json.loads, path.open())]
    assert steps == [(1, 2.0), (2, 4.0), (3, 9.0)]


def test_word_problems_are_right():
    for question, answer in bench_smol.chats(20):
        *_, total = answer['content'].split('<answer>')
        equations = answer['content'].split('<think>')[1].split('</think>')[0].split('; ')
        assert all(eval(e.replace('=', '==')) for e in equations)
        assert total == equations[-1].split(' = ')[1] + '</answer>'
        assert equations[0].split()[0] in question['content']
