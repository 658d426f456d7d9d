"""
Sampling from the trainer's own weights, and the script that chats and answers prompts.

    python sample.py --checkpoint=out/r1/final --chat=True
    python sample.py --checkpoint=out/r1/final --prompt=" 3 7 8 make =29" --samples=4
    python sample.py --checkpoint=out/r1/final --prompts=out/r1/data/test.jsonl

The sampler serves a queue of requests (prompt, sample) with a fixed number of slots:

    sampler = Sampler(model, stop_ids, slots=256)
    completions = sampler.generate(prompts, n=8, max_new_tokens=512, temperature=1.0, seed=1)

`Sampler.generate` fills free slots, advances all of them some steps, harvests those that are done,
and repeats. The way of a token:

    PromptCache.add       a prompt goes through the model once: Transformer.read_prompts
    Decoder.first_tokens  the first token of each of its samples is drawn from its last logits
    Decoder.step          the newest token of every slot goes through Transformer.decode, where each
                          layer's attention asks Cache.attend (kv_cache.py), on a GPU the kernel
                          mla_decode; the next token is drawn from the logits
    Slots.append          the token is noted, and whether it ends the completion
    Harvest.collect       the tokens become a Completion, and the slot is free

A finished slot takes the next request; when the queue is empty the batch shrinks to the rows that
still run; a step reads the live length only.

Every sample is a function of (seed, prompt number, sample number) and the weights: the uniform
number behind each token is a hash of (seed, prompt, sample, position), so that the batch size, the
slots and the other requests change nothing but rounding.

A model with an MTP layer drafts one token with it, and verifies two tokens a forward, when few rows
are left (`Speculation`). A token is always drawn from the model's own distribution with its own
noise, and the draft counts only if it is the same: the output is that of plain decoding, at any
temperature.

On a GPU a step is a CUDA graph, captured anew in every call (`Graphs`).

S slots, B of them in use, L tokens of a completion at most, T new tokens a row (2 to verify a
draft, else 1), V vocabulary, C hidden width, M MoE layers, K experts a token. Left out: paged
caches (all requests are known at the start), servers, beams.
"""

import os
import shlex
import sys
import warnings
from collections import deque
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Literal, NamedTuple

# before torch: says so where it is missing
from configurator import ConfigError, at_least, read_file, run, tell_idle

import torch
import torch.nn.functional as F

import hub
import kernels
from data.prompts import encode_prompts, instructed, visible
from data.source import made_by, missing, read_rows
from data.tokenizer import Tokenizer
from kernels import cpu, working_dtype
from kernels.cpu_sampling import onednn_weights
from kv_cache import Cache, KVBuffer, PromptReaders, graph_size
from model import Transformer


@dataclass
class Sampling:
    """Settings that sample.py and evaluate.py share."""
    # model
    checkpoint: str = 'out/r1/final'       # folder with config.json, *.safetensors and the
                                           # tokenizer, or a hub id
    # how tokens are drawn
    temperature: float = 1.0               # of the samples
    top_p: float = 1.0                     # nucleus of the samples; 1.0: everything
    top_k: int = 0                         # only the k most probable tokens; 0: all
    min_p: float = 0.0                     # only tokens of at least this share of the most
                                           # probable one's probability
    max_new_tokens: int = 192              # longest completion, the stop token included
    stop: list[str] = field(default_factory=list)  # texts that end a completion, besides the stop
                                           # tokens
    # prompts
    chat_template: str | None = None       # 'r1_zero' (that of DeepSeek-R1-Zero), a file, or None:
                                           # the tokenizer's own
    template_args: dict = field(default_factory=dict)  # as {'enable_thinking': False}, for the
                                           # template, over those saved with the tokenizer
    instruction: str = ''                  # text added to the end of each problem, for example how
                                           # to mark the answer
    prefill: str = ''                      # text the assistant's turn starts with, for example
                                           # "<think>"
    # sampler
    seed: int = 1                          # of the sampling noise
    slots: int = 256                       # rows decoded at once
    speculate: int | None = None           # most rows for which an MTP layer drafts; None: where it
                                           # pays; 0: never
    # machine
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
    # what is answered
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
    """tokens: ids, the stop token included where there is one
    logprobs: of each token, under softmax(logits / temperature) over all tokens
    finished: whether it ended with a stop token or stop string; else it was cut at its limit
    routes: experts of every input token, int16 [prompt + completion - 1, M, K]; None: not asked for
    entropy: nats of the distributions that its tokens were drawn from, summed; None: not asked for
    """
    tokens: list
    logprobs: list
    finished: bool
    routes: torch.Tensor | None = None
    entropy: float | None = None


class Request(NamedTuple):
    """One completion that is wanted"""
    prompt: int     # number of the prompt
    sample: int     # and of the sample
    key: int        # number that its noise is drawn from, in place of the prompt's
    limit: int      # most tokens


class NotFinite(FloatingPointError):
    """A logit was not finite; .completions holds what was finished, None elsewhere."""

    def __init__(self, message, completions):
        super().__init__(message)
        self.completions = completions


# --------------------------------------------------------------------------------------------------
# drawing a token


class Drawn(NamedTuple):
    """A token for each row, all [B]"""
    tokens: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor | None


@dataclass
class Drawing:
    """How tokens are drawn from logits, the same for all requests of a call. absent: ids that are
    no token, or None; the others as in `pick`."""
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    entropy: bool
    absent: torch.Tensor | None

    def noise(self, requests):
        """-> int64 [B], from which all noise of each request is made"""
        keys = torch.tensor([request.key for request in requests], dtype=torch.int64)
        samples = torch.tensor([request.sample for request in requests])
        return hash_of(self.seed, keys, samples)

    def __call__(self, logits_BV, noise_B, position):
        """position: of the tokens to draw, from 0 in their completions, a number or [B]"""
        if self.absent is not None:
            logits_BV.index_fill_(1, self.absent, -1e20)     # 0 times infinity is no number
        u_B = torch.zeros_like(noise_B, dtype=torch.float64)
        if self.temperature > 0:
            u_B = to_unit_interval(hash_with(noise_B, position))

        # on a CPU a few rows at a time: what one pass writes the next finds in the cache
        B, V = logits_BV.shape
        rows = max(1, 2**20 // V) if logits_BV.device.type == 'cpu' else B
        parts = [pick(z_BV, u, self.temperature, self.top_p, self.top_k, self.min_p, self.entropy)
                 for z_BV, u in zip(logits_BV.split(rows), u_B.split(rows))]
        if len(parts) == 1:
            return parts[0]
        tokens, logprobs, entropies = zip(*parts)
        return Drawn(torch.cat(tokens), torch.cat(logprobs),
                     torch.cat(entropies) if self.entropy else None)


def pick(logits_BV, u_B, temperature, top_p=1.0, top_k=0, min_p=0.0, entropy=False):
    """Samples by inverting the cumulative distribution at the numbers u in [0, 1). -> Drawn

    temperature 0: the most probable token, with its log-prob at temperature 1
    top_p, top_k, min_p: see `filtered`. Log-probs and entropies are those before any filter.
    entropy: whether to compute entropies, of softmax(logits / temperature) in nats
    """
    z_BV = logits_BV if temperature in (0, 1) else logits_BV / temperature
    p_BV = z_BV.softmax(dim=-1)
    if temperature == 0:
        tokens_B = first_largest(logits_BV)
    else:
        tokens_B = invert_cdf(filtered(p_BV, top_p, top_k, min_p), u_B)
    tokens_B1 = tokens_B.unsqueeze(1)
    logprobs_B = p_BV.gather(1, tokens_B1).squeeze(1).log()

    # H = log Σ exp(z) − Σ p z: without a logarithm of every probability
    entropies_B = None
    if entropy:
        lse_B = z_BV.gather(1, tokens_B1).squeeze(1) - logprobs_B
        entropies_B = lse_B - p_BV.mul_(z_BV).sum(-1)
    return Drawn(tokens_B, logprobs_B, entropies_B)


def filtered(p_BV, top_p, top_k, min_p):
    """-> p_BV with 0 for all but the top_k largest, of these those of at least min_p times the
    largest, of these the fewest whose share reaches top_p"""
    kept = p_BV
    if 0 < top_k < p_BV.shape[1]:
        least = p_BV.topk(top_k, dim=-1).values[:, -1:]
        kept = torch.where(p_BV >= least, p_BV, 0.0)
    if min_p > 0:
        least = min_p * p_BV.amax(dim=-1, keepdim=True)
        kept = torch.where(p_BV >= least, kept, 0.0)
    if top_p < 1:
        ranked, order = kept.sort(dim=-1, descending=True)
        before = ranked.cumsum(-1) - ranked
        inside = before < top_p * ranked.sum(-1, keepdim=True)
        ranked = torch.where(inside, ranked, 0.0)
        kept = torch.zeros_like(p_BV).scatter_(1, order, ranked)
    return kept


def in_blocks(x_BV, width, filling):
    """-> [B, blocks, width], the last block filled up"""
    missing = -x_BV.shape[1] % width
    if missing:      # F.pad copies where there is nothing to add, too
        x_BV = F.pad(x_BV, (0, missing), value=filling)
    return x_BV.view(len(x_BV), -1, width)


def first_largest(z_BV, width=64):
    """-> argmax [B]: of blocks of tokens first, then inside the block, because maxima are found ten
    times faster than their places"""
    blocks = in_blocks(z_BV, width, float('-inf'))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, width)).squeeze(1).argmax(-1)
    return block.squeeze(1) * width + inside


def invert_cdf(p_BV, u_B, width=64):
    """-> the first token [B] at which the cumulative sum of p exceeds u times its total; blocks of
    tokens first, then inside the block, because a cumulative sum in double over a whole vocabulary
    is slow"""
    B = len(p_BV)
    blocks = in_blocks(p_BV, width, 0.0)

    # which block
    cdf = blocks.sum(-1).double().cumsum(-1)
    target = u_B.unsqueeze(1) * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1)
    target = target - F.pad(cdf, (1, 0)).gather(1, block)
    block = block.squeeze(1)

    # which token of it; rounding never leads past the last one of positive probability
    first = torch.arange(0, B * blocks.shape[1], blocks.shape[1], device=block.device)
    cdf = blocks.flatten(0, 1).index_select(0, first + block).double().cumsum(-1)
    inside = torch.searchsorted(cdf, target, right=True).squeeze(1)
    last = (cdf < cdf[:, -1:]).sum(-1)
    return block * width + torch.minimum(inside, last)


def uniform(seed, *keys_B):
    """An integer and int64 tensors -> float64 in [0, 1): a hash of all."""
    return to_unit_interval(hash_of(seed, *keys_B))


def hash_of(seed, *keys_B):
    h = hash_with(torch.full_like(keys_B[0], seed), 0)
    for key_B in keys_B:
        h = hash_with(h, key_B)
    return h


def hash_with(h, key):
    """One round of splitmix64's mixer on int64 tensors; its constants 0x9E37.., 0xBF58.., 0x94D0..
    as signed numbers."""
    h = (h ^ key) - 0x61C8864680B583EB
    h = (h ^ shift_right(h, 30)) * -0x40A7B892E31B1A47
    h = (h ^ shift_right(h, 27)) * -0x6B2FB644ECCEEE15
    return h ^ shift_right(h, 31)


def shift_right(z, bits):
    """Fills with zeros, where >> of a negative number fills with ones."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def to_unit_interval(h):
    """The upper 53 bits of int64 -> float64 in [0, 1)"""
    return shift_right(h, 11).double() / 2**53


# --------------------------------------------------------------------------------------------------
# the sampler


class Sampler:
    """Samples completions from a model.

    model: a Transformer
    stop_ids: tokens that end a completion
    slots: rows decoded at once
    check_every: steps between looks at what has finished; None: what pays on this device
    stop_strings: texts that end a completion; they need `tokenizer`
    speculate: most rows for which an MTP layer drafts; None: what pays on this device; 0: never
    drafted, accepted: how many tokens it drafted in all calls, and how many of them counted
    """

    def __init__(self, model, stop_ids=(), slots=256, check_every=None, stop_strings=(),
                 tokenizer=None, speculate=None):
        self.model = model
        self.slots = slots
        self.tokenizer = tokenizer
        self.device = model.head_weight.device
        on_cpu = self.device.type == 'cpu'
        self.check_every = check_every or (4 if on_cpu else 32)
        self.stop_ids = sorted(set(stop_ids))
        if isinstance(stop_strings, str):
            stop_strings = [stop_strings]
        self.stop_strings = list(stop_strings)
        if speculate is None:
            speculate = 4 if on_cpu else 16
        self.speculate = speculate if model.cfg.num_nextn_predict_layers else 0
        self.drafted = 0
        self.accepted = 0

    @torch.no_grad()
    def generate(self, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, seed=0,
                 keys=None, on_token=None, progress=None, top_k=0, min_p=0.0, routes=False,
                 unbiased=False, on_done=None, entropy=False):
        """prompts: lists of token ids -> for each prompt a list of n Completions.

        max_new_tokens: an integer, or one for each prompt, or n for each prompt
        temperature, top_p, top_k, min_p: see `pick`; temperature 0 is greedy
        keys: a number for each prompt that its noise is drawn from (default: its place), so that a
            prompt's samples do not depend on which rank or call draws them
        on_token(prompt, sample, token): called as tokens appear
        on_done(prompt, sample, completion), progress.update(): called as completions appear
        routes, entropy: whether completions get theirs
        unbiased: refuse top_p, top_k and min_p, which change the distribution that the log-probs
            are of

        ValueError: an empty prompt, one that leaves no room, slots that do not fit in memory.
        NotFinite: a logit that is not finite, naming the request.
        """
        limits = limits_of_all(max_new_tokens, len(prompts), n)
        draw = Drawing(seed, temperature, top_p, top_k, min_p, entropy, self.model.absent)
        self.check(prompts, n, limits, draw, unbiased)
        queue = requests_of(limits, n, keys)
        results = [[None] * n for _ in prompts]

        S = min(self.slots, len(queue))
        with onednn_weights(self.model, S, free_memory(self.device)):
            slots = Slots(self.model, S, max(map(max, limits)), self.stop_ids, routes, entropy)
            prompt_cache = PromptCache(self.model, prompts, min(len(prompts), S + 1), routes)
            decoder = Decoder(self.model, slots, prompt_cache, draw)
            speculation = Speculation(decoder, self.speculate)
            harvest = Harvest(self, slots, prompt_cache, results, on_token, on_done, progress)

            while queue or slots.B:
                # fill slots
                taken = slots.take(queue)
                prompt_cache.add([request.prompt for request in taken.values()])
                decoder.first_tokens(taken)

                # advance
                if speculation.pays(queue):
                    speculation.advance(self.check_every)
                else:
                    speculation.stop()
                    decoder.advance(self.check_every)

                # harvest
                harvest.collect()
                if not queue and (moved := slots.shrink()):
                    decoder.move_rows(*moved)
                    speculation.move_rows(*moved)
                prompt_cache.keep(slots.prompts_in_use(), queue)

        self.drafted += speculation.drafted
        self.accepted += speculation.accepted
        return results

    # ---- what cannot be sampled

    def check(self, prompts, n, limits, draw, unbiased):
        """ValueError says what is wrong with the arguments of `generate`."""
        self.check_lengths(prompts, limits)
        every = list(chain.from_iterable(limits))
        one_each = len(prompts) == len(limits) and len(every) == n * len(prompts)
        drawable = (draw.temperature >= 0 and 0 < draw.top_p <= 1 and draw.top_k >= 0
                    and 0 <= draw.min_p <= 1)
        if not prompts or n < 1 or not one_each or min(every) < 1 or not drawable:
            raise ValueError(
                f'nothing to sample: {len(prompts)} prompts, n={n}, {len(every)} limits from '
                f'{min(every, default=None)} (one for each; >= 1), '
                f'temperature={draw.temperature} (>= 0), top_p={draw.top_p} (0 < top_p <= 1), '
                f'top_k={draw.top_k} (>= 0), min_p={draw.min_p} (0 to 1)')
        if unbiased and (draw.top_p < 1 or draw.top_k or draw.min_p):
            raise ValueError(
                f'top_p={draw.top_p}, top_k={draw.top_k}, min_p={draw.min_p} change the '
                'distribution that is sampled but not the log-probs, which biases the ratio of a '
                'policy gradient; use 1.0, 0 and 0.0 or allow it explicitly')
        if self.stop_strings and self.tokenizer is None:
            raise ValueError('stop strings need the tokenizer: Sampler(..., tokenizer=...)')
        self.check_memory(prompts, n, max(every))

    def check_lengths(self, prompts, limits):
        context = self.model.cfg.max_position_embeddings
        for i, (prompt, some) in enumerate(zip(prompts, limits)):
            limit = max(some, default=0)
            room = context - limit
            if not 1 <= len(prompt) <= room:
                raise ValueError(
                    f'prompt {i} has {len(prompt)} tokens; with max_new_tokens={limit} the '
                    f'context of {context} leaves room for 1 to {room}')

    def check_memory(self, prompts, n, limit):
        """ValueError if caches and logits of all slots do not fit into the memory that is free,
        naming the slots that would."""
        free = free_memory(self.device)
        if free is None:
            return
        cfg = self.model.cfg
        longest = max(map(len, prompts))
        slots = min(self.slots, len(prompts) * n)

        # bytes: a token of one layer's cache; all prompts; a slot, with its logits
        layer_token = cfg.cache_width * working_dtype(self.model.head_weight).itemsize
        token = layer_token * cfg.num_hidden_layers
        prompts_in_cache = min(len(prompts), self.slots + 1) * longest * token
        slot = limit * (token + 12) + 16 * cfg.vocab_size
        if self.speculate:
            prompts_in_cache += self.speculate * (longest + limit) * layer_token

        need = slots * slot + prompts_in_cache
        if need <= free:
            return
        fit = max(0, int((free - min(prompts_in_cache, free)) // slot))
        advice = '' if fit else ': shorten max_new_tokens or the prompts'
        raise ValueError(
            f'{slots} slots need {need / 2**30:.3g} GiB for {limit} new tokens each and '
            f'{free / 2**30:.3g} GiB are free; slots={fit} fit{advice}')


def limits_of_all(max_new_tokens, P, n):
    """-> [P][n] of each request, from a limit for all, for each prompt, or for each request"""
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * P
    return [[limit] * n if isinstance(limit, int) else list(limit) for limit in max_new_tokens]


def requests_of(limits, n, keys):
    """-> a deque of Requests, the samples of a prompt together"""
    if keys is None:
        keys = range(len(limits))
    queue = deque()
    for p, s in product(range(len(limits)), range(n)):
        queue.append(Request(p, s, keys[p], limits[p][s]))
    return queue


def free_memory(device):
    """-> bytes, or None where the system does not say"""
    if device.type == 'cuda':
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if os.path.exists('/proc/meminfo'):
        with open('/proc/meminfo') as f:
            for line in f:
                if line.startswith('MemAvailable'):
                    return int(line.split()[1]) * 1024
    return None


def right_padded(rows, device):
    """Lists of token ids -> int64 [len(rows), longest], filled up with 0"""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


def moe_layers(model):
    """-> how many, that of the MTP layer not counted"""
    return sum(hasattr(layer.mlp, 'gate') for layer in model.layers)


def stacked(routes, B, T):
    """routes as Transformer.decode appends them -> the experts, int16 [B, T, M, K]"""
    return torch.stack([experts.view(B, T, -1) for _, experts in routes], dim=2).short()


@dataclass
class HeldPrompt:
    """A prompt in the cache"""
    row: int                    # where its entries are in the buffer
    logits_V: torch.Tensor      # after its last token
    routes: torch.Tensor | None  # experts of its tokens, int16 [length, M, K]


class PromptCache:
    """The prompts that slots read, computed once each for all their samples.

    tokens: ids of every prompt
    buffer: KVBuffer of the cache entries of those that are held, a row each
    held: {prompt's number: HeldPrompt}
    """

    def __init__(self, model, prompts, rows, routes):
        cfg = model.cfg
        self.model = model
        self.tokens = prompts
        self.device = model.head_weight.device
        self.longest = max(map(len, prompts))
        self.buffer = KVBuffer(cfg, cfg.num_hidden_layers, rows, self.longest,
                               working_dtype(model.head_weight), self.device)
        self.with_routes = routes and moe_layers(model) > 0
        self.held = {}
        self.free_rows = list(range(rows))[::-1]

    def add(self, numbers, at_once=8192):
        """Computes those of the prompts that are not held, about `at_once` tokens a forward."""
        new = [p for p in dict.fromkeys(numbers) if p not in self.held]
        batch = []
        longest = 0
        for p in new:
            wider = max(longest, len(self.tokens[p]))
            if batch and (len(batch) + 1) * wider > at_once:
                self.compute(batch)
                batch = []
                wider = len(self.tokens[p])
            batch.append(p)
            longest = wider
        if batch:
            self.compute(batch)

    def compute(self, numbers):
        ids_BT = right_padded([self.tokens[p] for p in numbers], self.device)
        B, T = ids_BT.shape
        last_B = torch.tensor([len(self.tokens[p]) - 1 for p in numbers], device=self.device)
        routes = [] if self.with_routes else None
        logits_BV, entries = self.model.read_prompts(ids_BT, last_B, routes)

        rows = [self.free_rows.pop() for _ in numbers]
        rows_B = torch.tensor(rows, device=self.device)
        for layer, entry in enumerate(entries):
            self.buffer.write(layer, rows_B, entry)

        experts = stacked(routes, B, T) if routes else None
        for b, p in enumerate(numbers):
            its_routes = experts[b, :len(self.tokens[p])] if routes else None
            self.held[p] = HeldPrompt(rows[b], logits_BV[b], its_routes)

    def keep(self, in_use, queue):
        """Forgets prompts that no slot reads and that the next request does not want. in_use: set
        of numbers"""
        wanted = in_use | {queue[0].prompt} if queue else in_use
        for p in list(self.held):
            if p not in wanted:
                self.free_rows.append(self.held.pop(p).row)
        if not queue:
            self.close_gaps()

    def close_gaps(self):
        """Nothing waits: the prompts that are left take the first rows of the buffer."""
        count = len(self.held)
        gaps = sorted(row for row in self.free_rows if row < count)
        beyond = [p for p, held in self.held.items() if held.row >= count]
        for p, gap in zip(beyond, gaps):
            self.buffer.copy_rows(gap, self.held[p].row, len(self.tokens[p]))
            self.held[p].row = gap
        taken = {held.row for held in self.held.values()}
        self.free_rows = [row for row in range(self.buffer.rows) if row not in taken]


class Slots:
    """What each slot samples now. Slots 0 to B are in use, the rows of a step; a row whose
    completion is done goes on computing until it is given another request.

    request [S]             its Request, or None
    newest_S                its newest token, not yet fed to the model
    made_S                  tokens drawn so far
    prompt_length_S         tokens of its prompt
    limit_S                 most tokens
    noise_S                 of Drawing.noise
    done_S                  whether its completion has ended, or it has none
    not_finite_S            whether it met a log-prob that is not finite
    tokens_SL, logprobs_SL  what was drawn; a column more than L, to which rows that are done write
    entropies_SL            the same, or None: not asked for
    routes_SLMK             experts of the tokens fed, or None: not asked for

    longest: the most tokens of any row that runs, as of the last look
    changed: whether rows came or went since the decoder looked
    """

    def __init__(self, model, S, L, stop_ids, routes, entropy):
        self.S = S
        self.L = L
        self.device = device = model.head_weight.device
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)

        def integers(*shape, dtype=torch.int64):
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.newest_S = integers(S)
        self.made_S = integers(S)
        self.prompt_length_S = integers(S)
        self.limit_S = integers(S)
        self.noise_S = integers(S)
        self.done_S = torch.ones(S, dtype=torch.bool, device=device)
        self.not_finite_S = torch.zeros(S, dtype=torch.bool, device=device)
        self.tokens_SL = integers(S, L + 1)
        self.logprobs_SL = torch.zeros(S, L + 1, device=device)
        self.entropies_SL = torch.zeros(S, L + 1, device=device) if entropy else None
        self.routes_SLMK = None
        M = moe_layers(model)
        if routes and M:
            K = model.cfg.num_experts_per_tok
            self.routes_SLMK = integers(S, L + 1, M, K, dtype=torch.int16)

        self.B = 0
        self.request = [None] * S
        self.longest = 0
        self.changed = True

    def running(self):
        """-> [(row, its Request), ...]"""
        rows = enumerate(self.request[:self.B])
        return [(row, request) for row, request in rows if request is not None]

    def prompts_in_use(self):
        """-> their numbers"""
        return {request.prompt for _, request in self.running()}

    def take(self, queue):
        """Free slots take requests in turn. -> {row: Request} of those that did"""
        free = [row for row in range(self.B) if self.request[row] is None]
        free += range(self.B, self.S)
        taken = {row: queue.popleft() for row in free[:len(queue)]}
        for row, request in taken.items():
            self.request[row] = request
        self.B = max(self.B, 1 + max(taken, default=-1))
        return taken

    def reset(self, rows, requests, noise, prompt_lengths):
        """Sets rows [n] for new requests, without a token."""
        limits = [request.limit for request in requests]
        self.noise_S[rows] = noise
        self.made_S[rows] = 0
        self.done_S[rows] = False
        self.not_finite_S[rows] = False
        self.prompt_length_S[rows] = torch.tensor(prompt_lengths, device=self.device)
        self.limit_S[rows] = torch.tensor(limits, device=self.device)
        self.longest = max(self.longest, 1)
        self.changed = True

    def append(self, rows, live, drawn):
        """Notes a token for each of `rows` (their numbers [n], or the slice of all in use) that is
        live [n]; the others write to the spare column."""
        tokens, logprobs, entropies = drawn
        made = self.made_S[rows]
        column = torch.where(live, made, self.L)
        row = torch.arange(self.B, device=self.device) if isinstance(rows, slice) else rows
        self.tokens_SL[row, column] = tokens
        self.logprobs_SL[row, column] = logprobs
        if self.entropies_SL is not None:
            self.entropies_SL[row, column] = entropies
        self.newest_S[rows] = torch.where(live, tokens, self.newest_S[rows])

        made = made + live
        done = made >= self.limit_S[rows]
        if len(self.stop_ids):
            done |= (tokens.unsqueeze(1) == self.stop_ids).any(1)
        self.made_S[rows] = made
        self.done_S[rows] |= done & live
        self.not_finite_S[rows] |= ~torch.isfinite(logprobs) & live

    def look(self):
        """-> made, done, not_finite of the rows in use, lists. This waits for the device."""
        B = self.B
        return torch.stack([self.made_S[:B], self.done_S[:B], self.not_finite_S[:B]]).tolist()

    def shrink(self):
        """Nothing waits: the last rows that run move into the places of those that do not.
        -> to, source: rows [n] that moved, or None"""
        live = [row for row, _ in self.running()]
        B = graph_size(len(live), self.device)
        if (self.B - B) * 8 < self.B:
            return None
        gaps = [row for row in range(B) if self.request[row] is None]
        beyond = [row for row in live if row >= B]
        self.B = B
        self.changed = True
        if not beyond:
            return None

        for gap, row in zip(gaps, beyond):
            self.request[gap] = self.request[row]
            self.request[row] = None
        to = torch.tensor(gaps[:len(beyond)], device=self.device)
        source = torch.tensor(beyond, device=self.device)
        for x in self.of_each_slot():
            x[to] = x[source]
        return to, source

    def of_each_slot(self):
        tensors = [self.newest_S, self.made_S, self.prompt_length_S, self.limit_S, self.noise_S,
                   self.done_S, self.not_finite_S, self.tokens_SL, self.logprobs_SL,
                   self.entropies_SL, self.routes_SLMK]
        return [x for x in tensors if x is not None]


class Decoder:
    """Steps of all rows in use: the newest tokens go through the model, and the next are drawn."""

    def __init__(self, model, slots, prompt_cache, draw):
        cfg = model.cfg
        self.model = model
        self.slots = slots
        self.prompt_cache = prompt_cache
        self.draw = draw
        self.device = slots.device
        self.dtype = working_dtype(model.head_weight)
        own = KVBuffer(cfg, cfg.num_hidden_layers, slots.S, slots.L, self.dtype, self.device)
        self.cache = Cache(cfg, own, prompt_cache.buffer)
        self.graphs = Graphs(self.cache)

    def first_tokens(self, taken):
        """Draws them from the prompts' logits. taken: {row: its new Request}"""
        if not taken:
            return
        requests = list(taken.values())
        numbers = [request.prompt for request in requests]
        rows = torch.tensor(list(taken), device=self.device)
        noise = self.draw.noise(requests).to(self.device)
        lengths = [len(self.prompt_cache.tokens[p]) for p in numbers]
        self.slots.reset(rows, requests, noise, lengths)

        logits = torch.stack([self.prompt_cache.held[p].logits_V for p in numbers])
        drawn = self.draw(logits, noise, 0)
        self.slots.append(rows, torch.ones_like(rows, dtype=torch.bool), drawn)

    def advance(self, count):
        """`count` steps without a look at what is done (on a CPU: until all are)"""
        self.group_rows()
        self.repeat(self.step, 'step', count, tokens_a_step=1)

    def group_rows(self):
        """Where rows came or went: tells the cache which row reads which prompt."""
        slots = self.slots
        if not slots.changed:
            return
        slots.B = min(slots.S, graph_size(slots.B, self.device))
        rows_of = {}
        for row, request in slots.running():
            prompt = self.prompt_cache.held[request.prompt].row
            rows_of.setdefault(prompt, []).append(row)
        length_of = {}
        for p, held in self.prompt_cache.held.items():
            length_of[held.row] = len(self.prompt_cache.tokens[p])
        self.cache.readers = PromptReaders(
            rows_of, length_of, slots.B, self.prompt_cache.buffer, self.device)
        slots.changed = False

    def repeat(self, step, name, count, tokens_a_step):
        """step(length): a step that reads at most `length` of the tokens that a row made"""
        longest = self.slots.longest + count * tokens_a_step
        length = min(self.slots.L, graph_size(longest, self.device))
        if self.device.type == 'cuda':
            self.graphs.repeat(step, name, length, count)
            return
        with torch.inference_mode():      # an operation costs less; nothing made in here is kept
            for _ in range(count):
                if self.slots.done_S[:self.slots.B].all():
                    break
                step(length)

    def step(self, length):
        """The next token of each row"""
        slots = self.slots
        B = slots.B
        made_B = slots.made_S[:B].clone()
        h_BTC = self.forward(slots.newest_S[:B, None], made_B[:, None] - 1, length)
        logits_BV = self.model.logits(h_BTC[:, 0])
        drawn = self.draw(logits_BV, slots.noise_S[:B], made_B)
        slots.append(slice(0, B), ~slots.done_S[:B], drawn)

    def forward(self, ids_BT, at_BT, length):
        """-> hidden states [B, T, C] of tokens at places `at` of their completions"""
        slots = self.slots
        B, T = ids_BT.shape
        routes = [] if slots.routes_SLMK is not None else None
        self.cache.begin(at_BT, length, self.dtype)
        positions_BT = slots.prompt_length_S[:B, None] + at_BT
        h_BTC = self.model.decode(ids_BT, positions_BT, self.cache, routes)
        if routes:
            rows = torch.arange(B, device=self.device)
            slots.routes_SLMK[rows[:, None], at_BT] = stacked(routes, B, T)
        return h_BTC

    def move_rows(self, to, source):
        self.cache.own.copy_rows(to, source, self.slots.longest)


class Graphs:
    """Steps as CUDA graphs, captured after one eager step for each bucket of sizes. Graphs hold the
    addresses of the weights and die with the call of `generate`, so that updated or newly gathered
    weights are never missed."""

    def __init__(self, cache):
        self.cache = cache
        self.captured = {}       # {key: (graph, the PromptReaders whose tensors it reads)}
        self.usable = True

    def repeat(self, step, name, length, count):
        """step(length), `count` times. name: differs between steps that a graph tells apart"""
        key = name, length, self.cache.readers.key()
        if self.usable and count > 1:
            if key not in self.captured:
                step(length)
                count -= 1
                self.capture(step, length, key)
            if key in self.captured:
                self.replay(key, count)
                return
        for _ in range(count):
            step(length)

    def capture(self, step, length, key):
        graph = torch.cuda.CUDAGraph()
        others = [other for other, _ in self.captured.values()]
        pool = others[0].pool() if others else None
        try:
            with torch.cuda.graph(graph, pool=pool):
                step(length)
        except RuntimeError as error:
            warnings.warn('the decode step cannot be captured as a CUDA graph and runs eagerly: '
                          f'{error}', stacklevel=2)
            self.captured.clear()
            self.usable = False
            return
        self.captured[key] = graph, self.cache.readers

    def replay(self, key, count):
        graph, readers = self.captured[key]
        if readers is not self.cache.readers:
            readers.copy_(self.cache.readers)
        for _ in range(count):
            graph.replay()


class Speculation:
    """Steps that draft and verify. The MTP layer drafts the token after the newest one; the next
    step feeds both to the model, and where the draft was right gains a second token.

    drafted, accepted: counts of drafts
    cache: Cache of the MTP layer, over prompts and completions; None while nothing is drafted
    """

    def __init__(self, decoder, most_rows):
        self.decoder = decoder
        self.model = decoder.model
        self.slots = decoder.slots
        self.draw = decoder.draw
        self.most_rows = most_rows
        self.drafted = 0
        self.accepted = 0
        self.cache = None
        self.starts = 0

    def pays(self, queue):
        """Drafts cost a forward of the MTP layer: they pay only where a second token is nearly
        free, and only while enough are accepted."""
        few = 0 < self.slots.B <= self.most_rows
        good = self.accepted > 0.5 * self.drafted     # a verified step costs 1.2 to 1.5 plain ones
        return not queue and few and (self.drafted < 64 or good)

    def advance(self, count):
        """As Decoder.advance"""
        self.decoder.group_rows()
        if self.cache is None:
            self.start()
        name = f'draft {self.starts}'     # a graph holds the addresses of this start's cache
        self.decoder.repeat(self.step, name, count, tokens_a_step=2)
        drafted, accepted = self.counts.tolist()
        self.drafted += drafted
        self.accepted += accepted
        self.counts.zero_()

    def start(self):
        """Fills the MTP layer's cache by one forward of the few rows that are left."""
        slots = self.slots
        B = slots.B
        device = slots.device
        made = slots.made_S[:B].tolist()
        rows = [[0, 0] for _ in range(B)]
        for row, request in slots.running():
            prompt = self.decoder.prompt_cache.tokens[request.prompt]
            rows[row] = prompt + slots.tokens_SL[row, :made[row]].tolist()

        length = self.decoder.prompt_cache.longest + slots.L
        own = KVBuffer(self.model.cfg, 1, B, length, self.decoder.dtype, device)
        self.cache = Cache(self.model.cfg, own)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)   # drafted, accepted
        self.starts += 1

        last_B = torch.tensor([len(row) - 2 for row in rows], device=device)
        logits_BV, entry = self.model.mtp_read_prompts(right_padded(rows, device), last_B)
        own.write(0, torch.arange(B, device=device), entry)
        self.draft_B = self.draw(logits_BV, slots.noise_S[:B], slots.made_S[:B]).tokens

    def stop(self):
        self.cache = None

    def step(self, length):
        """Feeds the newest token and its draft. The token after the newest is drawn as ever; where
        it is the draft, the logits behind the draft are good as well. Then it drafts again."""
        slots = self.slots
        B = slots.B
        rows = slice(0, B)
        noise_B = slots.noise_S[:B]
        draft_B = self.draft_B[:B]
        made_B = slots.made_S[:B].clone()
        live_B = ~slots.done_S[:B]

        # the newest tokens and the drafts through the model
        ids_BT = torch.stack([slots.newest_S[:B], draft_B], dim=1)
        at_BT = torch.stack([made_B - 1, made_B.clamp(max=slots.L - 1)], dim=1)
        h_BTC = self.decoder.forward(ids_BT, at_BT, length)
        logits_BTV = self.model.logits(h_BTC)

        # the token after the newest
        first = self.draw(logits_BTV[:, 0], noise_B, made_B)
        slots.append(rows, live_B, first)

        # the token after the draft, where that was right
        right_B = live_B & (first.tokens == draft_B)
        self.counts += torch.stack([live_B.sum(), right_B.sum()])
        more_B = right_B & ~slots.done_S[:B]
        second = self.draw(logits_BTV[:, 1], noise_B, made_B + 1)
        slots.append(rows, more_B, second)

        next_BT = torch.stack([first.tokens, second.tokens], dim=1)
        self.draft_next(h_BTC, next_BT, at_BT, more_B.long(), length)

    def draft_next(self, h_BTC, next_BT, at_BT, last_B, length):
        """The MTP layer on the newest hidden states and the tokens after them. Drafts come from
        place `last` of each row, with the noise that the drafted token will meet."""
        slots = self.slots
        B = slots.B
        positions_BT = slots.prompt_length_S[:B, None] + at_BT
        longest = self.decoder.prompt_cache.longest + length
        self.cache.begin(positions_BT, longest, self.decoder.dtype)
        h_BTC = self.model.mtp_decode(h_BTC, next_BT, positions_BT, self.cache)
        h_BC = h_BTC[torch.arange(B, device=slots.device), last_B]
        drawn = self.draw(self.model.logits(h_BC), slots.noise_S[:B], slots.made_S[:B])
        self.draft_B[:B] = drawn.tokens

    def move_rows(self, to, source):
        if self.cache is not None:
            self.cache.own.copy_rows(to, source, self.cache.own.length)
            self.draft_B[to] = self.draft_B[source]


class Harvest:
    """Takes completions out of the slots that are done, and tells those who listen."""

    def __init__(self, sampler, slots, prompt_cache, results, on_token, on_done, progress):
        self.tokenizer = sampler.tokenizer
        self.stop_strings = sampler.stop_strings
        self.stop_ids = set(sampler.stop_ids)
        self.slots = slots
        self.prompt_cache = prompt_cache
        self.results = results
        self.on_token = on_token
        self.on_done = on_done
        self.progress = progress
        self.reported = {}       # {Request: how many of its tokens were read}

    def collect(self):
        slots = self.slots
        made, done, not_finite = slots.look()
        running = [(row, request) for row, request in slots.running() if not not_finite[row]]

        # the rows that have ended, and after how many tokens
        ends = {row: made[row] for row, _ in running if done[row]}
        ended_by_text = set()
        if self.stop_strings or self.on_token:
            for row, request in running:
                end = self.read(row, request, made[row])
                if end is not None:
                    ends[row] = end
                    ended_by_text.add(row)
        if ends:
            self.finish(ends, ended_by_text)

        if any(not_finite):
            p, s, *_ = slots.request[not_finite.index(True)]
            complete = sum(c is not None for c in chain.from_iterable(self.results))
            raise NotFinite(
                f'logits of prompt {p}, sample {s} are not finite; the weights are damaged or '
                f'training diverged ({complete} samples were complete)', self.results)
        slots.longest = max((made[row] for row, _ in slots.running()), default=0)

    def read(self, row, request, made):
        """Tells the tokens that are new. -> how many there are to the end of the first stop string,
        or None"""
        seen = self.reported.get(request, 0)
        ids = self.slots.tokens_SL[row, :made].tolist()
        end = self.first_stop(ids, seen)
        ids = ids[:end]
        if self.on_token:
            for token in ids[seen:]:
                self.on_token(request.prompt, request.sample, token)
        self.reported[request] = len(ids)
        return end

    def first_stop(self, ids, seen):
        """-> how many tokens it takes to complete the first stop string among the tokens from
        `seen` on, or None"""
        if not self.stop_strings or len(ids) == seen:
            return None
        longest = max(len(text.encode()) for text in self.stop_strings)
        begin = max(0, seen - longest)      # a token that is text has at least one byte
        if not self.has_stop(ids[begin:]):
            return None
        for end in range(seen + 1, len(ids) + 1):
            if self.has_stop(ids[begin:end]):
                return end
        return None

    def has_stop(self, ids):
        text = self.tokenizer.decode(ids)
        return any(stop in text for stop in self.stop_strings)

    def finish(self, ends, ended_by_text):
        """Makes the completions of some rows and frees them. ends: {row: its tokens}"""
        slots = self.slots
        rows = torch.tensor(list(ends), device=slots.device)
        longest = max(ends.values())
        tokens = slots.tokens_SL[rows, :longest].tolist()
        logprobs = slots.logprobs_SL[rows, :longest].tolist()
        entropies = None
        if slots.entropies_SL is not None:
            entropies = slots.entropies_SL[rows, :longest].double().cumsum(1).tolist()
        slots.done_S[rows] = True
        slots.changed = True

        for i, (row, end) in enumerate(ends.items()):
            request = slots.request[row]
            finished = row in ended_by_text or tokens[i][end - 1] in self.stop_ids
            completion = Completion(tokens[i][:end], logprobs[i][:end], finished)
            if slots.routes_SLMK is not None:
                prompt_routes = self.prompt_cache.held[request.prompt].routes
                own_routes = slots.routes_SLMK[row, :end - 1]
                completion.routes = torch.cat([prompt_routes, own_routes]).cpu()
            if entropies is not None:
                completion.entropy = entropies[i][end - 1]
            self.results[request.prompt][request.sample] = completion
            slots.request[row] = None
            self.reported.pop(request, None)
            if self.on_done:
                self.on_done(request.prompt, request.sample, completion)
            if self.progress is not None:
                self.progress.update()


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
    for key in keys:
        source = getattr(cfg, key)
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


def how_to_sample(cfg, generation):
    """-> arguments of Sampler.generate: what was set, else what the checkpoint's
    generation_config.json recommends, else the defaults"""
    names = ('temperature', 'top_p', 'top_k', 'min_p')
    recommended = {}
    if generation.get('do_sample') is False:
        recommended['temperature'] = 0.0
    else:
        for name in names:
            if generation.get(name) is not None:
                recommended[name] = generation[name]
    if generation.get('max_new_tokens'):
        recommended['max_new_tokens'] = generation['max_new_tokens']

    how = {}
    for name in (*names, 'max_new_tokens'):
        how[name] = getattr(cfg, name)
        if how[name] == getattr(Config, name):
            how[name] = recommended.get(name, how[name])
    return how


def no_words(tokenizer, text):
    """-> what to tell of a line that the tokenizer has no words for, or ''"""
    strange = [repr(part) for part in dict.fromkeys(tokenizer.spelled(text)) if part.strip()]
    if not strange:
        return ''
    better = '' if tokenizer.spelled(f' {text}') else f'; begin with a space, as in " {text}"'
    return (f'the model has no word for {", ".join(strange[:5])} and reads bytes, which it was not '
            f'trained on: do not believe the answer{better}')


DIM = '\x1b[2m'
PLAIN = '\x1b[0m'


def chat(cfg, model, tokenizer):
    """Reads lines from the terminal and streams answers; an empty line or Ctrl-D ends. <think> text
    is dimmed."""
    how = how_to_sample(cfg, tokenizer.generation)
    print_settings(how, tokenizer.generation)
    messages = []
    while (text := read_line()).strip():
        if told := no_words(tokenizer, text):
            print(f'{DIM}[{told}]{PLAIN}')
        asked = [{'role': 'user', 'content': text}]
        messages += instructed({'prompt': asked}, cfg.instruction)['prompt']
        messages, prompt, prefill = conversation(cfg, model, tokenizer, messages)
        if '<think>' in prefill and '</think>' not in prefill:
            print(DIM, end='')
        seed = cfg.seed + len(messages)
        try:
            answer = stream_answer(cfg, model, tokenizer, prompt, how, seed)
        except ValueError as error:  # does not fit
            messages.pop()
            print(f'[{error}]{PLAIN}')
            continue
        answer = prefill + until_stop(answer, cfg.stop)
        messages.append({'role': 'assistant', 'content': answer})


def print_settings(how, generation):
    settings = ', '.join(f'{name}={value:g}' for name, value in how.items())
    print(f'{DIM}{settings}{PLAIN}')
    penalty = generation.get('repetition_penalty', 1.0)
    if penalty != 1.0:
        print(f'{DIM}not applied: repetition_penalty={penalty}{PLAIN}')


def read_line():
    """-> a line of the terminal; '' after Ctrl-D or Ctrl-C"""
    try:
        return input('> ')
    except (EOFError, KeyboardInterrupt):
        print()
        return ''


def conversation(cfg, model, tokenizer, messages):
    """-> the messages, or only the last where they fill the context; token ids of the prompt; what
    the answer is made to start with"""
    context = model.cfg.max_position_embeddings
    (prompt,), (row,) = encode_prompts(tokenizer, [{'prompt': messages}], cfg.prefill)
    if len(messages) > 1 and len(prompt) > 0.75 * context:
        print(f'{DIM}[the conversation fills the context of {context} tokens; '
              f'starting afresh]{PLAIN}')
        messages = messages[-1:]
        (prompt,), (row,) = encode_prompts(tokenizer, [{'prompt': messages}], cfg.prefill)
    return messages, prompt, row['prefill']


def stream_answer(cfg, model, tokenizer, prompt, how, seed):
    """Prints the answer as it is sampled, and returns it. Ctrl-C ends the answer, not the chat.
    ValueError: the prompt does not fit."""
    stream = tokenizer.stream()
    pieces = []

    def show(_prompt, _sample, token):
        if token in tokenizer.stop_ids:
            return
        piece = stream.add(token)
        pieces.append(piece)
        piece = piece.replace('<think>', DIM + '<think>')
        piece = piece.replace('</think>', '</think>' + PLAIN)
        print(piece, end='', flush=True)

    sampler = Sampler(model, tokenizer.stop_ids, slots=1, check_every=1, stop_strings=cfg.stop,
                      tokenizer=tokenizer, speculate=cfg.speculate)
    room = max(1, model.cfg.max_position_embeddings - len(prompt))
    how = {**how, 'max_new_tokens': min(room, how['max_new_tokens'])}
    try:
        sampler.generate([prompt], seed=seed, on_token=show, **how)
    except KeyboardInterrupt:
        pass
    pieces.append(stream.flush())
    print(pieces[-1] + PLAIN)
    return ''.join(pieces)


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
    how = how_to_sample(cfg, tokenizer.generation)
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
