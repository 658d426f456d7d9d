"""
Next-token training: the base model, cold start, supervised fine-tuning, distillation.

    python sft.py config/r1/base.py --seed=2
    torchrun --nproc_per_node=8 sft.py config/sft_qwen.py --data="['traces.jsonl']"

Reads top to bottom: settings; rows as tokens; the loop in `main`. What all trainers share is in
train.py.

Rows are JSONL with "messages". A new model comes from `model`, a checkpoint to go on from is `init_from`. Documents are packed
into rows of `row_len` tokens in which they do not see each other; the loss is the mean over the labelled tokens of the global
batch, whatever the number of ranks and micro-batches (but in bfloat16
for the rounding of their gradients):

    loss = CE(t_{i+1}) + mtp_weight * CE_mtp(t_{i+2}) + balance_alpha * sequence balance,
    router bias b_i += bias_rate * sign(mean(count) - count_i) after every step

Ctrl-C or SIGTERM finishes the step, saves and stops; the same command goes on from there. The finished model is written to
`out_dir` in the hub's layout.

Left out: tensor and expert parallelism, validation loss on text (problems are sampled and graded instead, which is what the
recipe looks at), data streaming (data/tokens.py tokenises all rows before the first step).
"""

import math
import sys
import textwrap
import time
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

# before torch: says so where it is missing
from configurator import at_least, first_rank, run, tell_idle

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import rewards
from data.loader import PackedBatches
from data.prompts import visible
from data.source import at_row, read_rows
from data.tokens import Documents, token_folders
from evaluate import evaluate, evaluated
from model import sequence_balance_loss, update_router_bias
from train import (Graded, Log, Rows, Stop, Unsharded, begin, check_start, eval_problems,
                   expert_counts, finish, idle_in_training, load_model, load_tokenizer,
                   make_optimizers, model_config, report_skip, optimizer_step, peak_memory,
                   peak_tflops, resume, router_bias, schedule, shard, show_plan, start_processes,
                   tell_long, total)


@dataclass
class Config(Rows, Graded):
    # start
    out_dir: str = 'out/sft'
    init_from: str | None = None           # folder or hub id to start from; None: a new model of
                                           # shape `model`
    data: list[str] = field(default_factory=lambda: ['out/r1/data/corpus.jsonl'])  # JSONL files
                                           # of rows with "messages"

    # batches
    loss_on: Literal['assistant', 'all'] = 'assistant'  # its turns only, or every token (a base
                                           # model)
    skip_turns: bool = False               # train although most assistant turns carry no loss
    row_len: int = 136                     # tokens a packed row
    long_rows: Literal['error', 'drop'] = 'error'  # what to do with rows longer than that, and
                                           # problems without room for eval_max_new_tokens

    # loss
    mtp_weight: float = 0.3                # weight of the MTP loss, where the model has that layer
    balance_alpha: float = 1e-4            # weight of the sequence-wise balance loss
    bias_rate: float = 1e-3

    # evaluation
    eval_max_new_tokens: int = 192         # longest completion of an evaluation

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'eval_max_new_tokens')
        at_least(self, 0, 'mtp_weight', 'balance_alpha')
        if not self.data:
            raise ValueError('data is empty: give it files of rows')


# --------------------------------------------------------------------------------------------------
# rows as tokens


def tokenise(cfg, tokenizer, context=math.inf):
    """-> data.tokens.Documents of the rows of cfg.data, less those that are too long and those in
    which no turn carries loss. context: the model's. ValueError names file and row."""
    docs = Documents.mapped(shared_folders(cfg, tokenizer), cfg.data)
    everything = cfg.loss_on == 'all'
    if docs.without_turn and not everything:
        raise ValueError(f"{docs.without_turn}: no turn of the assistant's to learn; "
                         "loss_on='all' learns every token")
    long = docs.lengths > cfg.row_len
    beyond = docs.lengths > context
    if cfg.long_rows == 'drop':
        long |= beyond
    elif (beyond & ~long).any():
        first = int(np.flatnonzero(beyond & ~long)[0])
        raise ValueError(
            f'{docs.where(first)}: {docs.lengths[first]} tokens are more than the {context} of the '
            'model (max_position_embeddings): leave the row out, or lengthen the context: '
            "model={'max_position_embeddings': ...}, and the rope_theta or rope_scaling")
    named = [(docs.where(i), int(docs.lengths[i])) for i in np.flatnonzero(long)]
    tell_long(cfg, named, len(docs) - len(named))
    docs.keep(~long)
    if not everything:
        learnt = docs.learnt() > 0
        tell_silent(cfg, tokenizer, docs.turns, docs.silent, int((~learnt).sum()))
        docs.keep(learnt)
    return docs


def shared_folders(cfg, tokenizer):
    """-> the folders of cfg.data's token files. Rank 0 writes them, or says what is wrong; ranks of
    a machine that does not see them write their own, one of them each."""
    spare, told = Path(cfg.out_dir) / 'tokens', [None]
    if first_rank():
        try:
            told = [token_folders(cfg.data, tokenizer, spare=spare)]
        except (ValueError, OSError) as error:
            told = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    if isinstance(told[0], Exception):
        raise told[0]
    if all((folder / 'about.json').exists() for folder in told[0]):
        return told[0]
    return token_folders(cfg.data, tokenizer, spare=spare, quiet=True)


def tell_silent(cfg, tokenizer, turns, silent, left_out):
    """Rank 0 says on stderr how many of the assistant's turns carry no loss, and why. silent:
    {reason: turns}; left_out: rows that have no other. ValueError where that is most turns, unless
    cfg.skip_turns."""
    told, few = [], sum(silent.values())
    if tokenizer.turn_end is None:
        told.append('the chat template ends no turn of the assistant with a token that stops '
                    'sampling: the model does not learn to stop')
    if few:
        because = ' and '.join(f'{reason} ({n})' for reason, n in silent.items())
        told.append(f'{few} of {turns} assistant turns carry no loss, because {because}')
        if few == turns or (2 * few > turns and not cfg.skip_turns):
            raise ValueError(f'{told[-1]}. Give each as the last turn of a row of its own, or set '
                             'chat_template or template_args so that it is shown, or '
                             'skip_turns=True to train on the other turns')
    if left_out:
        told.append(f'{left_out} rows have no other turn and are left out')
    if told and first_rank():
        print(*told, sep='\n', file=sys.stderr)


def show_rows(cfg, tokenizer):
    """Prints the first cfg.show rows of each file of data: what is context and what carries loss"""
    for path in cfg.data:
        for number, row in enumerate(read_rows(path, require=('messages',))[:cfg.show], 1):
            with at_row(path, number):
                ids, mask = tokenizer.apply_chat_template(row['messages'])
            mask = [1] * len(ids) if cfg.loss_on == 'all' else mask
            print(f'{path}, row {number}: {len(ids)} tokens, {sum(mask)} with loss')
            for learnt, run in groupby(zip(mask, ids), itemgetter(0)):
                text = visible(tokenizer, [i for _, i in run])
                print(f'  {"loss" if learnt else "context"}\n{textwrap.indent(text, "    ", bool)}')
            print()


# --------------------------------------------------------------------------------------------------
# the run


def main(cfg):
    check_start(cfg)
    if cfg.plan:
        return show_plan(cfg)
    device, rank, world = start_processes(cfg)
    if cfg.show:
        tokenizer = load_tokenizer(cfg)      # on all ranks: rank 0 tells the others the date
        return show_rows(cfg, tokenizer) if rank == 0 else None
    if cfg.batch_rows % world:
        raise ValueError(f'batch_rows={cfg.batch_rows} does not divide into {world} ranks')
    begin(cfg)
    tokenizer = load_tokenizer(cfg)
    shape = model_config(cfg, tokenizer)
    no_experts = not any(map(shape.is_moe, range(shape.num_hidden_layers)))
    tell_idle(cfg, [*idle_in_training(cfg, world),
                    (no_experts, ('balance_alpha', 'bias_rate'), 'the model has no experts'),
                    (not shape.num_nextn_predict_layers, ('mtp_weight',), 'it has no MTP layer'),
                    (cfg.loss_on == 'all', ('skip_turns',), 'every token carries loss'),
                    (not cfg.eval_data, ('preference', 'reward_file', 'unsafe_code',
                                         'reward_workers'), 'no eval_data')])
    docs = tokenise(cfg, tokenizer, shape.max_position_embeddings)
    batches = PackedBatches(docs, cfg.batch_rows, cfg.row_len, cfg.seed, rank, world,
                            learn_all=cfg.loss_on == 'all')
    rewards.use_file(cfg.reward_file)
    problems = eval_problems(cfg, tokenizer, device)
    model, _ = load_model(cfg, device, tokenizer=tokenizer)
    active, params = model.num_params(active=True), model.num_params()
    moe = any(hasattr(layer.mlp, 'gate') for layer in model.model.layers)
    model = shard(model, cfg, device)
    optimizers = make_optimizers(model, cfg)

    # go on from the newest checkpoint
    step, seconds, flops, tokens, bad = 0, 0.0, 0.0, 0, 0
    if state := resume(cfg, model, optimizers):
        step, seconds, flops, tokens, bad = (state[key] for key in ('step', 'seconds', 'flops', 'tokens', 'bad'))
        batches.load_state(state['batches'])
    log, stop = Log(cfg, rank, step, cfg.steps), Stop()
    if state and (said := rewards.file_changed(state.get('reward_file'))):
        log.warn(f'from step {step} on others score: {said}')
    if rank == 0:
        told = f'{params / 1e6:.2f}M parameters ({active / 1e6:.2f}M active), '
        told += f'{len(docs)} documents, {docs.tokens} tokens'
        print(told + (f', from step {step}' if step else ''), file=sys.stderr)

    def save():
        nonlocal seconds, began, saved
        seconds, began, saved = seconds + time.time() - began, time.time(), step
        state = {'seconds': seconds, 'flops': flops, 'tokens': tokens, 'bad': bad, 'batches': batches.state()}
        state['date'] = tokenizer.date.isoformat()
        state['reward_file'] = rewards.file_stamp()
        checkpoint.save(cfg.out_dir, step, model, optimizers, state, cfg.keep)

    stream, mtp = iter(batches), bool(model.cfg.num_nextn_predict_layers) and cfg.mtp_weight > 0
    began, saved = time.time(), step
    while step < cfg.steps:
        # one optimizer step: gradient accumulation over micro-batches
        batch = {name: t.to(device) for name, t in next(stream).items()}
        labelled = total((batch['labels'] != -100).sum(), device).item()
        n_rows, sums, counts = len(batch['labels']), torch.zeros(3, device=device), 0
        for i in range(0, n_rows, cfg.micro_rows):
            part, routes = {name: t[i:i + cfg.micro_rows] for name, t in batch.items()}, []
            times = (part['doc_ids'] >= 0).flatten().long()      # 0: padding
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == 'bfloat16'):
                logp, _, mtp_logp = model.logprobs(**part, mtp=mtp, routes=routes if moe else None)
            # FSDP averages over ranks: `world` undoes it, so that the loss is the mean over the global batch
            loss = -logp.sum() / labelled * world
            sums[0] -= logp.detach().sum() / labelled
            if mtp:
                loss = loss + cfg.mtp_weight * -mtp_logp.sum() / labelled * world
                sums[1] -= mtp_logp.detach().sum() / labelled
            if moe and cfg.balance_alpha:
                balance = sum(sequence_balance_loss(s, c, times.view_as(part['labels'])) for s, c in routes)
                share = len(part['labels']) / n_rows
                loss = loss + cfg.balance_alpha * share * balance
                sums[2] += balance.detach() * share / world / len(routes)
            loss.backward()
            if moe:
                counts = counts + expert_counts(routes, model.cfg.n_routed_experts, times)
        sums = total(sums, device)
        norm = optimizer_step(model, optimizers, schedule(step, cfg), cfg.grad_clip, sums.sum().item())
        bad = bad + 1 if norm is None else 0
        if bad:
            report_skip(cfg, log, step, bad, batch, rank)
        if moe:
            counts = total(counts, device)
            update_router_bias(model, counts, cfg.bias_rate * (not bad))
        step += 1
        step_tokens = total((batch['doc_ids'] >= 0).sum(), device).item()
        tokens, flops = tokens + step_tokens, flops + 6.0 * active * step_tokens
        log.tick()
        # look
        if step % cfg.log_every == 0 or step == cfg.steps:
            sums, now, peak = sums.tolist(), seconds + time.time() - began, 1e12 * peak_tflops(cfg, device) * world
            numbers = {'step': step, 'loss': sums[0], 'lr': schedule(step - 1, cfg) * cfg.learning_rate, 'grad_norm': norm or 0.0, 'skipped': int(bad > 0),
                       'tokens': tokens, 'flops': flops, 'seconds': now,
                       'tokens_per_second': tokens / now, 'memory_gib': peak_memory(device)}
            numbers.update({'mfu': flops / now / peak} if peak else {})
            numbers.update({'mtp_loss': sums[1]} if mtp else {})
            if moe:  # 1: every expert gets the same; balance_loss is the mean over layers
                numbers.update(balance_loss=sums[2], expert_max_load=(counts.amax(1) / counts.float().mean(1)).mean().item(), **router_bias(model))
            log.write(numbers, ('loss', 'mtp_loss', 'grad_norm', 'expert_max_load', 'tokens_per_second'))
        if problems and (step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0):
            before = rewards.FAILURES.copy()
            with Unsharded(model), torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == 'bfloat16'):
                numbers, scored = evaluate(model, tokenizer, problems, n=1, greedy=False, max_new_tokens=cfg.eval_max_new_tokens, seed=cfg.seed)
            if rewards.FAILURES - before:
                log.warn(f'step {step}: evaluation with rewards that failed: {rewards.told()}')
            log.write({'step': step, **{f'eval_{k}': v for k, v in numbers.items()}}, ('eval_pass1', 'eval_length'))
            log.samples(step, evaluated(tokenizer, problems, '', scored))
        if (cfg.save_every and step % cfg.save_every == 0) or stop.wanted(device):
            save()
            if stop.wanted(device):
                stop.leave(log, step, cfg.out_dir)
    if saved != step:                                            # for more steps, some day
        save()
    finish(cfg, model, tokenizer, rank)
    log.close()


if __name__ == '__main__':
    run(main, Config)
    if dist.is_initialized():
        dist.destroy_process_group()
