import multiprocessing
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)
if not torch.cuda.is_available():
    # kernels are tested in Triton's interpreter, which reads this when it is imported, after here
    os.environ.setdefault('TRITON_INTERPRET', '1')


@pytest.fixture(scope='session')
def processes():
    """Starts processes that have torch and the scripts imported already."""
    context = multiprocessing.get_context('forkserver')
    path = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = f'{ROOT}{os.pathsep}{Path(__file__).parent}'
    context.set_forkserver_preload(['sft', 'grpo'])
    yield context
    os.environ.pop('PYTHONPATH') if path is None else os.environ.update(PYTHONPATH=path)


def one_rank(rank, world, folder, function, args):
    sys.stderr = open(folder / f'rank{rank}.txt', 'w')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/meeting', timedelta(seconds=20), world, rank)
    function(*args)
    dist.destroy_process_group()


@pytest.fixture
def ranks(processes, tmp_path):
    """ranks(world, function, *args): function(*args) in a process group of `world` ranks. A rank
    that fails, or hangs for some seconds, fails the test."""
    def start(world, function, *args, seconds=90):
        folder = tmp_path / f'ranks{world}'
        folder.mkdir()
        started = [processes.Process(target=one_rank, args=(rank, world, folder, function, args))
                   for rank in range(world)]
        for process in started:
            process.start()
        limit = time.time() + seconds
        while time.time() < limit and any(p.is_alive() for p in started):
            if any(p.exitcode for p in started):
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
        said = [(folder / f'rank{rank}.txt').read_text()[-3000:] for rank in range(world)]
        assert codes == [0] * world, '\n---\n'.join(said)
    return start
