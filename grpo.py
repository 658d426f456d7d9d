"""
Group relative policy optimisation: R1-Zero, RL from a cold start, the last RL over several kinds of
tasks.

    python grpo.py config/r1/zero.py --learning_rate=3e-4
    torchrun --nproc_per_node=8 grpo.py config/grpo_dapo.py --init_from=<folder> --data=train.jsonl

Each step: sample a group of G completions of every prompt with the trainer's own weights, score
them with plain reward functions, and push each completion by its advantage in the group
(DeepSeekMath arXiv:2402.03300, DeepSeek-R1 arXiv:2501.12948):

    A_i = (r_i - mean r) / (std r + 1e-6)      for every token of completion i
    L   = -sum_t w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
          + kl_coef * sum_t w_t k3_t
    rho_t = pi(t) / pi_old(t),    k3_t = pi_ref / pi - log(pi_ref / pi) - 1,    w_t by `loss_norm`

The deviation is that of TRL, verl and Stanford's CS336, so that published rates carry over: it
divides by G - 1 (by G, A would be 7% larger at G = 8, 15% at G = 4), and advantage_norm='batch' is
that of the rewards of all groups.

The variants differ from this at the places named; each has its preset in config/grpo_*.py:

    Dr.GRPO    2503.20783   A = r - mean (advantage_norm), sum over tokens / constant (loss_norm)
    DAPO       2503.14476   clip_high > clip_low, mean over tokens (loss_norm), other prompts for
                            groups that are all right or all wrong (dynamic_sampling), the reward
                            `overlong`, truncated completions out of the loss (mask_truncated)
    GSPO       2507.18071   rho of the whole completion, exp(mean_t log rho_t) (ratio)
    CISPO      2506.13585   -sg(clip(rho_t)) A log pi(t) (objective)
    REINFORCE               -A log pi(t) with the group's mean as baseline, or with none
                            (objective, advantage_norm, baseline)
    k1, k2                  log(pi / pi_ref) taken off the reward; its half square in the loss (kl)
    off-policy              several updates on a rollout, several times (updates, epochs)
    no clip                 clip_low = clip_high = inf
    TIS                     w_t min(pi_old / pi_sampler, tis): where sampler and trainer round
                            differently

The prompt must ask for what the rewards look for. It is the problem and `instruction` in the chat
template (`chat_template`, `template_args`), then `prefill`, in rollouts and evaluation alike. A
completion ends at a stop token or a text in `stop`; the rewards see nothing after that.

Prompts and completions are computed in micro-batches of about equally long ones. Groups whose
completions all score alike have no advantage; they are counted and, unless they carry a KL term,
not computed.
The same seeds give the same run on any number of ranks, but for rounding: in bfloat16 that of the
gradients, after which the samples of later steps differ.

What is logged covers all samples: the sampler's entropy and expert load (2 to 5% of its time), and
the share of all tokens in the loss that were clipped. Mismatch, KL, ratio and ratio_max cover the
tokens that were computed, late in RL a minority; computing the others for the ratio would take a
third of a step. With one update a rollout every ratio is 1. null: there was nothing to average.

Left out: asynchronous rollouts, a value network, a second inference engine (and so no weights to
synchronise).
"""

import json
import math
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from configurator import at_least, run, tell_idle  # before torch: says so where it is missing

import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
import plan
import rewards
from data.prompts import fitting, instructed, visible
from data.source import read_rows
from judge import load_judges
from kernels import cpu
from model import update_router_bias
from rollout import alike, collate, collect, flat, micro_batches, moe_shape, problem_order
from sample import present
from evaluate import average, evaluate, evaluated, show_problems
from train import (Clock, Graded, Log, Meter, Stop, Unsharded, autocast, check_out_dir, finish,
                   idle_in_training, load_model, load_tokenizer, make_optimizers, model_config,
                   optimizer_step, peak_memory, report_skip, reshard, resume, router_bias,
                   schedule, shard, start_processes, total, utilisation)


@dataclass
class Config(Graded):
    # start
    out_dir: str = 'out/grpo'
    init_from: str = 'out/r1/base'
    data: list[str] = field(default_factory=lambda: ['out/r1/data/rl.jsonl'])  # JSONL problem
                                           # files, taken in turn

    # rewards
    rewards: dict[str, float] = field(default_factory=lambda: {'accuracy': 1.0, 'format': 0.2})
                                           # weights of the reward functions

    # prompts
    instruction: str = ''                  # text added to the end of each problem, also
                                           # in eval_data, for example how to mark the answer
    prefill: str = ''                      # text the assistant's turn starts with, for example
                                           # "<think>"
    stop: list[str] = field(default_factory=list)  # texts that end a completion, as stop tokens do
    long_prompts: Literal['error', 'drop'] = 'error'  # what to do with prompts that leave no room
                                           # for max_new_tokens

    # rollout
    steps: int = 30                        # rollouts
    prompts: int = 32                      # prompts of a rollout, over all ranks
    group: int = 8                         # completions a prompt
    max_new_tokens: int = 192              # longest completion, the stop token included;
                                           # "max_length" of the rewards
    temperature: float = 1.0               # of the rollout, and inside every log-prob
    top_p: float = 1.0                     # nucleus of the rollout, top_k and min_p as in
                                           # sample.py: only with allow_biased
    top_k: int = 0                         # most probable tokens to draw from; 0: all
    min_p: float = 0.0                     # tokens of at least this share of the most probable
                                           # one's probability
    allow_biased: bool = False             # allow top_p, top_k and min_p: log-probs stay those of
                                           # all tokens, so ratios and gradients are biased
    dynamic_sampling: int = 0              # times that groups which are all right or all wrong
                                           # (without a reward for that: have equal totals) are
                                           # replaced by those of other prompts (DAPO); 0: never
    slots: int = 256                       # completions decoded at once on a rank

    # policy loss
    updates: int = 1                       # optimizer steps a rollout, each on its share of the
                                           # groups
    epochs: int = 1                        # times that a rollout is gone through, in the same
                                           # updates; pi_old stays the policy that sampled it
    objective: Literal['clip', 'cispo', 'reinforce'] = 'clip'  # 'clip' min(rho A, clip(rho) A),
                                           # 'cispo' sg(clip(rho)) A log pi, 'reinforce' A log pi
    ratio: Literal['token', 'sequence'] = 'token'  # rho of each 'token', or of the 'sequence':
                                           # their geometric mean (GSPO)
    clip_low: float = 0.2                  # rho is clipped below at 1 - this; both inf: clip off
    clip_high: float = 0.2                 # and above at 1 + this
    baseline: Literal['mean', 'none'] = 'mean'  # taken off a reward: its group's mean, or nothing
    advantage_norm: Literal['none', 'group', 'batch'] = 'group'  # then divided by the standard
                                           # deviation of the rewards of the group, of all
                                           # (the 'batch'), or by nothing
    loss_norm: Literal['sequence', 'token', 'constant'] = 'token'  # w_t: 'sequence' 1/(N |o|),
                                           # 'token' 1/all tokens, 'constant' 1/(N max_new_tokens)
    mask_truncated: bool = False           # completions cut at max_new_tokens count in their
                                           # group's mean, not in the loss
    tis: float = 0.0                       # bound of the weight pi_old / pi_sampler; 0: none
    replay_routes: bool = False            # MoE: the trainer takes the experts that the sampler
                                           # chose
    kl: Literal['k1', 'k2', 'k3'] = 'k3'   # estimate of the KL to the reference: 'k1' (in the
                                           # reward), 'k2' or 'k3' (in the loss)
    kl_coef: float = 0.0                   # its weight; 0: no reference is kept
    reference_every: int = 0               # optimizer updates (updates * epochs a rollout) after
                                           # which the reference becomes the policy, at the end of
                                           # that rollout; 0: never

    # optimizer
    learning_rate: float = 3e-4
    schedule: Literal['cosine', 'constant', 'linear'] = 'constant'
    warmup_steps: int = 2                  # linear warm-up, in rollouts
    micro_tokens: int = 4096               # tokens of one forward, padding included
    max_flops: float = 0.0                 # stop when this much compute is spent (sampling
                                           # included); the schedule then decays over the share of
                                           # it that is spent or of steps done, whichever is larger;
                                           # 0: no limit

    # machine
    seed: int = 1                          # of the prompts' order and the sampling noise

    # evaluation
    eval_every: int = 5                    # steps between evaluations, the start included; 0: only
                                           # at the end
    eval_rows: int = 128

    # checkpoints and the log
    samples_every: int = 10                # steps between rollouts written to samples.txt; 0: none
    save_every: int = 10

    # before a run
    show: int = 0                          # print this many prompts of each file and what their
                                           # own answers earn, then stop

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'prompts', 'max_new_tokens', 'updates', 'epochs', 'micro_tokens', 'slots')
        at_least(self, 0, 'top_k', 'min_p', 'dynamic_sampling', 'tis', 'kl_coef', 'reference_every',
                 'max_flops', 'samples_every')
        at_least(self, 0, 'clip_low', 'clip_high', finite=False)
        fewest = 1 if self.baseline == 'none' and self.advantage_norm != 'group' else 2
        if self.group < fewest or self.temperature <= 0:
            raise ValueError(
                f'group={self.group}, temperature={self.temperature}: advantages need 2 or more '
                'completions of a prompt that differ, so a temperature above 0')
        for key in ('data', 'rewards'):
            if not getattr(self, key):
                raise ValueError(f'{key} is empty: there is nothing to train on')
        if not self.allow_biased and (self.top_p < 1 or self.top_k or self.min_p):
            raise ValueError(
                f'top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p} sample another '
                'distribution than the one whose log-probs are trained, which biases the gradient; '
                'leave them at 1.0, 0 and 0.0, or set allow_biased=True')
        if '' in self.stop:
            raise ValueError('stop holds an empty text, which would end every completion at once')
        if self.prompts % self.updates:
            raise ValueError(f'prompts={self.prompts} does not divide into updates={self.updates}')


# --------------------------------------------------------------------------------------------------
# the maths


def advantages(rewards_PG, norm, baseline='mean', penalty_PG=None, eps=1e-6):
    """The task's rewards [P, G] float -> A [P, G] of their dtype, and which groups vary [P] bool.

        A_i = (r_i - penalty_i - b) / (std r + eps)

    baseline: b is the 'mean' of r - penalty over the group, or 0 for 'none'. norm: std is the
    standard deviation, over n - 1, of the rewards of the 'group' or of the whole 'batch'; 'none'
    divides by nothing, and so do the others where all those rewards are equal: then r - b is
    exactly 0 for 'mean'. penalty_PG is what kl='k1' takes off the rewards: the deviation is that of
    the task's reward alone, else the noise of the KL would become a full advantage where the
    rewards are equal."""
    def above_baseline(x_PG):
        return x_PG - x_PG.mean(dim=1, keepdim=True) if baseline == 'mean' else x_PG

    equal_P1 = alike(rewards_PG, 1)      # rollout.py: but for rounding
    A = above_baseline(rewards_PG)
    if baseline == 'mean':
        A = A.masked_fill(equal_P1, 0.0)
    if penalty_PG is not None:
        A = A - above_baseline(penalty_PG)
    if norm != 'none':
        dim = 1 if norm == 'group' else (0, 1)
        scaled = A / (rewards_PG.std(dim, keepdim=True) + eps)
        A = torch.where(alike(rewards_PG, dim), A, scaled)
    return A, ~equal_P1[:, 0]


def token_weights(lengths, norm, max_new_tokens):
    """Lengths [N] of all completions of an update -> w [N] double, the weight of each token of a
    completion, by the paper of

        'sequence'   GRPO       1 / (N |o|), the mean over completions of the mean over their tokens
        'token'      DAPO       1 / sum_i |o_i|, the mean over all tokens
        'constant'   Dr.GRPO    1 / (N max_new_tokens)

    A length of 0 stands for a completion that is out of the loss: it has no weight, and does not
    count in N."""
    lengths = lengths.double()
    in_loss = (lengths > 0).double()
    N = in_loss.sum().clamp(min=1)
    if norm == 'sequence':
        return in_loss / (N * lengths.clamp(min=1))
    if norm == 'token':
        return in_loss / lengths.sum().clamp(min=1)
    return in_loss / (N * max_new_tokens)


def policy_loss(logp, log_rho, A, w, objective, clip_low, clip_high):
    """logp, log_rho, A and w [n] of tokens -> loss, and where the clip binds below and above [n]
    bool. The loss is, sg for no gradient and clip(rho) for rho in 1 - clip_low .. 1 + clip_high,

        'clip'         -sum_t w_t min(rho_t A, clip(rho_t) A)
        'cispo'        -sum_t w_t sg(clip(rho_t)) A log pi(t)
        'reinforce'    -sum_t w_t A log pi(t)

    A clip_low and clip_high of inf clip nothing."""
    rho = log_rho.detach().clamp(max=88).exp()   # e^88 is about the largest float32
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)

    if objective == 'clip':
        binds = clipped * A < rho * A
        pushed = (A != 0) & ~binds   # elsewhere exp(log_rho) may overflow, and 0 * inf is nan
        unclipped = torch.where(pushed, log_rho, 0.0).exp() * A
        gain = torch.where(binds, clipped * A, unclipped)
    elif objective == 'cispo':
        binds = (clipped != rho) & (A != 0)
        gain = clipped * A * logp
    else:
        binds = torch.zeros_like(rho, dtype=torch.bool)
        gain = A * logp

    loss = -(w * gain).sum()
    return loss, binds & (rho < 1), binds & (rho > 1)


def of_sequence(log_rho, rows, B):
    """GSPO: log rho [n] of the tokens of completions `rows` [n] (0..B-1) -> [n], at every token the
    log of its completion's ratio

        s_i = exp(mean_t log rho_t)

    with the token's own gradient, d/dlogp s_t = s_i, so that weights 1 / (N |o|) give the paper's
    gradient."""
    zeros_B = torch.zeros(B, dtype=log_rho.dtype, device=log_rho.device)
    sums_B = zeros_B.index_add(0, rows, log_rho.detach())
    lengths_B = zeros_B.index_add(0, rows, torch.ones_like(log_rho))
    log_s = (sums_B / lengths_B)[rows]
    return log_rho - log_rho.detach() + log_s


def kl_terms(logp, ref_logp, kind):
    """Log-probs [n] of policy and reference -> [n], estimates of KL(pi || pi_ref) from samples of
    pi, token by token:

        k1 = log(pi / pi_ref)                      unbiased, of either sign; gradient of mean 0
        k2 = k1^2 / 2                              biased, with the gradient of the KL
        k3 = pi_ref / pi - log(pi_ref / pi) - 1    unbiased and never negative

    (joschu.net/blog/kl-approx.html)"""
    d = logp - ref_logp
    if kind == 'k1':
        return d
    if kind == 'k2':
        return d.square() / 2
    return (-d).exp() - 1 + d


# --------------------------------------------------------------------------------------------------
# log-probs and losses


def forward(model, batch, cfg, device, routes=None, entropy=False):
    """A micro-batch of `collate` -> logp [n] float32 of its labelled tokens, and the entropy [n] of
    the distributions that they are drawn from, or None unless it is asked for.

    Right padding needs no mask: nothing looks at what follows it. routes: a list that gets the
    experts of each MoE layer."""
    with autocast(cfg, device):
        logp, H, _ = model.logprobs(
            batch['input_ids'], batch['labels'], temperature=cfg.temperature, entropy=entropy,
            routes=routes, replay=batch['routes'], prefix=batch['prefix'])
    return logp, H


def losses(cfg, batch, logp, A_N, w_N):
    """logp [n] of a micro-batch, advantages and token weights [N + 1] of the step's samples ->
    policy loss, KL loss, and a dict of what the tokens are like, [n] without gradient:

        weight                      w, 0 where a token is out of the loss
        clipped_low, clipped_high   whether the clip binds
        ratio                       rho
        kl                          by cfg.kl; 0 without a reference
        mismatch                    log(pi_old / pi_sampler)"""
    rows = labelled_rows(batch)
    A = A_N[batch['number'][rows]]
    w = w_N[batch['number'][rows]]

    # the policy's ratio to the one that sampled, and of that one to the sampler's arithmetic
    old_logp = logp.detach() if batch['old_logp'] is None else batch['old_logp']
    log_rho = logp - old_logp
    if cfg.ratio == 'sequence':
        log_rho = of_sequence(log_rho, rows, len(batch['number']))
    mismatch = old_logp - batch['sampler_logp']

    # policy loss
    trusted = w * mismatch.exp().clamp(max=cfg.tis) if cfg.tis else w
    pg_loss, clipped_low, clipped_high = policy_loss(
        logp, log_rho, A, trusted, cfg.objective, cfg.clip_low, cfg.clip_high)

    # KL loss
    kl = torch.zeros_like(logp)
    if batch['ref_logp'] is not None:
        kl = kl_terms(logp, batch['ref_logp'], cfg.kl)
    if cfg.kl == 'k1':               # it is in the reward
        kl_loss = torch.zeros_like(pg_loss)
    else:
        kl_loss = cfg.kl_coef * (w * kl).sum()

    tokens = {
        'weight': w,
        'clipped_low': clipped_low,
        'clipped_high': clipped_high,
        'ratio': log_rho.detach().clamp(max=88).exp(),
        'kl': kl.detach(),
        'mismatch': mismatch,
    }
    return pg_loss, kl_loss, tokens


def labelled_rows(batch):
    """-> [n] int64, the row that each labelled token of a micro-batch is in"""
    return (batch['labels'] != -100).nonzero()[:, 0]


# --------------------------------------------------------------------------------------------------
# the parts of a step


def rewards_of(groups):
    """-> total rewards of the samples [P, G] float64"""
    totals = [[s.score['total'] for s in group] for group in groups]
    return torch.tensor(totals, dtype=torch.float64)


def length_in_loss(cfg, sample):
    """-> tokens of a completion; 0 for one that mask_truncated takes out of the loss"""
    if cfg.mask_truncated and not sample.score['finished']:
        return 0
    return len(sample.tokens)


def kl_in_reward(cfg):
    return cfg.kl == 'k1' and cfg.kl_coef > 0


def samples_with_gradient(cfg, samples, R_PG):
    """-> for each update, those of its samples that have a gradient, and so are computed. A sample
    without advantage has that of its KL term alone; with the KL in the reward all samples count."""
    if cfg.baseline == 'none':
        pushed_PG = R_PG != 0
    else:
        pushed_PG = ~alike(R_PG, 1).expand_as(R_PG)
    pushed = pushed_PG.flatten().tolist()
    per_update = len(samples) // cfg.updates
    shares = [[] for _ in range(cfg.updates)]
    for s in samples:
        in_loss = length_in_loss(cfg, s) > 0
        has_term = pushed[s.number] or cfg.kl_coef > 0
        if (in_loss and has_term) or kl_in_reward(cfg):
            shares[s.number // per_update].append(s)
    return shares


def rank_batches(cfg, shares, device, rank, world):
    """The share of samples of each update -> this rank's micro-batches of each, as many as on
    every rank."""
    batches = []
    for samples in shares:
        parts = micro_batches(samples, cfg.micro_tokens, world)
        mine = parts[rank::world]
        most = -(-len(parts) // world)
        mine += [[]] * (most - len(mine))
        batches.append([collate(part, device) for part in mine])
    return batches


@torch.no_grad()
def freeze_logprobs(cfg, model, reference, updates, device):
    """Adds to the micro-batches their log-probs before the first update: `old_logp` [n] by the
    policy, None in the first update, whose own are exactly those (`gradients` notes them, for later
    epochs); `ref_logp` [n] by the reference, which chooses its own experts, or None without one."""
    for u, batches in enumerate(updates):
        for batch in batches:
            batch['old_logp'] = None
            if u > 0:
                batch['old_logp'], _ = forward(model, batch, cfg, device)
            batch['ref_logp'] = None
            if reference is not None:
                free = {**batch, 'routes': None}
                batch['ref_logp'], _ = forward(reference, free, cfg, device)
    if reference is not None:
        reshard(reference)


def kl_penalty(cfg, updates, R_PG, device):
    """kl_coef * sum_t log(pi_sampler / pi_ref) of each sample, over all ranks, [P, G] float64; None
    where the KL is not in the reward. Called by every rank."""
    if not kl_in_reward(cfg):
        return None
    k1_N = torch.zeros(R_PG.numel() + 1, device=device)
    for batches in updates:
        for batch in batches:
            numbers = batch['number'][labelled_rows(batch)]
            k1_N.index_add_(0, numbers, kl_terms(batch['sampler_logp'], batch['ref_logp'], 'k1'))
    return cfg.kl_coef * total(k1_N, device)[:-1].cpu().double().view_as(R_PG)


def sample_weights(cfg, samples):
    """-> w [N] float32, the token_weights of each sample in its update"""
    lengths = torch.tensor([length_in_loss(cfg, s) for s in samples])
    weights = [token_weights(part, cfg.loss_norm, cfg.max_new_tokens)
               for part in lengths.chunk(cfg.updates)]
    return torch.cat(weights).float()


def append_zero(values_N, device):
    """-> [N + 1] on the device; the last value, 0, is that of number -1, a row without a sample"""
    return F.pad(values_N, (0, 1)).to(device)


def gradients(cfg, model, batches, A_N, w_N, meter, device, world):
    """Adds up the gradients of an update's micro-batches -> its loss, over all ranks, a number."""
    loss_sum = torch.zeros((), device=device)
    for batch in batches:
        logp, _ = forward(model, batch, cfg, device)
        pg_loss, kl_loss, tokens = losses(cfg, batch, logp, A_N, w_N)
        loss = pg_loss + kl_loss
        (loss * world).backward()            # FSDP averages over ranks

        if batch['old_logp'] is None:        # its own were those of the policy that sampled
            batch['old_logp'] = logp.detach()
        loss_sum += loss.detach()
        meter.add_batch(batch, pg_loss, tokens)
    return total(loss_sum, device).item()


def becomes_reference(cfg, step):
    """Whether the reference is replaced after `step` rollouts: when another cfg.reference_every
    optimizer updates are full."""
    if not cfg.reference_every:
        return False
    each = cfg.updates * cfg.epochs
    return step * each // cfg.reference_every > (step - 1) * each // cfg.reference_every


# --------------------------------------------------------------------------------------------------
# the numbers of a step


class PolicyMeter(Meter):
    """What the updates of a step were like: sums and maxima over the tokens in the loss."""

    SUMS = ('loss', 'tokens', 'clipped_low', 'clipped_high', 'ratio', 'kl', 'mismatch',
            'mismatch_kl', 'forwarded')
    MAXIMA = ('ratio', 'mismatch')

    def __init__(self, device):
        super().__init__(self.SUMS, device, torch.float64)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.maxima = dict.fromkeys(self.MAXIMA, zero)
        self.norms = []      # of the gradients
        self.skipped = 0     # updates

    def add_batch(self, batch, pg_loss, tokens):
        """A micro-batch, its policy loss and what `losses` says of its tokens."""
        in_loss = tokens['weight'] > 0
        ratio = tokens['ratio'][in_loss]
        mismatch = tokens['mismatch'][in_loss]
        self.add(
            loss=pg_loss,
            tokens=in_loss.sum(),
            clipped_low=tokens['clipped_low'][in_loss].sum(),
            clipped_high=tokens['clipped_high'][in_loss].sum(),
            ratio=ratio.sum(),
            kl=tokens['kl'][in_loss].sum(),
            mismatch=mismatch.abs().sum(),
            mismatch_kl=kl_terms(-mismatch.clamp(max=88), 0.0, 'k3').sum(),   # KL(sampler || old)
            forwarded=(batch['uses'] > 0).sum(),   # prompts too, a shared one once
        )
        if in_loss.any():
            self.maxima['ratio'] = torch.maximum(self.maxima['ratio'], ratio.max())
            self.maxima['mismatch'] = torch.maximum(self.maxima['mismatch'], mismatch.abs().max())

    def add_norm(self, norm):
        """Of an update's gradient, None where it was skipped."""
        if norm is None:
            self.skipped += 1
        else:
            self.norms.append(norm)

    def gather(self):
        """Makes plain numbers of sums and maxima, over all ranks. Called by every rank."""
        self.sums = self.read()
        maxima = torch.stack(list(self.maxima.values()))
        if dist.is_initialized():
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
        self.maxima = dict(zip(self.MAXIMA, maxima.tolist()))

    def numbers(self, cfg, length):
        """After gather; length: tokens of the rollout in the loss. -> what is logged: shares of all
        those tokens, means over the ones that were computed; None of nothing"""
        sums = self.sums
        computed = sums['tokens']
        in_all = cfg.epochs * length
        ratio_max = self.maxima['ratio']
        ones = 0
        if cfg.updates * cfg.epochs == 1 and computed < in_all:
            # in the only update of a rollout the tokens that are not computed have a ratio too, 1
            ones = in_all - computed
            ratio_max = max(ratio_max, 1.0)
        return {
            'clipped': mean(sums['clipped_low'] + sums['clipped_high'], in_all),
            'clipped_low': mean(sums['clipped_low'], in_all),
            'clipped_high': mean(sums['clipped_high'], in_all),
            'ratio': mean(sums['ratio'] + ones, computed + ones),
            'ratio_max': ratio_max or None,
            'kl': mean(sums['kl'], computed) if cfg.kl_coef else None,
            'mismatch': mean(sums['mismatch'], computed),
            'mismatch_kl': mean(sums['mismatch_kl'], computed),
            'mismatch_max': self.maxima['mismatch'] if computed else None,
            'grad_norm': average(self.norms),
            'skipped': self.skipped,
        }


def mean(value, count):
    """-> value / count, or None (null in metrics.jsonl) of nothing; of a list: `average`"""
    return value / count if count else None


def sampling_flops(active, rollout):
    """2 N a token sampled, and a prompt's once for its group; active: N, the active parameters"""
    return 2.0 * active * (rollout.sampled_tokens() + rollout.prompt_tokens())


def training_flops(cfg, active, tokens):
    """6 N a token trained, a third of it for one whose log-prob is frozen. tokens: of an epoch"""
    passes = cfg.epochs + (1 - 1 / cfg.updates) / 3
    if cfg.kl_coef:
        passes += 1 / 3
    return 6.0 * active * tokens * passes


def rollout_numbers(cfg, groups):
    """All that a step sampled [P][G] -> its rewards, lengths and shares in numbers. `right` is what
    rewards.right says, and not there where nobody scored the tasks; of those that know no right and
    wrong `judged` is the mean reward. A length of nobody is None."""
    scores = [s.score for s in flat(groups)]
    numbers = {
        'reward': average([s['total'] for s in scores]),
        'length': average([s['length'] for s in scores]),
    }

    checked = [(s['length'], rewards.right(s)) for s in scores]
    checked = [(length, right) for length, right in checked if right is not None]
    if checked:
        numbers['right'] = average([right for _, right in checked])
        for name, wanted in (('right', True), ('wrong', False)):
            lengths = [length for length, right in checked if right is wanted]
            numbers[f'length_{name}'] = average(lengths)

    judged = [rewards.accuracy_of(s) for s in scores if s.get('task') in rewards.JUDGED]
    if judged and None not in judged:
        numbers['judged'] = average(judged)

    for name in cfg.rewards:
        numbers[f'reward_{name}'] = average([s['rewards'][name] for s in scores])
    varies = ~alike(rewards_of(groups), 1)
    return {
        **numbers,
        'truncated': average([not s['finished'] for s in scores]),
        'mixing': average([s['mixed'] for s in scores]),
        'zero_variance': 1 - varies.double().mean().item(),
        'sampled_groups': len(groups),
    }


def expert_numbers(model, load):
    """load: what each expert got [MoE layers, E]"""
    if not load.numel():
        return {}
    busiest = (load.amax(1) / load.mean(1)).mean().item()
    return {'expert_max_load': busiest, **router_bias(model)}


def step_numbers(trainer, rollout, A_PG, meter, share, sampling, training):
    """-> a step's line of metrics.jsonl. share: of the peak learning rate. sampling, training:
    seconds"""
    cfg = trainer.cfg
    load = rollout.expert_load(trainer.moe_shape)
    return {
        'step': trainer.step,
        **rollout_numbers(cfg, rollout.all_groups),
        'advantage_std': A_PG.square().mean().sqrt().item(),
        'loss': meter.sums['loss'] / cfg.updates / cfg.epochs,
        'entropy': rollout.entropy(),
        **meter.numbers(cfg, rollout.tokens_in_loss(cfg)),
        'flops': trainer.flops,
        'reward_failures': rollout.failures,
        'seconds': trainer.clock.seconds(),
        'seconds_sampling': sampling,
        'seconds_training': training,
        'lr': share * cfg.learning_rate,
        'tokens_per_second': rollout.sampled_tokens() / (sampling + training),
        'memory_gib': peak_memory(trainer.device),
        **draft_numbers(*rollout.drafts()),
        **step_utilisation(trainer, rollout, meter.sums['forwarded'], sampling, training),
        **expert_numbers(trainer.model, load),
    }


def draft_numbers(drafted, accepted):
    return {'mtp_acceptance': accepted / drafted} if drafted else {}


def step_utilisation(trainer, rollout, forwarded, sampling, training):
    """Model FLOPs utilisation, of the tokens that went through the model; {} where the device is
    unknown. sampling, training: seconds"""
    cfg = trainer.cfg
    where = trainer.device, trainer.world
    sampled = sampling_flops(trainer.active, rollout)
    trained = training_flops(cfg, trainer.active, forwarded / cfg.epochs)
    numbers = utilisation(cfg, sampled + trained, sampling + training, *where)
    if numbers:
        numbers['mfu_training'] = utilisation(cfg, trained, training, *where)['mfu']
    return numbers


def samples_to_read(tokenizer, groups, A_PG, paths, kept):
    """-> of two groups, those that vary first, the samples of the highest and the lowest advantage,
    for Log.samples. kept: for each file the numbers of its rows"""
    entries = []
    varies = A_PG.amax(1) > A_PG.amin(1)
    for p in varies.int().argsort(descending=True, stable=True)[:2].tolist():
        best = A_PG[p].argmax().item()
        worst = A_PG[p].argmin().item()
        for g in dict.fromkeys((best, worst)):
            s = groups[p][g]
            file, row = s.row
            numbers = {**s.score['rewards'], 'total': s.score['total'],
                       'advantage': A_PG[p, g].item(), 'tokens': len(s.tokens)}
            entries.append((f'{paths[file]} row {kept[file][row] + 1}', numbers,
                            visible(tokenizer, s.prompt), visible(tokenizer, s.tokens)))
    return entries


def warnings_of(n, first):
    """Numbers of a step, and those of the run's first -> {what is wrong: what usually causes it and
    which key to turn}"""
    out = {}
    if n['zero_variance'] == 1 and not n.get('advantage_std'):   # else baseline='none', or k1
        out['zero variance'] = (
            f'every group scored alike (mean reward {n["reward"]:.3g}), so nothing is learnt: '
            'a reward that is always 0 usually means that answers are not found (see samples.txt; '
            'try chat_template, instruction or prefill), one that is always the same that the '
            'problems are too hard or too easy (data), or group or temperature too small')
    if n['reward_failures']:
        out['rewards'] = (
            f'{n["reward_failures"]} rewards failed and count 0.0; so far on this '
            f'rank: {rewards.told() or "none"}')
    if n['truncated'] == 1:
        out['truncated'] = (
            'every completion was cut: max_new_tokens is too small, or the model never says its '
            'stop token (the chat template, or a base model without a cold start)')
    if n['kl'] is not None and n['kl'] > 1:
        out['kl'] = (
            f'{n["kl"]:.3g} nats a token from the reference: the policy ran away, usually through '
            'a learning_rate too high; lower it, raise kl_coef, or set reference_every')
    if first and 0 < n['entropy'] < min(0.01, 0.2 * first['entropy']):
        out['entropy'] = (
            f'entropy fell to {n["entropy"]:.2g} nats a token: samples of a group become copies of '
            'each other; raise clip_high or temperature, lower learning_rate or updates')
    if n['mismatch_kl'] is not None and n['mismatch_kl'] > 0.02:
        out['mismatch'] = (
            f"sampler and trainer disagree (KL {n['mismatch_kl']:.2g} a token): usually bfloat16 "
            "on a MoE model; set tis=2, replay_routes=True, or dtype='float32'")
    return out


class StepClock(Clock):
    """Seconds of training, without pauses, and of the parts of a step."""

    def __init__(self, device, seconds):
        super().__init__(seconds)
        self.device = device
        self.lap_began = self.began

    def start(self):
        self.lap_began = time.time()

    def lap(self):
        """-> seconds since `start` or the lap before, once the device has done its work"""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        began = self.lap_began
        self.lap_began = time.time()
        return self.lap_began - began

    @contextmanager
    def paused(self):
        pause = time.time()
        yield
        self.began += time.time() - pause


# --------------------------------------------------------------------------------------------------
# the run


class Problems:
    """The rows of cfg.data and cfg.eval_data, checked, with the instruction; starts the rewards.

    Raises ValueError or FileNotFoundError for a file, a row or a reward that cannot be used."""

    def __init__(self, cfg, device):
        self.cfg = cfg
        rewards.use_file(cfg.reward_file)
        rewards.check_names(cfg.rewards)
        self.files = [self.read(path, cfg.rewards) for path in cfg.data]
        self.eval_files = [self.read(path, {'accuracy': 1.0}, cfg.eval_rows)
                           for path in cfg.eval_data]
        self.tasks = {row['task'] for row in flat(self.files + self.eval_files)}
        rewards.prepare(cfg.rewards, self.tasks, cfg.unsafe_code, cfg.reward_workers,
                        load_judges(cfg.preference, device))

    def read(self, path, weights, count=None):
        rows = read_rows(path, require=('prompt', 'task'))[:count]
        rewards.checked(path, rows, weights)
        return [instructed(row, self.cfg.instruction) for row in rows]

    def show(self, tokenizer):
        shown = dict(zip(self.cfg.data, self.files))
        show_problems(tokenizer, shown, self.cfg, self.cfg.rewards)

    def drop_long(self, tokenizer, context):
        """Leaves those that fit the context; ValueError where long_prompts is 'error'."""
        cfg = self.cfg
        room = context, cfg.max_new_tokens, cfg.prefill, cfg.long_prompts
        self.kept = []       # for each file the numbers of its rows that are left
        for i, path in enumerate(cfg.data):
            self.kept.append(fitting(tokenizer, path, self.files[i], *room))
            self.files[i] = [self.files[i][row] for row in self.kept[i]]
        self.eval_rows = []
        for path, rows in zip(cfg.eval_data, self.eval_files):
            self.eval_rows += [rows[i] for i in fitting(tokenizer, path, rows, *room)]
        self.digest = zlib.crc32(json.dumps(self.files, sort_keys=True).encode())


def idle_keys(cfg, problems, shape, world):
    """Cases for configurator.tell_idle. shape: ModelConfig"""
    known = problems.tasks | cfg.rewards.keys()
    has_experts = any(shape.is_moe(i) for i in range(shape.num_hidden_layers))
    ratios = ('clip_low', 'clip_high', 'ratio')
    return [
        *idle_in_training(cfg, world),
        (cfg.objective == 'reinforce', ratios, 'REINFORCE has no ratio'),
        (cfg.updates * cfg.epochs == 1, ratios,
         'in the only update of a rollout every ratio is 1'),
        (not cfg.kl_coef, ('kl', 'reference_every'), 'kl_coef is 0'),
        (not has_experts, ('bias_rate', 'replay_routes'), 'the model has no experts'),
        ('preference' not in known, ('preference',), 'no reward or task asks for it'),
        ('code' not in known, ('unsafe_code',), 'no reward or task runs programs'),
    ]


class Rollout(NamedTuple):
    """What a step sampled."""
    groups: list             # [P][G] of Samples, to train on
    all_groups: list         # those that dynamic_sampling replaced included
    counts: torch.Tensor     # of rollout.sample_groups, over all ranks
    failures: int            # rewards that failed

    def samples(self):
        """-> [N] of the groups to train on, numbered"""
        samples = flat(self.groups)
        for number, s in enumerate(samples):
            s.number = number
        return samples

    def sampled_tokens(self):
        return sum(s.score['length'] for s in flat(self.all_groups))

    def prompt_tokens(self):
        return sum(len(group[0].prompt) for group in self.all_groups)

    def tokens_in_loss(self, cfg):
        return sum(length_in_loss(cfg, s) for s in flat(self.groups))

    def drafts(self):
        """-> tokens that the MTP layer drafted, those accepted"""
        return self.counts[:2].tolist()

    def expert_load(self, shape):
        """-> tokens that each expert got, [MoE layers, E]"""
        return self.counts[2:].view(shape)

    def entropy(self):
        """-> nats a token of the distributions that all tokens were drawn from"""
        nats = sum(s.entropy for s in flat(self.all_groups))
        return mean(nats, self.sampled_tokens())


class Trainer:
    """A run: its models, optimizers and log, how far it is, and what its checkpoints hold."""

    def __init__(self, cfg, tokenizer, problems, device, rank, world):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.problems = problems
        self.device = device
        self.rank = rank
        self.world = world

        # models and optimizers
        model, _ = load_model(cfg, device, tokenizer=tokenizer)
        self.active = model.num_params(active=True)
        self.moe_shape = moe_shape(model)
        self.reference = None
        if cfg.kl_coef:
            reference, _ = load_model(cfg, device, tokenizer=tokenizer)
            self.reference = shard(reference.requires_grad_(False), cfg, device)
        self.model = shard(model, cfg, device)
        self.optimizers = make_optimizers(self.model, cfg)

        # how far it is
        self.step = 0            # rollouts
        self.drawn = 0           # problems
        self.skips = 0           # updates in a row that were skipped
        self.flops = 0.0
        self.flops_before = 0.0  # the last step
        self.first = None        # numbers of the first step, that the warnings compare with
        seconds = 0.0
        state = resume(cfg, self.model, self.optimizers)
        if state:
            self.go_on(state)
            seconds = state['seconds']
        self.saved = self.step   # of the newest checkpoint
        order = problem_order([len(rows) for rows in problems.files], cfg.seed)
        self.order = islice(order, self.drawn, None)

        self.log = Log(cfg, rank, self.step, cfg.steps, (self.flops_before, self.flops))
        if state and (said := rewards.file_changed(state.get('reward_file'))):
            self.log.warn(f'from step {self.step} on others score: {said}')
        self.stop = Stop()
        self.warned = set()
        self.rewards_work = False    # as far as is known
        self.clock = StepClock(device, seconds)

    def go_on(self, state):
        """Takes over what a checkpoint holds beside weights and optimizers."""
        out_dir = self.cfg.out_dir
        if (state['data'], state['seed']) != (self.problems.digest, self.cfg.seed):
            raise ValueError(
                f'the checkpoint in {out_dir} was saved with other problems or another seed; '
                'set another out_dir to start anew')
        self.step = state['step']
        self.drawn = state['drawn']
        self.skips = state['bad']
        self.flops = state['flops']
        self.flops_before = state.get('flops_before', 0.0)
        self.first = state['first']
        if self.reference is None:
            return
        if 'reference' not in state:
            raise ValueError(
                f'the checkpoint in {out_dir} was saved without a reference: kl_coef cannot be '
                'set in the middle of a run')
        for name, tensor in checkpoint.named_tensors(self.reference).items():
            tensor.data.copy_(checkpoint.placed(state['reference'].pop(name), tensor))

    def save(self):
        state = {
            'data': self.problems.digest,
            'seed': self.cfg.seed,
            'drawn': self.drawn,
            'bad': self.skips,
            'seconds': self.clock.seconds(),
            'flops': self.flops,
            'flops_before': self.flops_before,
            'first': self.first,
            'date': self.tokenizer.date.isoformat(),
            'reward_file': rewards.file_stamp(),
        }
        if self.reference is not None:
            state['reference'] = checkpoint.full_state_dict(self.reference)
        checkpoint.save(self.cfg.out_dir, self.step, self.model, self.optimizers, state,
                        self.cfg.keep_checkpoints)
        self.saved = self.step

    def ended(self):
        spent = self.cfg.max_flops > 0 and self.flops >= self.cfg.max_flops
        return self.step >= self.cfg.steps or spent

    def expected_steps(self):
        """-> steps in all: cfg.steps, or fewer where max_flops ends the run before, by what a step
        has cost so far"""
        if not self.cfg.max_flops:
            return self.cfg.steps
        affordable = math.ceil(self.step * self.cfg.max_flops / self.flops)
        return min(self.cfg.steps, max(self.step, affordable))

    def roll_out(self):
        """-> Rollout of the next problems; ValueError where a reward fails on all of the first"""
        cfg = self.cfg
        before = rewards.FAILURES.copy()
        groups, all_groups, counts = collect(
            cfg, self.model, self.tokenizer, self.problems.files, self.order, self.step,
            self.device, self.rank, self.world)
        self.drawn += len(all_groups)
        cpu.return_memory()      # of the sampler

        by_name = rewards.failures(before, cfg.rewards)
        failed = torch.tensor([by_name[name] for name in cfg.rewards])
        failed = total(failed, self.device).tolist()
        if not self.rewards_work:
            by_name = dict(zip(cfg.rewards, failed))
            rewards.require_working(by_name, len(all_groups) * cfg.group)
            self.rewards_work = True
        return Rollout(groups, all_groups, counts, sum(failed))

    def check_update(self, norm, batch):
        """norm: of optimizer_step, None where it skipped the update; too many in a row end the run
        with a FloatingPointError, and batch saved."""
        if norm is not None:
            self.skips = 0
            return
        self.skips += 1
        report_skip(self.cfg, self.log, self.step, self.skips, batch, self.rank)

    def end_step(self, rollout, shares, skipped):
        """After the updates. shares: of each update, its samples that were computed."""
        cfg = self.cfg
        load = rollout.expert_load(self.moe_shape)
        if load.numel() and not skipped:
            update_router_bias(self.model, load.to(self.device), cfg.bias_rate)
        self.step += 1
        cpu.return_memory()      # of the backward passes
        if self.reference is not None and becomes_reference(cfg, self.step):
            self.reference.load_state_dict(self.model.state_dict())

        tokens = sum(len(s) + 1 for s in flat(shares))
        self.flops_before = self.flops
        self.flops += (sampling_flops(self.active, rollout)
                       + training_flops(cfg, self.active, tokens))

    def log_step(self, numbers):
        """A step's line of the log, and what is wrong with it: once, until it has been well."""
        shown = ('reward', 'right', 'length', 'entropy', 'zero_variance', 'mismatch_max')
        self.log.write(numbers, shown)
        self.log.tick(self.expected_steps())
        self.first = self.first or {'entropy': numbers['entropy']}
        wrong = warnings_of(numbers, self.first)
        for what in sorted(wrong.keys() - self.warned):
            self.log.warn(f'step {self.step}: {wrong[what]}')
        self.warned = set(wrong)

    def log_evaluation(self):
        """Samples and grades cfg.eval_data, and logs it. It is no time of training."""
        cfg = self.cfg
        rows = self.problems.eval_rows
        before = rewards.FAILURES.copy()
        with self.clock.paused(), Unsharded(self.model), autocast(cfg, self.device):
            numbers, scored = evaluate(
                self.model, self.tokenizer, rows, n=1, greedy=False, temperature=cfg.temperature,
                prefill=cfg.prefill, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed,
                slots=cfg.slots, stop=cfg.stop, progress='evaluation')
        if rewards.FAILURES - before:
            self.log.warn(f'step {self.step}: evaluation with rewards that failed: '
                          f'{rewards.told()}')
        self.log.evaluation(self.step, numbers)
        self.log.samples(self.step, evaluated(self.tokenizer, rows, cfg.prefill, scored))

    def log_samples(self, groups, A_PG):
        """Now and then, after the first step too, a few of its samples, to be read."""
        every = self.cfg.samples_every
        if not every or (self.step != 1 and self.step % every):
            return
        entries = samples_to_read(self.tokenizer, groups, A_PG, self.cfg.data, self.problems.kept)
        self.log.samples(self.step, entries)

    def is_due(self, every):
        return every > 0 and self.step % every == 0

    def evaluation_due(self):
        due = self.ended() or self.is_due(self.cfg.eval_every)
        return due and len(self.problems.eval_rows) > 0

    def stop_if_wanted(self):
        if self.stop.wanted(self.device):
            self.stop.leave(self.log, self.step, self.cfg.out_dir)


def start(cfg):
    """-> Trainer, or None where plan or show only print."""
    present(cfg, 'init_from', 'tokenizer')
    if cfg.plan:
        plan.show(cfg, cfg.init_from, cfg.plan)
        return None
    device, rank, world = start_processes(cfg)
    if not cfg.show:
        check_out_dir(cfg)
    tokenizer = load_tokenizer(cfg)
    problems = Problems(cfg, device)
    shape = model_config(cfg, tokenizer)
    tell_idle(cfg, idle_keys(cfg, problems, shape, world))
    if cfg.show:
        if rank == 0:
            problems.show(tokenizer)
        return None
    problems.drop_long(tokenizer, shape.max_position_embeddings)
    return Trainer(cfg, tokenizer, problems, device, rank, world)


def main(cfg):
    """Rolls out, scores, takes advantages, updates, logs and saves, step by step until cfg.steps or
    cfg.max_flops."""
    trainer = start(cfg)
    if trainer is None:
        return
    model = trainer.model
    device = trainer.device
    if trainer.step == 0 and trainer.evaluation_due():
        trainer.log_evaluation()
    trainer.log.start_clock()

    while not trainer.ended():
        # Roll out groups of completions and score them
        trainer.clock.start()
        rollout = trainer.roll_out()
        samples = rollout.samples()
        R_PG = rewards_of(rollout.groups)
        sampling = trainer.clock.lap()

        # Make micro-batches of each update, with their log-probs before the first
        shares = samples_with_gradient(cfg, samples, R_PG)
        updates = rank_batches(cfg, shares, device, trainer.rank, trainer.world)
        freeze_logprobs(cfg, model, trainer.reference, updates, device)

        # Advantages of the samples, weights of their tokens
        penalty_PG = kl_penalty(cfg, updates, R_PG, device)
        A_PG, _ = advantages(R_PG, cfg.advantage_norm, cfg.baseline, penalty_PG)
        A_N = append_zero(A_PG.flatten().float(), device)
        w_N = append_zero(sample_weights(cfg, samples), device)

        # Update the policy
        meter = PolicyMeter(device)
        share = schedule(trainer.step, cfg, trainer.flops)     # of the peak learning rate
        for _ in range(cfg.epochs):
            for u, batches in enumerate(updates):
                loss = gradients(cfg, model, batches, A_N, w_N, meter, device, trainer.world)
                norm = optimizer_step(model, trainer.optimizers, share, cfg.grad_clip, loss)
                meter.add_norm(norm)
                batch = {'update': u, 'parts': batches, 'advantage': A_N, 'weight': w_N}
                trainer.check_update(norm, batch)
        trainer.end_step(rollout, shares, meter.skipped)
        training = trainer.clock.lap()

        # Log
        meter.gather()
        numbers = step_numbers(trainer, rollout, A_PG, meter, share, sampling, training)
        trainer.log_step(numbers)
        trainer.log_samples(rollout.groups, A_PG)

        # Evaluate and save
        if trainer.evaluation_due():
            trainer.log_evaluation()
        if trainer.is_due(cfg.save_every) or trainer.stop.wanted(device):
            trainer.save()
            trainer.stop_if_wanted()

    if trainer.saved != trainer.step:   # for more steps, some day
        trainer.save()
    finish(cfg, model, trainer.tokenizer, trainer.rank)
    trainer.log.close()


if __name__ == '__main__':
    run(main, Config)
    if dist.is_initialized():
        dist.destroy_process_group()
