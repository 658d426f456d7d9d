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
from tools import bench, kernel_bench

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
