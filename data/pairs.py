"""
Pairs of a better and a worse answer, from scored samples, for preference.py.

    python evaluate.py --checkpoint=out/r1/reject --data=sort.jsonl --n=8 --out=samples.jsonl
    python data/pairs.py --samples=samples.jsonl --tokenizer=out/r1/reject --out=pairs.jsonl \
        --held_out=100
"""

import itertools
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere
from configurator import run

from data.source import read_rows
from data.tokenizer import Tokenizer
from sample import present


@dataclass
class Config:
    # samples
    samples: list[str] = field(default_factory=list)  # of evaluate.py --out: "prompt" and "samples"
    tokenizer: str = ''                    # folder of the tokenizer that they were sampled with
    chat_template: str | None = None       # as in evaluate.py, when the samples were drawn
    template_args: dict = field(default_factory=dict)  # as in evaluate.py, for the same
    prefill: str = ''                      # text the assistant's turn was given to start with

    # pairs
    per_prompt: int = 1                    # pairs of a prompt at most
    held_out: int = 0                      # prompts set aside into *.held_out.jsonl
    seed: int = 1                          # of the choice among equals
    out: str = 'pairs.jsonl'               # file to write


def pairs_of(row, tokenizer, prefill, per_prompt, rng):
    """row: with "prompt" (messages or text) and scored "samples" -> at most per_prompt pairs
    {"chosen": messages, "rejected": messages} of a sample of the best total and one of the worst,
    each of the worst once. [] where all totals are equal. rng: random.Random."""
    prompt = row['prompt']
    if not isinstance(prompt, list):
        prompt = [{'role': 'user', 'content': prompt}]
    totals = [s['total'] for s in row['samples']]
    if max(totals) == min(totals):
        return []

    best = responses_of(row, max(totals))
    worst = responses_of(row, min(totals))
    rng.shuffle(best)
    rng.shuffle(worst)

    prefill = tokenizer.generation_prefill(prompt) + prefill
    pairs = []
    for good, bad in zip(itertools.cycle(best), worst[:per_prompt]):
        chosen = {'role': 'assistant', 'content': prefill + good}
        rejected = {'role': 'assistant', 'content': prefill + bad}
        pairs.append({'chosen': [*prompt, chosen], 'rejected': [*prompt, rejected]})
    return pairs


def responses_of(row, total):
    """-> the different responses with that total, in the row's order"""
    return list(dict.fromkeys(s['response'] for s in row['samples'] if s['total'] == total))


def write_pairs(path, prompts):
    """prompts: the pairs of each. Where there are none, no file is written."""
    lines = []
    for pairs in prompts:
        lines += [json.dumps(pair, ensure_ascii=False) + '\n' for pair in pairs]
    if lines:
        path.write_text(''.join(lines), encoding='utf-8')
        print(f'{len(lines)} pairs of {len(prompts)} prompts -> {path}')


def main(cfg):
    """Writes cfg.out and *.held_out.jsonl beside it. ValueError where the samples give too few
    pairs to hold out."""
    if not cfg.samples or not cfg.tokenizer:
        raise ValueError('set samples (files of evaluate.py --out) and tokenizer (the checkpoint '
                         'that they were sampled with)')
    present(cfg, 'tokenizer')
    rng = random.Random(cfg.seed)
    tokenizer = Tokenizer.from_pretrained(cfg.tokenizer, cfg.chat_template, cfg.template_args)

    # the pairs of each prompt
    rows = []
    for path in cfg.samples:
        rows += read_rows(path, require=('prompt', 'samples'))
    prompts = [pairs_of(row, tokenizer, cfg.prefill, cfg.per_prompt, rng) for row in rows]
    prompts = [pairs for pairs in prompts if pairs]
    rng.shuffle(prompts)
    if len(prompts) <= cfg.held_out:
        raise ValueError(f'{len(rows)} prompts, {len(prompts)} of them with samples that score '
                         f'differently: too few to hold out {cfg.held_out}')

    # none of a prompt that is held out is trained on
    out = Path(cfg.out)
    write_pairs(out, prompts[cfg.held_out:])
    write_pairs(out.with_suffix('.held_out.jsonl'), prompts[:cfg.held_out])


if __name__ == '__main__':
    run(main, Config)
