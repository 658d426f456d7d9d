"""
Rollouts: problems are drawn, sampled and scored, and the samples become micro-batches for grpo.py.

    problem_order    the endless list of problems, the same on every rank
    collect          groups of scored samples, each rank sampling its share
    micro_batches    samples of about equal length together
    collate          samples as tensors
"""

from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from data.prompts import encode_prompts
from evaluate import score
from sample import Sampler
from train import Unsharded, autocast, expert_counts, total


@dataclass
class Sample:
    """A completion of a prompt, with its score."""
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


# --------------------------------------------------------------------------------------------------
# problems


def problem_order(counts, seed):
    """Endless (file, row) pairs: the files take turns, each goes through its rows in an order drawn
    anew every epoch. counts: rows of each file"""
    def rows(file, count):
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + file * 1009 + epoch)
            for row in torch.randperm(count, generator=generator).tolist():
                yield file, row
            epoch += 1

    streams = [rows(file, count) for file, count in enumerate(counts)]
    while True:
        for stream in streams:
            yield next(stream)


# --------------------------------------------------------------------------------------------------
# groups of samples


def collect(cfg, model, tokenizer, files, order, step, device, rank, world):
    """Samples until there are cfg.prompts groups, the same on every rank.

    files: the rows of each file. order: of problem_order. With dynamic_sampling groups that are
    settled are replaced while attempts last; then the first of them fill up.

    -> groups to train on and all groups that were sampled, each [P][G] of Samples in the order they
    were drawn in; counts as in sample_groups, of all ranks."""
    all_groups = []
    counts = 0
    useless = []             # numbers of the groups that are to be replaced
    for _ in range(1 + cfg.dynamic_sampling):
        # each rank samples its share of the groups that are missing
        useful = len(all_groups) - len(useless)
        places = list(islice(order, cfg.prompts - useful))
        numbers = list(range(len(all_groups), len(all_groups) + len(places)))
        problems = [files[file][row] for file, row in places[rank::world]]
        with Unsharded(model):
            mine, my_counts = sample_groups(
                cfg, model, tokenizer, problems, numbers[rank::world], step, device)
        counts = counts + total(my_counts, device).cpu()

        # every rank gets all of them
        new = in_order(mine, len(places), world)
        for place, group in zip(places, new):
            for s in group:
                s.row = place
        all_groups += new

        if cfg.dynamic_sampling:
            useless += [i for i in numbers if settled(cfg, all_groups[i])]
        missing = cfg.prompts - (len(all_groups) - len(useless))
        if not missing:
            break
    left_out = useless[missing:]     # where useful ones are missing, the first useless ones stay
    groups = [group for i, group in enumerate(all_groups) if i not in left_out]
    return groups, all_groups, counts


def in_order(mine, count, world):
    """Rank r's groups r, r + world, ... -> all `count` groups, on every rank."""
    if world == 1:
        return mine
    shares = [None] * world
    dist.all_gather_object(shares, mine)
    return [shares[i % world][i // world] for i in range(count)]


def sample_groups(cfg, model, tokenizer, problems, numbers, step, device):
    """Samples and scores this rank's problems; numbers: of its groups in the step, for the noise.

    -> groups [P][G] of Samples; counts float64 [2 + MoE layers * E]: tokens that the MTP layer
    drafted, those accepted, and what each expert got of all samples' tokens, their prompts'
    included."""
    layers, experts = moe_shape(model)
    if not problems:
        return [], torch.zeros(2 + layers * experts, dtype=torch.float64)

    # sample
    asked = [{'max_length': cfg.max_new_tokens, **row} for row in problems]
    prompts, rows = encode_prompts(tokenizer, asked, cfg.prefill)
    sampler = Sampler(model, tokenizer.stop_ids, cfg.slots, None, cfg.stop, tokenizer)
    with autocast(cfg, device):
        completions = sampler.generate(
            prompts, cfg.group, cfg.max_new_tokens, cfg.temperature, cfg.top_p,
            cfg.seed * 1_000_003 + step, numbers, top_k=cfg.top_k, min_p=cfg.min_p, routes=True,
            unbiased=not cfg.allow_biased, entropy=True)

    # score
    scored = score(tokenizer, rows, completions, cfg.rewards, cfg.stop)
    groups = []
    for prompt, group, scores in zip(prompts, completions, scored):
        groups.append([sample_of(cfg, prompt, c, s) for c, s in zip(group, scores)])

    # count
    drafts = torch.tensor([sampler.drafted, sampler.accepted])
    load = torch.zeros(layers, experts, dtype=torch.float64)
    if layers:
        for group in completions:
            routes = torch.cat([c.routes for c in group])
            ones = torch.ones(len(routes), dtype=torch.int64)
            by_layer = [(None, chosen) for chosen in routes.unbind(1)]
            load += expert_counts(by_layer, experts, ones)
    return groups, torch.cat([drafts, load.flatten()])


def sample_of(cfg, prompt, completion, graded):
    """sample.Completion and what evaluate.score says of it -> Sample"""
    return Sample(
        prompt=prompt,
        tokens=completion.tokens,
        logprobs=completion.logprobs,
        score={name: value for name, value in graded.items() if name != 'response'},
        routes=completion.routes if cfg.replay_routes else None,
        entropy=completion.entropy,
    )


def flat(groups):
    """Samples, or rows, of all groups, in their order"""
    return [s for group in groups for s in group]


def moe_shape(model):
    """-> MoE layers (that of the MTP not counted), experts of each"""
    layers = model.model.layers[:model.cfg.num_hidden_layers]
    moe = [layer for layer in layers if hasattr(layer.mlp, 'gate')]
    return len(moe), model.cfg.n_routed_experts or 0


def settled(cfg, group):
    """Whether a group of Samples has nothing to choose between: all are equally right by the reward
    of their task ('accuracy' or its own name), or where that is none of the rewards, have equal
    totals. (By totals an `overlong` or `length` beside it would make almost every group vary.)"""
    names = ('accuracy', group[0].score.get('task'))
    weighed = [name for name in names if cfg.rewards.get(name)]
    if weighed:
        values = [s.score['rewards'][weighed[0]] for s in group]
    else:
        values = [s.score['total'] for s in group]
    return alike(torch.tensor([values], dtype=torch.float64), 1).item()


def alike(rewards_PG, dim):
    """-> bool [P, 1] of each group (dim 1) or [1, 1] of all (dim (0, 1)): whether the rewards are
    equal, but for the last digits of a double that the order of a sum decides"""
    highest = rewards_PG.amax(dim, keepdim=True)
    lowest = rewards_PG.amin(dim, keepdim=True)
    return highest - lowest <= 1e-12 * rewards_PG.abs().amax(dim, keepdim=True)


# --------------------------------------------------------------------------------------------------
# micro-batches


def micro_batches(samples, tokens, world):
    """-> lists of samples from the longest to the shortest, each of at most `tokens` tokens with
    its padding (a longer sample is alone). For several ranks the lists are cut finer where that
    gives every rank equally large ones."""
    ranked = sorted(samples, key=len, reverse=True)
    parts = cut(ranked, tokens)
    most = -(-len(parts) // world) * world
    while world > 1 and tokens > 1:
        tokens = 0.95 * tokens
        finer = cut(ranked, tokens)
        if len(finer) > most:
            break
        parts = finer
    return parts


def cut(ranked, tokens):
    """Samples from the longest to the shortest -> lists of at most `tokens` tokens with padding."""
    parts = []
    for s in ranked:
        if not parts or len(parts[-1][0]) * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(s)
    return parts


def collate(samples, device, share=True):
    """Samples -> a micro-batch, a dict of

        input_ids [B, T]      prompt and completion, right-padded; the last token is only a label
        labels [B, T]         the completion's tokens; -100 at the prompt and the padding
        sampler_logp [n]      the sampler's log-probs of the n labelled tokens, in row-major order
        number [B]            each row's place among the samples of the step
        uses [tokens]         for how many completions each of the model's tokens stands; 0: padding
        routes                list over MoE layers of those tokens' experts [tokens, K], or None
        prefix                None, or (ids [P, Lp], lengths [P], rows [B])

    Ids, labels and numbers are int64. The model's tokens are B T, in row-major order. With a prefix
    they are the P Lp of its ids, right-padded, and then the B T: all of a prompt but its last token
    is computed once for all its completions, and row b goes on with prompt rows[b] (see
    Transformer.logprobs). That is chosen where it saves a tenth of the tokens, unless not `share`.

    Without samples: one row that weighs nothing. Every forward of a sharded model is collective, so
    ranks run equally many."""
    if not samples:
        batch = collate_nothing()
    elif share and sharing_saves(samples):
        batch = collate_shared(samples)
    else:
        batch = collate_whole(samples)

    def move(value):
        return value.to(device) if torch.is_tensor(value) else value
    return tree_map(move, batch)


def collate_nothing():
    """A row of two tokens that stand for no completion; its number -1 is that of a weight of 0."""
    return {
        'input_ids': torch.zeros(1, 2, dtype=torch.int64),
        'labels': torch.zeros(1, 2, dtype=torch.int64),
        'sampler_logp': torch.zeros(2),
        'number': torch.tensor([-1]),
        'uses': torch.zeros(2, dtype=torch.int64),
        'routes': None,
        'prefix': None,
    }


def collate_whole(samples):
    """Each row is a whole prompt and its completion, T = the longest of them."""
    B = len(samples)
    T = max(len(s) for s in samples)
    ids_BT = torch.zeros(B, T, dtype=torch.int64)
    labels_BT = torch.full((B, T), -100)
    uses_BT = torch.zeros(B, T, dtype=torch.int64)
    for b, s in enumerate(samples):
        ids_BT[b, :len(s)] = torch.tensor(s.prompt + s.tokens)[:-1]
        labels_BT[b, len(s.prompt) - 1:len(s)] = torch.tensor(s.tokens)
        uses_BT[b, :len(s)] = 1
    uses = uses_BT.flatten()
    logprobs = [logprob for s in samples for logprob in s.logprobs]
    return {
        'input_ids': ids_BT,
        'labels': labels_BT,
        'sampler_logp': torch.tensor(logprobs),
        'number': torch.tensor([s.number for s in samples]),
        'uses': uses,
        'routes': place_routes([s.routes for s in samples], uses),
        'prefix': None,
    }


def collate_shared(samples):
    """Each prompt but its last token is in `prefix`; each row is that token and a completion."""
    prompts = different_prompts(samples)
    P = len(prompts)
    Lp = max(len(prompt) for prompt in prompts) - 1
    place = {prompt: p for p, prompt in enumerate(prompts)}
    prompt_of_row = [place[tuple(s.prompt)] for s in samples]
    lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])
    ids_PL = torch.zeros(P, Lp, dtype=torch.int64)
    for ids, prompt in zip(ids_PL, prompts):
        ids[:len(prompt) - 1] = torch.tensor(prompt[:-1])

    # a prompt's tokens have as many uses as it has rows
    rows_P = torch.tensor(prompt_of_row).bincount()
    is_token_PL = torch.arange(Lp) < lengths.unsqueeze(1)
    uses_PL = torch.where(is_token_PL, rows_P.unsqueeze(1), 0)

    batch = collate_whole([replace(s, prompt=s.prompt[-1:], routes=None) for s in samples])
    batch['prefix'] = ids_PL, lengths, torch.tensor(prompt_of_row)
    batch['uses'] = torch.cat([uses_PL.flatten(), batch['uses']])
    if samples[0].routes is not None:
        # of each prompt those of its first sample
        first = [samples[prompt_of_row.index(p)] for p in range(P)]
        of_prompts = [s.routes[:len(s.prompt) - 1] for s in first]
        of_rows = [s.routes[len(s.prompt) - 1:] for s in samples]
        batch['routes'] = place_routes(of_prompts + of_rows, batch['uses'])
    return batch


def place_routes(routes, uses):
    """The experts [T, MoE layers, K] of each stretch of tokens, or None, and uses [tokens] -> their
    experts where the tokens are, a list over MoE layers of [tokens, K]; or None"""
    if routes[0] is None:
        return None
    chosen = torch.cat(routes).long()
    placed = torch.zeros(len(uses), *chosen.shape[1:], dtype=torch.int64)
    placed[uses > 0] = chosen
    return list(placed.unbind(1))


def sharing_saves(samples):
    """Whether prompts computed once save a tenth of the tokens, and the mask that it needs is not
    too large."""
    prompts = different_prompts(samples)
    B = len(samples)
    longest_prefix = max(len(prompt) for prompt in prompts) - 1
    longest_completion = max(len(s.tokens) for s in samples)
    whole = B * max(len(s) for s in samples)
    shared = len(prompts) * longest_prefix + B * longest_completion
    mask_size = B * longest_completion * (longest_prefix + longest_completion)
    return shared < 0.9 * whole and mask_size < 2**28


def different_prompts(samples):
    """-> tuples of ids, in the order in which they come first"""
    return list(dict.fromkeys(tuple(s.prompt) for s in samples))
