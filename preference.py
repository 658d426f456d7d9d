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
import zlib
from dataclasses import dataclass
from itertools import islice
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
from train import (Clock, Log, Meter, Rows, Stop, autocast, check_out_dir, check_ranks, check_start,
                   finish, idle_in_training, is_due, load_model, load_tokenizer, make_optimizers,
                   model_config, optimizer_step, report_long, reshard, resume, schedule, shard,
                   show_plan, start_processes)


@dataclass
class Config(Rows):
    # batches
    judged: Literal['summary', 'response'] = 'summary'  # what follows the reasoning, or all

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise ValueError('data is empty: give it files of pairs')


# --------------------------------------------------------------------------------------------------
# pairs as tokens


def read_pairs(path, tokenizer, judged, row_len, context=math.inf, long=None):
    """-> [(ids of chosen, ids of rejected)], the longer at most row_len and context tokens.

    Longer ones are added to the list `long`, as (file and row, tokens); without it they are an
    error. ValueError names the row that is too long or no pair."""
    pairs = []
    for number, row in enumerate(read_rows(path, require=('chosen', 'rejected')), 1):
        where = f'{path}, row {number}'
        check_pair(row, where)
        with at_row(path, number):
            chosen = conversation(tokenizer, row['chosen'], judged)
            rejected = conversation(tokenizer, row['rejected'], judged)
        length = max(len(chosen), len(rejected))
        if length <= min(row_len, context):
            pairs.append((chosen, rejected))
        elif long is not None:
            long.append((where, length))
        elif length > row_len:
            raise ValueError(f'{where}: {length} tokens do not fit row_len={row_len}')
        else:
            raise ValueError(f'{where}: {length} tokens are more than the {context} of the model '
                             '(max_position_embeddings): leave the row out, or lengthen it')
    return pairs


def check_pair(row, where):
    """ValueError unless chosen and rejected are conversations that differ in the assistant's last
    turn at most."""
    for side in ('chosen', 'rejected'):
        messages = row[side]
        is_chat = isinstance(messages, list) and len(messages) > 0
        if not is_chat or messages[-1].get('role') != 'assistant':
            raise ValueError(f'{where}: "{side}" must be a list of messages that ends with the '
                             "assistant's")
    if row['chosen'][:-1] != row['rejected'][:-1]:
        raise ValueError(f'{where}: chosen and rejected must answer the same conversation')


def fitting_pairs(cfg, tokenizer, paths, context):
    """-> the pairs of these files that fit cfg.row_len and the context; (file and row, tokens) of
    those that do not. ValueError where there are such and cfg.long_rows is 'error'."""
    pairs = []
    long = []
    for path in paths:
        pairs += read_pairs(path, tokenizer, cfg.judged, cfg.row_len, context, long)
    report_long(cfg, long, len(pairs))
    return pairs, long


def prompts_of(paths, long):
    """-> for each pair of these files its prompt as a text. long: of fitting_pairs, to leave
    out."""
    left_out = {where for where, _ in long}
    prompts = []
    for path in paths:
        for number, row in enumerate(read_rows(path, require=('chosen',)), 1):
            if f'{path}, row {number}' not in left_out:
                prompts.append(json.dumps(row['chosen'][:-1]))
    return prompts


def show_pairs(cfg, tokenizer):
    """Prints the first cfg.show pairs of each file of data as the reward model reads them."""
    for path in cfg.data:
        pairs = read_pairs(path, tokenizer, cfg.judged, math.inf)[:cfg.show]
        for number, (chosen, rejected) in enumerate(pairs, 1):
            print(f'{path}, row {number}: {len(chosen)} and {len(rejected)} tokens')
            for name, ids in (('chosen', chosen), ('rejected', rejected)):
                print(f'  {name}\n{textwrap.indent(visible(tokenizer, ids), "    ", bool)}')
            print()


def pair_order(n, batch, seed):
    """Endless batches of pair numbers below n; every epoch in an order drawn anew."""
    left = []
    epoch = 0
    while True:
        while len(left) < batch:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            left += torch.randperm(n, generator=generator).tolist()
            epoch += 1
        yield left[:batch]
        left = left[batch:]


# --------------------------------------------------------------------------------------------------
# scores


def scores_of(model, pairs, device):
    """-> s(chosen), s(rejected): float32 [2, pairs]"""
    docs = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    input_ids, last = padded(docs, device)
    return model.scores(input_ids, last).view(2, -1)


@torch.no_grad()
def judge_pairs(model, pairs, device, rows):
    """-> s(chosen), s(rejected): float32 [2, pairs], read `rows` pairs at a time"""
    parts = [scores_of(model, pairs[i:i + rows], device) for i in range(0, len(pairs), rows)]
    return torch.cat(parts, 1)


def accuracy(chosen, rejected, prompts=None):
    """s(chosen) [n], s(rejected) [n] -> share of pairs in which the chosen one scores more (ties
    count half), its 95% interval, the loss.

    prompts: that of each pair, since pairs of one prompt say less than as many of several; without
    it every pair has a prompt of its own."""
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    mean, interval = mean_ci(right.tolist(), prompts)
    loss = -F.logsigmoid(chosen - rejected).mean().item()
    return mean, interval, loss


def accumulate(cfg, model, pairs, world, device):
    """Adds up the gradient of a step's loss over micro-batches; pairs: this rank's.
    -> {'loss', 'accuracy'}, over all ranks. Called by every rank."""
    meter = Meter(('loss', 'accuracy'), device)
    for i in range(0, len(pairs), cfg.micro_rows):
        with autocast(cfg, device):
            chosen, rejected = scores_of(model, pairs[i:i + cfg.micro_rows], device)
        loss = -F.logsigmoid(chosen - rejected).sum() / cfg.batch_rows
        (loss * world).backward()  # FSDP averages over ranks
        meter.add(loss=loss, accuracy=(chosen > rejected).sum() / cfg.batch_rows)
    return meter.read()


# --------------------------------------------------------------------------------------------------
# the run


def load_pairs(cfg, tokenizer, world):
    """-> pairs to train on, held-out pairs, the prompts of the latter. ValueError says what is
    wrong with settings or rows before a model is loaded."""
    check_out_dir(cfg)
    tell_idle(cfg, idle_in_training(cfg, world))
    check_ranks(cfg, world)
    context = model_config(cfg, tokenizer).max_position_embeddings
    pairs, _ = fitting_pairs(cfg, tokenizer, cfg.data, context)
    held_out, long = fitting_pairs(cfg, tokenizer, cfg.eval_data, context)
    return pairs, held_out, prompts_of(cfg.eval_data, long)


def load_reward_model(cfg, tokenizer, device):
    """-> RewardModel made of the language model that cfg names, ready for training; optimizers"""
    language_model, _ = load_model(cfg, device, whole=True, tokenizer=tokenizer)
    model = RewardModel.from_language_model(language_model)
    del language_model
    model = shard(model, cfg, device)
    if dist.is_initialized():
        register_fsdp_forward_method(model, 'scores')
    return model, make_optimizers(model, cfg)


def go_on(cfg, model, optimizers, identity, rank):
    """Loads the newest checkpoint in out_dir, if there is one -> steps that are done, Log, Clock.
    ValueError where the identity (data and seed) of that run is another."""
    state = resume(cfg, model, optimizers)
    if not state:
        return 0, Log(cfg, rank, 0, cfg.steps), Clock()
    if any(state[key] != value for key, value in identity.items()):
        raise ValueError(f'the checkpoint in {cfg.out_dir} was saved with other pairs or '
                         'another seed; set another out_dir to start anew')
    return state['step'], Log(cfg, rank, state['step'], cfg.steps), Clock(state['seconds'])


def check_finite(norm, step):
    """FloatingPointError where optimizer_step skipped the update of a step (from 0)."""
    if norm is None:
        raise FloatingPointError(f'step {step + 1}: loss or gradient is not finite; '
                                 'try a lower learning_rate')


def evaluate_pairs(cfg, model, pairs, prompts, step, log, device):
    """Writes how many of the held-out pairs are ordered rightly to metrics.jsonl, and at the end of
    the run on stderr."""
    chosen, rejected = judge_pairs(model, pairs, device, cfg.micro_rows)
    right, interval, loss = accuracy(chosen, rejected, prompts)
    numbers = {'accuracy': right, 'accuracy_ci': interval, 'loss': loss}
    log.evaluation(step, numbers, ('accuracy', 'loss'))
    if not log.quiet and step == cfg.steps:
        low, high = interval
        print(f'{len(pairs)} held-out pairs of {len(set(prompts))} prompts: {right:.3f} '
              f'right, 95% interval {low:.3f} to {high:.3f}', file=sys.stderr)


@torch.no_grad()
def centre(cfg, model, pairs, device):
    """Moves the bias so that a typical answer scores 0: the loss does not know where zero is."""
    typical = judge_pairs(model, pairs[:256], device, cfg.micro_rows).mean().item()
    reshard(model).score.bias -= typical


def finish_reward_model(cfg, model, tokenizer, pairs, device, rank):
    """Writes the finished model to out_dir, and preference.json: what it judges, and the date that
    its template printed. Called by every rank."""
    centre(cfg, model, pairs, device)
    if rank == 0:
        about = {'judged': cfg.judged, 'date': tokenizer.date.isoformat()}
        (Path(cfg.out_dir) / 'preference.json').write_text(json.dumps(about))
    finish(cfg, model, tokenizer, rank)


def main(cfg):
    """Loads; for each step: batch, loss, backward, optimizer, log, evaluate, save. The finished
    model says in preference.json what it judges."""
    check_start(cfg)
    if cfg.plan:
        return show_plan(cfg)
    device, rank, world = start_processes(cfg)
    tokenizer = load_tokenizer(cfg)
    if cfg.show:
        return show_pairs(cfg, tokenizer) if rank == 0 else None

    # load, and go on from the newest checkpoint
    pairs, held_out, prompts = load_pairs(cfg, tokenizer, world)
    model, optimizers = load_reward_model(cfg, tokenizer, device)
    identity = {'data': zlib.crc32(json.dumps(pairs).encode()), 'seed': cfg.seed}
    done, log, clock = go_on(cfg, model, optimizers, identity, rank)
    saved = done
    order = islice(pair_order(len(pairs), cfg.batch_rows, cfg.seed), done, None)
    stop = Stop()

    def save():
        state = {**identity, 'seconds': clock.seconds(), 'date': tokenizer.date.isoformat()}
        checkpoint.save(cfg.out_dir, done, model, optimizers, state,
                        cfg.keep_checkpoints)

    for step in range(done, cfg.steps):
        # batch
        batch = [pairs[i] for i in next(order)[rank::world]]

        # loss and backward
        sums = accumulate(cfg, model, batch, world, device)

        # optimizer
        share = schedule(step, cfg)
        norm = optimizer_step(model, optimizers, share, cfg.grad_clip, sums['loss'])
        check_finite(norm, step)

        # log
        done += 1
        log.tick()
        if is_due(done, cfg.log_every, cfg.steps):
            numbers = {'grad_norm': norm, 'lr': share * cfg.learning_rate,
                       'seconds': clock.seconds()}
            log.write({'step': done, **sums, **numbers}, ('loss', 'accuracy'))

        # evaluate
        if held_out and is_due(done, cfg.eval_every, cfg.steps):
            evaluate_pairs(cfg, model, held_out, prompts, done, log, device)

        # save
        if is_due(done, cfg.save_every) or stop.wanted(device):
            save()
            saved = done
            if stop.wanted(device):
                stop.leave(log, done, cfg.out_dir)

    if saved != done:   # for more steps, some day
        save()
    finish_reward_model(cfg, model, tokenizer, pairs, device, rank)
    log.close()


if __name__ == '__main__':
    run(main, Config)
    if dist.is_initialized():
        dist.destroy_process_group()
