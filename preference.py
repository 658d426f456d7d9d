"""
The learned reward: which of two answers would be preferred? Trained by sft.py; pairs may come from people, or from scored samples:

    python evaluate.py --checkpoint=out/r1/reject --data="['sort.jsonl']" --n=8 --out=samples.jsonl
    python preference.py --samples="['samples.jsonl']" --tokenizer=out/r1/reject --out=pairs.jsonl --held_out=100
    python sft.py --objective=preference --init_from=out/r1/reject --data="['pairs.jsonl']" --eval_data="['pairs.held_out.jsonl']"

    p(chosen is preferred to rejected) = sigmoid(s(chosen) - s(rejected)),   loss = -log p       (Bradley and Terry, 1952)

s is a linear head on the last token's hidden state of a language model that has read the conversation. Rows of `data` are
{"chosen": [messages], "rejected": [messages]}, the same but for the assistant's last turn. As in DeepSeek-R1 (arXiv:2501.12948,
2.3.4) helpfulness is judged by the final summary alone and safety by the whole response: `judged` says which, in training and,
by the checkpoint, in `rewards.preference_reward`, which is sigmoid(s): how likely the answer is preferred to a typical one.

Left out: margins and ties in the data, other losses of pairs (DPO trains a policy, not a reward).
"""

import itertools
import json
import math
import random
import sys
import textwrap
import time
import zlib
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from configurator import run, tell_idle  # before torch: says so where it is missing

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import checkpoint
from data.prompts import visible
from data.source import at_row, read_rows
from data.tokenizer import Tokenizer
from evaluate import mean_ci
from model import Transformer, cast_once
from rewards import split_response
from sample import present


class RewardModel(Transformer):
    """A Transformer whose output is one number a conversation. lm_head stays in the checkpoint, frozen."""

    def __init__(self, cfg):
        super().__init__(replace(cfg, num_nextn_predict_layers=0))
        self.score = nn.Linear(cfg.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        if not cfg.tie_word_embeddings:
            self.lm_head.weight.requires_grad_(False)

    @classmethod
    def from_language_model(cls, model):
        made = cls(model.cfg).to(model.head_weight.device)
        made.stored_dtype = model.stored_dtype
        wanted = made.state_dict()
        made.load_state_dict({name: t for name, t in model.state_dict().items() if name in wanted}, strict=False)
        return made

    def scores(self, input_ids, last):
        """Conversations [B, T] padded on the right, last [B]: the index of each one's last token -> s [B] float32"""
        rope, mask = self.context(input_ids)
        h = self.hidden(input_ids, rope, mask)
        h = h[torch.arange(len(h), device=h.device), last]
        weight, bias = cast_once(self.score.weight), cast_once(self.score.bias)
        with torch.autocast(h.device.type, enabled=False):
            s = F.linear(h.float(), weight.float(), bias.float())
        return s[:, 0].clone()   # of a view FSDP warns


def padded(docs, device):
    """[ids] -> input_ids [B, T], last [B]"""
    T = max(map(len, docs))
    ids = torch.tensor([doc + [0] * (T - len(doc)) for doc in docs], device=device)
    return ids, torch.tensor([len(doc) - 1 for doc in docs], device=device)


def conversation(tokenizer, messages, judged):
    """-> ids of the messages, of whose last only the summary (what follows the reasoning) is left where that is what is judged"""
    *before, last = messages
    if judged == 'summary':
        last = {**last, 'content': split_response(last['content'], {})[1].strip()}
    return tokenizer.apply_chat_template([*before, last])[0]


def read_pairs(path, tokenizer, judged, row_len, context=math.inf, long=None):
    """-> [(ids of chosen, ids of rejected)]. ValueError names a row that is no pair. One longer
    than row_len or the model's context is added to `long`, as (file and row, tokens); without that
    list it is an error."""
    pairs = []
    for number, row in enumerate(read_rows(path, require=('chosen', 'rejected')), 1):
        where = f'{path}, row {number}'
        for side in ('chosen', 'rejected'):
            if not isinstance(row[side], list) or not row[side] or row[side][-1].get('role') != 'assistant':
                raise ValueError(f'{where}: "{side}" must be a list of messages that ends with the assistant\'s')
        if row['chosen'][:-1] != row['rejected'][:-1]:
            raise ValueError(f'{where}: chosen and rejected must answer the same conversation')
        with at_row(path, number):
            pair = tuple(conversation(tokenizer, row[side], judged)
                         for side in ('chosen', 'rejected'))
        length = max(map(len, pair))
        if length <= min(row_len, context):
            pairs.append(pair)
        elif long is not None:
            long.append((where, length))
        elif length > row_len:
            raise ValueError(f'{where}: {length} tokens do not fit row_len={row_len}')
        else:
            raise ValueError(f'{where}: {length} tokens are more than the {context} of the model '
                             '(max_position_embeddings): leave the row out, or lengthen it')
    return pairs


def fitting_pairs(cfg, tokenizer, paths, context, long):
    """-> the pairs of these files that fit cfg.row_len and the context. Others are refused, or,
    where long_rows is 'drop', added to `long` as (file and row, tokens)."""
    from sft import tell_long
    limits = cfg.judged, cfg.row_len, context, long
    pairs = [pair for path in paths for pair in read_pairs(path, tokenizer, *limits)]
    tell_long(cfg, long, len(pairs))
    return pairs


def show_pairs(cfg, tokenizer):
    """Prints the first cfg.show pairs of each file of data as the reward model reads them"""
    for path in cfg.data:
        pairs = read_pairs(path, tokenizer, cfg.judged, math.inf)[:cfg.show]
        for number, pair in enumerate(pairs, 1):
            print(f'{path}, row {number}: {len(pair[0])} and {len(pair[1])} tokens')
            for name, ids in zip(('chosen', 'rejected'), pair):
                print(f'  {name}\n{textwrap.indent(visible(tokenizer, ids), "    ", bool)}')
            print()


@torch.no_grad()
def judge_pairs(model, pairs, device, rows):
    """-> s(chosen) [n], s(rejected) [n], in parts of `rows` pairs"""
    parts = [model.scores(*padded([pair[k] for k in (0, 1) for pair in pairs[i:i + rows]], device)).view(2, -1)
             for i in range(0, len(pairs), rows)]
    return torch.cat(parts, 1)


def accuracy(chosen, rejected, prompts=None):
    """-> share of pairs in which the chosen one scores more (ties count half), its 95% interval,
    the loss. prompts: that of each pair, since pairs of one prompt say less than as many of
    several; without it every pair has a prompt of its own."""
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    loss = -F.logsigmoid(chosen - rejected).mean().item()
    return *mean_ci(right.tolist(), prompts), loss


def pair_order(n, batch, seed):
    """Endless batches of pair numbers; every epoch in an order drawn anew."""
    left, epoch = [], 0
    while True:
        while len(left) < batch:
            left += torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
            epoch += 1
        yield left[:batch]
        left = left[batch:]


def train(cfg):
    """sft.py's settings; a row of a batch is a pair. The finished model says in preference.json what it judges."""
    from sft import (Log, Stop, begin, finish, idle_in_training, let_go, load_model,
                     load_tokenizer, make_optimizers, model_config, optimizer_step,
                     resume, schedule, shard, start_processes, total)
    device, rank, world = start_processes(cfg)
    tokenizer = load_tokenizer(cfg)
    if cfg.show:
        return show_pairs(cfg, tokenizer) if rank == 0 else None
    begin(cfg)
    tell_idle(cfg, [*idle_in_training(cfg, world),
                    (True, ('loss_on', 'skip_turns', 'mtp_weight', 'balance_alpha', 'bias_rate',
                            'max_bad_updates', 'eval_rows', 'eval_max_new_tokens'),
                     "it is for objective='tokens'")])
    if cfg.batch_rows % world:
        raise ValueError(f'batch_rows={cfg.batch_rows} does not divide into {world} ranks')
    context = model_config(cfg, tokenizer).max_position_embeddings
    pairs = fitting_pairs(cfg, tokenizer, cfg.data, context, [])
    held_out = fitting_pairs(cfg, tokenizer, cfg.eval_data, context, long := [])
    language_model, _ = load_model(cfg, device, whole=True, tokenizer=tokenizer)
    model = RewardModel.from_language_model(language_model)
    del language_model
    dropped = {where for where, _ in long}
    prompts = [json.dumps(row['chosen'][:-1]) for path in cfg.eval_data
               for number, row in enumerate(read_rows(path, require=('chosen',)), 1)
               if f'{path}, row {number}' not in dropped]
    model = shard(model, cfg, device)
    if dist.is_initialized():
        torch.distributed.fsdp.register_fsdp_forward_method(model, 'scores')
    optimizers, order, step, seconds = make_optimizers(model, cfg, device), pair_order(len(pairs), cfg.batch_rows, cfg.seed), 0, 0.0
    data = zlib.crc32(json.dumps(pairs).encode())
    if state := resume(cfg, model, optimizers):
        if (state['data'], state['seed']) != (data, cfg.seed):
            raise ValueError(f'the checkpoint in {cfg.out_dir} was saved with other pairs or another seed; set another out_dir to start anew')
        step, seconds = state['step'], state['seconds']
        for _ in range(step):
            next(order)
    log, stop, began, saved = Log(cfg, rank, step, cfg.steps), Stop(), time.time(), step

    def save():
        nonlocal seconds, began, saved
        seconds, began, saved = seconds + time.time() - began, time.time(), step
        state = {'data': data, 'seed': cfg.seed, 'seconds': seconds}
        state['date'] = tokenizer.date.isoformat()
        checkpoint.save(cfg.out_dir, step, model, optimizers, state, cfg.keep)

    while step < cfg.steps:
        mine, sums = [pairs[i] for i in next(order)[rank::world]], torch.zeros(2, device=device)
        for i in range(0, len(mine), cfg.micro_rows):
            part = mine[i:i + cfg.micro_rows]
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == 'bfloat16'):
                chosen, rejected = model.scores(*padded([pair[k] for k in (0, 1) for pair in part], device)).view(2, -1)
            loss = -F.logsigmoid(chosen - rejected).sum() / cfg.batch_rows
            (loss * world).backward()  # FSDP averages over ranks
            sums += torch.stack([loss.detach(), (chosen > rejected).sum() / cfg.batch_rows])
        sums = total(sums, device).tolist()
        norm = optimizer_step(model, optimizers, schedule(step, cfg), cfg.grad_clip, sums[0])
        if norm is None:
            raise FloatingPointError(f'step {step + 1}: loss or gradient is not finite; try a lower learning_rate')
        step += 1
        log.tick()
        if step % cfg.log_every == 0 or step == cfg.steps:
            log.write({'step': step, 'loss': sums[0], 'accuracy': sums[1], 'grad_norm': norm, 'lr': schedule(step - 1, cfg) * cfg.learning_rate,
                       'seconds': seconds + time.time() - began}, ('loss', 'accuracy'))
        if held_out and (step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0):
            scores = judge_pairs(model, held_out, device, cfg.micro_rows)
            right, interval, loss = accuracy(*scores, prompts)
            log.write({'step': step, 'eval_accuracy': right, 'eval_accuracy_ci': interval, 'eval_loss': loss}, ('eval_accuracy',))
            if rank == 0 and step == cfg.steps:
                low, high = interval
                print(f'{len(held_out)} held-out pairs of {len(set(prompts))} prompts: {right:.3f} '
                      f'right, 95% interval {low:.3f} to {high:.3f}', file=sys.stderr)
        if (cfg.save_every and step % cfg.save_every == 0) or stop.wanted(device):
            save()
            if stop.wanted(device):
                stop.leave(log, step, cfg.out_dir)
    if saved != step:          # for more steps, some day
        save()
    with torch.no_grad():  # the loss does not know where zero is: let a typical answer score 0
        typical = judge_pairs(model, pairs[:256], device, cfg.micro_rows).mean().item()
        let_go(model).score.bias -= typical
    if rank == 0:
        about = {'judged': cfg.judged, 'date': tokenizer.date.isoformat()}
        (Path(cfg.out_dir) / 'preference.json').write_text(json.dumps(about))
    finish(cfg, model, tokenizer, rank)
    log.close()


@dataclass
class PairsConfig:
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
    """A row with scored samples -> pairs of a sample of the best total and one of the worst, where these differ, each of the worst once"""
    prompt = row['prompt'] if isinstance(row['prompt'], list) else [{'role': 'user', 'content': row['prompt']}]
    totals = [s['total'] for s in row['samples']]
    best, worst = (list(dict.fromkeys(s['response'] for s in row['samples'] if s['total'] == end)) for end in (max(totals), min(totals)))
    if max(totals) == min(totals):
        return []
    rng.shuffle(best)
    rng.shuffle(worst)
    prefill = tokenizer.generation_prefill(prompt) + prefill
    said = lambda response: [*prompt, {'role': 'assistant', 'content': prefill + response}]  # noqa: E731
    return [{'chosen': said(good), 'rejected': said(bad)} for good, bad in zip(itertools.cycle(best), worst[:per_prompt])]


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
        raise ValueError(f'{len(rows)} prompts, {len(found)} of them with samples that score differently: too few to hold out '
                         f'{cfg.held_out}')
    out = Path(cfg.out)
    for path, part in ((out, found[cfg.held_out:]), (out.with_suffix('.held_out.jsonl'), found[:cfg.held_out])):
        lines = [json.dumps(pair, ensure_ascii=False) + '\n' for pairs in part for pair in pairs]
        if lines:
            path.write_text(''.join(lines), encoding='utf-8')
            print(f'{len(lines)} pairs of {len(part)} prompts -> {path}')


class Judge:
    """A trained reward model, to ask: judge(prompt, text), or judge.read(many) first, which reads
    them in batches. A template that prints the date prints that of its training, so that a run
    which goes on tomorrow has the same rewards."""

    def __init__(self, folder, device='cpu'):
        path = Path(folder) / 'preference.json'
        if not path.exists():
            raise ValueError(f'{folder} holds no reward model: train one with python sft.py --objective=preference --out_dir={folder}')
        about = json.loads(path.read_text())
        self.judged = about['judged']
        self.model = RewardModel.from_pretrained(folder, device=device)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        if 'date' in about:
            self.tokenizer.date = datetime.fromisoformat(about['date'])
        self.device, self.known = device, {}

    def __call__(self, prompt, text):
        """prompt: messages or text; text: the assistant's whole turn -> sigmoid(s)"""
        key = json.dumps(prompt), text
        if key not in self.known:
            self.read([(prompt, text)])
        return self.known[key]

    @torch.no_grad()
    def read(self, asked, rows=32):
        """asked: [(prompt, text)]; their values are known afterwards, others forgotten. Longer conversations lose their beginning."""
        docs, self.known = {}, {}
        for prompt, text in asked:
            messages = prompt if isinstance(prompt, list) else [{'role': 'user', 'content': prompt}]
            ids = conversation(self.tokenizer, [*messages, {'role': 'assistant', 'content': text}], self.judged)
            docs[json.dumps(prompt), text] = ids[-self.model.cfg.max_position_embeddings:]
        keys = sorted(docs, key=lambda key: len(docs[key]))
        for i in range(0, len(keys), rows):
            part = keys[i:i + rows]
            self.known.update(zip(part, self.model.scores(*padded([docs[key] for key in part], self.device)).sigmoid().tolist()))


if __name__ == '__main__':
    run(main, PairsConfig)
