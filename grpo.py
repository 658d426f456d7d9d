"""
Group relative policy optimisation: R1-Zero, RL from a cold start, the last RL over several kinds of tasks.

    python grpo.py config/r1/zero.py --learning_rate=3e-4
    torchrun --nproc_per_node=8 grpo.py config/grpo_dapo.py --init_from=<folder> --data="['train.jsonl']"

Each step: sample a group of G completions of every prompt with the trainer's own weights, score them with plain reward functions,
and push each completion by its advantage in the group (DeepSeekMath arXiv:2402.03300, DeepSeek-R1 arXiv:2501.12948):

    A_i = (r_i - mean r) / (std r + 1e-6)                         for every token of completion i
    L   = -sum_t w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + kl_coef * sum_t w_t k3_t
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
    TIS                     w_t min(pi_old / pi_sampler, tis): where sampler and trainer round differently

The prompt must ask for what the rewards look for. It is the problem and `instruction` in the chat
template (`chat_template`, `template_args`), then `prefill`, in rollouts and evaluation alike. A
completion ends at a stop token or a text in `stop`; the rewards see nothing after that.

Prompts and completions are computed in micro-batches of about equally long ones. Groups whose completions all score alike have no
advantage; they are counted and, unless they carry a KL term, not computed.
The same seeds give the same run on any number of ranks, but for rounding: in bfloat16 that of the
gradients, after which the samples of later steps differ.

What is logged covers all samples: the sampler's entropy and expert load (2 to 5% of its time), and
the share of all tokens in the loss that were clipped. Mismatch, KL, ratio and ratio_max cover the
tokens that were computed, late in RL a minority; computing the others for the ratio would take a
third of a step. With one update a rollout every ratio is 1. null: there was nothing to average.

Left out: asynchronous rollouts, a value network, a second inference engine (and so no weights to synchronise).
"""

import json
import time
import zlib
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from configurator import at_least, run, tell_idle  # before torch: says so where it is missing

import torch
import torch.distributed as dist

import checkpoint
import plan
import rewards
from data.prompts import fitting, instructed, visible
from data.source import read_rows
from judge import load_judges
from model import update_router_bias
from rollout import alike, collate, collect, micro_batches, moe_shape, problem_order
from sample import present
from evaluate import average, evaluate, evaluated, show_problems
from train import (Graded, Log, Stop, Unsharded, check_out_dir, finish, idle_in_training,
                   load_model, load_tokenizer, make_optimizers, model_config, optimizer_step,
                   peak_memory, peak_tflops, report_skip, reshard, resume, router_bias, schedule,
                   shard, start_processes, total)


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
    top_k: int = 0                         # the so many most probable tokens; 0: all
    min_p: float = 0.0                     # tokens of at least this share of the most probable
                                           # one's probability
    allow_biased: bool = False             # let them: log-probs stay those of all tokens, so ratios
                                           # and gradients are biased
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
                                           # included); 0: no limit

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
    show: int = 0                          # print the first so many prompts of each file and what
                                           # their own answers earn, then stop

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'prompts', 'max_new_tokens', 'updates', 'epochs', 'micro_tokens', 'slots')
        at_least(self, 0, 'top_k', 'min_p', 'dynamic_sampling', 'tis', 'kl_coef', 'reference_every',
                 'max_flops', 'samples_every')
        at_least(self, 0, 'clip_low', 'clip_high', finite=False)
        fewest = 1 if self.baseline == 'none' and self.advantage_norm != 'group' else 2
        if self.group < fewest or self.temperature <= 0:
            raise ValueError(f'group={self.group}, temperature={self.temperature}: advantages need 2 or more completions of a prompt that differ')
        for key in ('data', 'rewards'):
            if not getattr(self, key):
                raise ValueError(f'{key} is empty: there is nothing to train on')
        if not self.allow_biased and (self.top_p < 1 or self.top_k or self.min_p):
            raise ValueError(f'top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p} sample another distribution than the one whose '
                             'log-probs are trained, which biases the gradient; leave them at 1.0, 0 and 0.0, or set allow_biased=True')
        if '' in self.stop:
            raise ValueError('stop holds an empty text, which would end every completion at once')
        if self.prompts % self.updates:
            raise ValueError(f'prompts={self.prompts} does not divide into updates={self.updates}')


# ---------------------------------------------------------------------------------------------------------------------
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
    def above_baseline(x):
        return x - x.mean(dim=1, keepdim=True) if baseline == 'mean' else x
    equal, A = alike(rewards_PG, 1), above_baseline(rewards_PG)
    if baseline == 'mean':
        A = A.masked_fill(equal, 0.0)
    if penalty_PG is not None:
        A = A - above_baseline(penalty_PG)
    if norm != 'none':
        dim = 1 if norm == 'group' else (0, 1)
        scaled = A / (rewards_PG.std(dim, keepdim=True) + eps)
        A = torch.where(alike(rewards_PG, dim), A, scaled)
    return A, ~equal[:, 0]


def token_weights(lengths, norm, max_new_tokens):
    """lengths [N] of all completions of an update -> w [N], the weight of each token of a completion; sum_i len_i w_i is 1 for
    'sequence' and 'token'. A length of 0 stands for a completion that is out of the loss: its weight is 0 and it counts nowhere."""
    lengths = lengths.double()
    N, here = (lengths > 0).sum().clamp(min=1), (lengths > 0).double()
    if norm == 'sequence':
        return here / (N * lengths.clamp(min=1))
    return here / (lengths.sum().clamp(min=1) if norm == 'token' else N * max_new_tokens)


def policy_loss(logp, log_rho, A, w, objective, clip_low, clip_high):
    """logp, log_rho, A and w [n] of tokens -> loss, and where the clip binds below and above [n]
    bool. A clip_low and clip_high of inf clip nothing."""
    rho = log_rho.detach().clamp(max=88).exp()   # e^88 is about the largest float32
    bounded = rho.clamp(1 - clip_low, 1 + clip_high)
    if objective == 'clip':          # PPO: nothing is gained outside the bounds
        binds = bounded * A < rho * A
        pushed = (A != 0) & ~binds   # elsewhere exp(log_rho) may overflow: 0 * inf is no gradient
        gain = torch.where(binds, bounded * A, torch.where(pushed, log_rho, 0.0).exp() * A)
    elif objective == 'cispo':       # the bounded ratio weighs every token's gradient
        gain, binds = bounded * A * logp, (bounded != rho) & (A != 0)
    else:
        gain, binds = A * logp, torch.zeros_like(rho, dtype=torch.bool)
    return -(w * gain).sum(), binds & (rho < 1), binds & (rho > 1)


def of_sequence(log_rho, rows, B):
    """GSPO: token ratios [n] of completions `rows` [n] (0..B-1) -> s_i = exp(mean_t log rho_t), as its log at every token, with each
    token's own gradient: d/dlogp s_t = s_i, so that weights 1/(N |o|) give the paper's gradient."""
    sums = torch.zeros(2, B, dtype=log_rho.dtype, device=log_rho.device)
    sums = sums.index_add(1, rows, torch.stack([log_rho.detach(), torch.ones_like(log_rho)]))
    return log_rho - log_rho.detach() + (sums[0] / sums[1])[rows]


def kl_terms(logp, ref, kind):
    """Estimates of KL(pi || pi_ref) from samples of pi, token by token: k1 = log(pi / pi_ref) is unbiased but of either sign, and its
    gradient has mean 0; k2 = k1^2 / 2 is biased, with the gradient of the KL; k3 is unbiased and never negative. (joschu.net/blog/kl-approx.html)"""
    d = logp - ref
    return {'k1': d, 'k2': d.square() / 2, 'k3': (-d).exp() - 1 + d}[kind]


# ---------------------------------------------------------------------------------------------------------------------
# log-probs and losses


def forward(model, part, cfg, device, routes=None):
    """-> logp [n], entropy [n] of the labelled tokens. Right padding needs no mask: nothing looks at what follows it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == 'bfloat16'):
        logp, entropy, _ = model.logprobs(part['input_ids'], part['labels'], temperature=cfg.temperature, entropy=True, routes=routes,
                                          replay=part['routes'], prefix=part['prefix'])
    return logp, entropy.detach()


def losses(cfg, part, logp, A_N, w_N):
    """logp [n] of a micro-batch, advantages and token weights [N + 1] of the step's samples -> policy loss, kl_coef * KL, and over the
    tokens [n]: which count, where the clip binds below and above, KL, rho, log(pi_old / pi_sampler)"""
    rows = (part['labels'] != -100).nonzero()[:, 0]
    A, w = A_N[part['number'][rows]], w_N[part['number'][rows]]
    old = logp.detach() if part['old'] is None else part['old']
    log_rho, off = logp - old, old - part['sampler_logp']
    if cfg.ratio == 'sequence':
        log_rho = of_sequence(log_rho, rows, len(part['number']))
    weight = w * off.exp().clamp(max=cfg.tis) if cfg.tis else w
    loss, low, high = policy_loss(logp, log_rho, A, weight, cfg.objective, cfg.clip_low, cfg.clip_high)
    kl = torch.zeros_like(logp) if part['ref'] is None else kl_terms(logp, part['ref'], cfg.kl)
    kl_loss = cfg.kl_coef * (w * kl).sum() if cfg.kl != 'k1' else 0.0 * logp.sum()   # k1 is in the reward
    return loss, kl_loss, w > 0, low, high, kl, log_rho.detach().clamp(max=88).exp(), off


# ---------------------------------------------------------------------------------------------------------------------
# the run


def frozen(cfg, model, reference, used, N, device, rank, world):
    """used: the samples of each update that are computed, of N -> this rank's micro-batches of each update, as many on every rank, with the
    log-probs before the first update, `old` by the policy and `ref` by the reference (None where not needed); the sums of the k1 terms of
    its samples [N + 1]."""
    updates, k1_N = [], torch.zeros(N + 1, device=device)
    for some in used:
        parts = micro_batches(some, cfg.micro_tokens, world)
        mine = parts[rank::world]
        updates.append([collate(part, device) for part in mine + [[]] * (-(-len(parts) // world) - len(mine))])
    with torch.no_grad():
        for u, parts in enumerate(updates):
            for part in parts:
                part['old'] = forward(model, part, cfg, device)[0] if u else None   # the first update's own are exactly those
                if reference is None:
                    part['ref'] = None
                else:                              # which chooses its own experts
                    part['ref'] = forward(reference, {**part, 'routes': None}, cfg, device)[0]
                if cfg.kl == 'k1' and reference is not None:
                    rows = (part['labels'] != -100).nonzero()[:, 0]
                    k1_N.index_add_(0, part['number'][rows], kl_terms(part['sampler_logp'], part['ref'], 'k1'))
    if reference is not None:
        reshard(reference)
    return updates, k1_N


def becomes_reference(cfg, step):
    """Whether the reference is replaced after `step` rollouts: when another cfg.reference_every
    optimizer updates are full."""
    each, every = cfg.updates * cfg.epochs, cfg.reference_every
    return every > 0 and step * each // every > (step - 1) * each // every


def share(value, count):
    """-> value / count, or None (null in metrics.jsonl) of nothing"""
    return value / count if count else None


def to_read(tokenizer, groups, A, paths, kept):
    """-> of two groups, those that vary first, the samples of the highest and the lowest advantage,
    for Log.samples. A [P, G]; kept: for each file the numbers of its rows"""
    varies, entries = A.amax(1) > A.amin(1), []
    for p in varies.int().argsort(descending=True, stable=True)[:2].tolist():
        for i in dict.fromkeys((A[p].argmax().item(), A[p].argmin().item())):
            s, (file, row) = groups[p][i], groups[p][i].row
            numbers = {**s.score['rewards'], 'total': s.score['total'], 'advantage': A[p, i].item(),
                       'tokens': len(s.tokens)}
            entries.append((f'{paths[file]} row {kept[file][row] + 1}', numbers,
                            visible(tokenizer, s.prompt), visible(tokenizer, s.tokens)))
    return entries


def of_rollout(cfg, every):
    """All that a step sampled [P][G] -> its rewards, lengths and shares in numbers. `right` is what
    rewards.right says, and not there where nobody scored the tasks; of those that know no right and
    wrong `judged` is the mean reward. A length of nobody is None."""
    scores = [s.score for group in every for s in group]
    totals = [[s.score['total'] for s in group] for group in every]
    varies = ~alike(torch.tensor(totals, dtype=torch.float64), 1)
    numbers = {'reward': average([s['total'] for s in scores]),
               'length': average([s['length'] for s in scores])}
    checked = [(s['length'], r) for s in scores if (r := rewards.right(s)) is not None]
    if checked:
        numbers['right'] = average([r for _, r in checked])
        for name, wanted in (('right', True), ('wrong', False)):
            numbers[f'length_{name}'] = average([length for length, r in checked if r is wanted])
    judged = [rewards.accuracy_of(s) for s in scores if s.get('task') in rewards.JUDGED]
    if judged and None not in judged:
        numbers['judged'] = average(judged)
    for name in cfg.rewards:
        numbers[f'reward_{name}'] = average([s['rewards'][name] for s in scores])
    return {**numbers, 'truncated': average([not s['finished'] for s in scores]),
            'mixing': average([s['mixed'] for s in scores]),
            'zero_variance': 1 - varies.double().mean().item(), 'sampled_groups': len(every)}


def warnings_of(n, first):
    """numbers of a step, and those of the run's first -> {what is wrong: what usually causes it and which key to turn}"""
    out = {}
    if n['zero_variance'] == 1 and not n.get('advantage_std'):   # else baseline='none', or k1
        out['zero variance'] = (f'every group scored alike (mean reward {n["reward"]:.3g}), so nothing is learnt: a reward that is always 0 usually '
                                'means that answers are not found (see samples.txt; try '
                                'chat_template, instruction or prefill), one that is '
                                'always the same that the '
                                'problems are too hard or too easy (data), or group or temperature too small')
    if n['reward_failures']:
        out['rewards'] = (f'{n["reward_failures"]} rewards failed and count 0.0; so far on this '
                          f'rank: {rewards.told() or "none"}')
    if n['truncated'] == 1:
        out['truncated'] = ('every completion was cut: max_new_tokens is too small, or the model never says its stop token '
                            '(the chat template, or a base model without a cold start)')
    if n['kl'] is not None and n['kl'] > 1:
        out['kl'] = (f'{n["kl"]:.3g} nats a token from the reference: the policy ran away, usually through a learning_rate too high; lower it, '
                     'raise kl_coef, or set reference_every')
    if first and 0 < n['entropy'] < min(0.01, 0.2 * first['entropy']):
        out['entropy'] = (f'entropy fell to {n["entropy"]:.2g} nats a token: samples of a group become copies of each other; raise clip_high or '
                          'temperature, lower learning_rate or updates')
    if n['mismatch_kl'] is not None and n['mismatch_kl'] > 0.02:
        out['mismatch'] = (f"sampler and trainer disagree (KL {n['mismatch_kl']:.2g} a token): usually bfloat16 on a MoE model; set tis=2, "
                           "replay_routes=True, or dtype='float32'")
    return out


def main(cfg):
    present(cfg, 'init_from', 'tokenizer')
    if cfg.plan:
        return plan.show(cfg, cfg.init_from, cfg.plan)
    device, rank, world = start_processes(cfg)
    if not cfg.show:
        check_out_dir(cfg)
    tokenizer = load_tokenizer(cfg)

    # problems
    rewards.use_file(cfg.reward_file)
    rewards.check_names(cfg.rewards)
    files = [rewards.checked(path, read_rows(path, require=('prompt', 'task')), cfg.rewards)
             for path in cfg.data]
    eval_files = [read_rows(path, require=('prompt', 'task'))[:cfg.eval_rows]
                  for path in cfg.eval_data]
    for path, rows in zip(cfg.eval_data, eval_files):
        rewards.checked(path, rows, {'accuracy': 1.0})
    files, eval_files = ([[instructed(row, cfg.instruction) for row in rows] for rows in kind]
                         for kind in (files, eval_files))
    tasks = {row['task'] for rows in (*files, *eval_files) for row in rows}
    judges = load_judges(cfg.preference, device)
    rewards.prepare(cfg.rewards, tasks, cfg.unsafe_code, cfg.reward_workers, judges)
    shape, once = model_config(cfg, tokenizer), cfg.updates * cfg.epochs == 1
    no_experts = not any(map(shape.is_moe, range(shape.num_hidden_layers)))
    ratios, known = ('clip_low', 'clip_high', 'ratio'), tasks | cfg.rewards.keys()
    tell_idle(cfg, [*idle_in_training(cfg, world),
                    (cfg.objective == 'reinforce', ratios, 'REINFORCE has no ratio'),
                    (once, ratios, 'in the only update of a rollout every ratio is 1'),
                    (not cfg.kl_coef, ('kl', 'reference_every'), 'kl_coef is 0'),
                    (no_experts, ('bias_rate', 'replay_routes'), 'the model has no experts'),
                    ('preference' not in known, ('preference',), 'no reward or task asks for it'),
                    ('code' not in known, ('unsafe_code',), 'no reward or task runs programs')])
    if cfg.show:
        shown = dict(zip(cfg.data, files))
        return show_problems(tokenizer, shown, cfg, cfg.rewards) if rank == 0 else None
    room = shape.max_position_embeddings, cfg.max_new_tokens, cfg.prefill, cfg.long_prompts
    rows_kept = [fitting(tokenizer, *file, *room) for file in zip(cfg.data, files)]
    files = [[rows[i] for i in kept] for rows, kept in zip(files, rows_kept)]
    eval_rows = [rows[i] for path, rows in zip(cfg.eval_data, eval_files)
                 for i in fitting(tokenizer, path, rows, *room)]
    model, _ = load_model(cfg, device, tokenizer=tokenizer)
    active, moe = model.num_params(active=True), moe_shape(model)
    reference = None
    if cfg.kl_coef:
        frozen_model, _ = load_model(cfg, device, tokenizer=tokenizer)
        reference = shard(frozen_model.requires_grad_(False), cfg, device)
    model = shard(model, cfg, device)
    optimizers = make_optimizers(model, cfg)

    # go on from the newest checkpoint
    step, drawn, bad, seconds, flops, first = 0, 0, 0, 0.0, 0.0, None
    data = zlib.crc32(json.dumps(files, sort_keys=True).encode())
    if state := resume(cfg, model, optimizers):
        if (state['data'], state['seed']) != (data, cfg.seed):
            raise ValueError(f'the checkpoint in {cfg.out_dir} was saved with other problems or another seed; set another out_dir to start anew')
        step, drawn, bad, seconds, flops, first = (state[key] for key in ('step', 'drawn', 'bad', 'seconds', 'flops', 'first'))
        if reference is not None:
            if 'reference' not in state:
                raise ValueError(f'the checkpoint in {cfg.out_dir} was saved without a reference: kl_coef cannot be set in the middle of a run')
            for name, tensor in checkpoint.named_tensors(reference).items():
                tensor.data.copy_(checkpoint.placed(state['reference'].pop(name), tensor))
    order = islice(problem_order([len(rows) for rows in files], cfg.seed), drawn, None)
    log, stop, warned = Log(cfg, rank, step, cfg.steps), Stop(), set()
    if state and (said := rewards.file_changed(state.get('reward_file'))):
        log.warn(f'from step {step} on others score: {said}')

    def save():
        nonlocal seconds, began, saved
        seconds, began, saved = seconds + time.time() - began, time.time(), step
        state = {'data': data, 'seed': cfg.seed, 'drawn': drawn, 'bad': bad, 'seconds': seconds, 'flops': flops, 'first': first}
        state['date'] = tokenizer.date.isoformat()
        state['reward_file'] = rewards.file_stamp()
        if reference is not None:
            state['reference'] = checkpoint.full_state_dict(reference)
        checkpoint.save(cfg.out_dir, step, model, optimizers, state, cfg.keep)

    def look():
        before = rewards.FAILURES.copy()
        with Unsharded(model), torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == 'bfloat16'):
            numbers, scored = evaluate(model, tokenizer, eval_rows, n=1, greedy=False, temperature=cfg.temperature, prefill=cfg.prefill,
                                       max_new_tokens=cfg.max_new_tokens, seed=cfg.seed,
                                       slots=cfg.slots, stop=cfg.stop)
        if rewards.FAILURES - before:
            log.warn(f'step {step}: evaluation with rewards that failed: {rewards.told()}')
        log.write({'step': step, **{f'eval_{k}': v for k, v in numbers.items()}})
        log.samples(step, evaluated(tokenizer, eval_rows, cfg.prefill, scored))

    def timed(start):
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.time() - start

    if eval_rows and cfg.eval_every and step == 0:
        look()
    began, saved, tried = time.time(), step, False

    def ended():
        return step >= cfg.steps or bool(cfg.max_flops) and flops >= cfg.max_flops

    while not ended():
        # rollout
        start, before = time.time(), rewards.FAILURES.copy()
        groups, every, counts = collect(
            cfg, model, tokenizer, files, order, step, device, rank, world)
        drawn += len(every)
        failed = rewards.failures(before, cfg.rewards)
        failed = total(torch.tensor([failed[name] for name in cfg.rewards]), device).tolist()
        if not tried:
            rewards.require_working(dict(zip(cfg.rewards, failed)), len(every) * cfg.group)
            tried = True
        sampling, start = timed(start), time.time()
        samples = [s for group in groups for s in group]
        for number, s in enumerate(samples):
            s.number = number
        N, totals = len(samples), [[s.score['total'] for s in group] for group in groups]
        R = torch.tensor(totals, dtype=torch.float64)
        pushed = R != 0 if cfg.baseline == 'none' else ~alike(R, 1).expand_as(R)
        pushed = pushed.flatten().tolist()
        lengths = torch.tensor([len(s.tokens) * (s.score['finished'] or not cfg.mask_truncated) for s in samples])
        w_N = torch.cat([token_weights(part, cfg.loss_norm, cfg.max_new_tokens).float() for part in lengths.chunk(cfg.updates)])
        w_N = torch.cat([w_N, torch.zeros(1)]).to(device)       # the last is that of a row without a sample

        # micro-batches of each update, and their frozen log-probs: the policy's as it sampled, the reference's
        in_reward = cfg.kl == 'k1' and reference is not None      # then of completions out of the loss too
        computed = [in_reward or length > 0 and (push or reference is not None)
                    for length, push in zip(lengths.tolist(), pushed)]
        used = [[samples[i] for i in some.tolist() if computed[i]]
                for some in torch.arange(N).chunk(cfg.updates)]
        trained = sum(len(s) + 1 for some in used for s in some)
        updates, k1_N = frozen(cfg, model, reference, used, N, device, rank, world)
        penalty = None
        if in_reward:
            penalty = cfg.kl_coef * total(k1_N, device)[:-1].cpu().double().view_as(R)
        A, _ = advantages(R, cfg.advantage_norm, cfg.baseline, penalty)
        A_N = torch.cat([A.flatten().float(), torch.zeros(1)]).to(device)

        # updates
        stats = torch.zeros(9, dtype=torch.float64, device=device)
        worst = torch.zeros(2, dtype=torch.float64, device=device)
        norms, skipped = [], 0
        for u, parts in list(enumerate(updates)) * cfg.epochs:
            loss_sum = torch.zeros((), device=device)
            for part in parts:
                logp, _ = forward(model, part, cfg, device)
                loss, kl_loss, real, *told = losses(cfg, part, logp, A_N, w_N)
                if part['old'] is None:              # its own were those of the policy that sampled
                    part['old'] = logp.detach()
                ((loss + kl_loss) * world).backward()            # FSDP averages over ranks
                loss_sum += (loss + kl_loss).detach()
                low, high, kl, rho, off = (x.detach()[real] for x in told)
                stats += torch.stack([real.sum(), low.sum(), high.sum(), kl.sum(),
                                      rho.sum(), off.abs().sum(),
                                      kl_terms(-off.clamp(max=88), 0.0, 'k3').sum(),
                                      loss.detach(), (part['uses'] > 0).sum()])
                if real.any():
                    worst = torch.maximum(worst, torch.stack([rho.max(), off.abs().max()]))
            norm = optimizer_step(model, optimizers, schedule(step, cfg), cfg.grad_clip, total(loss_sum, device).item())
            bad = bad + 1 if norm is None else 0
            if bad:
                skipped += 1
                batch = {'update': u, 'parts': parts, 'advantage': A_N, 'weight': w_N}
                report_skip(cfg, log, step, bad, batch, rank)
            else:
                norms.append(norm)
        drafts, load = counts[:2], counts[2:].view(moe)
        if load.numel():
            update_router_bias(model, load.to(device), cfg.bias_rate * (not skipped))
        training = timed(start)
        step += 1
        if reference is not None and becomes_reference(cfg, step):
            reference.load_state_dict(model.state_dict())

        # numbers of the step
        sampled, prompt_tokens = sum(s.score['length'] for group in every for s in group), sum(len(group[0].prompt) for group in every)
        if dist.is_initialized():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        stats = total(stats, device).tolist()
        # tokens in the loss; and those that are not computed and yet have a ratio, which is 1
        n = cfg.epochs * lengths.sum().item()
        idle = n - stats[0] if once else 0
        forwards = cfg.epochs + (1 - 1 / cfg.updates) / 3 + (reference is not None) / 3
        flops += 2.0 * active * (sampled + prompt_tokens) + 6.0 * active * trained * forwards   # a prompt counts for each completion
        peak = 1e12 * peak_tflops(cfg, device) * world
        numbers = {
            'step': step, **of_rollout(cfg, every),
            'advantage_std': A.square().mean().sqrt().item(),
            'loss': stats[7] / len(updates) / cfg.epochs,
            'entropy': share(sum(s.entropy for group in every for s in group), sampled),
            'clipped': share(stats[1] + stats[2], n), 'clipped_low': share(stats[1], n),
            'clipped_high': share(stats[2], n), 'ratio': share(stats[4] + idle, stats[0] + idle),
            'ratio_max': max(worst[0].item(), float(idle > 0)) or None,
            'kl': share(stats[3], stats[0]) if reference is not None else None,
            'mismatch': share(stats[5], stats[0]), 'mismatch_kl': share(stats[6], stats[0]),
            'mismatch_max': worst[1].item() if stats[0] else None,
            'grad_norm': average(norms), 'skipped': skipped,
            'flops': flops, 'reward_failures': sum(failed),
            'seconds': seconds + time.time() - began, 'seconds_sampling': sampling, 'seconds_training': training, 'lr': schedule(step - 1, cfg) * cfg.learning_rate,
            'tokens_per_second': sampled / (sampling + training),
            'memory_gib': peak_memory(device)}
        if drafts[0]:
            numbers['mtp_acceptance'] = (drafts[1] / drafts[0]).item()
        if peak:
            done = 6.0 * active * stats[8] / cfg.epochs * forwards   # tokens that were computed
            numbers.update(mfu=(2.0 * active * (sampled + prompt_tokens) + done) / (sampling + training) / peak, mfu_training=done / training / peak)
        if load.numel():
            numbers['expert_max_load'] = (load.amax(1) / load.mean(1)).mean().item()
            numbers.update(router_bias(model))
        log.write(numbers, ('reward', 'right', 'length', 'entropy', 'zero_variance', 'mismatch_max'))
        log.tick()
        first = first or {'entropy': numbers['entropy']}
        wrong = warnings_of(numbers, first)
        for what in sorted(wrong.keys() - warned):               # once, until it has been well again
            log.warn(f'step {step}: {wrong[what]}')
        warned = set(wrong)
        if cfg.samples_every and (step % cfg.samples_every == 0 or step == 1):
            log.samples(step, to_read(tokenizer, groups, A, cfg.data, rows_kept))
        if eval_rows and (ended() or cfg.eval_every and step % cfg.eval_every == 0):
            pause = time.time()
            look()
            began += time.time() - pause  # evaluation is not training time
        if (cfg.save_every and step % cfg.save_every == 0) or stop.wanted(device):
            save()
            if stop.wanted(device):
                stop.leave(log, step, cfg.out_dir)
    if saved != step:                                            # for more steps, some day
        save()
    finish(cfg, model, tokenizer, rank)
    log.close()


if __name__ == '__main__':
    run(main, Config)
    if dist.is_initialized():
        dist.destroy_process_group()
