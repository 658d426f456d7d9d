"""
Sampling from the trainer's own weights, and the script that chats and samples prompts.

    python sample.py --checkpoint=out/r1/final --chat=True
    python sample.py --checkpoint=out/r1/final --prompt=" 3 7 8 make =29" --samples=4
    python sample.py --checkpoint=out/r1/final --prompts=out/r1/data/test.jsonl

The sampler serves a queue of (prompt, sample) requests with a fixed number of slots:

    completions = Sampler(model, stop_ids, slots=256).generate(prompts, n=8, max_new_tokens=512, temperature=1.0, seed=1)

A prompt is computed once. Its cache entries are a region that its n samples read together, and each slot has a region of its own
for what it wrote: scores over both go through one softmax, and the prompt's part is one product per prompt for all its samples.
A finished slot takes the next request at once; when the queue is empty the batch shrinks to the rows still running; a step reads
the live length only. MLA caches the latent and the rope key (c + r numbers a token and layer) and decodes absorbed (model.py).

Every sample is a function of (seed, prompt number, sample number) and the weights: the uniform number behind each token is a
hash of (seed, prompt, sample, position), so the batch size, the slots and the other requests change nothing but rounding.

A model with an MTP layer drafts one token with it and verifies two tokens a forward when few rows are left. The token is always
drawn from the model's own distribution with its own noise, and the draft counts only if it is the same: the output is that of
plain decoding, at any temperature.

On a GPU a step is a CUDA graph, captured anew in every call.

S slots, m of them in use, P prompts in use, g rows of one prompt, G key heads (1 for MLA), R query heads for each, T new tokens a row
(1, or 2 to verify a draft), L own tokens. Left out: paged caches (all requests are known at the start), servers, beams.
"""

import os
import shlex
import sys
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# before torch: says so where it is missing
from configurator import ConfigError, at_least, read_file, run, tell_idle

import torch
import torch.nn.functional as F

import hub
import kernels
from data.prompts import encode_prompts, instructed, visible
from data.source import made_by, missing, read_rows
from data.tokenizer import Tokenizer
from kernels import cpu, fused, working_dtype
from kernels.cpu_sampling import onednn_weights
from kernels.mla_decode import mla_decode
from model import Transformer


@dataclass
class Sampling:
    """Settings that sample.py and evaluate.py share."""
    checkpoint: str = 'out/r1/final'       # folder with config.json, *.safetensors and the
                                           # tokenizer, or a hub id
    temperature: float = 1.0               # of the samples
    top_p: float = 1.0                     # nucleus of the samples; 1.0: everything
    top_k: int = 0                         # only the so many most probable tokens; 0: all
    min_p: float = 0.0                     # only tokens of at least this share of the most
                                           # probable one's probability
    max_new_tokens: int = 192              # longest completion, the stop token included
    stop: list[str] = field(default_factory=list)  # texts that end a completion, besides the stop
                                           # tokens
    chat_template: str | None = None       # 'r1_zero' (that of DeepSeek-R1-Zero), a file, or None:
                                           # the tokenizer's own
    template_args: dict = field(default_factory=dict)  # as {'enable_thinking': False}, for the
                                           # template, over those saved with the tokenizer
    instruction: str = ''                  # text added to the end of each problem, for example how
                                           # to mark the answer
    prefill: str = ''                      # text the assistant's turn starts with, for example
                                           # "<think>"
    seed: int = 1                          # of the sampling noise
    slots: int = 256                       # rows decoded at once
    speculate: int | None = None           # most rows for which an MTP layer drafts; None: where it
                                           # pays; 0: never
    threads: int = 2                       # CPU threads
    device: Literal['auto', 'cpu', 'cuda'] = 'auto'  # auto: a GPU if there is one
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the weights
    kernels: Literal['auto', 'triton', 'torch'] = 'auto'  # auto: Triton on a GPU where it is
                                           # installed

    def __post_init__(self):
        at_least(self, 1, 'max_new_tokens', 'slots', 'threads')
        at_least(self, 0, 'temperature', 'top_k', 'min_p')
        if '' in self.stop:
            raise ValueError('stop holds an empty text, which would end every completion at once')


@dataclass
class Config(Sampling):
    chat: bool = False                     # talk to the checkpoint, in the terminal
    prompt: list[str] = field(default_factory=list)  # texts of a user to answer
    prompts: str = ''                      # JSONL file of rows with "prompt" to answer
    samples: int = 1                       # answers to each

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'samples')


# keys of evaluate.py alone, which sampled prompts and chatted once
OF_EVALUATE = (
    'data', 'limit', 'n', 'greedy', 'think_budget', 'think_at_least', 'think_end', 'wait',
    'best_of', 'rewards', 'preference', 'unsafe_code', 'reward_file', 'reward_workers', 'out',
    'summary', 'keep', 'keep_length', 'keep_pass_rate', 'keep_per_prompt', 'keep_rows',
    'long_prompts', 'show', 'plan', 'endpoint', 'remote')


@dataclass
class Completion:
    tokens: list      # ids, the stop token included when there is one
    logprobs: list    # log-probability of each under softmax(logits / temperature) over all tokens
    finished: bool    # True: ended with a stop token or stop string; False: cut at the length limit
    routes: torch.Tensor | None = None  # [prompt + completion - 1, MoE layers, K] int16: the experts of every input token, if asked for
    entropy: float | None = None  # nats of the distributions its tokens were drawn from, summed


class NotFinite(FloatingPointError):
    """A logit was not finite; .completions holds what was finished, None elsewhere."""

    def __init__(self, message, completions):
        super().__init__(message)
        self.completions = completions


# ---------------------------------------------------------------------------------------------------------------------
# the cache


class Region:
    """Cache entries of `layers` layers for `rows` sequences of up to `length` tokens: of each layer keys and values [rows, length, G d], or
    MLA's latent [rows, length, c + r], which is key and in part value."""

    def __init__(self, cfg, layers, rows, length, dtype, device):
        self.cfg, self.rows, self.length = cfg, rows, length
        widths = [cfg.cache_width] if cfg.mla else [cfg.cache_width // 2] * 2
        self.layers = [[torch.zeros(rows, length, width, dtype=dtype, device=device) for width in widths] for _ in range(layers)]

    def put(self, layer, index, entry):
        """entry: as `Transformer.prefill` and the attention layers make it, at [rows, length][index]"""
        for place, part in zip(self.layers[layer], entry):
            place[index] = part.to(place.dtype)

    def read(self, layer, rows, length):
        """-> keys [rows, length, K], values [rows, length, V]"""
        k, v = self.layers[layer][0], self.layers[layer][-1]
        return k[:rows, :length], v[:rows, :length, :self.cfg.kv_lora_rank if self.cfg.mla else None]

    def move(self, to, source, length):
        for parts in self.layers:
            for place in parts:
                place[to, :length] = place[source, :length]


class Groups:
    """Which rows read which prompt. rows [P g]: the rows of prompt 0, then of prompt 1, ..., filled up with row 0; place [m]: where
    each row went; both None when the rows lie so already. bias [m, 1, 1, Lp]: 0, or -inf past the end of the row's prompt. For the kernel:
    ends [P] the prompts' lengths, order [m] the rows by prompt, prompt [m] that of each then, inverse [m], most: rows of one prompt at most."""

    def __init__(self, prefix, by_prompt, lengths, m, device, rounded):
        """by_prompt: {prompt slot: its rows}; lengths: {prompt slot: tokens}; rounded: sizes that graphs are captured for"""
        self.P, self.g, self.m = min(prefix.rows, rounded(max(by_prompt) + 1)), rounded(max(map(len, by_prompt.values()))), m
        self.Lp = min(prefix.length, rounded(max(lengths[p] for p in by_prompt)))
        rows, place = [0] * (self.P * self.g), [0] * m
        for p, mine in by_prompt.items():
            for i, row in enumerate(mine):
                rows[p * self.g + i], place[row] = row, p * self.g + i
        in_place = len(rows) == m and rows == list(range(m))
        self.rows, self.place = (None, None) if in_place else (torch.tensor(rows, device=device), torch.tensor(place, device=device))
        self.ends = torch.tensor([lengths.get(p, 1) if p in by_prompt else 1 for p in range(self.P)], device=device)
        reads = [row % self.P for row in range(m)]                     # rows without a request read any prompt
        for p, mine in by_prompt.items():
            for row in mine:
                reads[row] = p
        self.most = rounded(max(Counter(reads).values()))
        reads = torch.tensor(reads, device=device)
        hide = torch.arange(self.Lp, device=device) >= self.ends[reads, None, None, None]
        self.bias = torch.zeros(hide.shape, device=device).masked_fill_(hide, float('-inf'))
        self.prompt, self.order = reads.sort(stable=True)
        self.inverse = self.order.argsort()

    def key(self):
        return self.P, self.g, self.Lp, self.m, self.most, self.rows is None

    def copy_(self, other):
        """The numbers of `other`, whose key is the same, for a captured graph that reads these tensors."""
        for name, mine in vars(self).items():
            if torch.is_tensor(mine):
                mine.copy_(getattr(other, name))

    def gather(self, t):
        """[m, X, D] -> [P, g X, D]"""
        t = t if self.rows is None else t.index_select(0, self.rows)
        return t.reshape(self.P, -1, t.shape[-1])

    def scatter(self, t):
        """[P, g X, D] -> [m, X, D]"""
        t = t.view(self.P * self.g, -1, t.shape[-1])
        return t if self.place is None else t.index_select(0, self.place)


class Cache:
    """What `Transformer.decode` attends to: each row's own region, and the prompts' if there are any."""

    def __init__(self, own, prefix=None):
        self.own, self.prefix, self.groups = own, prefix, None
        self.G = 1 if own.cfg.mla else own.cfg.num_key_value_heads
        self.R = own.cfg.num_attention_heads // self.G

    def begin(self, at_mT, length, dtype):
        """The next forward writes at `at` of each row's own region and reads its first `length` entries, up to and with `at`."""
        (m, T), device = at_mT.shape, at_mT.device
        self.m, self.length, self.at = m, length, at_mT
        self.place = (at_mT + torch.arange(0, m * self.own.length, self.own.length, device=device).unsqueeze(1)).flatten()
        self.kernel = self.own.cfg.mla and fused(at_mT)
        if self.kernel:
            return
        hide = torch.arange(length, device=device) > at_mT.unsqueeze(-1)
        self.bias = torch.zeros(m, T, 1, length, device=device).masked_fill_(hide.unsqueeze(2), float('-inf'))
        if self.prefix is not None:
            self.bias = torch.cat([self.groups.bias.expand(-1, T, -1, -1), self.bias], -1)
        self.zero = torch.zeros((), dtype=dtype, device=device)
        if self.G > 1:
            self.wide = torch.zeros(m, T, self.G, self.R, self.G, self.own.cfg.head_dim, dtype=dtype, device=device)

    def widen(self, q):
        """q [m, T, H, D] -> [m, T H, G D], zeros beside each query but at its own key head: one product serves all heads"""
        if self.G == 1:
            return q.flatten(1, 2)
        self.wide.diagonal(dim1=2, dim2=4).copy_(q.unflatten(2, (self.G, self.R)).permute(0, 1, 3, 4, 2))
        return self.wide.flatten(4).flatten(1, 3)

    def narrow(self, o, T):
        """o [m, T H, G D] -> [m, T, H, D], of each query what its own value head gave"""
        o = o.view(self.m, T, self.G, self.R, self.G, -1)
        return o.squeeze(4).flatten(2, 3) if self.G == 1 else o.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3).flatten(2, 3)

    def scores(self, a, b, scale):
        """scale * a b; of bf16 in float32 on a GPU, as the trainer's kernels have them"""
        if a.is_cuda and a.dtype == torch.bfloat16:
            return torch.bmm(a, b, out_dtype=torch.float32).mul_(scale)
        return torch.baddbmm(self.zero, a, b, beta=0, alpha=scale)

    def attend(self, layer, q, entry, scale):
        """q [m, T, H, D], entry of the m T new tokens, parts [m, T, ·] -> o [m, T, H, Dv]. One softmax over prompt and own tokens."""
        (m, T, H, _), own = q.shape, self.own.layers[layer]
        for place, part in zip(own, entry):
            place.view(-1, place.shape[2]).index_copy_(0, self.place, part.flatten(0, 1).to(place.dtype))
        q = q.to(own[0].dtype)
        if self.kernel:
            seen, latent, c = self.at[:, 0] + 1, own[0], self.own.cfg.kv_lora_rank
            if self.prefix is None:
                return mla_decode(q, latent[:m], seen, scale, c)
            g, prefix = self.groups, self.prefix.layers[layer][0]
            o = mla_decode(q.index_select(0, g.order), latent[:m], seen.index_select(0, g.order), scale, c, prefix[:g.P], g.ends,
                           g.prompt, g.most, g.order)
            return o.index_select(0, g.inverse)
        q, g, (k, v) = self.widen(q), self.groups, self.own.read(layer, m, self.length)
        scores = self.scores(k, q.mT, scale).mT      # with few queries a key faster this way round
        if self.prefix is not None:
            pk, pv = self.prefix.read(layer, g.P, g.Lp)
            before = self.scores(g.gather(q), pk.mT, scale)
            scores = torch.cat([g.scatter(before), scores], -1)
        p = scores.unflatten(1, (T, H)).add_(self.bias).softmax(-1, dtype=torch.float32).to(q.dtype).flatten(1, 2)
        if self.prefix is None:
            return self.narrow(torch.bmm(p, v), T)
        return self.narrow(torch.baddbmm(g.scatter(torch.bmm(g.gather(p[..., :g.Lp]), pv)), p[..., g.Lp:], v), T)


# ---------------------------------------------------------------------------------------------------------------------
# drawing a token


def pick(logits_SV, u_S, temperature, top_p=1.0, top_k=0, min_p=0.0, entropy=False):
    """Sample by inverting the cumulative distribution at the numbers u -> tokens [S], their
    log-probs [S] and, if asked for, the entropy [S], both before any filter.
    temperature 0: the most probable token, with its log-prob at temperature 1. Filters: the top_k largest, of these those of at
    least min_p times the largest, of these the fewest whose share reaches top_p."""
    p = (logits_SV if temperature in (0, 1) else logits_SV / temperature).softmax(dim=-1)
    if temperature == 0:
        x = largest(logits_SV)
    else:
        allowed = p
        if top_k and top_k < p.shape[1]:
            allowed = torch.where(p >= p.topk(top_k, dim=-1).values[:, -1:], p, 0.0)
        if min_p > 0:
            allowed = torch.where(p >= min_p * p.amax(dim=-1, keepdim=True), allowed, 0.0)
        if top_p < 1:
            ranked, order = allowed.sort(dim=-1, descending=True)
            inside = ranked.cumsum(-1) - ranked < top_p * ranked.sum(-1, keepdim=True)
            allowed = torch.zeros_like(p).scatter_(1, order, ranked * inside)
        x = invert(allowed, u_S)
    logp = p.gather(1, x.unsqueeze(1)).squeeze(1).log()
    return (x, logp, torch.special.entr(p).sum(-1)) if entropy else (x, logp)


def largest(z_SV, width=64):
    """-> argmax: blocks of tokens first, then inside the block, because maxima are found ten times faster than their places."""
    blocks = F.pad(z_SV, (0, -z_SV.shape[1] % width), value=float('-inf')).view(len(z_SV), -1, width)
    b = blocks.amax(-1).argmax(-1, keepdim=True)
    i = blocks.gather(1, b.unsqueeze(-1).expand(-1, 1, width)).squeeze(1).argmax(-1)
    return b.squeeze(1) * width + i


def invert(p_SV, u_S, width=64):
    """-> the first token at which the cumulative sum of p exceeds u times its total; blocks of tokens first, then inside the block,
    because a cumulative sum in double over a whole vocabulary is slow."""
    S, V = p_SV.shape
    blocks = F.pad(p_SV, (0, -V % width)).view(S, -1, width)
    cdf = blocks.sum(-1).double().cumsum(-1)
    target = u_S.unsqueeze(1) * cdf[:, -1:]
    b = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1)
    target = target - F.pad(cdf, (1, 0)).gather(1, b)
    first = torch.arange(0, blocks.shape[0] * blocks.shape[1], blocks.shape[1], device=b.device)
    cdf = blocks.flatten(0, 1).index_select(0, first + b.squeeze(1)).double().cumsum(-1)
    i = torch.searchsorted(cdf, target, right=True).squeeze(1)
    i = torch.minimum(i, (cdf < cdf[:, -1:]).sum(-1))          # rounding never leads past the last token of positive probability
    return b.squeeze(1) * width + i


def mix(h, key):
    """One round of splitmix64's mixer on int64 tensors; constants 0x9E37.., 0xBF58.., 0x94D0.. as signed numbers."""
    h = (h ^ key) - 0x61C8864680B583EB
    h = (h ^ shift(h, 30)) * -0x40A7B892E31B1A47
    h = (h ^ shift(h, 27)) * -0x6B2FB644ECCEEE15
    return h ^ shift(h, 31)


def shift(z, bits):
    """z >> bits, logical, not arithmetic"""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seed, *keys_S):
    """An integer and int64 tensors -> float64 in [0, 1): a hash of all."""
    h = mix(torch.full_like(keys_S[0], seed), 0)
    for key in keys_S:
        h = mix(h, key)
    return shift(h, 11).double() / 2**53


# ---------------------------------------------------------------------------------------------------------------------
# the engine


class Sampler:
    """model: a Transformer. stop_ids: tokens that end a completion; stop_strings: texts that do (needs `tokenizer`). slots: rows
    decoded at once. check_every: steps between looks at what has finished. speculate: most rows for which an MTP layer drafts
    (None: what pays on this device; 0: never). drafted and accepted count the drafts of all its
    calls."""

    def __init__(self, model, stop_ids=(), slots=256, check_every=None, stop_strings=(), tokenizer=None, speculate=None):
        self.model, self.slots, self.tokenizer = model, slots, tokenizer
        self.device = model.head_weight.device
        self.check_every = check_every or (4 if self.device.type == 'cpu' else 32)
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=self.device)
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        self.speculate = (4 if self.device.type == 'cpu' else 16) if speculate is None else speculate
        self.speculate *= bool(model.cfg.num_nextn_predict_layers)
        self.drafted = self.accepted = 0

    @torch.no_grad()
    def generate(self, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, seed=0, keys=None, on_token=None, progress=None,
                 top_k=0, min_p=0.0, routes=False, unbiased=False, on_done=None, entropy=False):
        """prompts: lists of token ids -> for each prompt a list of n Completions.

        max_new_tokens: an integer, or one for each prompt, or n for each prompt. temperature 0 is greedy (its log-probs are those of
        temperature 1). keys: a number for each prompt that its noise is drawn from (default: its place), so that a prompt's samples do not depend
        on which rank or call draws them. routes: return every token's experts; entropy: that of
        the distributions. unbiased: refuse top_p, top_k and min_p, which
        change the distribution that the log-probs are of. on_token(prompt, sample, token) is called as tokens appear,
        on_done(prompt, sample, completion) as completions do. ValueError: an empty prompt, one that leaves no room, slots that do
        not fit in memory; NotFinite: a logit that is not finite, naming the request."""
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        limits = [[limit] * n if isinstance(limit, int) else list(limit) for limit in limits]
        self.check(prompts, n, limits, temperature, top_p, top_k, min_p, unbiased)
        how = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, entropy=entropy)
        results = [[None] * n for _ in prompts]
        rows = min(self.slots, len(prompts) * n)
        with onednn_weights(self.model, rows, free_memory(self.device)):
            run = Run(self, prompts, min(self.slots, len(prompts) * n), limits, seed, keys, routes, how, results)
            queue = deque((p, s) for p in range(len(prompts)) for s in range(n))
            while run.m or queue:
                run.fill(queue)
                run.advance(self.check_every, speculating := self.speculating(run, queue))
                run.harvest(on_token, on_done, progress.update if progress is not None else None)
                if not queue:
                    run.shrink()
                run.forget(queue)
                if not speculating:
                    run.mtp = None
        self.drafted, self.accepted = self.drafted + run.drafted, self.accepted + run.accepted
        return results

    def speculating(self, run, queue):
        """Drafts cost a forward of the MTP layer: only where a second token is nearly free, and only while enough are accepted."""
        useful = run.drafted < 64 or run.accepted > 0.5 * run.drafted   # a verified step costs 1.2 to 1.5 plain ones
        return not queue and 0 < run.m <= self.speculate and useful

    def check(self, prompts, n, limits, temperature, top_p, top_k, min_p, unbiased):
        context = self.model.cfg.max_position_embeddings
        for i, (prompt, limit) in enumerate(zip(prompts, map(max, limits))):
            if not 1 <= len(prompt) <= context - limit:
                raise ValueError(f'prompt {i} has {len(prompt)} tokens; with max_new_tokens={limit} the context of '
                                 f'{context} leaves room for 1 to {context - limit}')
        every = [limit for some in limits for limit in some]
        if not prompts or n < 1 or len(limits) != len(prompts) or len(every) != n * len(prompts) or min(every) < 1 \
                or temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or not 0 <= min_p <= 1:
            raise ValueError(f'nothing to sample: {len(prompts)} prompts, n={n}, {len(every)} limits from {min(every, default=None)} '
                             f'(one for each; >= 1), temperature={temperature} (>= 0), top_p={top_p} (0 < top_p <= 1), '
                             f'top_k={top_k} (>= 0), min_p={min_p} (0 to 1)')
        if unbiased and (top_p < 1 or top_k or min_p):
            raise ValueError(f'top_p={top_p}, top_k={top_k}, min_p={min_p} change the distribution that is sampled but not the '
                             'log-probs, which biases the ratio of a policy gradient; use 1.0, 0 and 0.0 or allow it explicitly')
        if self.stop_strings and self.tokenizer is None:
            raise ValueError('stop strings need the tokenizer: Sampler(..., tokenizer=...)')
        self.plan(prompts, n, max(every))

    def plan(self, prompts, n, limit):
        """ValueError if caches and logits of all slots do not fit into the memory that is free, naming the slots that would."""
        cfg, size, free = self.model.cfg, working_dtype(self.model.head_weight).itemsize, free_memory(self.device)
        longest, token = max(map(len, prompts)), cfg.cache_width * cfg.num_hidden_layers * size
        prefix = min(len(prompts), self.slots + 1) * longest * token
        slot = limit * (token + 12) + 16 * cfg.vocab_size
        if cfg.num_nextn_predict_layers and self.speculate:
            prefix += self.speculate * (longest + limit) * cfg.cache_width * size
        need = min(self.slots, len(prompts) * n) * slot + prefix
        if free is not None and need > free:
            fit = max(0, int((free - min(prefix, free)) // slot))
            raise ValueError(f'{min(self.slots, len(prompts) * n)} slots need {need / 2**30:.3g} GiB for {limit} new tokens each and '
                             f'{free / 2**30:.3g} GiB are free; slots={fit} fit' + ('' if fit else ': shorten max_new_tokens or the prompts'))


def free_memory(device):
    """-> bytes, or None where the system does not say"""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if os.path.exists('/proc/meminfo'):
        with open('/proc/meminfo') as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith('MemAvailable')), None)


def bucket(n):
    """n, rounded up to three binary digits: 1 .. 8, 10, 12, 14, 16, 20, ..."""
    unit = 1 << max(0, n.bit_length() - 3)
    return -(-n // unit) * unit


class Run:
    """The slots of one `generate`: caches, what each slot holds, and the CUDA graphs of its steps.
    A slot's `cur` is its newest token, not yet fed; `made` counts its tokens; rows that are done go on computing and write to a spare
    column."""

    def __init__(self, sampler, prompts, slots, limits, seed, keys, routes, how, results):
        self.sampler, self.model, self.device, self.how = sampler, sampler.model, sampler.device, how
        self.prompts, self.limits, self.cfg = prompts, limits, sampler.model.cfg
        cfg, device = self.cfg, self.device
        self.dtype = working_dtype(self.model.head_weight)
        self.S, self.L, self.longest_prompt = slots, max(map(max, limits)), max(map(len, prompts))
        P = min(len(prompts), self.S + 1)
        self.prefix = Region(cfg, cfg.num_hidden_layers, P, self.longest_prompt, self.dtype, device)
        self.cache = Cache(Region(cfg, cfg.num_hidden_layers, self.S, self.L, self.dtype, device), self.prefix)
        self.cur, self.start, self.made, self.cap, self.noise = torch.zeros(5, self.S, dtype=torch.int64, device=device).unbind()
        self.done, self.bad = torch.ones(self.S, dtype=torch.bool, device=device), torch.zeros(self.S, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(self.S, self.L + 1, dtype=torch.int64, device=device)
        self.logps = torch.zeros(self.S, self.L + 1, device=device)
        self.entropies = torch.zeros_like(self.logps) if how['entropy'] else None
        moe = [layer for layer in self.model.model.layers[:cfg.num_hidden_layers] if hasattr(layer.mlp, 'gate')]
        self.routes = torch.zeros(self.S, self.L + 1, len(moe), cfg.num_experts_per_tok, dtype=torch.int16, device=device) \
            if routes and moe else None
        self.state = [t for t in (self.cur, self.start, self.made, self.cap, self.noise, self.done, self.bad, self.tokens, self.logps,
                                  self.entropies, self.routes) if t is not None]
        keys = torch.tensor(range(len(prompts)) if keys is None else keys, dtype=torch.int64)
        self.seeds = mix(mix(torch.full_like(keys, seed), 0), keys)                    # of each prompt
        # on the host
        self.m, self.longest = 0, 0                     # rows in use, most tokens of any of them
        self.request = [None] * self.S                  # (prompt, sample) of each slot
        self.held = {}                                  # prompt -> (its slot in the prefix region, logits after it, its routes)
        self.free = list(range(P))[::-1]
        self.told, self.results = {}, results
        self.drafted = self.accepted = 0
        self.mtp, self.graphs, self.fresh_groups = None, {}, True

    # ---- requests in and out

    def fill(self, queue):
        """Free slots take requests, whose first token comes from the prompt's logits."""
        slots = [i for i in range(self.m) if self.request[i] is None] + list(range(self.m, self.S))
        taken = [(slot, *queue.popleft()) for slot in slots[:len(queue)]]
        if not taken:
            return
        self.prefill(list(dict.fromkeys(p for _, p, _ in taken if p not in self.held)))
        slot, p, s = (torch.tensor(column) for column in zip(*taken))
        noise, slot = mix(self.seeds[p], s).to(self.device), slot.to(self.device)
        self.noise[slot], self.made[slot], self.done[slot], self.bad[slot] = noise, 0, False, False
        self.start[slot] = torch.tensor([len(self.prompts[p]) for _, p, _ in taken], device=self.device)
        self.cap[slot] = torch.tensor([self.limits[p][s] for _, p, s in taken], device=self.device)
        for row, p, s in taken:
            self.request[row], self.told[row] = (p, s), 0
        self.m = max(self.m, 1 + max(row for row, _, _ in taken))
        drawn = self.draw(torch.stack([self.held[p][1] for _, p, _ in taken]), noise, 0)
        self.note(slot, torch.ones_like(slot, dtype=torch.bool), *drawn)
        self.longest, self.fresh_groups = max(self.longest, 1), True

    def prefill(self, numbers, at_once=8192):
        """Prompts into the prefix region, about `at_once` tokens a forward."""
        while numbers:
            T, count = 0, 0
            while count < len(numbers) and (not count or (count + 1) * max(T, len(self.prompts[numbers[count]])) <= at_once):
                T, count = max(T, len(self.prompts[numbers[count]])), count + 1
            some, numbers = numbers[:count], numbers[count:]
            ids = torch.tensor([self.prompts[p] + [0] * (T - len(self.prompts[p])) for p in some], device=self.device)
            last = torch.tensor([len(self.prompts[p]) - 1 for p in some], device=self.device)
            routes = [] if self.routes is not None else None
            logits, entries = self.model.prefill(ids, last, routes)
            slots = torch.tensor([self.free.pop() for _ in some], device=self.device)
            for layer, entry in enumerate(entries):
                self.prefix.put(layer, (slots.unsqueeze(1), torch.arange(T, device=self.device)), entry)
            routes = torch.stack([chosen.view(len(some), T, -1) for _, chosen in routes], 2).short() if routes else [None] * len(some)
            for p, slot, logit, route in zip(some, slots.tolist(), logits, routes):
                self.held[p] = slot, logit, None if route is None else route[:len(self.prompts[p])]

    def forget(self, queue):
        """Prompts that no slot reads and no request waits for; when nothing waits, the others close the gaps."""
        needed = {r[0] for r in self.request if r is not None} | ({queue[0][0]} if queue else set())
        for p in [p for p in self.held if p not in needed]:
            self.free.append(self.held.pop(p)[0])
        if not queue:
            gaps = sorted(slot for slot in self.free if slot < len(self.held))
            high = [p for p in self.held if self.held[p][0] >= len(self.held)]
            for p, gap in zip(high, gaps):
                self.prefix.move(gap, self.held[p][0], len(self.prompts[p]))
                self.held[p] = gap, *self.held[p][1:]
            self.free = [slot for slot in range(self.prefix.rows) if slot not in {v[0] for v in self.held.values()}]

    def harvest(self, on_token, on_done, progress):
        """Completions of the slots that are done; frees them."""
        made, done, bad = torch.stack([self.made[:self.m], self.done[:self.m], self.bad[:self.m]]).tolist()
        active = [i for i in range(self.m) if self.request[i] is not None and not bad[i]]
        ended, cut = [i for i in active if done[i]], {}
        if self.sampler.stop_strings or on_token:
            for i in active:
                ids = self.tokens[i, :made[i]].tolist()
                stop = self.stop_string(ids, self.told[i])
                if stop:
                    ids, cut[i], made[i] = ids[:stop], stop, stop
                    ended += [] if done[i] else [i]
                for token in ids[self.told[i]:] if on_token else ():
                    on_token(*self.request[i], token)
                self.told[i] = len(ids)
        if ended:
            rows = torch.tensor(ended, device=self.device)
            top = max(made[i] for i in ended)
            tokens, logps = self.tokens[rows, :top].tolist(), self.logps[rows, :top].tolist()
            sums = None
            if self.entropies is not None:
                sums = self.entropies[rows, :top].double().cumsum(1).tolist()
            stops, self.done[rows], self.fresh_groups = set(self.sampler.stop_ids.tolist()), True, True
            for k, (i, ids, logp) in enumerate(zip(ended, tokens, logps)):
                (p, s), count = self.request[i], made[i]
                route = None
                if self.routes is not None:
                    route = torch.cat([self.held[p][2], self.routes[i, :count - 1]]).cpu()
                c = Completion(ids[:count], logp[:count], i in cut or ids[count - 1] in stops,
                               route, sums and sums[k][count - 1])
                self.results[p][s], self.request[i] = c, None
                if on_done:
                    on_done(p, s, c)
                if progress:
                    progress()
        if any(bad):
            p, s = self.request[bad.index(1)]
            complete = sum(c is not None for r in self.results for c in r)
            raise NotFinite(f'logits of prompt {p}, sample {s} are not finite; the weights are damaged or training diverged '
                            f'({complete} samples were complete)', self.results)
        self.longest = max((made[i] for i in range(self.m) if self.request[i] is not None), default=0)

    def stop_string(self, ids, seen):
        """-> how many tokens it takes to complete the first stop string among the tokens from `seen` on, or None"""
        strings, decode = self.sampler.stop_strings, self.sampler.tokenizer.decode if self.sampler.stop_strings else None
        if not strings or len(ids) == seen:
            return None
        begin = max(0, seen - max(len(s.encode()) for s in strings))        # a token that is text has at least one byte
        if any(s in decode(ids[begin:]) for s in strings):
            for end in range(seen + 1, len(ids) + 1):
                if any(s in decode(ids[begin:end]) for s in strings):
                    return end

    def shrink(self):
        """Nothing waits: the last running rows move into the places of finished ones."""
        live = [i for i in range(self.m) if self.request[i] is not None]
        m = self.rounded(len(live))
        if (self.m - m) * 8 < self.m:
            return
        gaps, moved = [i for i in range(m) if self.request[i] is None], [i for i in live if i >= m]
        if moved:
            to, source = (torch.tensor(x, device=self.device) for x in (gaps[:len(moved)], moved))
            self.cache.own.move(to, source, self.longest)
            for t in self.state + ([self.draft] if self.mtp else []):
                t[to] = t[source]
            if self.mtp:
                self.mtp.own.move(to, source, self.mtp.own.length)
            for a, b in zip(gaps, moved):
                self.request[a], self.request[b], self.told[a] = self.request[b], None, self.told[b]
        self.m, self.fresh_groups = m, True

    def rounded(self, n):
        """Sizes that a CUDA graph is captured for: at most a quarter more than n. On CPU n itself."""
        return n if self.device.type == 'cpu' else bucket(n)

    # ---- steps

    def draw(self, logits, noise, made):
        """logits [rows, V], those of ids without a token become -inf -> as `pick`"""
        if self.model.absent is not None:
            logits.index_fill_(1, self.model.absent, float('-inf'))
        u = shift(mix(noise, made), 11).double() / 2**53 if self.how['temperature'] else None
        return pick(logits, u, **self.how)

    def note(self, rows, live, x, logp, *H):
        """Token x of the rows (a tensor, or the slice of all in use) where `live`: the others write to the spare column. Sets made, done and cur."""
        made = self.made[rows]
        at = torch.where(live, made, self.L)
        place = torch.arange(self.m, device=self.device) if isinstance(rows, slice) else rows
        self.tokens[place, at], self.logps[place, at] = x, logp
        if self.entropies is not None:
            self.entropies[place, at] = H[0]
        self.cur[rows] = torch.where(live, x, self.cur[rows])
        made = made + live
        done = made >= self.cap[rows]
        if len(self.sampler.stop_ids):
            done |= (x.unsqueeze(1) == self.sampler.stop_ids).any(1)
        self.made[rows] = made
        self.done[rows] |= done & live
        self.bad[rows] |= ~torch.isfinite(logp) & live

    def forward(self, ids_mT, at_mT, length):
        """-> hidden states [m, T, C] of tokens at `at` of their rows' own regions"""
        routes = [] if self.routes is not None else None
        self.cache.begin(at_mT, length, self.dtype)
        h = self.model.decode(ids_mT, self.start[:self.m, None] + at_mT, self.cache, routes)
        if routes:
            self.routes[torch.arange(self.m, device=self.device)[:, None], at_mT] = \
                torch.stack([chosen.view(*ids_mT.shape, -1) for _, chosen in routes], 2).short()
        return h

    def step(self, length):
        made = self.made[:self.m].clone()
        h = self.forward(self.cur[:self.m, None], made[:, None] - 1, length)
        drawn = self.draw(self.model.logits(h[:, 0]), self.noise[:self.m], made)
        self.note(slice(0, self.m), ~self.done[:self.m], *drawn)

    def verify(self, length):
        """Feeds the newest token and the draft after it. The token after the newest is drawn as ever; if it is the draft, the
        second position's is good as well. Then the MTP layer drafts again, with the noise that the drafted token will meet."""
        m, noise = self.m, self.noise[:self.m]
        rows, made, live = slice(0, m), self.made[:m].clone(), ~self.done[:m]
        at = torch.stack([made - 1, made.clamp(max=self.L - 1)], 1)
        h = self.forward(torch.stack([self.cur[:m], self.draft[:m]], 1), at, length)
        logits = self.model.logits(h)
        x, *drawn = self.draw(logits[:, 0], noise, made)
        self.note(rows, live, x, *drawn)
        hit = live & (x == self.draft[:m]) & ~self.done[:m]
        self.counts += torch.stack([live.sum(), (live & (x == self.draft[:m])).sum()])
        y, *drawn = self.draw(logits[:, 1], noise, made + 1)
        self.note(rows, hit, y, *drawn)
        self.propose(h, torch.stack([x, y], 1), self.start[:m, None] + at, hit.long(), self.longest_prompt + length)

    def propose(self, h, next_ids, positions, last, length):
        """MTP layer on the newest hidden states and the tokens after them -> drafts, from the `last` of each row."""
        self.mtp.begin(positions, length, self.dtype)
        h = self.model.mtp_decode(h, next_ids, positions, self.mtp)
        logits = self.model.logits(h[torch.arange(self.m, device=self.device), last])
        self.draft[:self.m] = self.draw(logits, self.noise[:self.m], self.made[:self.m])[0]

    def start_speculating(self):
        """The MTP layer has its own cache over prompt and completion: one forward of the few rows that are left fills it."""
        m, made = self.m, self.made[:self.m].tolist()
        rows = [self.prompts[r[0]] + self.tokens[i, :made[i]].tolist() if (r := self.request[i]) else [0, 0] for i in range(m)]
        T = max(map(len, rows)) - 1
        ids = torch.tensor([row + [0] * (T + 1 - len(row)) for row in rows], device=self.device)
        self.mtp = Cache(Region(self.cfg, 1, m, self.longest_prompt + self.L, self.dtype, self.device))
        self.draft, self.counts = (torch.zeros(size, dtype=torch.int64, device=self.device) for size in (m, 2))
        last = torch.tensor([len(row) - 2 for row in rows], device=self.device)
        logits, entry = self.model.mtp_prefill(ids, last)
        places = torch.arange(m, device=self.device)[:, None], torch.arange(T, device=self.device)
        self.mtp.own.put(0, places, entry)
        self.draft[:] = self.draw(logits, self.noise[:m], self.made[:m])[0]

    def advance(self, count, speculating):
        """`count` steps of all rows without looking at what is done (on CPU: until all are)."""
        if self.fresh_groups:
            self.m = min(self.S, self.rounded(self.m))
            by_prompt = {}
            for row in range(self.m):
                if self.request[row] is not None:
                    by_prompt.setdefault(self.held[self.request[row][0]][0], []).append(row)
            lengths = {slot: len(self.prompts[p]) for p, (slot, *_) in self.held.items()}
            self.cache.groups = Groups(self.prefix, by_prompt, lengths, self.m, self.device, self.rounded)
            self.fresh_groups = False
        if speculating and self.mtp is None:
            self.start_speculating()
        step = self.verify if speculating else self.step
        length = min(self.L, self.rounded(self.longest + count * (1 + speculating)))
        if self.device.type == 'cuda':
            self.replay(step, length, count)
        else:
            with torch.inference_mode():      # an operation costs less; nothing made in here is kept
                for _ in range(count):
                    if self.done[:self.m].all():
                        break
                    step(length)
        if speculating:
            drafted, accepted = self.counts.tolist()
            self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
            self.counts.zero_()

    def replay(self, step, length, count):
        """Steps as a CUDA graph, captured after one eager step for each bucket of sizes. Graphs hold the addresses of the weights and
        die with this run, so that updated or newly gathered weights are never missed."""
        key = step.__name__, length, self.cache.groups.key(), id(self.mtp)
        if self.graphs is None or count == 1:
            return [step(length) for _ in range(count)]
        if key not in self.graphs:
            step(length)
            count -= 1
            graph, pool = torch.cuda.CUDAGraph(), next((g.pool() for g, _ in self.graphs.values()), None)
            try:
                with torch.cuda.graph(graph, pool=pool):
                    step(length)
            except RuntimeError as error:
                warnings.warn(f'the decode step cannot be captured as a CUDA graph and runs eagerly: {error}')
                self.graphs = None
                return [step(length) for _ in range(count)]
            self.graphs[key] = graph, self.cache.groups
        graph, groups = self.graphs[key]
        if groups is not self.cache.groups:
            groups.copy_(self.cache.groups)
        for _ in range(count):
            graph.replay()


# --------------------------------------------------------------------------------------------------
# the script


def until_stop(text, stop):
    """The text up to the end of the first of the texts `stop` in it: the token that completes one
    may hold more."""
    ends = [text.index(s) + len(s) for s in stop if s in text]
    return text[:min(ends)] if ends else text


def present(cfg, *keys):
    """FileNotFoundError where one of the keys names a folder that is not there, unless it may be
    that of a model of the hub"""
    for source, key in ((getattr(cfg, key), key) for key in keys):
        if not source or Path(source).is_dir():
            continue
        if Path(source).exists():
            raise FileNotFoundError(f'{source} is no folder: set {key} to the folder it is in')
        if made_by(source):
            raise missing(source, key)
        if not hub.ID.fullmatch(source):
            raise missing(source, f'{key} to a folder or a hub id, owner/name')


def device_of(cfg):
    """-> cfg.device, or what 'auto' stands for here"""
    if cfg.device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('device=cuda, but PyTorch sees no GPU')
    if cfg.device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    return cfg.device


def use_device(cfg):
    """-> device, for which threads, memory and kernels are set"""
    torch.set_num_threads(cfg.threads)
    cpu.keep_memory()
    kernels.use(cfg.kernels)
    device = device_of(cfg)
    if device == 'cuda':    # which 'cuda' then means; Triton and graphs take the current one
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    return device


def load(cfg, tokenizer, device):
    model = Transformer.from_pretrained(cfg.checkpoint, getattr(torch, cfg.dtype), device).eval()
    tokenizer.check_model(model.cfg.vocab_size, f'tokenizer and model in {cfg.checkpoint}')
    model.use_tokens(tokenizer)
    return model


def chat_settings(cfg, generation):
    """What is sampled with: what was set, else what the checkpoint's generation_config.json
    recommends, else the defaults."""
    names = ('temperature', 'top_p', 'top_k', 'min_p', 'max_new_tokens')
    theirs = {}
    if generation.get('do_sample') is False:
        theirs['temperature'] = 0.0
    else:
        for name in names[:-1]:
            if generation.get(name) is not None:
                theirs[name] = generation[name]
    if generation.get('max_new_tokens'):
        theirs['max_new_tokens'] = generation['max_new_tokens']
    how = {}
    for name in names:
        value = getattr(cfg, name)
        unset = value == getattr(Config, name)
        how[name] = theirs.get(name, value) if unset else value
    return how


def no_words(tokenizer, text):
    """-> what to tell of a line that the tokenizer has no words for, or ''"""
    strange = [repr(part) for part in dict.fromkeys(tokenizer.spelled(text)) if part.strip()]
    if not strange:
        return ''
    better = '' if tokenizer.spelled(f' {text}') else f'; begin with a space, as in " {text}"'
    return (f'the model has no word for {", ".join(strange[:5])} and reads bytes, which it was not '
            f'trained on: do not believe the answer{better}')


def chat(cfg, model, tokenizer):
    """Reads lines from the terminal and streams answers; an empty line or Ctrl-D ends. <think> text
    is dimmed."""
    messages, dim, plain = [], '\x1b[2m', '\x1b[0m'
    how = chat_settings(cfg, tokenizer.generation)
    print(f'{dim}{", ".join(f"{name}={value:g}" for name, value in how.items())}{plain}')
    if tokenizer.generation.get('repetition_penalty', 1.0) != 1.0:
        penalty = tokenizer.generation['repetition_penalty']
        print(f'{dim}not applied: repetition_penalty={penalty}{plain}')
    while True:
        try:
            text = input('> ')
        except (EOFError, KeyboardInterrupt):
            return print()
        if not text.strip():
            return
        if told := no_words(tokenizer, text):
            print(f'{dim}[{told}]{plain}')
        asked = [{'role': 'user', 'content': text}]
        messages += instructed({'prompt': asked}, cfg.instruction)['prompt']
        context = model.cfg.max_position_embeddings
        (prompt,), (row,) = encode_prompts(tokenizer, [{'prompt': messages}], cfg.prefill)
        if len(messages) > 1 and len(prompt) > 0.75 * context:
            print(f'{dim}[the conversation fills the context of {context} tokens; '
                  f'starting afresh]{plain}')
            messages = messages[-1:]
            (prompt,), (row,) = encode_prompts(tokenizer, [{'prompt': messages}], cfg.prefill)
        stream, said = tokenizer.stream(), []
        if '<think>' in row['prefill'] and '</think>' not in row['prefill']:
            print(dim, end='')
        def show(_, __, token):
            if token not in tokenizer.stop_ids:
                said.append(piece := stream.add(token))
                piece = piece.replace('<think>', dim + '<think>')
                print(piece.replace('</think>', '</think>' + plain), end='', flush=True)
        try:
            sampler = Sampler(
                model, tokenizer.stop_ids, slots=1, check_every=1, stop_strings=cfg.stop,
                tokenizer=tokenizer, speculate=cfg.speculate)
            room = max(1, min(context - len(prompt), how['max_new_tokens']))
            sampler.generate([prompt], 1, seed=cfg.seed + len(messages), on_token=show,
                             **{**how, 'max_new_tokens': room})
        except ValueError as error:  # does not fit
            messages.pop()
            print(f'[{error}]{plain}')
            continue
        except KeyboardInterrupt:    # ends the answer, not the chat
            pass
        said.append(stream.flush())
        print(said[-1] + plain)
        answer = row['prefill'] + until_stop(''.join(said), cfg.stop)
        messages.append({'role': 'assistant', 'content': answer})


def sample_prompts(cfg, model, tokenizer):
    """Prints each prompt and its samples; control tokens stand between brackets."""
    for text in cfg.prompt:
        if told := no_words(tokenizer, text):
            print(told, file=sys.stderr)
    rows = [{'prompt': text} for text in cfg.prompt]
    if cfg.prompts:
        rows += read_rows(cfg.prompts, require=('prompt',))
    rows = [instructed(row, cfg.instruction) for row in rows]
    prompts, _ = encode_prompts(tokenizer, rows, cfg.prefill)
    sampler = Sampler(model, tokenizer.stop_ids, cfg.slots, stop_strings=cfg.stop,
                      tokenizer=tokenizer, speculate=cfg.speculate)
    how = chat_settings(cfg, tokenizer.generation)
    completions = sampler.generate(prompts, cfg.samples, seed=cfg.seed, **how)
    for prompt, samples in zip(prompts, completions):
        print(visible(tokenizer, prompt))
        for completion in samples:
            print(f'  {visible(tokenizer, completion.tokens)}')
        print()


def main(cfg):
    tell_idle(cfg, [(cfg.chat, ('prompt', 'prompts', 'samples', 'slots'),
                     'what is answered in a chat is typed')])
    if not (cfg.chat or cfg.prompt or cfg.prompts):
        raise ValueError('nothing to answer: set prompt, prompts (a file of them) or chat=True')
    present(cfg, 'checkpoint')
    device = use_device(cfg)
    tokenizer = Tokenizer.from_pretrained(cfg.checkpoint, cfg.chat_template, cfg.template_args)
    model = load(cfg, tokenizer, device)
    if cfg.chat:
        return chat(cfg, model, tokenizer)
    return sample_prompts(cfg, model, tokenizer)


def send_to_evaluate(argv):
    """Exits with the command to use where a key, of a config file too, is evaluate.py's."""
    for argument in argv:
        keys = [argument.removeprefix('--').partition('=')[0]]
        if not argument.startswith('-'):
            try:
                keys = read_file(argument)
            except ConfigError:    # which `run` tells
                return
        for key in keys:
            if key in OF_EVALUATE:
                print(f'sample.py: {key} is a key of evaluate.py: python evaluate.py '
                      f'{shlex.join(argv)}', file=sys.stderr)
                sys.exit(2)


if __name__ == '__main__':
    send_to_evaluate(sys.argv[1:])
    run(main, Config)
