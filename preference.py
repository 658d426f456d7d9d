"""
The learned reward: which of two answers would be preferred? Pairs may come from people, or from
scored samples (data/pairs.py):

    python preference.py config/r1/reward.py
    python preference.py --init_from=out/r1/reject --data=pairs.jsonl \
        --eval_data=pairs.held_out.jsonl

    p(chosen is preferred to rejected) = sigmoid(s(chosen) - s(rejected)),   loss = -log p

(Bradley and Terry, 1952.) s is a linear head on the last token's hidden state of a language model
that has read the conversation (judge.py). Rows of `data` are
{"chosen": [messages], "rejected": [messages]}, the same but for the assistant's last turn. As in
DeepSeek-R1 (arXiv:2501.12948, 2.3.4) helpfulness is judged by the final summary alone and safety by
the whole response: `judged` says which, in training and, by the checkpoint, in
`rewards.preference_reward`, which is sigmoid(s): how likely the answer is preferred to a typical
one.

Left out: margins and ties in the data, other losses of pairs (DPO trains a policy, not a reward).
"""

import json
import math
import sys
import textwrap
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import run, tell_idle  # before torch: says so where it is missing

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import register_fsdp_forward_method

import checkpoint
from data.prompts import visible
from data.source import at_row, read_rows
from evaluate import mean_ci
from judge import RewardModel, conversation, padded
from train import (Log, Rows, Stop, begin, check_start, finish, idle_in_training, reshard,
                   load_model, load_tokenizer, make_optimizers, model_config, optimizer_step,
                   resume, schedule, shard, show_plan, start_processes, tell_long, total)


@dataclass
class Config(Rows):
    # batches
    judged: Literal['summary', 'response'] = 'summary'  # what follows the reasoning, or all

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise ValueError('data is empty: give it files of pairs')


def read_pairs(path, tokenizer, judged, row_len, context=math.inf, long=None):
    """-> [(ids of chosen, ids of rejected)]. ValueError names a row that is no pair. One longer
    than row_len or the model's context is added to `long`, as (file and row, tokens); without that
    list it is an error."""
    pairs = []
    for number, row in enumerate(read_rows(path, require=('chosen', 'rejected')), 1):
        where = f'{path}, row {number}'
        for side in ('chosen', 'rejected'):
            messages = row[side]
            if (not isinstance(messages, list) or not messages
                    or messages[-1].get('role') != 'assistant'):
                raise ValueError(f'{where}: "{side}" must be a list of messages that ends with the '
                                 "assistant's")
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


def scores_of(model, pairs, device):
    """-> [2, pairs]: s(chosen), s(rejected)"""
    docs = [pair[k] for k in (0, 1) for pair in pairs]
    return model.scores(*padded(docs, device)).view(2, -1)


@torch.no_grad()
def judge_pairs(model, pairs, device, rows):
    """-> s(chosen) [n], s(rejected) [n], in parts of `rows` pairs"""
    parts = [scores_of(model, pairs[i:i + rows], device) for i in range(0, len(pairs), rows)]
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
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            left += torch.randperm(n, generator=generator).tolist()
            epoch += 1
        yield left[:batch]
        left = left[batch:]


def main(cfg):
    """The finished model says in preference.json what it judges."""
    check_start(cfg)
    if cfg.plan:
        return show_plan(cfg)
    device, rank, world = start_processes(cfg)
    tokenizer = load_tokenizer(cfg)
    if cfg.show:
        return show_pairs(cfg, tokenizer) if rank == 0 else None
    begin(cfg)
    tell_idle(cfg, idle_in_training(cfg, world))
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
        register_fsdp_forward_method(model, 'scores')
    optimizers = make_optimizers(model, cfg)
    order = pair_order(len(pairs), cfg.batch_rows, cfg.seed)
    step, seconds = 0, 0.0
    data = zlib.crc32(json.dumps(pairs).encode())
    if state := resume(cfg, model, optimizers):
        if (state['data'], state['seed']) != (data, cfg.seed):
            raise ValueError(f'the checkpoint in {cfg.out_dir} was saved with other pairs or '
                             'another seed; set another out_dir to start anew')
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
                chosen, rejected = scores_of(model, part, device)
            loss = -F.logsigmoid(chosen - rejected).sum() / cfg.batch_rows
            (loss * world).backward()  # FSDP averages over ranks
            sums += torch.stack([loss.detach(), (chosen > rejected).sum() / cfg.batch_rows])
        sums = total(sums, device).tolist()
        norm = optimizer_step(model, optimizers, schedule(step, cfg), cfg.grad_clip, sums[0])
        if norm is None:
            raise FloatingPointError(f'step {step + 1}: loss or gradient is not finite; '
                                     'try a lower learning_rate')
        step += 1
        log.tick()
        if step % cfg.log_every == 0 or step == cfg.steps:
            numbers = {'step': step, 'loss': sums[0], 'accuracy': sums[1], 'grad_norm': norm,
                       'lr': schedule(step - 1, cfg) * cfg.learning_rate,
                       'seconds': seconds + time.time() - began}
            log.write(numbers, ('loss', 'accuracy'))
        if held_out and (step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0):
            scores = judge_pairs(model, held_out, device, cfg.micro_rows)
            right, interval, loss = accuracy(*scores, prompts)
            numbers = {'step': step, 'eval_accuracy': right, 'eval_accuracy_ci': interval,
                       'eval_loss': loss}
            log.write(numbers, ('eval_accuracy',))
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
        reshard(model).score.bias -= typical
    if rank == 0:
        about = {'judged': cfg.judged, 'date': tokenizer.date.isoformat()}
        (Path(cfg.out_dir) / 'preference.json').write_text(json.dumps(about))
    finish(cfg, model, tokenizer, rank)
    log.close()


if __name__ == '__main__':
    run(main, Config)
    if dist.is_initialized():
        dist.destroy_process_group()
