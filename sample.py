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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import rewards
from configurator import configure
from data import teacher
from data.loader import read_rows
from data.tokenizer import Tokenizer
from decode import Sampler
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
    endpoint: str | None = None            # ask an OpenAI-compatible server instead; `checkpoint` is then the model's name there
    remote: dict = field(default_factory=dict)  # more settings for that, see data/teacher.py


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
    if cfg.endpoint:
        return teacher.from_sample(cfg)
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
