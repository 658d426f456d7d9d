"""
Sampling: a batched KV-cache engine on the trainer's own weights, evaluation, sample files, chat.

    python sample.py config/r1/eval.py --checkpoint=out/r1/final           # pass@1, greedy, pass@k, maj@k with intervals
    python sample.py --checkpoint=out/r1/zero --data="['data/countdown/rl.jsonl']" --out=samples.jsonl   # samples, rewards
    python sample.py --checkpoint=out/r1/final --chat=True

`Sampler.generate` runs a queue of (prompt, sample) requests over a fixed number of slots. A prompt is computed once and its
cache entries copied to the slots of its n samples; a finished slot takes the next request, and when the queue is empty the
batch shrinks to the rows still running. MLA models cache the latent and the rope key only and decode absorbed (model.py).

Every sample is a function of (seed, prompt number, sample number) and the weights: the uniform number behind each token is a
hash of (seed, prompt, sample, position), so the batch size, the slots and the other requests change nothing but rounding.

Left out: paged caches (all requests are known at the start), servers, beam search.
"""

import json
import os
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import rewards
from configurator import configure
from data.loader import read_rows
from data.tokenizer import Tokenizer
from model import Transformer


@dataclass
class Config:
    checkpoint: str = 'out/r1/final'       # folder with config.json, *.safetensors and the tokenizer
    data: list = field(default_factory=lambda: ['data/countdown/test.jsonl'])  # problem files: rows with "prompt", "task", ...
    limit: int = 0                         # use the first so many problems; 0: all
    n: int = 8                             # samples a problem
    greedy: bool = True                    # evaluate the greedy answer too
    temperature: float = 1.0               # of the n samples
    top_p: float = 1.0                     # nucleus of the n samples; 1.0: everything
    max_new_tokens: int = 192              # longest completion, the stop token included
    prefill: str = ''                      # text the assistant's turn starts with, for example "<think>"
    seed: int = 1                          # of the sampling noise
    slots: int = 256                       # rows decoded at once
    threads: int = 2                       # CPU threads
    device: str = 'auto'                   # 'cpu', 'cuda' or 'auto'
    dtype: str = 'float32'                 # of the weights: 'float32' or 'bfloat16'
    rewards: dict = field(default_factory=lambda: {'accuracy': 1.0, 'format': 1.0, 'language': 1.0})  # what to score samples by
    preference: dict = field(default_factory=dict)  # reward models of the reward 'preference', {name: folder}
    unsafe_code: bool = False              # let programs of the model run without a sandbox where there is none
    reward_workers: int = -1               # processes that grade; -1: one a core where programs are run, else none
    out: str | None = None                 # write every sample with its rewards to this JSONL file
    summary: str | None = None             # write the numbers to this JSON file
    keep: dict = field(default_factory=dict)  # write only samples with rewards at least these, e.g. {'accuracy': 1, 'format': 1}
    keep_per_prompt: int = 0               # of those, at most so many different ones a problem; 0: all
    keep_rows: int = 0                     # and at most so many in all; 0: all
    chat: bool = False                     # talk to the checkpoint instead


# ---------------------------------------------------------------------------------------------------------------------
# the engine


@dataclass
class Completion:
    tokens: list      # ids, the stop token included when there is one
    logprobs: list    # log-probability of each under softmax(logits / temperature) over the whole vocabulary
    finished: bool    # True: ended with a stop token; False: cut at the length limit


class Sampler:
    """model: a Transformer. stop_ids: tokens that end a completion. slots: rows decoded at once."""

    def __init__(self, model, stop_ids=(), slots=256, check_every=4):
        self.model, self.slots, self.check_every = model, slots, check_every
        self.device = model.head_weight.device
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def generate(self, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, seed=0, keys=None, on_token=None,
                 progress=None):
        """prompts: lists of token ids -> for each prompt a list of n Completions.

        temperature 0 is greedy (its log-probs are those of temperature 1). keys: a number for each prompt that its noise is drawn
        from (default: its place), so that a prompt's samples do not depend on which rank or call draws them. on_token(prompt, sample, token) is called as tokens
        appear. ValueError: an empty prompt, or one that leaves no room for max_new_tokens; FloatingPointError: a logit that is
        not finite, naming the request."""
        self.check(prompts, n, max_new_tokens, temperature, top_p)
        model, device, told = self.model, self.device, Counter()
        queue = deque((p, s) for p in range(len(prompts)) for s in range(n))
        keys = torch.tensor(range(len(prompts)) if keys is None else keys, device=device)
        results = [[None] * n for _ in prompts]
        S = min(self.slots, len(queue))
        L = max(map(len, prompts)) + max_new_tokens
        dtype = model.head_weight.dtype
        cache = [torch.zeros(S, L, model.cfg.cache_width, dtype=dtype, device=device) for _ in range(model.cfg.num_hidden_layers)]
        logits = torch.zeros(S, model.cfg.vocab_size, device=device)                # of each slot's next token
        tokens = torch.zeros(S, max_new_tokens, dtype=torch.int64, device=device)
        logps = torch.zeros(S, max_new_tokens, device=device)
        who = torch.zeros(S, 2, dtype=torch.int64, device=device)                   # (prompt, sample)
        start, made = (torch.zeros(S, dtype=torch.int64, device=device) for _ in range(2))   # prompt length, tokens so far
        done = torch.ones(S, dtype=torch.bool, device=device)
        prefix, m = {}, 0                                                           # prompt -> (entries, logits); slots in use

        while m or queue:
            # fill free slots from the queue, the free ones of the running batch first
            free = done[:m].nonzero()[:, 0].tolist() + list(range(m, S))
            taken = [(slot, *queue.popleft()) for slot in free[:len(queue)]]
            arriving = list(dict.fromkeys(p for _, p, _ in taken))
            fresh = [p for p in arriving if p not in prefix]
            self.prefill([prompts[p] for p in fresh], fresh, prefix)
            if taken:
                slots, ps, ss = (torch.tensor(column, device=device) for column in zip(*taken))
                who[slots], start[slots] = torch.stack([ps, ss], 1), torch.tensor([len(prompts[p]) for _, p, _ in taken], device=device)
                made[slots], done[slots] = 0, False
                logits[slots] = torch.stack([prefix[p][1] for _, p, _ in taken])
                for p in arriving:
                    mine = torch.tensor([slot for slot, q, _ in taken if q == p], device=device)
                    for layer, entry in zip(cache, prefix[p][0]):
                        layer[mine, :len(entry)] = entry
                m = max(m, max(slot for slot, _, _ in taken) + 1)
                waiting = {queue[0][0]} if queue else set()
                prefix = {p: v for p, v in prefix.items() if p in waiting}
            # a few steps without looking at `done` on the host
            length = min(L, int((start + made)[:m].max()) + self.check_every)
            for _ in range(self.check_every):
                x, logp = pick(logits[:m], keys[who[:m, 0]], who[:m, 1], made[:m], seed, temperature, top_p)
                rows, at = torch.arange(m, device=device), made[:m].clamp(max=max_new_tokens - 1)
                live = ~done[:m]
                tokens[rows, at] = torch.where(live, x, tokens[rows, at])
                logps[rows, at] = torch.where(live, logp, logps[rows, at])
                made[:m] += live
                done[:m] |= torch.isin(x, self.stop_ids) | (made[:m] >= max_new_tokens)
                if device.type == 'cpu' and done[:m].all():
                    break
                position = (start + made - 1)[:m].clamp(max=L - 1)
                logits[:m] = model.decode(x.unsqueeze(1), position.unsqueeze(1), [c[:m] for c in cache], length)[:, 0]
            # harvest what finished; close the gaps with the last running rows when nothing waits
            ended = done[:m].nonzero()[:, 0].tolist()
            for slot in ended:
                (p, s), count = who[slot].tolist(), int(made[slot])
                ids = tokens[slot, :count].tolist()
                if results[p][s] is None:
                    results[p][s] = Completion(ids, logps[slot, :count].tolist(), bool(torch.isin(tokens[slot, count - 1], self.stop_ids)))
                    if progress is not None:
                        progress.update()
            if on_token:
                for (p, s), row, count in zip(who[:m].tolist(), tokens, made.tolist()):
                    for token in row[told[p, s]:count].tolist():
                        on_token(p, s, token)
                    told[p, s] = count
            if not torch.isfinite(logps[:m]).all():
                bad = (~torch.isfinite(logps[:m])).any(1).nonzero()[0, 0]
                raise FloatingPointError(f'logits of prompt {who[bad, 0]}, sample {who[bad, 1]} are not finite; the weights are damaged '
                                         f'or training diverged ({sum(c is not None for r in results for c in r)} samples were complete)')
            if not queue and (len(ended) * 4 >= m or len(ended) == m):
                keep = (~done[:m]).nonzero()[:, 0]
                m = len(keep)
                for t in (logits, tokens, logps, who, start, made, done, *cache):
                    t[:m] = t[keep]
        return results

    def prefill(self, prompts, numbers, prefix, at_once=64):
        """prefix[number] = (cache entries of each layer [len, W], logits after the last token [V])"""
        for i in range(0, len(prompts), at_once):
            some = prompts[i:i + at_once]
            T = max(map(len, some))
            ids = torch.tensor([p + [0] * (T - len(p)) for p in some], device=self.device)
            logits, entries = self.model.prefill(ids, torch.tensor([len(p) - 1 for p in some], device=self.device))
            for j, (p, number) in enumerate(zip(some, numbers[i:i + at_once])):
                prefix[number] = [e[j, :len(p)] for e in entries], logits[j]

    def check(self, prompts, n, max_new_tokens, temperature, top_p):
        room = self.model.cfg.max_position_embeddings - max_new_tokens
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= room:
                raise ValueError(f'prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} the context of '
                                 f'{self.model.cfg.max_position_embeddings} leaves room for 1 to {room}')
        if not prompts or n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f'nothing to sample: {len(prompts)} prompts, n={n}, max_new_tokens={max_new_tokens}, '
                             f'temperature={temperature} (>= 0), top_p={top_p} (0 < top_p <= 1)')


def pick(logits_SV, prompt_S, sample_S, position_S, seed, temperature, top_p):
    """Sample by inverting the cumulative distribution at a uniform number -> tokens [S], their log-probs [S]."""
    logp = (logits_SV / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        x = logits_SV.argmax(dim=-1)
    else:
        p = logp.exp()
        if top_p < 1:
            ranked, order = p.sort(dim=-1, descending=True)
            inside = ranked.cumsum(-1) - ranked < top_p            # the smallest set of mass >= top_p
            p = torch.zeros_like(p).scatter_(1, order, ranked * inside)
        cdf = p.double().cumsum(dim=-1)
        u = uniform(seed, prompt_S, sample_S, position_S)
        x = torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1).clamp(max=p.shape[1] - 1)
    return x, logp.gather(1, x.unsqueeze(1)).squeeze(1)


def uniform(seed, *keys_S):
    """An integer and int64 tensors -> float64 in [0, 1): a hash of all, one round of splitmix64's mixer for each."""
    def shift(z, bits):  # logical, not arithmetic
        return (z >> bits) & ((1 << (64 - bits)) - 1)
    h = torch.full_like(keys_S[0], seed)
    for key in (0, *keys_S):
        h = (h ^ key) - 0x61C8864680B583EB                         # constants: 0x9E37.., 0xBF58.., 0x94D0.. as signed numbers
        h = (h ^ shift(h, 30)) * -0x40A7B892E31B1A47
        h = (h ^ shift(h, 27)) * -0x6B2FB644ECCEEE15
        h = h ^ shift(h, 31)
    return shift(h, 11).double() / 2**53


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def encode_prompts(tokenizer, rows, prefill=''):
    """rows with "prompt" (messages or text) -> token ids of each prompt, and the rows with what the assistant's turn starts with
    (the template's own prefill and `prefill`) under "prefill", where the rewards look for it."""
    ids, out = [], []
    for row in rows:
        messages = row['prompt'] if isinstance(row['prompt'], list) else [{'role': 'user', 'content': row['prompt']}]
        prompt, _ = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids.append(prompt + tokenizer.encode_assistant(prefill))
        out.append({**row, 'prefill': tokenizer.generation_prefill() + prefill})
    return ids, out


def score(tokenizer, rows, completions, weights):
    """Completions of each row -> list of dicts {"response", "total", "rewards", "answer", "mixed", "length", "finished"}"""
    scored, responses = [], []
    for row, samples in zip(rows, completions):
        lengths = [len(sample.tokens) for sample in samples]
        for sample, length in zip(samples, lengths):
            response = tokenizer.decode([t for t in sample.tokens if t not in tokenizer.stop_ids])
            responses.append((response, {**row, 'completion_tokens': length, 'shortest': min(lengths), 'longest': max(lengths)}))
    graded = iter(zip(responses, rewards.grade(responses, weights)))
    for row, samples in zip(rows, completions):
        scored.append([])
        for sample, ((response, _), (total, parts)) in zip(samples, graded):
            scored[-1].append({'response': response, 'total': total, 'rewards': parts, 'length': len(sample.tokens),
                               'finished': sample.finished, 'answer': rewards.answer_of(response, row),
                               'mixed': rewards.language_mixed(response, row)})
    return scored


def mean_ci(values):
    """-> mean, [low, high]: the 95% normal interval over problems"""
    x = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * x.std().item() / len(x) ** 0.5 if len(x) > 1 else float('nan')
    return x.mean().item(), [max(0.0, x.mean().item() - half), min(1.0, x.mean().item() + half)]


def pass_at_k(n, right, k):
    """Unbiased estimate from n samples of which `right` are: 1 - C(n - right, k) / C(n, k)."""
    if n - right < k:
        return 1.0
    return 1.0 - torch.prod(1.0 - k / torch.arange(n - right + 1, n + 1, dtype=torch.float64)).item()


def majority(samples):
    """1.0 if the most frequent answer is right (the first of equals); samples without an answer do not vote."""
    votes = Counter(s['answer'] for s in samples if s['answer'] is not None)
    if not votes:
        return 0.0
    winner = votes.most_common(1)[0][0]
    return max(s['rewards']['accuracy'] for s in samples if s['answer'] == winner)


def statistics(scored):
    """-> dict of numbers over the scored samples of all problems; pass1_ci and maj_ci are 95% intervals over problems"""
    n = len(scored[0])
    right = [[s['rewards']['accuracy'] >= 1 for s in samples] for samples in scored]
    every = [s for samples in scored for s in samples]
    average = lambda values: sum(values) / max(1, len(values))  # noqa: E731
    pass1, pass1_ci = mean_ci([average(r) for r in right])
    out = {'problems': len(scored), 'samples': n, 'pass1': pass1, 'pass1_ci': pass1_ci,
           'length': average([s['length'] for s in every]), 'truncated': average([not s['finished'] for s in every])}
    right_lengths = [s['length'] for s in every if s['rewards']['accuracy'] >= 1]
    wrong_lengths = [s['length'] for s in every if s['rewards']['accuracy'] < 1]
    out.update(length_right=average(right_lengths), length_wrong=average(wrong_lengths), mixing=average([s['mixed'] for s in every]))
    out.update({name: average([s['rewards'][name] for s in every]) for name in every[0]['rewards'] if name != 'accuracy'})
    k = 2
    while k <= n:
        out[f'pass{k}'] = average([pass_at_k(n, sum(r), k) for r in right])
        out[f'maj{k}'], out[f'maj{k}_ci'] = mean_ci([majority(samples[:k]) for samples in scored])
        k *= 2
    return out


def evaluate(model, tokenizer, rows, n=8, temperature=1.0, top_p=1.0, max_new_tokens=192, seed=1, greedy=True, prefill='', slots=256,
             weights=None, progress=False):
    """-> (numbers, scored samples). Greedy accuracy is under "greedy" with its interval."""
    weights = weights or {'accuracy': 1.0, 'format': 1.0, 'language': 1.0}
    sampler = Sampler(model, tokenizer.stop_ids, slots)
    ids, rows = encode_prompts(tokenizer, rows, prefill)
    bar = tqdm(total=len(ids) * (n + greedy), desc='sampling', disable=not progress, leave=False)
    completions = sampler.generate(ids, n, max_new_tokens, temperature, top_p, seed, progress=bar)
    scored = score(tokenizer, rows, completions, weights)
    numbers = statistics(scored)
    if greedy:
        best = score(tokenizer, rows, sampler.generate(ids, 1, max_new_tokens, 0.0, progress=bar), weights)
        numbers['greedy'], numbers['greedy_ci'] = mean_ci([s['rewards']['accuracy'] for s, in best])
    bar.close()
    return numbers, scored


def kept(cfg, rows, scored):
    """Rows for SFT: samples whose rewards reach `cfg.keep`, different ones only, at most keep_per_prompt each and keep_rows in all
    (round-robin over the problems)."""
    chosen = []
    for row, samples in zip(rows, scored):
        good = [s for s in samples if s['finished'] and all(s['rewards'][name] >= low for name, low in cfg.keep.items())]
        good = list({s['response']: s for s in good}.values())
        for rank, s in enumerate(good[:cfg.keep_per_prompt or None]):
            prompt = row['prompt'] if isinstance(row['prompt'], list) else [{'role': 'user', 'content': row['prompt']}]
            text = row.get('prefill', '') + s['response']
            chosen.append((rank, {'messages': [*prompt, {'role': 'assistant', 'content': text}], 'task': row['task'], 'rewards': s['rewards']}))
    chosen.sort(key=lambda pair: pair[0])
    return [row for _, row in chosen][:cfg.keep_rows or None]


# ---------------------------------------------------------------------------------------------------------------------
# chat


def chat(cfg, model, tokenizer):
    """Reads lines from the terminal and streams answers; an empty line or Ctrl-D ends. <think> text is dimmed."""
    messages, dim, plain = [], '\x1b[2m', '\x1b[0m'
    while True:
        try:
            text = input('> ')
        except (EOFError, KeyboardInterrupt):
            return print()
        if not text.strip():
            return
        messages.append({'role': 'user', 'content': text})
        prompt, _ = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        stream, said = tokenizer.stream(), []
        def show(_, __, token):
            if token not in tokenizer.stop_ids:
                said.append(piece := stream.add(token))
                print(piece.replace('<think>', dim + '<think>').replace('</think>', '</think>' + plain), end='', flush=True)
        try:
            Sampler(model, tokenizer.stop_ids, slots=1, check_every=1).generate(
                [prompt + tokenizer.encode_assistant(cfg.prefill)], 1, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed + len(messages), on_token=show)
        except ValueError as error:  # the conversation no longer fits
            messages.clear()
            print(f'[{error}; starting afresh]', end='')
        print(plain)
        if messages:
            messages.append({'role': 'assistant', 'content': ''.join(said)})


def write_jsonl(path, rows):
    """Complete or not at all: written beside the target, then moved."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(path.name + '.tmp')
    with open(temp, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    os.replace(temp, path)


def main(cfg):
    torch.set_num_threads(cfg.threads)
    device = ('cuda' if torch.cuda.is_available() else 'cpu') if cfg.device == 'auto' else cfg.device
    model = Transformer.from_pretrained(cfg.checkpoint, getattr(torch, cfg.dtype), device).eval()
    tokenizer = Tokenizer.from_pretrained(cfg.checkpoint)
    if cfg.chat:
        return chat(cfg, model, tokenizer)
    numbers = {}
    written = []
    files = {path: read_rows(path, require=('prompt', 'task'))[:cfg.limit or None] for path in cfg.data}
    rewards.prepare(cfg.rewards, {row['task'] for rows in files.values() for row in rows}, cfg.unsafe_code, cfg.reward_workers, cfg.preference, device)
    for path, rows in files.items():
        numbers[path], scored = evaluate(model, tokenizer, rows, cfg.n, cfg.temperature, cfg.top_p, cfg.max_new_tokens, cfg.seed,
                                         cfg.greedy, cfg.prefill, cfg.slots, cfg.rewards, progress=True)
        if cfg.keep:
            written += kept(cfg, [{**row, 'prefill': tokenizer.generation_prefill() + cfg.prefill} for row in rows], scored)
        else:
            written += [{**row, 'samples': samples} for row, samples in zip(rows, scored)]
        print(path)
        for name, value in numbers[path].items():
            show = lambda v: f'{v:.4g}' if isinstance(v, float) else str(v)  # noqa: E731
            print(f'  {name:14s}', ' to '.join(map(show, value)) if isinstance(value, list) else show(value))
    if cfg.out:
        write_jsonl(cfg.out, written)
        print(f'{len(written)} rows -> {cfg.out}')
    if cfg.summary:
        write_jsonl(cfg.summary, [numbers])
    return numbers


if __name__ == '__main__':
    main(configure(Config, sys.argv[1:]))
