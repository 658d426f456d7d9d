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
    samples: list[str] = field(default_factory=list)  # of evaluate.py --out: "prompt" and "samples"
    tokenizer: str = ''                    # folder of the tokenizer that they were sampled with
    chat_template: str | None = None       # as in evaluate.py, when the samples were drawn
    template_args: dict = field(default_factory=dict)  # as in evaluate.py, for the same
    prefill: str = ''                      # text the assistant's turn was given to start with
    per_prompt: int = 1                    # pairs of a prompt at most
    held_out: int = 0                      # prompts set aside into *.held_out.jsonl
    seed: int = 1                          # of the choice among equals
    out: str = 'pairs.jsonl'               # file to write


def pairs_of(row, tokenizer, prefill, per_prompt, rng):
    """A row with scored samples -> pairs of a sample of the best total and one of the worst, where
    these differ, each of the worst once"""
    prompt = row['prompt']
    if not isinstance(prompt, list):
        prompt = [{'role': 'user', 'content': prompt}]
    totals = [s['total'] for s in row['samples']]
    if max(totals) == min(totals):
        return []

    def responses(total):
        return list(dict.fromkeys(s['response'] for s in row['samples'] if s['total'] == total))

    best, worst = responses(max(totals)), responses(min(totals))
    rng.shuffle(best)
    rng.shuffle(worst)
    prefill = tokenizer.generation_prefill(prompt) + prefill

    def said(response):
        return [*prompt, {'role': 'assistant', 'content': prefill + response}]

    return [{'chosen': said(good), 'rejected': said(bad)}
            for good, bad in zip(itertools.cycle(best), worst[:per_prompt])]


def main(cfg):
    if not cfg.samples or not cfg.tokenizer:
        raise ValueError('set samples (files of evaluate.py --out) and tokenizer (the checkpoint '
                         'that they were sampled with)')
    present(cfg, 'tokenizer')
    rng = random.Random(cfg.seed)
    tokenizer = Tokenizer.from_pretrained(cfg.tokenizer, cfg.chat_template, cfg.template_args)
    rows = [row for path in cfg.samples for row in read_rows(path, require=('prompt', 'samples'))]
    found = [pairs_of(row, tokenizer, cfg.prefill, cfg.per_prompt, rng) for row in rows]
    found = [pairs for pairs in found if pairs]
    rng.shuffle(found)
    if len(found) <= cfg.held_out:
        raise ValueError(f'{len(rows)} prompts, {len(found)} of them with samples that score '
                         f'differently: too few to hold out {cfg.held_out}')
    out = Path(cfg.out)
    held_out = out.with_suffix('.held_out.jsonl')
    for path, part in ((out, found[cfg.held_out:]), (held_out, found[:cfg.held_out])):
        lines = [json.dumps(pair, ensure_ascii=False) + '\n' for pairs in part for pair in pairs]
        if lines:
            path.write_text(''.join(lines), encoding='utf-8')
            print(f'{len(lines)} pairs of {len(part)} prompts -> {path}')


if __name__ == '__main__':
    run(main, Config)
