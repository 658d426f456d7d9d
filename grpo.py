"""
Group relative policy optimisation: R1-Zero, RL from a cold start, the last RL over several kinds of tasks.

    python grpo.py config/r1/zero.py --learning_rate=3e-4
    torchrun --nproc_per_node=8 grpo.py config/grpo_qwen.py

Each step: sample a group of G completions of every prompt with the trainer's own weights, score them with plain reward functions,
and push each completion by its advantage in the group (DeepSeekMath arXiv:2402.03300, DeepSeek-R1 arXiv:2501.12948):

    A_i = (r_i - mean r) / std r                                  for every token of completion i
    L   = -sum_t w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + kl_coef * sum_t w_t k3_t
    rho_t = pi(t) / pi_old(t),    k3_t = pi_ref / pi - log(pi_ref / pi) - 1,    w_t by `loss_norm`

Groups whose completions all score alike have no advantage; they are counted and, unless they carry a KL term, not computed.
Prompts and completions are packed into rows like SFT documents. The same seeds give the same run on any number of ranks.

Left out: asynchronous rollouts, a value network, a second inference engine (and so no weights to synchronise).
"""

import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import rewards
from configurator import configure
from data.loader import pack, read_rows
from model import update_router_bias
from sample import Sampler, encode_prompts, evaluate, score
from sft import (Log, Stop, Unsharded, expert_counts, finish, load_model, make_optimizers, optimizer_step, schedule, shard,
                 start_processes, total)


@dataclass
class Config:
    out_dir: str = 'out/grpo'              # checkpoints, metrics.jsonl, samples.txt and the finished model
    init_from: str = 'out/r1/base'         # checkpoint to start from
    tokenizer: str | None = None           # folder of the tokenizer; None: that of init_from
    data: list = field(default_factory=lambda: ['data/countdown/rl.jsonl'])  # JSONL problem files, taken in turn
    rewards: dict = field(default_factory=lambda: {'accuracy': 1.0, 'format': 0.2})  # weights of the reward functions
    steps: int = 30                        # rollouts
    prompts: int = 32                      # prompts of a rollout, over all ranks
    group: int = 8                         # completions a prompt
    max_new_tokens: int = 192              # longest completion, the stop token included
    temperature: float = 1.0               # of the rollout, and inside every log-prob
    prefill: str = ''                      # text the assistant's turn starts with, for example "<think>"
    updates: int = 1                       # optimizer steps a rollout, each on its share of the groups
    clip_low: float = 0.2                  # rho is clipped below at 1 - this
    clip_high: float = 0.2                 # and above at 1 + this
    scale_advantage: bool = True           # divide by the group's standard deviation
    loss_norm: str = 'token'               # w_t: 'sequence' 1/(N |o|), 'token' 1/all tokens, 'constant' 1/(N max_new_tokens)
    kl_coef: float = 0.0                   # weight of the KL to the reference; 0: no reference is kept
    reference_every: int = 0               # steps after which the reference becomes the policy; 0: never
    learning_rate: float = 3e-4            # peak, AdamW
    muon_learning_rate: float = 0.0        # peak, Muon for the hidden matrices; 0: AdamW for everything
    schedule: str = 'constant'             # 'cosine', 'constant' or 'linear' after the warm-up
    warmup_steps: int = 2                  # linear warm-up, in rollouts
    min_lr: float = 0.1                    # share of the peak at the end of the schedule
    beta1: float = 0.9                     # AdamW
    beta2: float = 0.95                    # AdamW
    weight_decay: float = 0.0              # decoupled, for matrices
    grad_clip: float = 1.0                 # largest gradient norm; 0: none
    bias_rate: float = 0.0                 # step of the router bias
    row_len: int = 256                     # tokens of a packed row
    micro_rows: int = 16                   # packed rows of one forward
    slots: int = 256                       # completions decoded at once on a rank
    max_flops: float = 0.0                 # stop when this much compute is spent (sampling included); 0: no limit
    seed: int = 1                          # of the prompts' order and the sampling noise
    device: str = 'auto'                   # 'cpu', 'cuda' or 'auto'
    dtype: str = 'float32'                 # arithmetic: 'float32', or 'bfloat16' (autocast)
    threads: int = 2                       # CPU threads a rank
    activation_checkpointing: bool = False # recompute activations in the backward pass
    eval_data: list = field(default_factory=list)  # problem files to sample and grade while training
    eval_every: int = 5                    # steps between evaluations, the start included; 0: none
    eval_rows: int = 128                   # problems of an evaluation
    save_every: int = 10                   # steps between checkpoints; 0: only when stopped
    keep: int = 2                          # checkpoints kept
    resume: bool = True                    # go on from the newest checkpoint in out_dir


# ---------------------------------------------------------------------------------------------------------------------
# the maths


def advantages(rewards_PG, scale):
    """[P, G] -> A [P, G] = r - mean, over the group's standard deviation if `scale`; and which groups vary [P]. Groups without
    variance get 0."""
    centred = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    std = rewards_PG.std(dim=1, keepdim=True, correction=0)
    varies = std > 1e-6
    return torch.where(varies, centred / (std if scale else 1.0), 0.0), varies[:, 0]


def token_weights(lengths, norm, max_new_tokens):
    """lengths [N] of all completions of an update -> w [N], the weight of each token of a completion; sum_i len_i w_i is 1 for
    'sequence' and 'token'."""
    lengths = lengths.double()
    if norm == 'sequence':
        return 1.0 / (len(lengths) * lengths)
    if norm == 'token':
        return torch.full_like(lengths, 1.0 / lengths.sum().item())
    if norm == 'constant':
        return torch.full_like(lengths, 1.0 / (len(lengths) * max_new_tokens))
    raise ValueError(f"loss_norm must be 'sequence', 'token' or 'constant', not {norm!r}")


def policy_loss(logp, old, A, w, clip_low, clip_high):
    """-> -sum_t w min(rho A, clip(rho) A), and where the clip binds, all over tokens [n]"""
    rho = (logp - old).exp()
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    return -(w * torch.minimum(rho * A, clipped * A)).sum(), (clipped * A < rho * A).detach()


def k3(logp, ref):
    """An unbiased, non-negative estimate of KL(pi || pi_ref) from samples of pi, token by token."""
    return (ref - logp).exp() - (ref - logp) - 1


# ---------------------------------------------------------------------------------------------------------------------
# rollouts as packed rows


@dataclass
class Sample:
    prompt: list          # token ids
    tokens: list          # completion's ids, the stop token included
    logprobs: list        # the sampler's
    advantage: float = 0.0
    weight: float = 0.0   # of each of its tokens in the loss


def pack_samples(samples, row_len):
    """-> dict of [B, T] tensors: input_ids, labels (completion tokens only), positions, doc_ids as in data/loader.py, and at labelled
    positions advantage, weight and sampled (the sampler's log-prob)."""
    docs = [s.prompt + s.tokens for s in samples]
    rows = pack(docs, row_len + 1)
    shape = len(rows), row_len
    out = {name: torch.zeros(shape, dtype=torch.int64) for name in ('input_ids', 'positions')}
    out.update(labels=torch.full(shape, -100), doc_ids=torch.full(shape, -1))
    out.update({name: torch.zeros(shape) for name in ('advantage', 'weight', 'sampled')})
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            s, n = samples[i], len(docs[i]) - 1                   # the last token is a label, never an input
            here, said = slice(at, at + n), slice(at + len(s.prompt) - 1, at + n)
            out['input_ids'][b, here] = torch.tensor(docs[i][:-1])
            out['positions'][b, here] = torch.arange(n)
            out['doc_ids'][b, here] = i
            out['labels'][b, said] = torch.tensor(s.tokens)
            out['sampled'][b, said] = torch.tensor(s.logprobs)
            out['advantage'][b, said], out['weight'][b, said] = s.advantage, s.weight
            at += n
    return out


def micro_batches(batch, rows, device):
    """Parts of `rows` rows; every rank gets the same number of them, since each forward of a sharded model is collective: the
    missing ones are a token whose weight is 0."""
    parts = [{name: t[i:i + rows].to(device) for name, t in batch.items()} for i in range(0, len(batch['labels']), rows)]
    count = torch.tensor(len(parts), device=device)
    if dist.is_initialized():
        dist.all_reduce(count, dist.ReduceOp.MAX)
    blank = {name: torch.zeros(1, 2, dtype=t.dtype, device=device) for name, t in batch.items()}
    return parts + [blank] * (int(count) - len(parts))


def forward(model, part, cfg, device, routes=None):
    """-> logp [n], entropy [n] of the labelled tokens"""
    inputs = {name: part[name] for name in ('input_ids', 'labels', 'positions', 'doc_ids')}
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == 'bfloat16'):
        return model.logprobs(**inputs, temperature=cfg.temperature, entropy=True, routes=routes)[:2]


def problem_order(counts, per_step, seed):
    """Endless steps of (file, row) pairs: the files take turns, each goes through its rows in an order drawn anew every epoch."""
    def rows(file, n):
        epoch = 0
        while True:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + file * 1009 + epoch))
            yield from ((file, row) for row in order.tolist())
            epoch += 1
    streams = [rows(file, n) for file, n in enumerate(counts)]
    turn = 0
    while True:
        yield [next(streams[(turn + i) % len(streams)]) for i in range(per_step)]
        turn += per_step


# ---------------------------------------------------------------------------------------------------------------------
# the run


def rollout(cfg, model, tokenizer, problems, numbers, step):
    """Samples and scores this rank's problems. -> groups [P][G] of Samples, scored [P][G] of dicts"""
    ids, rows = encode_prompts(tokenizer, problems, cfg.prefill)
    sampler = Sampler(model, tokenizer.stop_ids, cfg.slots)
    with Unsharded(model):
        completions = sampler.generate(ids, cfg.group, cfg.max_new_tokens, cfg.temperature, seed=cfg.seed * 1_000_003 + step, keys=numbers)
    scored = score(tokenizer, rows, completions, cfg.rewards)
    return [[Sample(prompt, c.tokens, c.logprobs) for c in group] for prompt, group in zip(ids, completions)], scored


def main(cfg):
    device, rank, world = start_processes(cfg)
    if (Path(cfg.out_dir) / 'config.json').exists():
        return print(f'{cfg.out_dir} holds a finished model; remove it or set another out_dir to train again')
    if cfg.prompts % (world * cfg.updates):
        raise ValueError(f'prompts={cfg.prompts} does not divide into {world} ranks x updates={cfg.updates}')
    model, tokenizer = load_model(cfg, device)
    files = [read_rows(path, require=('prompt', 'task')) for path in cfg.data]
    eval_rows = [row for path in cfg.eval_data for row in read_rows(path, require=('prompt', 'task'))[:cfg.eval_rows]]
    order = problem_order([len(rows) for rows in files], cfg.prompts, cfg.seed)
    active, E = model.num_params(active=True), model.cfg.n_routed_experts
    moe = sum(hasattr(layer.mlp, 'gate') for layer in model.model.layers[:model.cfg.num_hidden_layers])
    reference = shard(copy.deepcopy(model).requires_grad_(False), cfg, device) if cfg.kl_coef else None
    model = shard(model, cfg, device)
    optimizers = make_optimizers(model, cfg, device)

    # go on from the newest checkpoint
    step, seconds, flops = 0, 0.0, 0.0
    found = checkpoint.latest(cfg.out_dir) if cfg.resume else None
    if found:
        state = checkpoint.load(found, model, optimizers)
        step, seconds, flops = state['step'], state['seconds'], state['flops']
        if reference is not None:
            for name, tensor in checkpoint.named_tensors(reference).items():
                tensor.data.copy_(checkpoint.placed(state['reference'][name], tensor))
        for _ in range(step):
            next(order)
    log, stop = Log(cfg, rank, step, cfg.steps), Stop()

    def save():
        state = {'seconds': seconds, 'flops': flops}
        if reference is not None:
            state['reference'] = checkpoint.full_state_dict(reference)
        checkpoint.save(cfg.out_dir, step, model, optimizers, state, cfg.keep)

    def look():
        with Unsharded(model):
            numbers, scored = evaluate(model, tokenizer, eval_rows, n=1, greedy=False, temperature=cfg.temperature, prefill=cfg.prefill,
                                       max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, slots=cfg.slots)
        log.write({'step': step, **{f'eval_{k}': v for k, v in numbers.items()}})
        log.samples(step, scored)

    def timed(start):
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.time() - start

    if eval_rows and cfg.eval_every and step == 0:
        look()
    began = time.time()
    while step < cfg.steps and not (cfg.max_flops and flops >= cfg.max_flops):
        # rollout: this rank's share of the prompts
        start = time.time()
        chosen = list(enumerate(next(order)))[rank::world]
        groups, scored = rollout(cfg, model, tokenizer, [files[f][r] for _, (f, r) in chosen], [i for i, _ in chosen], step)
        sampling = timed(start)
        R = torch.tensor([[s['total'] for s in group] for group in scored])
        A, varies = advantages(R, cfg.scale_advantage)
        for group, a in zip(groups, A.tolist()):
            for sample, advantage in zip(group, a):
                sample.advantage = advantage

        # updates: each on its share of the groups
        start, stats, trained = time.time(), torch.zeros(8, dtype=torch.float64, device=device), 0
        counts = torch.zeros(moe, E or 0, dtype=torch.int64, device=device)
        share = len(groups) // cfg.updates
        parts_of = []
        for u in range(cfg.updates):
            mine = range(u * share, (u + 1) * share)
            lengths = torch.zeros(cfg.prompts // cfg.updates, cfg.group, device=device)
            lengths[rank::world] = torch.tensor([[float(len(s.tokens)) for s in groups[g]] for g in mine], device=device)
            weights = token_weights(total(lengths, device).flatten(), cfg.loss_norm, cfg.max_new_tokens).view_as(lengths)[rank::world]
            for row, g in enumerate(mine):
                for sample, weight in zip(groups[g], weights[row].tolist()):
                    sample.weight = weight
            used = [s for g in mine if varies[g] or cfg.kl_coef for s in groups[g]]
            trained += sum(len(s.prompt) + len(s.tokens) for s in used)
            packed = pack_samples(used, cfg.row_len) if used else {name: t[:0] for name, t in pack_samples(groups[0], cfg.row_len).items()}
            parts_of.append(micro_batches(packed, cfg.micro_rows, device))
            for part in parts_of[-1]:  # frozen log-probs, from the policy as it sampled
                with torch.no_grad():
                    part['old'] = forward(model, part, cfg, device)[0] if cfg.updates > 1 else None
                    part['ref'] = forward(reference, part, cfg, device)[0] if reference is not None else None
        norms = []
        for parts in parts_of:
            for part in parts:
                routes = [] if moe else None
                logp, entropy = forward(model, part, cfg, device, routes)
                here = part['labels'] != -100
                a, w, sampled = part['advantage'][here], part['weight'][here], part['sampled'][here]
                old = part['old'] if part['old'] is not None else logp.detach()
                loss, clipped = policy_loss(logp, old, a, w, cfg.clip_low, cfg.clip_high)
                kl = k3(logp, part['ref']) if part['ref'] is not None else torch.zeros_like(logp)
                ((loss + cfg.kl_coef * (w * kl).sum()) * world).backward()
                real = w > 0
                off = (old - sampled)[real].abs()          # before any update: sampler against trainer
                stats[:6] += torch.stack([real.sum(), entropy[real].sum(), clipped[real].sum(), kl.detach()[real].sum(), off.sum(), loss.detach()])
                stats[6] = torch.maximum(stats[6], off.max() if len(off) else stats[6])
                if moe:
                    counts = counts + expert_counts(routes, E)
            norms.append(optimizer_step(model, optimizers, schedule(step, cfg), cfg.grad_clip))
        if moe:
            counts = total(counts, device)
            update_router_bias(model, counts, cfg.bias_rate)
        training = timed(start)
        step += 1
        if reference is not None and cfg.reference_every and step % cfg.reference_every == 0:
            reference.load_state_dict(model.state_dict())

        # numbers of the step, over all ranks
        every = [s for group in scored for s in group]
        right = lambda s: s['rewards'].get('accuracy', s['total']) >= 1  # noqa: E731
        sums = {'reward': sum(s['total'] for s in every), 'length': sum(s['length'] for s in every), 'right': sum(map(right, every)),
                'length_right': sum(s['length'] for s in every if right(s)), 'truncated': sum(not s['finished'] for s in every),
                'mixing': sum(s['mixed'] for s in every), 'zero_variance': (~varies).sum().item() * cfg.group,
                'prompt_tokens': sum(len(g[0].prompt) for g in groups), 'trained': trained, 'squares': A.square().sum().item(),
                **{f'reward_{name}': sum(s['rewards'][name] for s in every) for name in cfg.rewards}}
        summed = dict(zip(sums, total(torch.tensor(list(sums.values()), dtype=torch.float64, device=device), device).tolist()))
        mismatch = stats[6].clone()
        if dist.is_initialized():
            dist.all_reduce(mismatch, dist.ReduceOp.MAX)
        stats = total(stats, device).tolist()
        N, n = cfg.prompts * cfg.group, max(1.0, stats[0])
        forwards = 1 + (cfg.updates > 1) / 3 + (reference is not None) / 3
        flops += 2.0 * active * (summed['length'] + summed['prompt_tokens']) + 6.0 * active * summed['trained'] * forwards
        now = seconds + time.time() - began
        numbers = {'step': step, **{name: summed[name] / N for name in sums if name not in ('length_right', 'prompt_tokens', 'trained', 'squares')},
                   'length_right': summed['length_right'] / max(1, summed['right']),
                   'length_wrong': (summed['length'] - summed['length_right']) / max(1, N - summed['right']),
                   'advantage_std': (summed['squares'] / N) ** 0.5, 'loss': stats[5], 'entropy': stats[1] / n, 'clipped': stats[2] / n, 'kl': stats[3] / n,
                   'mismatch': stats[4] / n, 'mismatch_max': mismatch.item(), 'grad_norm': sum(norms) / len(norms), 'flops': flops,
                   'reward_failures': sum(rewards.FAILURES.values()), 'seconds': now, 'seconds_sampling': sampling, 'seconds_training': training, 'lr': schedule(step - 1, cfg)}
        if moe:
            numbers['expert_max_load'] = (counts.amax(1) / counts.float().mean(1).clamp(min=1e-9)).mean().item()
        log.write(numbers, ('reward', 'right', 'length', 'entropy', 'zero_variance', 'mismatch_max'))
        log.tick()
        if eval_rows and cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
            pause = time.time()
            look()
            began += time.time() - pause  # evaluation is not training time
        if (cfg.save_every and step % cfg.save_every == 0) or stop.wanted(device):
            seconds, began = seconds + time.time() - began, time.time()
            save()
            if stop.wanted(device):
                stop.leave(log, step, cfg.out_dir)
    finish(cfg, model, tokenizer, rank)
    log.close()


if __name__ == '__main__':
    main(configure(Config, sys.argv[1:]))
    if dist.is_initialized():
        dist.destroy_process_group()
