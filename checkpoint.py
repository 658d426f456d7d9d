"""
Checkpoints of a training run that survive a kill at any moment, and from which it goes on to the
same bits.

    out_dir/step_00000123/
        weights.safetensors    model.state_dict() in training's names and dtypes, tied tensors once
        optimizer.pt           list of optimizer state dicts, with parameter names for indices
        state.pt               the dict the script passes (data cursor, schedule, ...) and 'step'
        rng_rank0.pt ...       a file a rank: generators of torch (CPU and its CUDA device), numpy
                               and python
        hub/                   with export=True: what model.save_pretrained writes
        checksums.json         sha256 of every file

All tensors are whole, so a run may go on with another number of ranks. A checkpoint is written as
step_00000123.tmp, brought to the disk and then renamed: a folder without suffix is complete. Under
torchrun every rank calls save, latest and load; rank 0 writes and all ranks read, so out_dir lies
on storage that every node sees. While it saves, rank 0 holds the whole weights and optimizer state
in CPU memory.
"""
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves, tree_map


def save(out_dir, step: int, model, optimizers: list, state: dict, keep: int = 2,
         export: bool = False) -> Path:
    """
    Writes out_dir/step_{step:08d} and returns its path; then deletes all other checkpoints but the
    newest keep − 1 of earlier steps (those of later steps belong to a run that was taken back).

    state: tensors, numbers, strings and None in lists, tuples and dicts, the same keys on every
    rank; rank 0's is kept. export: also model.save_pretrained(path/hub), on rank 0 alone, with
    state_dict= where the model is sharded.

    Raises OSError on a full disk, which leaves earlier checkpoints as they were and nothing of the
    new one; ValueError for values that could not be read back, a parameter foreign to the model, or
    optimizer state in local shards.
    """
    if keep < 1:
        raise ValueError(f'keep must be at least 1, not {keep}')
    path = Path(out_dir) / f'step_{step:08d}'
    weights = full_state_dict(model)
    states = [optimizer_state(model, optimizer) for optimizer in optimizers]
    state = tree_map(whole, state)
    rngs = gather_rng_states()

    def write():
        check_readable([state, [s['param_groups'] for s in states]])
        leaves = tree_leaves([state, states, weights, weights if export else None])
        need = sum(leaf.nbytes for leaf in leaves if torch.is_tensor(leaf))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix('.tmp')
        shutil.rmtree(temporary, ignore_errors=True)   # of a save that was killed
        free = shutil.disk_usage(path.parent).free
        try:
            if free < need:
                raise OSError(errno.ENOSPC, 'too little to begin with')
            write_files(temporary, {**state, 'step': step}, weights, states, rngs,
                        model if export else None)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if disk_full(error):
                message = (f'disk full, checkpoint not saved: {need:,} bytes needed, {free:,} '
                           'free; earlier checkpoints are untouched')
                raise OSError(errno.ENOSPC, message, str(path)) from error
            raise
        publish(temporary, path, keep)
        return path

    return on_rank0(write)


def latest(out_dir) -> Path | None:
    """The newest checkpoint in out_dir whose checksums hold, or None. Damaged ones are named on
    stderr and left out."""
    def find():
        for path in folders(out_dir):
            if path.suffix == '.tmp':
                continue
            problem = damage(path)
            if problem is None:
                return path
            print(f'{path} is damaged and left out: {problem}', file=sys.stderr)
    return on_rank0(find)


def began(out_dir) -> str:
    """
    When the run in out_dir began, in ISO form: 'date' in the state of its newest checkpoint that
    can be read and has one, else now. Chat templates print it as today's, so that it is asked for
    before there is a model to load the checkpoint into.
    """
    def find():
        dates = (state['date'] for _, state in states(out_dir) if 'date' in state)
        return next(dates, None) or datetime.now().isoformat()
    return on_rank0(find)


def peek(out_dir, *keys) -> dict | None:
    """
    The numbers of these keys in the state of the newest checkpoint in out_dir, 'step' among them,
    or None without one. Nothing is verified or loaded: for what has to be known before.
    """
    def find():
        for path, state in states(out_dir):
            if path.suffix != '.tmp':
                return {key: state.get(key) for key in ('step', *keys)}
    return on_rank0(find)


def states(out_dir):
    """Yields (folder, state) of the checkpoints whose state can be read, newest first; of damaged
    ones `latest` will say so."""
    for path in folders(out_dir):
        try:
            state = torch.load(path / 'state.pt', 'cpu', mmap=True, weights_only=True)
        except Exception:   # whatever a damaged file raises
            continue
        yield path, state


def load(path, model, optimizers: list) -> dict:
    """
    Restores the tensors of model and optimizers, hyperparameters, and this rank's generators, bit
    for bit; returns the state that save was given and 'step', tensors on the CPU. A rank beyond
    those that saved gets generators seeded from rank 0's.

    Raises ValueError, with everything as it was, for a damaged file or a tensor or parameter group
    that does not fit.
    """
    path = Path(path)
    targets = named_tensors(model)
    problem = on_rank0(lambda: damage(path))
    if problem:
        raise ValueError(f'{path} is damaged: {problem}')
    states = torch.load(path / 'optimizer.pt', map_location='cpu', mmap=True, weights_only=True)
    with safe_open(path / 'weights.safetensors', 'pt') as weights, torch.no_grad():
        check_fit(path, weights, states, targets, optimizers)
        for name, target in targets.items():
            target.copy_(placed(weights.get_tensor(name), target))
        for saved, optimizer in zip(states, optimizers):
            restore_optimizer(optimizer, saved, targets)
    rng = path / f'rng_rank{rank()}.pt'
    if rng.exists():
        set_rng_state(torch.load(rng, weights_only=True))
    else:
        seed = int(digest(path / 'rng_rank0.pt')[:7], 16) + rank()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
    return torch.load(path / 'state.pt', map_location='cpu', weights_only=True)


# ---- tensors, whole and sharded ----

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def named_tensors(model) -> dict:
    """Name -> parameter or buffer of the state dict, each once: a tied one by its first name."""
    names = {}
    state = model.state_dict(keep_vars=True)   # keep_vars: the objects that optimizers hold
    for name, tensor in state.items():
        names.setdefault(tensor, name.replace('_orig_mod.', ''))   # the prefix of torch.compile
    return {name: tensor for tensor, name in names.items()}


def whole(value):
    """A tensor unsharded on the CPU, None on ranks but 0 (collective for a DTensor); other values
    as they are."""
    if not torch.is_tensor(value):
        return value
    value = value.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if rank() != 0:
        return None
    value = value.cpu().contiguous()
    is_view = value.untyped_storage().nbytes() != value.nbytes
    return value.clone() if is_view else value   # a view would save all its storage


def placed(saved, like):
    """A whole CPU tensor on the device of `like`, sharded as it is."""
    saved = saved.to(like.device)
    if isinstance(like, DTensor):   # src_data_rank=None: each rank has it all
        return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
    return saved


def full_state_dict(model) -> dict:
    """Name -> whole CPU tensor on rank 0 (the model's own memory where it is whole on the CPU),
    tied ones once; -> None on other ranks. Called by every rank."""
    return {name: whole(tensor) for name, tensor in named_tensors(model).items()}


def optimizer_state(model, optimizer) -> dict:
    """The optimizer's state dict with names for indices and, on rank 0, whole tensors. Called by
    every rank."""
    kind = type(optimizer).__name__
    names = {p: name for name, p in named_tensors(model).items()}
    state, groups = {}, []
    for group in optimizer.param_groups:
        for p in group['params']:
            if p not in names:
                raise ValueError(f'{kind} holds a parameter {list(p.shape)} that the model has not')
            entry = optimizer.state.get(p, {})
            for key, value in entry.items():
                if is_local_shard(value, p):
                    raise ValueError(f'{kind}: {key} of {names[p]} is a local shard, not a DTensor')
            state[names[p]] = {key: whole(value) for key, value in entry.items()}
        groups.append({**group, 'params': [names[p] for p in group['params']]})
    return {'state': state, 'param_groups': groups}


def is_local_shard(value, p) -> bool:
    """Whether value, of the optimizer's state for p, is only this rank's part of a tensor."""
    is_plain = torch.is_tensor(value) and not isinstance(value, DTensor)
    return isinstance(p, DTensor) and is_plain and value.ndim > 0


def restore_optimizer(optimizer, saved: dict, targets: dict):
    """Sets state and hyperparameters without the casts to the parameters' dtype that
    Optimizer.load_state_dict does."""
    optimizer.state.clear()
    for group, old in zip(optimizer.param_groups, saved['param_groups']):
        for key in set(old) - {'params'}:
            value = old[key]
            if torch.is_tensor(value):   # the learning rate of a compiled step keeps its device
                device = getattr(group.get(key), 'device', 'cpu')
                value = value.to(device, copy=True)
            group[key] = value
        for name in old['params']:
            p = targets[name]
            for key, value in saved['state'][name].items():
                optimizer.state[p][key] = restored(value, p, group)


def restored(value, p, group):
    """A value of the saved state of parameter p as a new object on the device where it belongs."""
    if not torch.is_tensor(value):
        return value
    if value.ndim and value.shape == p.shape:
        empty = torch.empty_like(p, dtype=value.dtype, requires_grad=False)
        return empty.copy_(placed(value, p))
    # torch keeps step counters on the CPU unless the step runs on the device
    on_device = value.ndim or group.get('fused') or group.get('capturable')
    return value.to(p.device if on_device else 'cpu', copy=True)


def check_fit(path: Path, weights, states: list, targets: dict, optimizers: list):
    """Raises ValueError naming the first tensor, optimizer or parameter group that is not as it
    was saved."""
    saved = set(weights.keys())
    for name in sorted(saved ^ set(targets)):
        where = 'checkpoint' if name in saved else 'model'
        raise ValueError(f'{path}: {name} is only in the {where}')
    for name, target in targets.items():
        old = weights.get_tensor(name)
        if old.shape != target.shape or old.dtype != target.dtype:
            raise ValueError(f'{path}: {name} is {old.dtype} {list(old.shape)} in the checkpoint '
                             f'and {target.dtype} {list(target.shape)} in the model')
    names = {p: name for name, p in targets.items()}
    if len(states) != len(optimizers):
        raise ValueError(f'{path}: {len(states)} optimizers in the checkpoint, '
                         f'{len(optimizers)} in the script')
    for i, (old, optimizer) in enumerate(zip(states, optimizers)):
        saved_groups = [group['params'] for group in old['param_groups']]
        own_groups = []
        for group in optimizer.param_groups:
            own_groups.append([names.get(p) for p in group['params']])
        if saved_groups != own_groups:
            raise ValueError(f'{path}: the parameter groups of optimizer {i} '
                             f'({type(optimizer).__name__}) differ')


# ---- random generators ----

def gather_rng_states() -> list:
    """The generators' states of all ranks, on rank 0. Called by every rank."""
    if not dist.is_initialized():
        return [rng_state()]
    rngs = [None] * dist.get_world_size()
    dist.gather_object(rng_state(), rngs if rank() == 0 else None)
    return rngs


def rng_state() -> dict:
    kind, keys, *rest = np.random.get_state()
    on_cuda = torch.cuda.is_initialized()
    return {
        'torch': torch.get_rng_state(),
        'python': random.getstate(),
        'cuda': torch.cuda.get_rng_state() if on_cuda else None,
        'numpy': (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def set_rng_state(saved: dict):
    kind, keys, *rest = saved['numpy']
    torch.set_rng_state(saved['torch'])
    random.setstate(saved['python'])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if saved['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved['cuda'])


# ---- files ----

def on_rank0(function):
    """function() run by rank 0; what it returns or raises, every rank returns or raises."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            if not dist.is_initialized():
                raise
            picklable = isinstance(error, (OSError, ValueError))
            outcome[1] = error if picklable else RuntimeError(repr(error))
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


def check_readable(values):
    """Raises ValueError unless values can be saved, and read back without running code from the
    file."""
    buffer = io.BytesIO()
    try:
        torch.save(tree_map(without_tensor, values), buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        culprit = re.search(r'GLOBAL (\S+)', str(error))
        raise ValueError('a checkpoint holds tensors, numbers, strings and plain containers; the '
                         'state or a parameter group has a '
                         f'{culprit[1] if culprit else error}') from error


def without_tensor(value):
    return None if torch.is_tensor(value) else value


def write_files(folder: Path, state: dict, weights: dict, states: list, rngs: list, export):
    """Makes the folder of a checkpoint and brings it to the disk. export: the model to write to
    hub/, or None."""
    folder.mkdir()
    save_file(weights, folder / 'weights.safetensors')
    files = {'optimizer.pt': states, 'state.pt': state}
    for r, rng in enumerate(rngs):
        files[f'rng_rank{r}.pt'] = rng
    for name, value in files.items():
        # by the file, not its name, torch keeps the OSError of a full disk
        with open(folder / name, 'wb') as file:
            torch.save(value, file)
    if export is not None:
        sharded = any(isinstance(p, DTensor) for p in export.parameters())
        export.save_pretrained(folder / 'hub', **({'state_dict': weights} if sharded else {}))
    written = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    sums = {path.relative_to(folder).as_posix(): digest(path) for path in written}
    (folder / 'checksums.json').write_text(json.dumps(sums, indent=1), encoding='utf-8')
    for entry in [*folder.rglob('*'), folder]:
        sync(entry)


def publish(temporary: Path, path: Path, keep: int):
    """Gives the finished folder its name, then removes every other but the keep − 1 checkpoints
    before it."""
    if path.exists():   # the same step again: latest finds the old one until the new has the name
        old = path.with_suffix('.old')
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(temporary, path)
    sync(path.parent)
    found = folders(path.parent)
    earlier = [other for other in found if other.suffix == '' and step_of(other) < step_of(path)]
    for other in found:
        if other not in [path, *earlier[:keep - 1]]:
            shutil.rmtree(other)


def folders(out_dir) -> list[Path]:
    """Folders of checkpoints, newest step first; of one step the complete one before .old, and
    .tmp last."""
    name = re.compile(r'step_\d{8,}(\.old|\.tmp)?')
    found = [path for path in Path(out_dir).glob('step_*') if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: (-step_of(path), path.suffix))


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix('step_'))


def disk_full(error) -> bool:
    """Whether the OSError of a full disk or quota lies behind error (safetensors has only its
    text)."""
    while error:
        code = getattr(error, 'errno', None)
        if code in (errno.ENOSPC, errno.EDQUOT) or re.search(r'os error (28|122)\)', str(error)):
            return True
        error = error.__context__
    return False


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, None if their checksums hold."""
    try:
        sums = json.loads((path / 'checksums.json').read_text(encoding='utf-8'))
        for name, expected in sums.items():
            if digest(path / name) != expected:
                return f'the checksum of {name} differs'
    except (OSError, ValueError, AttributeError) as error:
        return ' '.join(str(error).split())


def digest(file: Path) -> str:
    sha = hashlib.sha256()
    with open(file, 'rb') as f:
        while chunk := f.read(2**24):
            sha.update(chunk)
    return sha.hexdigest()


def sync(path: Path):
    """Brings a file, or the entries of a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
