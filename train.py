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
import time
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

import checkpoint
import curves
import hub
import plan
import rewards
from data.prompts import fitting
from data.source import read_rows
from data.tokenizer import Tokenizer
from judge import load_judges
from kernels import fp8
from model import ModelConfig, Transformer
from progress import Bar, glance, tell
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
    keep_checkpoints: int = 2              # the newest of them
    resume: bool = True                    # go on from the newest checkpoint in out_dir
    wandb: str = ''                        # project of Weights & Biases to log to as well (the
                                           # [wandb] extra)

    # before a run
    show: int = 0                          # print so many rows of each file as tokens, and stop
    plan: bool | str = False               # print what the run needs in memory and stop: on this
                                           # machine, or on ranks x GB as 8x80

    def __post_init__(self):
        at_least(self, 1, 'steps', 'threads', 'keep_checkpoints')
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

WAIT_TIMEOUT = timedelta(hours=2)     # of ranks that wait for one that reads, saves or samples
PASS_TIMEOUT = timedelta(minutes=10)  # of ranks in the same forward or backward pass: longer is a
                                      # fault


def start_processes(cfg):
    """-> device, rank, world (number of ranks). Under torchrun joins the process group: nccl on
    GPUs, gloo on CPUs."""
    device = use_device(cfg)
    if 'RANK' in os.environ and not dist.is_initialized():
        backend = 'nccl' if device == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=WAIT_TIMEOUT)
    if not dist.is_initialized():
        return torch.device(device), 0, 1
    return torch.device(device), dist.get_rank(), dist.get_world_size()


def autocast(cfg, device):
    """A context in which the model computes in cfg.dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == 'bfloat16')


@functools.cache
def device_mesh(kind, world, shard_ranks):
    """The ranks as FSDP sees them, in groups of their own: where they gather different layers the
    run ends after PASS_TIMEOUT (which is NCCL's own limit too), not after WAIT_TIMEOUT."""
    if shard_ranks:
        shape = world // shard_ranks, shard_ranks
        return init_device_mesh(kind, shape, mesh_dim_names=('copies', 'ranks'))
    group = dist.new_group(timeout=PASS_TIMEOUT)
    return DeviceMesh.from_group(group, kind, mesh_dim_names=('ranks',))


def into_units(model, cfg, device):
    """FSDP2: each layer is a unit; the embedding, norm and head are another. With `shard_ranks`
    every so many ranks (a node) share a copy of the weights and gradients are averaged over the
    copies (HSDP); else all ranks share one. ValueError where shard_ranks does not divide them."""
    world = dist.get_world_size()
    if world % (cfg.shard_ranks or world):
        raise ValueError(f'shard_ranks={cfg.shard_ranks} does not divide {world} ranks')
    mesh = device_mesh(device.type, world, cfg.shard_ranks)
    policy = mixed_precision(cfg, device)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def mixed_precision(cfg, device):
    """-> FSDP's policy: on GPUs bf16 weights are gathered and float32 gradients reduced. Inputs
    stay as they are: FSDP would copy every list among them, and routes be collected in the copy."""
    if cfg.dtype != 'bfloat16' or device.type != 'cuda':
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                cast_forward_inputs=False)


def shard(model, cfg, device):
    """-> the model ready for training: under torchrun in FSDP units, if a checkpoint was not read
    into them already."""
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
    """Frees the weights that FSDP gathered -> the model. After a forward without a backward pass
    its root stays gathered, and what is then changed, or held by an optimizer, is soon lost."""
    if isinstance(model, FSDPModule):
        model.reshard()
    return model


class Unsharded:
    """`with Unsharded(model):` gathers every FSDP unit for sampling and frees it afterwards
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
    """-> tensor, the sum of a number or tensor over all ranks. Called by every rank."""
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
        """-> whether any rank had a signal. Called by every rank."""
        return bool(total(float(self.signal is not None), device))

    def leave(self, log, step, folder):
        """Ends the process: status 0 after SIGTERM, else 130."""
        log.close()
        print(f'stopped after step {step}, saved in {folder}; the same command goes on from there',
              file=sys.stderr)
        sys.exit(0 if self.signal == signal.SIGTERM else 130)


# --------------------------------------------------------------------------------------------------
# optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices [.., rows, columns]:

        M <- beta M + G                                 momentum of the gradient G
        O  = NS5(G + beta M)                            Nesterov's, see `orthogonalise`
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) O

    Stacked experts [E, rows, columns] are orthogonalised one by one.
    https://kellerjordan.github.io/posts/muon
    (torch.optim.Muon takes neither stacks nor shards.)"""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    self.step_parameter(p, group)

    def step_parameter(self, p, group):
        beta = group['momentum']
        state = self.state[p]
        if not state:
            state['momentum'] = torch.zeros_like(p)
        state['momentum'].mul_(beta).add_(p.grad)
        nesterov = p.grad.add(state['momentum'], alpha=beta)
        direction = orthogonalise_sharded(nesterov)

        rows, columns = p.shape[-2:]
        scale = max(1.0, rows / columns) ** 0.5
        p.mul_(1 - group['lr'] * group['weight_decay'])
        p.add_(direction, alpha=-group['lr'] * scale)


def orthogonalise(g, steps=5):
    """Newton-Schulz iteration towards U V^T of g [.., rows, columns] = U S V^T:

        X = G / |G|, then `steps` times    A = X X^T,    X <- a X + (b A + c A A) X

    The singular values of the result lie between about 0.7 and 1.2; its dtype is that of g. It is
    computed in float32."""
    x = g.float() / (g.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:              # X X^T is then the smaller of the two products
        x = x.mT
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    if is_tall:
        x = x.mT
    return x.to(g.dtype)


def orthogonalise_sharded(g):
    """As orthogonalise; g may be a DTensor, which each rank gathers whole."""
    if not isinstance(g, DTensor):
        return orthogonalise(g)
    whole = orthogonalise(g.full_tensor())
    return distribute_tensor(whole, g.device_mesh, g.placements, src_data_rank=None)


NOT_HIDDEN = ('embed', 'lm_head', 'gate.weight', 'score.weight')  # matrices at the model's ends,
                                                                  # and routers


def make_optimizers(model, cfg):
    """-> list: AdamW and, if cfg.muon_learning_rate is set, Muon.

    Muon takes the hidden matrices; AdamW the embedding, head (that of a reward model too), router,
    norms and biases. Each parameter group has its peak rate under 'peak_lr'."""
    muon = []
    matrices = []
    vectors = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_hidden = p.ndim >= 2 and not any(part in name for part in NOT_HIDDEN)
        if is_hidden and cfg.muon_learning_rate:
            muon.append(p)
        elif p.ndim >= 2:
            matrices.append(p)
        else:
            vectors.append(p)

    groups = [{'params': matrices, 'weight_decay': cfg.weight_decay},
              {'params': vectors, 'weight_decay': 0.0}]
    betas = (cfg.beta1, cfg.beta2)
    optimizers = [torch.optim.AdamW(groups, cfg.learning_rate, betas, fused=True)]
    if muon:
        optimizers.append(Muon(muon, cfg.muon_learning_rate, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['peak_lr'] = group['lr']
    return optimizers


def schedule(step, cfg, flops=0.0):
    """-> share of the peak learning rate at a step (from 0), before which `flops` were spent:

        (step + 1) / warmup_steps           in the warm-up
        min_lr + (1 - min_lr) f(done)       done goes from 0 after it to 1 at the last step
        f(x) = 1 (constant), 1 - x (linear), (1 + cos(pi x)) / 2 (cosine)

    With cfg.max_flops done is at least the share of them that is spent. Otherwise a run that ends
    with its warm-up does not come down."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))

    # how much of the way down is done
    last = cfg.steps - 1
    start = min(cfg.warmup_steps, last - 1)
    done = 0.0
    if start >= 0 and cfg.warmup_steps <= last:
        done = min(1.0, max(0, step - start) / (last - start))
    max_flops = getattr(cfg, 'max_flops', 0)
    if max_flops:
        done = max(done, min(1.0, flops / max_flops))

    fall = 1.0
    if cfg.schedule == 'linear':
        fall = 1 - done
    elif cfg.schedule == 'cosine':
        fall = 0.5 * (1 + math.cos(math.pi * done))
    return warm * (cfg.min_lr + (1 - cfg.min_lr) * fall)


def optimizer_step(model, optimizers, share, grad_clip, loss=0.0):
    """Sets the learning rates to `share` of their peaks, clips the gradients, steps, clears them.

    loss: of all ranks. -> gradient norm before clipping; None where that or the loss is not finite,
    and then no weight and no optimizer's state is changed."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float('inf'))
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm.item()
    is_finite = math.isfinite(norm) and math.isfinite(loss)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * share
        if is_finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm if is_finite else None


def report_skip(cfg, log, step, in_a_row, batch, rank):
    """Warns that the update of a step (from 0) was skipped, as the last in_a_row were.

    After cfg.max_bad_updates of them each rank saves its batch and FloatingPointError ends the
    run."""
    log.warn(f'step {step + 1}: loss or gradient is not finite, '
             f'update skipped ({in_a_row} in a row)')
    if in_a_row < cfg.max_bad_updates:
        return
    path = Path(cfg.out_dir) / f'bad_batch_rank{rank}.pt'
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'step': step, **batch}, path)
    raise FloatingPointError(
        f'{in_a_row} updates in a row had a loss or gradient that is not finite; the batch is in '
        f'{path}, checkpoints in {cfg.out_dir} are from before. Usual causes: learning_rate '
        'too high, rows of data that are broken; the same command replays the steps since the '
        'checkpoint to the same bits')


# --------------------------------------------------------------------------------------------------
# the start of a run


def check_start(cfg):
    """ValueError or FileNotFoundError unless the settings, a Rows, name what to start from and it
    is there."""
    if not (cfg.tokenizer or cfg.init_from):
        raise ValueError('set init_from (a checkpoint) or tokenizer (and model) to start from')
    present(cfg, 'init_from', 'tokenizer')


def show_plan(cfg):
    """Prints what a run with these settings, a Rows, needs in memory."""
    start = cfg.init_from
    if not start:
        vocab_size = Tokenizer.from_pretrained(cfg.tokenizer).vocab_size
        start = {'vocab_size': vocab_size, **cfg.model}
    plan.show(cfg, start, cfg.plan)


def check_out_dir(cfg):
    """ValueError, before anything is loaded, where nothing is left to do in out_dir: the run is
    finished or past cfg.steps. Called by every rank."""
    out = cfg.out_dir
    saved = checkpoint.peek(out, 'flops')   # 'step' and 'flops' of the newest checkpoint
    is_finished = checkpoint.on_rank0((Path(out) / 'config.json').exists)
    if saved is None and is_finished:
        raise ValueError(f'{out} holds a finished model and no checkpoint to go on from: set '
                         f'another out_dir (with init_from={out} it starts from these weights)')
    if saved is None:
        return

    step = saved['step']
    if not cfg.resume:
        raise ValueError(f'{out} has a checkpoint of step {step} in the way: with resume=False a '
                         'run starts anew, in another out_dir or when you have removed it')
    if step > cfg.steps:
        raise ValueError(f'{out} is at step {step}, past steps={cfg.steps}, and is left as it is: '
                         f'raise steps to go on from there, or set another out_dir')
    max_flops = getattr(cfg, 'max_flops', 0)
    is_spent = max_flops > 0 and saved['flops'] >= max_flops
    if is_finished and (step == cfg.steps or is_spent):
        key = 'max_flops' if is_spent else 'steps'
        raise ValueError(f'{out} holds the finished model of step {step}: raise {key} to go on '
                         'from its last checkpoint, or set another out_dir to train anew')


def check_ranks(cfg, world):
    """ValueError where the rows of a step cannot be dealt to the ranks in equal shares."""
    if cfg.batch_rows % world:
        raise ValueError(f'batch_rows={cfg.batch_rows} does not divide into {world} ranks')


def idle_in_training(cfg, world):
    """Cases for configurator.idle that the trainers share."""
    evaluation = ('eval_every', 'eval_rows', 'eval_max_new_tokens')
    return [(not cfg.eval_data, evaluation, 'no eval_data'),
            (cfg.schedule == 'constant', ('min_lr',), "schedule='constant' never falls"),
            (world == 1, ('shard_ranks',), 'there is one process')]


def resume(cfg, model, optimizers):
    """Loads the newest checkpoint in out_dir -> its state, or None where there is none. Learning
    rates and the like stay those of this command. Called by every rank."""
    found = checkpoint.latest(cfg.out_dir)
    if not found:
        return None
    settings = []
    for group in all_groups(optimizers):
        settings.append({key: value for key, value in group.items() if key != 'params'})
    state = checkpoint.load(found, model, optimizers)
    for group, values in zip(all_groups(optimizers), settings):
        group.update(values)
    if dist.is_initialized():
        dist.barrier()         # a rank may have read for long
    return state


def all_groups(optimizers):
    groups = []
    for optimizer in optimizers:
        groups += optimizer.param_groups
    return groups


def load_tokenizer(cfg):
    """-> the Tokenizer of cfg.tokenizer or cfg.init_from, with the date on which the run began.
    Called by every rank."""
    source = cfg.tokenizer or cfg.init_from
    tokenizer = Tokenizer.from_pretrained(source, cfg.chat_template, cfg.template_args)
    tokenizer.date = datetime.fromisoformat(checkpoint.began(cfg.out_dir))
    return tokenizer


def model_config(cfg, tokenizer):
    """-> ModelConfig of the model that load_model will make or read"""
    changes = getattr(cfg, 'model', {})
    if cfg.init_from:
        folder = hub.local_folder(cfg.init_from, ('config.json',))
        return ModelConfig.read(folder / 'config.json', **changes)
    ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    return ModelConfig.new({'vocab_size': tokenizer.vocab_size, **ids, **changes})


def load_model(cfg, device, whole=False, tokenizer=None):
    """-> model, tokenizer, from init_from or new.

    Under torchrun each rank reads only its shards of a checkpoint, unless `whole`. tokenizer: of
    load_tokenizer, where it is there already. ValueError where model and tokenizer do not fit."""
    source = cfg.tokenizer or cfg.init_from
    if tokenizer is None:
        tokenizer = load_tokenizer(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.init_from:
        split = None
        if dist.is_initialized() and not whole:
            split = functools.partial(into_units, cfg=cfg, device=device)
        changes = getattr(cfg, 'model', {})
        model = Transformer.from_pretrained(cfg.init_from, device=device, shard=split, **changes)
        tokenizer.check_model(model.cfg.vocab_size, f'{source} and {cfg.init_from}')
    else:
        model = Transformer(model_config(cfg, tokenizer)).to(device)
    model.use_tokens(tokenizer)
    if cfg.fp8:
        model = fp8.convert(model)
    return model, tokenizer


def report_long(cfg, long, kept):
    """long: [(file and row, tokens)] of the rows that do not fit, beside `kept` others. ValueError
    names the first of them, or where cfg.long_rows is 'drop' a line on stderr does."""
    if not long:
        return
    where, tokens = long[0]
    setting = f'row_len={cfg.row_len}' if tokens > cfg.row_len else 'max_position_embeddings'
    message = f'{where}: {tokens} tokens do not fit {setting}'
    count = f'{len(long)} of {len(long) + kept} rows are too long'
    if not kept:
        raise ValueError(f'{message} ({count}): raise that')
    if cfg.long_rows == 'error':
        raise ValueError(f"{message} ({count}): raise that, or set long_rows='drop'")
    if first_rank():
        print(f'{message}; {count} and dropped', file=sys.stderr)


def eval_problems(cfg, tokenizer, device):
    """-> the rows of cfg.eval_data, of each file the first eval_rows, that fit the context; their
    rewards are ready. ValueError names a row that cannot be graded."""
    context = model_config(cfg, tokenizer).max_position_embeddings
    problems = []
    for path in cfg.eval_data:
        rows = read_rows(path, require=('prompt', 'task'))[:cfg.eval_rows]
        rewards.checked(path, rows, {'accuracy': 1.0})
        kept = fitting(tokenizer, path, rows, context, cfg.eval_max_new_tokens, '', cfg.long_rows,
                       'eval_max_new_tokens', 'long_rows')
        problems += [rows[i] for i in kept]
    if problems:
        tasks = {row['task'] for row in problems}
        judges = load_judges(cfg.preference, device)
        rewards.prepare({'accuracy': 1.0}, tasks, cfg.unsafe_code, cfg.reward_workers, judges)
    return problems


# --------------------------------------------------------------------------------------------------
# what a run writes

RATE_KEYS = ('learning_rate', 'schedule', 'warmup_steps', 'min_lr', 'steps', 'max_flops')


EVALUATED = ('pass1', 'judged', 'length', 'truncated')   # what is shown of an evaluation


class Log:
    """metrics.jsonl, samples.txt and the progress line, on rank 0. A resumed run first drops what
    they hold of the steps after its checkpoint, a new one all."""

    def __init__(self, cfg, rank, step, steps, flops=(0.0, 0.0)):
        """step: how many steps were done before, of `steps`. flops: spent before the last of them
        and after it, for a schedule that follows max_flops"""
        self.folder = Path(cfg.out_dir)
        self.quiet = rank != 0
        if self.quiet:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.note_settings(cfg, step, flops)
        self.keep_metrics(step)
        self.keep_samples(step)
        self.file = open(self.folder / 'metrics.jsonl', 'a')
        self.wandb = self.start_wandb(cfg, step) if cfg.wandb else None
        self.can_draw = True    # as far as is known
        self.bar = Bar(self.folder.name, steps, 'steps', done=step, leave=True)

    def note_settings(self, cfg, step, flops):
        """Writes config.run.json; warns of what is not as it was when the run began."""
        path = self.folder / 'config.run.json'
        now = json.loads(json.dumps(asdict(cfg)))
        before = hub.read_json(path) if step and path.exists() else now
        for key, value in now.items():
            if before.get(key) != value:
                self.warn(f'{key} was {before.get(key)!r}; from step {step} on it is {value!r}')
        if any(before.get(key) != now.get(key) for key in RATE_KEYS):
            settings = SimpleNamespace(**{**now, **before})
            old = schedule(step - 1, settings, flops[0]) * settings.learning_rate
            new = schedule(step, cfg, flops[1]) * cfg.learning_rate
            if not math.isclose(old, new):
                self.warn(f'the learning rate jumps from {old:.3g} in step {step} to {new:.3g} in '
                          f'step {step + 1}')
        path.write_text(json.dumps(now, indent=1))

    def keep_metrics(self, step):
        """Cuts metrics.jsonl after what was written up to this step."""
        path = self.folder / 'metrics.jsonl'
        lines = path.read_text().splitlines() if path.exists() and step else []
        lines = [line for line in lines if line.endswith('}') and json.loads(line)['step'] <= step]
        path.write_text(''.join(line + '\n' for line in lines))

    def keep_samples(self, step):
        """Cuts samples.txt after what was written up to this step."""
        path = self.folder / 'samples.txt'
        text = path.read_text(encoding='utf-8') if path.exists() and step else ''
        for heading in re.finditer(r'^step (\d+),', text, re.M):
            if int(heading[1]) > step:
                text = text[:heading.start()]
                break
        path.write_text(text, encoding='utf-8')

    def start_wandb(self, cfg, step):
        """-> the run of Weights & Biases. SystemExit where that is not installed."""
        try:
            import wandb
        except ImportError:
            raise SystemExit("wandb is missing: pip install -e '.[wandb]', or leave the key "
                             '`wandb` empty') from None
        return wandb.init(project=cfg.wandb, name=str(self.folder), resume='allow',
                          id=self.wandb_id(step), config=asdict(cfg))

    def wandb_id(self, step):
        """The run's id, made at its start and kept beside its checkpoints: a run that begins again,
        or goes on in a copy of its folder, is another. A folder that was moved holds the same."""
        path = self.folder / 'wandb.json'
        folder = str(self.folder.resolve())
        known = hub.read_json(path) if step and path.exists() else {}
        is_copy = False
        if known and known['folder'] != folder:
            is_copy = (Path(known['folder']) / path.name).exists()
        if not known or is_copy:
            known = {'id': uuid.uuid4().hex[:12]}
        path.write_text(json.dumps({**known, 'folder': folder}))
        return known['id']

    def write(self, numbers, shown=()):
        """numbers: {name: number or None}, 'step' among them, a line of metrics.jsonl. shown: names
        of those for the progress line."""
        if self.quiet:
            return
        self.file.write(json.dumps(numbers) + '\n')
        self.file.flush()
        if self.wandb:
            values = {k: v for k, v in numbers.items() if k != 'step' and v is not None}
            self.wandb.log(values, step=numbers['step'])
        if shown:
            self.bar.say(in_words(numbers, shown))

    def evaluation(self, step, numbers, shown=EVALUATED):
        """Writes the numbers of an evaluation, shows some, and redraws curve.png. numbers: {name:
        number or interval}, in metrics.jsonl with "eval_" before each name; shown: names"""
        if self.quiet:
            return
        self.write({'step': step, **{f'eval_{name}': value for name, value in numbers.items()}})
        tell(f'{self.folder.name}, step {step}, evaluation: {in_words(numbers, shown)}')
        if self.can_draw and not curves.redraw(self.folder):
            self.can_draw = False
            tell("no curve.png: matplotlib is missing; pip install -e '.[plot]'")

    def warn(self, text):
        if not self.quiet:
            tell(f'warning: {text}')

    def samples(self, step, entries):
        """Writes samples to samples.txt, and shows the first. entries: (where from, {name: number},
        prompt, response), the last two text"""
        if self.quiet:
            return
        for where, numbers, prompt, response in entries[:1]:
            tell(f'step {step}, {where}: {in_words(numbers, numbers)}\n'
                 f'{glance(prompt, 2)}\n{glance(response)}')
        with open(self.folder / 'samples.txt', 'a', encoding='utf-8') as file:
            for where, numbers, prompt, response in entries:
                numbers = ', '.join(f'{name} {value:.3g}' for name, value in numbers.items())
                file.write(f'step {step}, {where}: {numbers}\n')
                for name, text in (('prompt', prompt), ('response', response)):
                    file.write(f'  {name}\n{textwrap.indent(text, "    ", bool)}\n')
                file.write('\n')

    def tick(self, expected=None):
        """A step is done. expected: steps in all, where that is not sure beforehand"""
        if self.quiet:
            return
        if expected is not None:
            self.bar.expect(expected)
        self.bar.update()

    def start_clock(self):
        """The time left is told from here on: what was before is no part of the steps."""
        if not self.quiet:
            self.bar.restart()

    def close(self):
        if not self.quiet:
            self.bar.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish()


def in_words(numbers, names):
    """-> 'pass1 0.31 (0.25 to 0.38), length 48' of those names that there are"""
    words = []
    for name in names:
        if numbers.get(name) is None:
            continue
        interval = ''
        if ends := numbers.get(f'{name}_ci'):
            interval = f' ({ends[0]:.3g} to {ends[1]:.3g})'
        words.append(f'{name} {numbers[name]:.3g}{interval}')
    return ', '.join(words)


def is_due(step, every, last=None):
    """Whether what is done every so many steps (0: never), and after the last one, is done after
    this one."""
    return step == last or every > 0 and step % every == 0


class Clock:
    """Seconds of training, over all the parts of a run that was stopped and went on."""

    def __init__(self, seconds=0.0):
        """seconds: of the parts before"""
        self.before = seconds
        self.began = time.time()

    def seconds(self):
        return self.before + time.time() - self.began


class Meter:
    """Sums of a step by name, over micro-batches as they come and over ranks when they are read."""

    def __init__(self, names, device, dtype=torch.float32):
        self.sums = {name: torch.zeros((), dtype=dtype, device=device) for name in names}

    def add(self, **values):
        """values: tensors of one number, whose gradients are not wanted"""
        for name, value in values.items():
            self.sums[name] += value.detach()

    def read(self):
        """-> {name: number}, over all ranks. Called by every rank."""
        sums = torch.stack(list(self.sums.values()))
        return dict(zip(self.sums, total(sums, sums.device).tolist()))


def expert_counts(routes, E, times):
    """Tokens that each expert got -> [MoE layers, E] int64.

    routes: for each MoE layer (scores, experts [tokens, K]). times [tokens]: for how many each
    token counts, 0 for padding."""
    counts = []
    for _, chosen in routes:
        weights = times.repeat_interleave(chosen.shape[1]).double()
        counts.append(torch.bincount(chosen.flatten(), weights, E).long())
    return torch.stack(counts)


def expert_max_load(counts):
    """counts [MoE layers, E] -> the busiest expert's tokens over the mean expert's, averaged over
    layers; 1 where every expert gets the same"""
    return (counts.amax(1) / counts.float().mean(1)).mean().item()


def router_bias(model):
    """-> {'router_bias_max': the largest |b|}, or {} of a model without router biases"""
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


PEAK_TFLOPS = {  # dense bfloat16, of the data sheets; by a part of the device's name
    'B200': 2250, 'GH200': 989, 'H200': 989, 'H100': 989, 'H800': 989, 'A100': 312, 'A800': 312,
    'L40S': 362, 'RTX 4090': 165,
}


def peak_tflops(cfg, device):
    """-> TFLOP/s of one device by its data sheet, 0.0 where unknown. (The FLOPs of the logs are 6 N
    a token trained and 2 N sampled, N the active parameters: no attention scores, no
    recomputation.)"""
    if cfg.peak_tflops:
        return cfg.peak_tflops
    device_name = torch.cuda.get_device_name() if device.type == 'cuda' else ''
    for name, tflops in PEAK_TFLOPS.items():
        if name in device_name:
            return float(tflops)
    return 0.0


def utilisation(cfg, flops, seconds, device, world):
    """-> {'mfu': share of the devices' peak that these FLOPs are}, {} where the peak is unknown"""
    peak = 1e12 * peak_tflops(cfg, device) * world
    return {'mfu': flops / seconds / peak} if peak else {}


def finish(cfg, model, tokenizer, rank):
    """Writes the finished model and its tokenizer to out_dir in the hub's layout, weights in
    save_dtype; config.json appears last. Called by every rank."""
    weights = checkpoint.full_state_dict(model) if dist.is_initialized() else None
    if rank == 0:
        tokenizer.save_pretrained(cfg.out_dir)
        dtype = getattr(torch, cfg.save_dtype) if cfg.save_dtype else model.stored_dtype
        model.save_pretrained(cfg.out_dir, dtype, state_dict=weights)
        if model.cfg.num_nextn_predict_layers:
            layer = f'model.layers.{model.cfg.num_hidden_layers}.*'
            tell(f'{cfg.out_dir}: transformers has no MTP layer, loads the rest and lists '
                 f'{layer} as UNEXPECTED')
    if dist.is_initialized():
        dist.barrier()
