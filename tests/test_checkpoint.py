import copy
import errno
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import nn

import checkpoint


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))

    def forward(self, x):
        return x * self.weight


class Model(nn.Module):
    """Tied embedding, stacked matrices, odd sizes (uneven shards), bfloat16 beside float32, a
    buffer."""
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.experts = nn.Parameter(torch.randn(3, 6, 5))
        self.norm = Scale()
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer('bias', torch.tensor([5.0001, -5.0001]))

    def forward(self, ids):
        x = self.embed(ids)
        mixed = self.norm(torch.einsum('td,edf->tf', x, self.experts)).sum(-1, keepdim=True)
        return self.head(mixed + x + self.bias.sum())

    def save_pretrained(self, folder, state_dict=None):
        Path(folder).mkdir()
        weights = state_dict or checkpoint.full_state_dict(self)
        weights = {'hub.' + name: tensor for name, tensor in weights.items()}
        save_file(weights, Path(folder) / 'model.safetensors')


class Momentum(torch.optim.Optimizer):
    """Keeps float32 momentum of bfloat16 parameters: load_state_dict of torch would round it."""
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, nested=[1, (2.0, None)]))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                state = self.state[p]
                if not state:
                    state['momentum'] = torch.zeros_like(p, dtype=torch.float32)
                    state['count'] = 0
                state['momentum'].mul_(0.9).add_(p.grad.float())
                state['count'] += 1
                p.sub_((group['lr'] * state['momentum']).to(p.dtype))


def build(seed=0):
    torch.manual_seed(seed)
    return Model()


def optimizers_of(model):
    return [torch.optim.AdamW([{'params': [model.embed.weight], 'weight_decay': 0.1},
                               {'params': [model.experts], 'lr': 3e-3}], lr=1e-2),
            Momentum([model.norm.weight], lr=1e-2)]


def train(model, optimizers, steps):
    """Steps whose data come from all three global generators."""
    for _ in range(steps):
        ids = torch.randint(7, (4,))
        scale = random.random() + np.random.rand()
        (model(ids).square().mean() * scale).backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]['lr'] *= 0.9
            optimizer.step()
            optimizer.zero_grad()
        model.bias.add_(torch.rand(2))


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def snapshot(model, optimizers):
    """Every bit that training depends on, whole, in a copy."""
    return copy.deepcopy({'weights': checkpoint.full_state_dict(model),
                          'optimizers': [checkpoint.optimizer_state(model, o) for o in optimizers]})


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert bits(a).equal(bits(b))
    else:
        assert a == b


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def trained(seed=0, steps=2):
    model = build(seed)
    optimizers = optimizers_of(model)
    seed_all(seed)
    train(model, optimizers, steps)
    return model, optimizers


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- one process ----

def test_resume_goes_on_to_the_same_bits(tmp_path):
    model, optimizers = trained()
    cursor = {'epoch': 1, 'order': torch.arange(3), 'nested': [(1.5, None, 'x')]}
    path = checkpoint.save(tmp_path, 2, model, optimizers, {'cursor': cursor})
    assert path == tmp_path / 'step_00000002' and names(tmp_path) == ['step_00000002']
    train(model, optimizers, 3)
    expected = snapshot(model, optimizers)

    other = build(seed=9)
    fresh = optimizers_of(other)
    seed_all(99)
    state = checkpoint.load(checkpoint.latest(tmp_path), other, fresh)
    assert_same(state, {'cursor': cursor, 'step': 2})
    assert other.head.weight is other.embed.weight
    train(other, fresh, 3)
    assert_same(snapshot(other, fresh), expected)
    assert expected['optimizers'][1]['state']['norm.weight']['momentum'].dtype == torch.float32


def test_loading_over_used_optimizers_leaves_nothing_of_them(tmp_path):
    model = build()
    optimizers = optimizers_of(model)                  # no state yet
    before = snapshot(model, optimizers)
    path = checkpoint.save(tmp_path, 0, model, optimizers, {})
    seed_all(0)
    train(model, optimizers, 2)
    assert checkpoint.load(path, model, optimizers) == {'step': 0}
    assert_same(snapshot(model, optimizers), before)
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]['params']:
            assert len(optimizer.state[p]) == 0


def test_saving_disturbs_nothing(tmp_path):
    model, optimizers = trained()
    generators = checkpoint.rng_state()
    before = snapshot(model, optimizers)
    checkpoint.save(tmp_path, 2, model, optimizers, {})
    assert_same(snapshot(model, optimizers), before)
    assert_same(checkpoint.rng_state(), generators)


def test_tied_and_viewed_tensors_are_stored_once(tmp_path):
    model = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight]['momentum_buffer'] = torch.randn(50, 100, 100)[3]
    path = checkpoint.save(tmp_path, 1, model, [optimizer], {})
    assert (path / 'optimizer.pt').stat().st_size < 2 * 40_000
    path = checkpoint.save(tmp_path, 2, build(), [], {'reference': torch.randn(50, 100, 100)[3].T})
    assert (path / 'state.pt').stat().st_size < 2 * 40_000
    stored = checkpoint.safe_open(path / 'weights.safetensors', 'pt').keys()
    assert set(stored) == {'embed.weight', 'experts', 'norm.weight', 'bias'}


def test_compiled_model_fits_the_plain_one(tmp_path):
    model, optimizers = trained()
    path = checkpoint.save(tmp_path, 2, torch.compile(model), optimizers, {})
    expected, other = snapshot(model, optimizers), build(seed=5)
    fresh = optimizers_of(other)
    checkpoint.load(path, other, fresh)
    assert_same(snapshot(other, fresh), expected)


def test_keep_and_leftovers(tmp_path):
    model, optimizers = trained()
    (tmp_path / 'step_notes.txt').write_text('mine')
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, model, optimizers, {}, keep=2)
    assert names(tmp_path) == ['step_00000010', 'step_00000015', 'step_notes.txt']
    (tmp_path / 'step_00000012.tmp').mkdir()
    (tmp_path / 'step_00000020.tmp' / 'hub').mkdir(parents=True)
    checkpoint.save(tmp_path, 20, model, optimizers, {}, keep=2)
    assert names(tmp_path) == ['step_00000015', 'step_00000020', 'step_notes.txt']
    checkpoint.save(tmp_path, 16, model, optimizers, {}, keep=2)    # the run was taken back to 15
    assert names(tmp_path) == ['step_00000015', 'step_00000016', 'step_notes.txt']
    assert checkpoint.latest(tmp_path).name == 'step_00000016'
    checkpoint.save(tmp_path, 16, build(3), optimizers_of(build(3))[:0], {'again': True}, keep=1)
    assert names(tmp_path) == ['step_00000016', 'step_notes.txt']
    assert checkpoint.load(checkpoint.latest(tmp_path), build(), []) == {'again': True, 'step': 16}
    with pytest.raises(ValueError, match='keep must be at least 1'):
        checkpoint.save(tmp_path, 17, model, optimizers, {}, keep=0)


def test_export_writes_the_hub_folder_under_the_checksums(tmp_path):
    model, optimizers = trained()
    path = checkpoint.save(tmp_path, 1, model, optimizers, {}, export=True)
    exported = checkpoint.safe_open(path / 'hub' / 'model.safetensors', 'pt')
    assert exported.get_tensor('hub.experts').equal(model.experts)
    assert 'hub/model.safetensors' in json.loads((path / 'checksums.json').read_text())


@pytest.mark.parametrize('file', ['weights.safetensors', 'optimizer.pt', 'state.pt',
                                  'rng_rank0.pt', 'checksums.json'])
@pytest.mark.parametrize('how', ['flip', 'cut', 'remove'])
def test_damaged_checkpoint_is_named_and_the_older_one_taken(tmp_path, capsys, file, how):
    model, optimizers = trained()
    older = checkpoint.save(tmp_path, 5, model, optimizers, {})
    newer = checkpoint.save(tmp_path, 10, model, optimizers, {})
    data = bytearray((newer / file).read_bytes())
    if how == 'remove':
        (newer / file).unlink()
    else:
        data[len(data) // 2] ^= 1
        (newer / file).write_bytes(data if how == 'flip' else data[:len(data) // 2])
    assert checkpoint.latest(tmp_path) == older
    err = capsys.readouterr().err
    assert err.startswith(f'{newer} is damaged and left out: ') and err.count('\n') == 1
    assert file in err or file == 'checksums.json'
    before = snapshot(model, optimizers)
    with pytest.raises(ValueError, match='step_00000010 is damaged: '):
        checkpoint.load(newer, model, optimizers)
    assert_same(snapshot(model, optimizers), before)


def test_latest_of_nothing(tmp_path, capsys):
    assert checkpoint.latest(tmp_path / 'absent') is None
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / 'step_00000003').mkdir()
    assert checkpoint.latest(tmp_path) is None
    assert 'step_00000003 is damaged' in capsys.readouterr().err


def test_load_names_what_does_not_fit_and_changes_nothing(tmp_path):
    model, optimizers = trained()
    path = checkpoint.save(tmp_path, 1, model, optimizers, {})

    def refuses(message, model, optimizers):
        before = snapshot(model, optimizers)
        with pytest.raises(ValueError, match=message):
            checkpoint.load(path, model, optimizers)
        assert_same(snapshot(model, optimizers), before)

    wide = build(1)
    wide.experts = nn.Parameter(torch.randn(3, 6, 8))
    refuses(r'experts is torch.float32 \[3, 6, 5\] in the checkpoint '
            r'and torch.float32 \[3, 6, 8\] in the model', wide, optimizers_of(wide))
    rounded = build(1)
    rounded.experts.data = rounded.experts.data.bfloat16()
    refuses(r'experts is torch.float32 .* torch.bfloat16', rounded, optimizers_of(rounded))
    extra = build(1)
    extra.scale = nn.Parameter(torch.ones(2))
    refuses('scale is only in the model', extra, optimizers_of(extra))
    fewer = build(1)
    fewer.bias = None
    refuses('bias is only in the checkpoint', fewer, optimizers_of(fewer))
    other = build(1)
    optimizers = optimizers_of(other)
    refuses('2 optimizers in the checkpoint, 1 in the script', other, optimizers[:1])
    refuses(r'the parameter groups of optimizer 0 \(Momentum\) differ', other, optimizers[::-1])


def test_save_refuses_what_could_not_come_back(tmp_path):
    model, optimizers = trained()
    checkpoint.save(tmp_path, 1, model, optimizers, {})
    with pytest.raises(ValueError, match='the state or a parameter group has a '):
        checkpoint.save(tmp_path, 2, model, optimizers, {'config': Path('x')})
    with pytest.raises(ValueError, match='the state or a parameter group has a '):
        checkpoint.save(tmp_path, 2, model, optimizers, {'f': lambda: 1})
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(3, 2))], lr=0.1)
    with pytest.raises(ValueError, match=r'SGD holds a parameter \[3, 2\] that the model has not'):
        checkpoint.save(tmp_path, 2, model, [stranger], {})
    assert names(tmp_path) == ['step_00000001']


# ---- a full disk ----

class FullDisk:
    """A file that takes `room` bytes and then fails as a full disk does."""
    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def assert_full(tmp_path, model, optimizers, before):
    message = r'disk full, checkpoint not saved: [\d,]+ bytes needed'
    with pytest.raises(OSError, match=message) as error:
        checkpoint.save(tmp_path, 7, model, optimizers, {})
    assert error.value.errno == errno.ENOSPC and 'step_00000007' in str(error.value)
    assert names(tmp_path) == ['step_00000003']
    assert checkpoint.damage(tmp_path / 'step_00000003') is None
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*')} == before


@pytest.mark.parametrize('where', ['free', 'torch 0', 'torch 700', 'torch 3000', 'rust', 'mkdir',
                                   'sync', 'quota'])
def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, where):
    model, optimizers = trained()
    checkpoint.save(tmp_path, 3, model, optimizers, {})
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*')}

    def full(*args, **kwargs):
        raise OSError(errno.EDQUOT if where == 'quota' else errno.ENOSPC, 'No space left on device')

    def full_in_rust(*args):
        raise RuntimeError('Error while serializing: I/O error: '
                           'No space left on device (os error 28)')

    if where == 'free':
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=100))
    elif where.startswith('torch'):
        room = int(where.split()[1])
        monkeypatch.setattr(checkpoint, 'open', lambda *args: FullDisk(open(*args), room),
                            raising=False)
    elif where == 'rust':
        monkeypatch.setattr(checkpoint, 'save_file', full_in_rust)
    elif where == 'mkdir':
        monkeypatch.setattr(Path, 'mkdir', lambda self, **kwargs: kwargs or full())
    else:
        monkeypatch.setattr(os, 'fsync', full)
    assert_full(tmp_path, model, optimizers, before)
    monkeypatch.undo()
    assert checkpoint.save(tmp_path, 7, model, optimizers, {}).name == 'step_00000007'


def test_other_failures_clean_up_and_keep_their_message(tmp_path, monkeypatch):
    model, optimizers = trained()

    def broken(*args):
        raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(os, 'fsync', broken)
    with pytest.raises(PermissionError):
        checkpoint.save(tmp_path, 7, model, optimizers, {})
    assert names(tmp_path) == []


# ---- kills ----

def save_and_die(tmp_path, model, optimizers, step, line):
    """Saves in a forked process that dies at the line-th line run while it touches files; False if
    it ended before."""
    child = os.fork()
    if child == 0:
        left = line
        here = {'write', 'write_files', 'publish', 'sync', 'digest'}

        def trace(frame, event, arg):
            nonlocal left
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file == shutil.__file__ or (file == checkpoint.__file__ and name in here):
                left -= event == 'line'
                if left < 0:
                    os._exit(9)
            return trace
        try:
            sys.settrace(trace)
            checkpoint.save(tmp_path, step, model, optimizers, {'step of old': step}, keep=1)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def kill_at_lines(tmp_path, step, stride):
    """However far the save came, a whole checkpoint is there, the old or the new one; the next save
    tidies up."""
    old, new, model = trained(seed=0), trained(seed=1), build(2)
    optimizers = optimizers_of(model)
    checkpoint.save(tmp_path / 'base', 2, *old, {}, keep=1)
    run = tmp_path / 'run'
    found = []   # whether it was the new one, line after line
    line = 0
    killed = True
    while killed:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / 'base', run)
        killed = save_and_die(run, *new, step, line)
        state = checkpoint.load(checkpoint.latest(run), model, optimizers)
        found.append('step of old' in state)
        assert_same(snapshot(model, optimizers), snapshot(*(new if found[-1] else old)))
        if line % 7 == 0:
            checkpoint.save(run, 4, model, optimizers, {}, keep=1)
            assert names(run) == ['step_00000004']
        line += stride
    assert line > 150 and found[0] is False and found[-1] is True
    assert found == sorted(found)   # once the new one is there it stays


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('step', [3, 2], ids=['next step', 'same step again'])
def test_killed_during_a_save(tmp_path, step):
    kill_at_lines(tmp_path, step, stride=9)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('step', [3, 2], ids=['next step', 'same step again'])
def test_killed_at_every_line_of_a_save(tmp_path, step):
    kill_at_lines(tmp_path, step, stride=1)


# ---- several processes ----

def begin(run, world):
    """Trains on world ranks, saves steps 2 and 3; returns what was saved, whole on rank 0."""
    model, optimizers = shard(build(seed=0), world)
    seed_all(0)   # the same data on each rank: the mean gradient is that of one process
    train(model, optimizers, 2)
    checkpoint.save(run, 2, model, optimizers, {'a': 1}, export=True)
    seed_all(50 + checkpoint.rank())
    checkpoint.save(run, 3, model, optimizers, {'a': 2})
    return snapshot(model, optimizers)


def go_on(run, world):
    """Loads on world ranks; returns what came back, one draw of each generator, and the weights two
    steps later."""
    model, optimizers = shard(build(seed=8), world)
    seed_all(7)
    path = checkpoint.latest(run)
    assert path == run / 'step_00000003'
    assert checkpoint.load(path, model, optimizers) == {'a': 2, 'step': 3}
    drawn = [torch.rand(1).item(), np.random.rand(), random.random()]
    back = snapshot(model, optimizers)
    seed_all(1)
    train(model, optimizers, 2)
    return back, drawn, checkpoint.full_state_dict(model)


def shard(model, world):
    if world > 1:
        from torch.distributed.fsdp import fully_shard
        fully_shard(model.norm)
        fully_shard(model)
    return model, optimizers_of(model)


def two_ranks(rank, tmp_path):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meeting', rank=rank,
                            world_size=2)
    saved = begin(tmp_path / 'two', 2)
    from_one = go_on(tmp_path / 'one', 2)
    from_two = go_on(tmp_path / 'two', 2)
    torch.save([saved, from_one, from_two], tmp_path / f'rank{rank}.pt')

    model, optimizers = shard(build(), 2)              # a full disk on rank 0 is heard of by both
    if rank == 0:
        usage = shutil.disk_usage(tmp_path)

        def nearly_full(path):
            return usage._replace(free=100)
        shutil.disk_usage = nearly_full
    with pytest.raises(OSError, match='disk full, checkpoint not saved'):
        checkpoint.save(tmp_path / 'two', 9, model, optimizers, {})
    optimizers[1].state[model.norm.weight]['momentum'] = torch.zeros(3)
    message = 'Momentum: momentum of norm.weight is a local shard, not a DTensor'
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / 'two', 9, model, optimizers, {})
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason='needs torch.distributed')
def test_fsdp_save_and_load_on_other_numbers_of_ranks(tmp_path):
    # saved and loaded by (ranks that saved, ranks that loaded)
    saved = {1: begin(tmp_path / 'one', 1)}
    mp.start_processes(two_ranks, (tmp_path,), nprocs=2, start_method='spawn')
    saved[2], one_to_two, two_to_two = torch.load(tmp_path / 'rank0.pt')
    two_to_one = go_on(tmp_path / 'two', 1)
    loaded = {(1, 2): one_to_two, (2, 2): two_to_two, (2, 1): two_to_one}
    _, *by_rank1 = torch.load(tmp_path / 'rank1.pt')
    drawn_by_rank1 = [drawn for _, drawn, _ in by_rank1]

    two = tmp_path / 'two'
    assert names(two) == ['step_00000002', 'step_00000003']
    assert len(list((two / 'step_00000003').glob('rng_rank*.pt'))) == 2
    exported = checkpoint.safe_open(two / 'step_00000002' / 'hub' / 'model.safetensors', 'pt')
    assert exported.get_tensor('hub.experts').equal(saved[2]['weights']['experts'])

    for (ranks_saved, ranks_loaded), (back, drawn, after) in loaded.items():
        assert_same(back, saved[ranks_saved])          # every bit, whatever the number of ranks
        seed_all(50)
        assert drawn == [torch.rand(1).item(), np.random.rand(), random.random()]
        if ranks_loaded == 2:
            assert drawn_by_rank1[ranks_saved - 1] != drawn

        # and training goes on as in one process that never stopped
        single = build(seed=3)
        optimizers = optimizers_of(single)
        run = tmp_path / ['one', 'two'][ranks_saved - 1]
        checkpoint.load(run / 'step_00000003', single, optimizers)
        seed_all(1)
        train(single, optimizers, 2)
        for name, tensor in checkpoint.full_state_dict(single).items():
            torch.testing.assert_close(after[name], tensor)
    seed_all(51)
    assert drawn_by_rank1[1] == [torch.rand(1).item(), np.random.rand(), random.random()]
