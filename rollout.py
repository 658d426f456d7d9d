"""
Rollouts: problems are drawn, sampled and scored, and the samples become micro-batches for grpo.py.
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from data.prompts import encode_prompts
from evaluate import score
from sample import Sampler
from train import Unsharded, expert_counts, total


@dataclass
class Sample:
    prompt: list             # token ids
    tokens: list             # completion's ids, the stop token included
    logprobs: list           # the sampler's
    score: dict              # of evaluate.score: "total", "rewards", "length", "finished", ...,
                             # without the text
    routes: torch.Tensor | None = None  # experts [T, MoE layers, K] of all tokens but the last,
                             # with replay_routes
    number: int = -1         # place among the samples of the step
    entropy: float = 0.0     # nats of the distributions that its tokens were drawn from, summed
    row: tuple = (0, 0)      # file and row of its problem

    def __len__(self):       # tokens that go through the model
        return len(self.prompt) + len(self.tokens) - 1


def alike(rewards_PG, dim):
    """-> bool [P, 1] of each group (dim 1) or [1, 1] of all (dim (0, 1)): whether the rewards are
    equal, but for the last digits of a double that the order of a sum decides"""
    high, low = rewards_PG.amax(dim, keepdim=True), rewards_PG.amin(dim, keepdim=True)
    return high - low <= 1e-12 * rewards_PG.abs().amax(dim, keepdim=True)


def problem_order(counts, seed):
    """Endless (file, row) pairs: the files take turns, each goes through its rows in an order drawn
    anew every epoch."""
    def rows(file, n):
        epoch = 0
        while True:
            drawn = torch.Generator().manual_seed(seed * 1_000_003 + file * 1009 + epoch)
            order = torch.randperm(n, generator=drawn)
            yield from ((file, row) for row in order.tolist())
            epoch += 1
    streams = [rows(file, n) for file, n in enumerate(counts)]
    while True:
        yield from (next(stream) for stream in streams)


def sample_groups(cfg, model, tokenizer, problems, numbers, step, device):
    """Samples and scores this rank's problems. -> groups [P][G] of Samples; counts float64
    [2 + MoE layers * E]: tokens that the MTP layer drafted, those accepted, and what each expert
    got of all samples' tokens, their prompts' included."""
    if not problems:
        return [], torch.zeros(2 + math.prod(moe_shape(model)), dtype=torch.float64)
    asked = [{'max_length': cfg.max_new_tokens, **row} for row in problems]
    ids, rows = encode_prompts(tokenizer, asked, cfg.prefill)
    sampler = Sampler(model, tokenizer.stop_ids, cfg.slots, None, cfg.stop, tokenizer)
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == 'bfloat16'):
        completions = sampler.generate(
            ids, cfg.group, cfg.max_new_tokens, cfg.temperature, cfg.top_p,
            cfg.seed * 1_000_003 + step, numbers, top_k=cfg.top_k, min_p=cfg.min_p, routes=True,
            unbiased=not cfg.allow_biased, entropy=True)
    scored = score(tokenizer, rows, completions, cfg.rewards, cfg.stop)
    layers, experts = moe_shape(model)
    groups, load = [], torch.zeros(layers, experts, dtype=torch.float64)
    for prompt, *group in zip(ids, completions, scored):
        if layers:
            routes = torch.cat([c.routes for c in group[0]])
            times = torch.ones(len(routes), dtype=torch.int64)
            load += expert_counts([(None, chosen) for chosen in routes.unbind(1)], experts, times)
        groups.append([])
        for c, s in zip(*group):
            graded = {k: v for k, v in s.items() if k != 'response'}
            routes = c.routes if cfg.replay_routes else None
            groups[-1].append(
                Sample(prompt, c.tokens, c.logprobs, graded, routes, entropy=c.entropy))
    drafts = torch.tensor([sampler.drafted, sampler.accepted])
    return groups, torch.cat([drafts, load.flatten()])


def moe_shape(model):
    """-> MoE layers (that of the MTP not counted), experts of each"""
    layers = model.model.layers[:model.cfg.num_hidden_layers]
    return sum(hasattr(layer.mlp, 'gate') for layer in layers), model.cfg.n_routed_experts or 0


def collect(cfg, model, tokenizer, files, order, step, device, rank, world):
    """Samples until there are cfg.prompts groups. -> the groups to train on and all that were
    sampled, each [P][G], and the counts of all ranks, the same on every rank. With dynamic_sampling
    groups that are settled are replaced while attempts last; then the first of them fill up. Groups
    stay in the order they were drawn in."""
    every, groups, counts = [], [], 0
    for _ in range(1 + cfg.dynamic_sampling):
        chosen = list(enumerate(islice(order, cfg.prompts - len(groups)), len(every)))
        mine = chosen[rank::world]
        with Unsharded(model):
            problems, numbers = [files[f][r] for _, (f, r) in mine], [i for i, _ in mine]
            new, told = sample_groups(cfg, model, tokenizer, problems, numbers, step, device)
        counts = counts + total(told, device).cpu()
        if world > 1:
            shares = [None] * world
            dist.all_gather_object(shares, new)
            new = [shares[i % world][i // world] for i in range(len(chosen))]
        for (_, place), group in zip(chosen, new):
            for s in group:
                s.row = place
        every += new
        flat = [i for i, group in enumerate(every) if cfg.dynamic_sampling and settled(cfg, group)]
        groups = [group for i, group in enumerate(every) if i not in flat]
        if len(groups) == cfg.prompts:
            return groups, every, counts
    spare = flat[cfg.prompts - len(groups):]
    return [group for i, group in enumerate(every) if i not in spare], every, counts


def settled(cfg, group):
    """Whether a group of Samples has nothing to choose between: all are equally right by the reward
    of their task ('accuracy' or its own name), or where that is none of the rewards, have equal
    totals. (By totals an `overlong` or `length` beside it would make almost every group vary.)"""
    checks = [name for name in ('accuracy', group[0].score.get('task')) if cfg.rewards.get(name)]
    values = [s.score['rewards'][checks[0]] if checks else s.score['total'] for s in group]
    return alike(torch.tensor([values], dtype=torch.float64), 1).item()


def micro_batches(samples, tokens, world):
    """-> lists of samples from the longest to the shortest, each of at most `tokens` tokens with
    its padding (a longer sample is alone). For several ranks the lists are cut finer where that
    gives every rank equally large ones."""
    def cut(tokens):
        parts = []
        for s in ranked:
            if not parts or len(parts[-1][0]) * (len(parts[-1]) + 1) > tokens:
                parts.append([])
            parts[-1].append(s)
        return parts
    ranked = sorted(samples, key=len, reverse=True)
    parts = cut(tokens)
    most = -(-len(parts) // world) * world
    while world > 1 and tokens > 1 and len(finer := cut(tokens := 0.95 * tokens)) <= most:
        parts = finer
    return parts


def tensors(samples, device, share=True):
    """-> dict of input_ids and labels (the completion's tokens; else -100) [B, T], right-padded;
    the sampler's log-probs [n] of the labelled tokens in row-major order; each row's number [B];
    `times`, for how many completions each of the model's tokens stands (0: padding); routes, list
    over MoE layers of the experts of those tokens, or None.

    Where that saves a tenth of the tokens, all of a prompt but its last token is in `prefix` (see
    Transformer.logprobs), once for all its completions, and the rows start there. Without samples:
    one row that weighs nothing (every forward of a sharded model is collective, so ranks run
    equally many)."""
    if not samples:
        return {'input_ids': torch.zeros(1, 2, dtype=torch.int64, device=device),
                'labels': torch.zeros(1, 2, dtype=torch.int64, device=device),
                'times': torch.zeros(2, dtype=torch.int64, device=device),
                'sampled': torch.zeros(2, device=device),
                'number': torch.tensor([-1], device=device), 'routes': None, 'prefix': None}
    different = dict.fromkeys(tuple(s.prompt) for s in samples)
    prompts = {prompt: i for i, prompt in enumerate(different)}
    B, P = len(samples), len(prompts)
    Lp, Lc = max(map(len, prompts)) - 1, max(len(s.tokens) for s in samples)
    whole = B * max(map(len, samples))
    mask_size = B * Lc * (Lp + Lc)
    share = share and P * Lp + B * Lc < 0.9 * whole and mask_size < 2**28
    starts = [len(s.prompt) - 1 if share else 0 for s in samples]
    lengths = [len(s) - start for s, start in zip(samples, starts)]
    T = max(lengths)
    ids, labels = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -100)
    for b, (s, start) in enumerate(zip(samples, starts)):
        # the last token is a label, never an input
        ids[b, :lengths[b]] = torch.tensor((s.prompt + s.tokens)[start:-1])
        labels[b, len(s.prompt) - 1 - start:lengths[b]] = torch.tensor(s.tokens)
    times = (torch.arange(T) < torch.tensor(lengths).unsqueeze(1)).flatten().long()
    prefix = None
    rows = [prompts[tuple(s.prompt)] for s in samples]
    if share:
        sizes = torch.tensor([len(prompt) - 1 for prompt in prompts])
        prefix = torch.zeros(P, Lp, dtype=torch.int64), sizes, torch.tensor(rows)
        for row, prompt in zip(prefix[0], prompts):
            row[:len(prompt) - 1] = torch.tensor(prompt[:-1])
        uses = torch.tensor(rows).bincount(minlength=P).unsqueeze(1)
        times = torch.cat([((torch.arange(Lp) < sizes.unsqueeze(1)) * uses).flatten(), times])
        prefix = tuple(t.to(device) for t in prefix)
    routes = None
    if samples[0].routes is not None:
        # of each prompt those of its first sample
        first = dict(zip(reversed(rows), reversed(samples)))
        taken = [first[i].routes[:len(prompt) - 1] for prompt, i in prompts.items() if share]
        taken += [s.routes[start:] for s, start in zip(samples, starts)]
        routes = torch.zeros(len(times), *taken[0].shape[1:], dtype=torch.int64)
        routes[times > 0] = torch.cat(taken).long()
        routes = list(routes.to(device).unbind(1))
    out = {'input_ids': ids, 'labels': labels, 'times': times,
           'sampled': torch.tensor([p for s in samples for p in s.logprobs]),
           'number': torch.tensor([s.number for s in samples])}
    return {**{name: t.to(device) for name, t in out.items()}, 'routes': routes, 'prefix': prefix}
