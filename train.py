"""
What every training script needs: settings, processes and shards, optimizers, the log, the start and
the end of a run. sft.py, grpo.py and preference.py are built from these pieces.

Ctrl-C or SIGTERM finishes the step, saves and stops; the same command goes on from there. The
finished model is written to `out_dir` in the hub's layout.
"""

import functools
import json
import math
import os
import re
import resource
import signal
import sys
import textwrap
import uuid
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

# before torch: says so where it is missing
from configurator import at_least, first_rank

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import checkpoint
import hub
import plan
import rewards
from data.prompts import fitting
from data.source import read_rows
from data.tokenizer import Tokenizer
from judge import load_judges
from kernels import fp8
from model import ModelConfig, Transformer
from sample import present, use_device


@dataclass
class Training:
    """Settings of every training script."""
    # start
    out_dir: str = 'out/run'               # checkpoints, metrics.jsonl, samples.txt and the
                                           # finished model
    init_from: str | None = None           # folder or hub id to start from
    tokenizer: str | None = None           # folder of the tokenizer; None: that of init_from
    chat_template: str | None = None       # 'r1_zero' (that of DeepSeek-R1-Zero), a file, or None:
                                           # the tokenizer's own
    template_args: dict = field(default_factory=dict)  # as {'enable_thinking': False}, for the
                                           # template, over those saved with the tokenizer
    data: list[str] = field(default_factory=list)  # JSONL files

    # optimizer
    steps: int = 1000                      # optimizer steps
    learning_rate: float = 2e-3            # peak, AdamW
    muon_learning_rate: float = 0.0        # peak, Muon for the hidden matrices; 0: AdamW for
                                           # everything
    schedule: Literal['cosine', 'constant', 'linear'] = 'cosine'  # of the learning rate after the
                                           # warm-up
    warmup_steps: int = 20                 # linear warm-up
    min_lr: float = 0.1                    # share of the peak at the end of the schedule
    beta1: float = 0.9                     # AdamW
    beta2: float = 0.95                    # AdamW
    weight_decay: float = 0.0              # decoupled, for matrices
    grad_clip: float = 1.0                 # largest gradient norm; 0: none

    # machine
    seed: int = 1                          # of the weights and the order of the data
    device: Literal['auto', 'cpu', 'cuda'] = 'auto'  # auto: a GPU if there is one
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # arithmetic; bfloat16 by autocast
    threads: int = 2                       # CPU threads a rank
    kernels: Literal['auto', 'triton', 'torch'] = 'auto'  # auto: Triton on a GPU where it is
                                           # installed
    fp8: bool = False                      # linear layers multiply in FP8 (DeepSeek-V3's blocks);
                                           # simulated on a CPU
    shard_ranks: int = 0                   # ranks that share one copy of the weights (HSDP: those
                                           # of a node); 0: all
    activation_checkpointing: bool = False # recompute activations in the backward pass
    peak_tflops: float = 0.0               # of a device, for the model FLOPs utilisation; 0: looked
                                           # up by the GPU's name

    # evaluation
    eval_data: list[str] = field(default_factory=list)  # problem files to sample and grade while
                                           # training
    eval_every: int = 0                    # steps between evaluations; 0: only at the end

    # checkpoints and the log
    save_every: int = 200                  # steps between checkpoints; 0: only when stopped and
                                           # at the end
    save_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # of the finished model
                                           # (no checkpoint); None: as init_from is stored,
                                           # float32 if new
    keep: int = 2                          # checkpoints kept
    resume: bool = True                    # go on from the newest checkpoint in out_dir
    wandb: str = ''                        # project of Weights & Biases to log to as well (the
                                           # [wandb] extra)

    # before a run
    show: int = 0                          # print so many rows of each file as tokens, and stop
    plan: bool | str = False               # print what the run needs in memory and stop: on this
                                           # machine, or on ranks x GB as 8x80

    def __post_init__(self):
        at_least(self, 1, 'steps', 'threads', 'keep')
        at_least(self, 0, 'learning_rate', 'muon_learning_rate', 'warmup_steps', 'min_lr',
                 'weight_decay', 'grad_clip', 'shard_ranks', 'eval_every', 'save_every', 'show')


@dataclass
class Graded(Training):
    """Settings of the scripts whose models are sampled and graded: sft.py and grpo.py."""
    # optimizer
    max_bad_updates: int = 3               # updates in a row that may be skipped for a loss or
                                           # gradient that is not finite
    bias_rate: float = 0.0                 # step of the router bias

    # evaluation
    eval_rows: int = 64                    # problems of an evaluation

    # rewards
    preference: dict[str, str] = field(default_factory=dict)  # reward models of the task or reward
                                           # 'preference', {name: folder}
    reward_file: str = ''                  # Python file of your own rewards and tasks, functions
                                           # name_reward(response, row)
    unsafe_code: bool = False              # let programs of the model run without a sandbox where
                                           # there is none
    reward_workers: int = -1               # processes that grade; -1: one a core where programs are
                                           # run or there is a reward_file, else none

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'max_bad_updates', 'eval_rows')
        at_least(self, 0, 'bias_rate')


@dataclass
class Rows(Training):
    """Settings of the scripts that read rows of a fixed length: sft.py and preference.py."""
    # start
    model: dict = field(default_factory=dict)  # ModelConfig of a new model (vocab_size follows from
                                           # the tokenizer); with init_from the keys to change, as
                                           # {'max_position_embeddings': 131072,
                                           # 'rope_scaling': {...}} for longer context

    # batches
    row_len: int = 136                     # tokens a row
    long_rows: Literal['error', 'drop'] = 'error'  # what to do with rows longer than that
    batch_rows: int = 32                   # rows of an optimizer step over all ranks
    micro_rows: int = 32                   # rows of one forward on one rank; the rest is gradient
                                           # accumulation

    # checkpoints and the log
    log_every: int = 10                    # steps between lines of metrics.jsonl

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'row_len', 'batch_rows', 'micro_rows', 'log_every')


# --------------------------------------------------------------------------------------------------
# processes and devices

PATIENCE = timedelta(hours=2)  # of ranks that wait for one that reads, saves or samples
TOGETHER = timedelta(minutes=10)  # of ranks in the same forward or backward pass: longer is a fault


def start_processes(cfg):
    """-> device, rank, world. Under torchrun joins the process group: nccl on GPUs, gloo on
    CPUs."""
    device = use_device(cfg)
    if 'RANK' in os.environ and not dist.is_initialized():
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo', timeout=PATIENCE)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return torch.device(device), rank, world


@functools.cache
def mesh_of(kind, world, shard_ranks):
    """The ranks as FSDP sees them, in groups of their own: where they gather different layers the
    run ends after ten minutes (TOGETHER, which is NCCL's own limit too), not after PATIENCE."""
    if shard_ranks:
        shape = world // shard_ranks, shard_ranks
        return init_device_mesh(kind, shape, mesh_dim_names=('copies', 'ranks'))
    group = dist.new_group(timeout=TOGETHER)
    return DeviceMesh.from_group(group, kind, mesh_dim_names=('ranks',))


def into_units(model, cfg, device):
    """FSDP2: each layer is a unit, the embedding, norm and head another. With `shard_ranks` every
    so many ranks (a node) share a copy of the weights and gradients are averaged over the copies
    (HSDP); else all ranks share one."""
    world = dist.get_world_size()
    if world % (cfg.shard_ranks or world):
        raise ValueError(f'shard_ranks={cfg.shard_ranks} does not divide {world} ranks')
    mesh = mesh_of(device.type, world, cfg.shard_ranks)
    policy = precision(cfg, device)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def precision(cfg, device):
    """On GPUs bf16 weights are gathered and float32 gradients reduced. Inputs stay as they are:
    FSDP would copy every list among them, and routes be collected in the copy."""
    if cfg.dtype != 'bfloat16' or device.type != 'cuda':
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                cast_forward_inputs=False)


def shard(model, cfg, device):
    """The model ready for training: in FSDP units, if a checkpoint was not read into them already.
    Nothing to do in one process."""
    model.activation_checkpointing = cfg.activation_checkpointing
    if dist.is_initialized():
        if not isinstance(model, FSDPModule):
            into_units(model, cfg, device)
        register_fsdp_forward_method(model, 'logprobs')
        dist.barrier()         # a rank may have read for long
        with torch.no_grad():  # the first unit to run becomes the root: it must be the whole model
            blank = torch.zeros(1, 2, dtype=torch.int64, device=device)
            model.logprobs(blank, blank)
    return reshard(model)


def reshard(model):
    """After a forward without a backward pass: FSDP's root stays gathered, and what is then
    changed, or held by an optimizer, is soon freed."""
    if isinstance(model, FSDPModule):
        model.reshard()
    return model


class Unsharded:
    """`with Unsharded(model):` gathers every FSDP unit for sampling and lets go of it afterwards
    (unshard is not recursive). Ranks may run different things within, or nothing, as long as no
    hook of FSDP is called: see Transformer."""

    def __init__(self, model):
        self.units = [m for m in model.modules() if isinstance(m, FSDPModule)]

    def __enter__(self):
        for unit in self.units:
            unit.unshard()

    def __exit__(self, *_):
        for unit in self.units:
            unit.reshard()


def total(value, device):
    """Sum of a number or tensor over all ranks."""
    value = torch.as_tensor(value, device=device)
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


class Stop:
    """Turns the first SIGINT or SIGTERM into a wish that the loop honours between steps; a second
    one interrupts at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, _):
        if self.signal == number:
            raise KeyboardInterrupt
        self.signal = number

    def wanted(self, device):
        return bool(total(float(self.signal is not None), device))

    def leave(self, log, step, folder):
        log.close()
        print(f'stopped after step {step}, saved in {folder}; the same command goes on from there',
              file=sys.stderr)
        sys.exit(0 if self.signal == signal.SIGTERM else 130)


# --------------------------------------------------------------------------------------------------
# optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices [.., rows, columns]:

        W -= lr * sqrt(max(1, rows / columns)) * NS5(nesterov momentum)

    Stacked experts [E, rows, columns] are orthogonalised one by one.
    https://kellerjordan.github.io/posts/muon
    (torch.optim.Muon takes neither stacks nor shards.)"""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state['momentum'] = torch.zeros_like(p)
                state['momentum'].mul_(group['momentum']).add_(p.grad)
                update = p.grad.add(state['momentum'], alpha=group['momentum'])
                if isinstance(update, DTensor):
                    whole = orthogonalise(update.full_tensor())
                    update = distribute_tensor(whole, p.device_mesh, p.placements,
                                               src_data_rank=None)
                else:
                    update = orthogonalise(update)
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(update, alpha=-group['lr'] * scale)


def orthogonalise(g, steps=5):
    """Newton-Schulz iteration towards U V^T of g = U S V^T; singular values end between about 0.7
    and 1.2."""
    x = g.float() / (g.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if flip else x).to(g.dtype)


def make_optimizers(model, cfg):
    """-> list. Muon, if its rate is set, takes the hidden matrices; AdamW the embedding, head (that
    of a reward model too), router, norms and biases."""
    apart = ('embed', 'lm_head', 'gate.weight', 'score.weight')

    def hidden(name, p):
        return p.ndim >= 2 and not any(part in name for part in apart)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if cfg.muon_learning_rate and hidden(name, p)]
    rest = [p for name, p in named if not (cfg.muon_learning_rate and hidden(name, p))]
    groups = [{'params': [p for p in rest if p.ndim >= 2], 'weight_decay': cfg.weight_decay},
              {'params': [p for p in rest if p.ndim < 2], 'weight_decay': 0.0}]
    optimizers = [torch.optim.AdamW(groups, cfg.learning_rate, (cfg.beta1, cfg.beta2), fused=True)]
    if muon:
        optimizers.append(Muon(muon, cfg.muon_learning_rate, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['peak_lr'] = group['lr']
    return optimizers


def schedule(step, cfg):
    """Share of the peak learning rate at a step (0-based): up to 1 in warmup_steps, then down to
    min_lr at the last step. A run that ends with its warm-up does not come down."""
    warm, last = min(1.0, (step + 1) / max(1, cfg.warmup_steps)), cfg.steps - 1
    start, done = min(cfg.warmup_steps, last - 1), 0.0
    if start >= 0 and cfg.warmup_steps <= last:
        done = min(1.0, max(0, step - start) / (last - start))
    tail = {'constant': 1.0, 'linear': 1 - done, 'cosine': 0.5 * (1 + math.cos(math.pi * done))}
    return warm * (cfg.min_lr + (1 - cfg.min_lr) * tail[cfg.schedule])


def optimizer_step(model, optimizers, share, grad_clip, loss=0.0):
    """-> gradient norm before clipping. Sets the learning rates to `share` of their peaks, steps,
    clears the gradients. Where the norm or `loss` (of all ranks) is not finite nothing is changed
    and None returned."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float('inf'))
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    healthy = math.isfinite(norm) and math.isfinite(loss)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * share
        if healthy:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm if healthy else None


def report_skip(cfg, log, step, bad, batch, rank):
    """An update was skipped, the `bad`th in a row: told, and the end of the run after
    cfg.max_bad_updates, with each rank's batch saved."""
    log.warn(f'step {step + 1}: loss or gradient is not finite, update skipped ({bad} in a row)')
    if bad >= cfg.max_bad_updates:
        path = Path(cfg.out_dir) / f'bad_batch_rank{rank}.pt'
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({'step': step, **batch}, path)
        raise FloatingPointError(
            f'{bad} updates in a row had a loss or gradient that is not finite; the batch is in '
            f'{path}, checkpoints in {cfg.out_dir} are from before. Usual causes: learning_rate '
            'too high, rows of data that are broken; the same command replays the steps since the '
            'checkpoint to the same bits')


# --------------------------------------------------------------------------------------------------
# the start of a run


def check_start(cfg):
    """Raises unless a Rows names what to start from, and it is there."""
    if not (cfg.tokenizer or cfg.init_from):
        raise ValueError('set init_from (a checkpoint) or tokenizer (and model) to start from')
    present(cfg, 'init_from', 'tokenizer')


def show_plan(cfg):
    """Prints what a Rows needs in memory."""
    start = cfg.init_from
    if not start:
        vocab_size = Tokenizer.from_pretrained(cfg.tokenizer).vocab_size
        start = {'vocab_size': vocab_size, **cfg.model}
    plan.show(cfg, start, cfg.plan)


def begin(cfg):
    """ValueError, before anything is loaded, where nothing is left to do in out_dir: the run is
    finished or past cfg.steps. Called by every rank."""
    at, out = checkpoint.peek(cfg.out_dir, 'flops'), cfg.out_dir
    finished = checkpoint.on_rank0((Path(out) / 'config.json').exists)
    if at is None and finished:
        raise ValueError(f'{out} holds a finished model and no checkpoint to go on from: set '
                         f'another out_dir (with init_from={out} it starts from these weights)')
    if at is None:
        return
    step, most = at['step'], getattr(cfg, 'max_flops', 0)
    if not cfg.resume:
        raise ValueError(f'{out} has a checkpoint of step {step} in the way: with resume=False a '
                         'run starts anew, in another out_dir or when you have removed it')
    if step > cfg.steps:
        raise ValueError(f'{out} is at step {step}, past steps={cfg.steps}, and is left as it is: '
                         f'raise steps to go on from there, or set another out_dir')
    spent = bool(most) and at['flops'] >= most
    if finished and (step == cfg.steps or spent):
        raise ValueError(f'{out} holds the finished model of step {step}: raise '
                         f'{"max_flops" if spent else "steps"} to go on from its last checkpoint, '
                         'or set another out_dir to train anew')


def idle_in_training(cfg, world):
    """Cases for configurator.idle that the trainers share."""
    return [(not cfg.eval_data, ('eval_every', 'eval_rows', 'eval_max_new_tokens'), 'no eval_data'),
            (cfg.schedule == 'constant', ('min_lr',), "schedule='constant' never falls"),
            (world == 1, ('shard_ranks',), 'there is one process')]


def resume(cfg, model, optimizers):
    """-> the state of the newest checkpoint in out_dir, which is loaded, or None. Learning rates
    and the like are those of this command, not the checkpoint's."""
    found = checkpoint.latest(cfg.out_dir)
    if not found:
        return None
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    ours = [{key: value for key, value in group.items() if key != 'params'} for group in groups]
    state = checkpoint.load(found, model, optimizers)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, values in zip(groups, ours):
        group.update(values)
    if dist.is_initialized():
        dist.barrier()         # a rank may have read for long
    return state


def load_tokenizer(cfg):
    source = cfg.tokenizer or cfg.init_from
    tokenizer = Tokenizer.from_pretrained(source, cfg.chat_template, cfg.template_args)
    tokenizer.date = datetime.fromisoformat(checkpoint.began(cfg.out_dir))
    return tokenizer


def model_config(cfg, tokenizer):
    """-> ModelConfig of the model that load_model makes or reads, before it does"""
    changes = getattr(cfg, 'model', {})
    if cfg.init_from:
        folder = hub.local_folder(cfg.init_from, ('config.json',))
        return ModelConfig.read(folder / 'config.json', **changes)
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    return ModelConfig.new({'vocab_size': tokenizer.vocab_size, **ids, **changes})


def load_model(cfg, device, whole=False, tokenizer=None):
    """-> model, tokenizer, from init_from or new. Under torchrun each rank reads only its shards of
    a checkpoint, unless `whole`. tokenizer: of load_tokenizer, where it is there already."""
    source = cfg.tokenizer or cfg.init_from
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.init_from:
        parts = None
        if dist.is_initialized() and not whole:
            parts = functools.partial(into_units, cfg=cfg, device=device)
        model = Transformer.from_pretrained(cfg.init_from, device=device, shard=parts,
                                            **getattr(cfg, 'model', {}))
        tokenizer.check_model(model.cfg.vocab_size, f'{source} and {cfg.init_from}')
    else:
        model = Transformer(model_config(cfg, tokenizer)).to(device)
    model.use_tokens(tokenizer)
    return fp8.convert(model) if cfg.fp8 else model, tokenizer


def tell_long(cfg, long, others):
    """long: [(file and row, tokens)] of the rows that do not fit, beside so many others. ValueError
    names the first of them, or where cfg.long_rows is 'drop' a line on stderr does."""
    if not long:
        return
    (where, tokens), count = long[0], f'{len(long)} of {len(long) + others} rows are too long'
    room = f'row_len={cfg.row_len}' if tokens > cfg.row_len else 'max_position_embeddings'
    told = f'{where}: {tokens} tokens do not fit {room}'
    if cfg.long_rows == 'error' or not others:
        way = ", or set long_rows='drop'" if others and cfg.long_rows == 'error' else ''
        raise ValueError(f'{told} ({count}): raise that{way}')
    if first_rank():
        print(f'{told}; {count} and dropped', file=sys.stderr)


def eval_problems(cfg, tokenizer, device):
    """-> the rows of cfg.eval_data, of each file the first eval_rows, that fit the context"""
    context, problems = model_config(cfg, tokenizer).max_position_embeddings, []
    for path in cfg.eval_data:
        rows = read_rows(path, require=('prompt', 'task'))[:cfg.eval_rows]
        rewards.checked(path, rows, {'accuracy': 1.0})
        kept = fitting(tokenizer, path, rows, context, cfg.eval_max_new_tokens, '', cfg.long_rows,
                       'eval_max_new_tokens', 'long_rows')
        problems += [rows[i] for i in kept]
    if problems:
        rewards.prepare({'accuracy': 1.0}, {row['task'] for row in problems}, cfg.unsafe_code,
                        cfg.reward_workers, load_judges(cfg.preference, device))
    return problems


# --------------------------------------------------------------------------------------------------
# what a run writes

RATE = ('learning_rate', 'schedule', 'warmup_steps', 'min_lr', 'steps')  # what it follows from


class Log:
    """metrics.jsonl, samples.txt and the progress line, on rank 0. A resumed run first drops what
    they hold of the steps after its checkpoint, a new one all."""

    def __init__(self, cfg, rank, step, steps):
        self.folder, self.quiet = Path(cfg.out_dir), rank != 0
        if self.quiet:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        settings, now = self.folder / 'config.run.json', json.loads(json.dumps(asdict(cfg)))
        before = hub.read_json(settings) if step and settings.exists() else now
        for key in now:
            if before.get(key) != now[key]:
                self.warn(f'{key} was {before.get(key)!r}; from step {step} on it is {now[key]!r}')
        if any(before.get(key) != now.get(key) for key in RATE):
            then = SimpleNamespace(**{**now, **before})
            old = schedule(step - 1, then) * then.learning_rate
            new = schedule(step, cfg) * cfg.learning_rate
            if not math.isclose(old, new):
                self.warn(f'the learning rate jumps from {old:.3g} in step {step} to {new:.3g} in '
                          f'step {step + 1}')
        settings.write_text(json.dumps(now, indent=1))
        path = self.folder / 'metrics.jsonl'
        old = path.read_text().splitlines() if path.exists() and step else []
        old = [line for line in old if line.endswith('}') and json.loads(line)['step'] <= step]
        path.write_text(''.join(line + '\n' for line in old))
        self.file = open(path, 'a')
        path = self.folder / 'samples.txt'
        old = path.read_text(encoding='utf-8') if path.exists() and step else ''
        later = (m.start() for m in re.finditer(r'^step (\d+),', old, re.M) if int(m[1]) > step)
        path.write_text(old[:next(later, None)], encoding='utf-8')
        self.wandb = None
        if cfg.wandb:
            try:
                import wandb
            except ImportError:
                raise SystemExit("wandb is missing: pip install -e '.[wandb]', or leave the key "
                                 '`wandb` empty') from None
            self.wandb = wandb.init(project=cfg.wandb, name=str(self.folder), resume='allow',
                                    id=self.wandb_id(step), config=asdict(cfg))
        self.bar = tqdm(total=steps, initial=step, desc=self.folder.name, dynamic_ncols=True,
                        mininterval=1.0)

    def wandb_id(self, step):
        """The run's id, made at its start and kept beside its checkpoints: a run that begins again,
        or goes on in a copy of its folder, is another. A folder that was moved holds the same."""
        path, here = self.folder / 'wandb.json', str(self.folder.resolve())
        known = hub.read_json(path) if step and path.exists() else {}
        copied = known and known['folder'] != here and (Path(known['folder']) / path.name).exists()
        if not known or copied:
            known = {'id': uuid.uuid4().hex[:12]}
        path.write_text(json.dumps({**known, 'folder': here}))
        return known['id']

    def write(self, numbers, shown=()):
        if self.quiet:
            return
        self.file.write(json.dumps(numbers) + '\n')
        self.file.flush()
        if self.wandb:
            there = {k: v for k, v in numbers.items() if k != 'step' and v is not None}
            self.wandb.log(there, step=numbers['step'])
        there = {name: numbers[name] for name in shown if numbers.get(name) is not None}
        said = ' '.join(f'{name} {value:.3g}' for name, value in there.items())
        self.bar.set_postfix_str(said, refresh=False)

    def warn(self, text):
        if not self.quiet:
            tqdm.write(f'warning: {text}', file=sys.stderr)

    def samples(self, step, entries):
        """entries: (where from, {name: number}, prompt, response), the last two text"""
        if self.quiet:
            return
        with open(self.folder / 'samples.txt', 'a', encoding='utf-8') as f:
            for where, numbers, *texts in entries:
                numbers = ', '.join(f'{name} {value:.3g}' for name, value in numbers.items())
                f.write(f'step {step}, {where}: {numbers}\n')
                for name, text in zip(('prompt', 'response'), texts):
                    f.write(f'  {name}\n{textwrap.indent(text, "    ", bool)}\n')
                f.write('\n')

    def tick(self):
        if not self.quiet:
            self.bar.update()

    def close(self):
        if not self.quiet:
            self.bar.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish()


def expert_counts(routes, E, times):
    """-> tokens that each expert got, [MoE layers, E]; times [tokens]: for how many each counts, 0
    for padding"""
    counts = []
    for _, chosen in routes:
        weights = times.repeat_interleave(chosen.shape[1]).double()
        counts.append(torch.bincount(chosen.flatten(), weights, E).long())
    return torch.stack(counts)


def router_bias(model):
    biases = [b.abs().max().item() for name, b in model.named_buffers()
              if name.endswith('e_score_correction_bias')]
    return {'router_bias_max': max(biases)} if biases else {}


def peak_memory(device):
    """-> GiB at the peak so far: this rank's tensors on a GPU; on a CPU the whole process, about
    0.6 of it Python and libraries (what --plan expects is of tensors alone)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists('/proc/self/status'):
        # Linux: ru_maxrss counts what the parent held when it started this process
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) / 2**20
    unit = 2**30 if sys.platform == 'darwin' else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_tflops(cfg, device):
    """-> dense bfloat16 TFLOP/s of one device by its data sheet, 0.0 where unknown. (The FLOPs of
    the logs are 6 N a token trained and 2 N sampled, N the active parameters: no attention scores,
    no recomputation.)"""
    known = {'B200': 2250, 'GH200': 989, 'H200': 989, 'H100': 989, 'H800': 989, 'A100': 312,
             'A800': 312, 'L40S': 362, 'RTX 4090': 165}
    name = torch.cuda.get_device_name() if device.type == 'cuda' else ''
    return cfg.peak_tflops or float(next((v for k, v in known.items() if k in name), 0))


def finish(cfg, model, tokenizer, rank):
    """The finished model and its tokenizer in out_dir, the hub's layout, in save_dtype; config.json
    appears last."""
    weights = checkpoint.full_state_dict(model) if dist.is_initialized() else None
    if rank == 0:
        tokenizer.save_pretrained(cfg.out_dir)
        dtype = getattr(torch, cfg.save_dtype) if cfg.save_dtype else model.stored_dtype
        model.save_pretrained(cfg.out_dir, dtype, state_dict=weights)
        if model.cfg.num_nextn_predict_layers:
            layer = f'model.layers.{model.cfg.num_hidden_layers}.*'
            tqdm.write(f'{cfg.out_dir}: transformers has no MTP layer, loads the rest and lists '
                       f'{layer} as UNEXPECTED', sys.stderr)
    if dist.is_initialized():
        dist.barrier()
