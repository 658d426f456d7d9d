"""
Next-token training: the base model, cold start, supervised fine-tuning, distillation.

    python sft.py config/r1/base.py --seed=2
    torchrun --nproc_per_node=8 sft.py config/distill_qwen2.5_math_7b.py

Reads top to bottom: settings; rows as tokens; the loss; the loop in `main`. What all trainers share
is in train.py.

Rows are JSONL with "messages". A new model comes from `model`, a checkpoint to go on from is
`init_from`. Documents are packed into rows of `row_len` tokens in which they do not see each other;
the loss is the mean over the labelled tokens of the global batch, whatever the number of ranks and
micro-batches (but in bfloat16 for the rounding of their gradients):

    loss = CE(t_{i+1}) + mtp_weight * CE_mtp(t_{i+2}) + balance_alpha * sequence balance,
    router bias b_i += bias_rate * sign(mean(count) - count_i) after every step

Ctrl-C or SIGTERM finishes the step, saves and stops; the same command goes on from there. The
finished model is written to `out_dir` in the hub's layout.

Left out: tensor and expert parallelism, validation loss on text (problems are sampled and graded
instead, which is what the recipe looks at), data streaming (data/tokens.py tokenises all rows
before the first step).
"""

import math
import sys
import textwrap
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

# before torch: says so where it is missing
from configurator import at_least, first_rank, run, tell_idle

import numpy as np
import torch.distributed as dist

import checkpoint
import rewards
from data.loader import PackedBatches
from data.prompts import visible
from data.source import at_row, read_rows
from data.tokens import Documents, token_folders
from evaluate import evaluate, evaluated
from model import sequence_balance_loss, update_router_bias
from train import (Clock, Graded, Log, Meter, Rows, Stop, Unsharded, autocast, check_out_dir,
                   check_ranks, check_start, eval_problems, expert_counts, expert_max_load, finish,
                   idle_in_training, is_due, load_model, load_tokenizer, make_optimizers,
                   model_config, optimizer_step, peak_memory, report_long, report_skip, resume,
                   router_bias, schedule, shard, show_plan, start_processes, total, utilisation)


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
    learns_all = cfg.loss_on == 'all'
    if docs.without_turn and not learns_all:
        raise ValueError(f"{docs.without_turn}: no turn of the assistant's to learn; "
                         "loss_on='all' learns every token")

    # rows that are too long
    is_long = docs.lengths > cfg.row_len
    is_beyond = docs.lengths > context
    if cfg.long_rows == 'drop':
        is_long |= is_beyond
    elif (is_beyond & ~is_long).any():
        first = int(np.flatnonzero(is_beyond & ~is_long)[0])
        raise ValueError(
            f'{docs.where(first)}: {docs.lengths[first]} tokens are more than the {context} of the '
            'model (max_position_embeddings): leave the row out, or lengthen the context: '
            "model={'max_position_embeddings': ...}, and the rope_theta or rope_scaling")
    long = [(docs.where(i), int(docs.lengths[i])) for i in np.flatnonzero(is_long)]
    report_long(cfg, long, len(docs) - len(long))
    docs.select(~is_long)

    # rows without loss
    if not learns_all:
        is_learnt = docs.learnt() > 0
        report_silent(cfg, tokenizer, docs.turns, docs.silent, int((~is_learnt).sum()))
        docs.select(is_learnt)
    return docs


def shared_folders(cfg, tokenizer):
    """-> the folders of cfg.data's token files. Rank 0 writes them, or says what is wrong; ranks of
    a machine that does not see them write their own, one of them each."""
    spare = Path(cfg.out_dir) / 'tokens'
    outcome = [None]         # the folders, or what went wrong
    if first_rank():
        try:
            outcome = [token_folders(cfg.data, tokenizer, spare=spare)]
        except (ValueError, OSError) as error:
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    folders = outcome[0]
    if all((folder / 'about.json').exists() for folder in folders):
        return folders
    return token_folders(cfg.data, tokenizer, spare=spare, quiet=True)


def report_silent(cfg, tokenizer, turns, silent, left_out):
    """Rank 0 says on stderr how many of the assistant's turns carry no loss, and why.

    turns: of the assistant, in all. silent: {reason: turns}. left_out: rows that have no other
    turn. ValueError where most turns are silent, unless cfg.skip_turns."""
    lines = []
    count = sum(silent.values())
    if tokenizer.turn_end is None:
        lines.append('the chat template ends no turn of the assistant with a token that stops '
                     'sampling: the model does not learn to stop')
    if count:
        reasons = ' and '.join(f'{reason} ({n})' for reason, n in silent.items())
        line = f'{count} of {turns} assistant turns carry no loss, because {reasons}'
        if count == turns or (2 * count > turns and not cfg.skip_turns):
            raise ValueError(f'{line}. Give each as the last turn of a row of its own, or set '
                             'chat_template or template_args so that it is shown, or '
                             'skip_turns=True to train on the other turns')
        lines.append(line)
    if left_out:
        lines.append(f'{left_out} rows have no other turn and are left out')
    if lines and first_rank():
        print(*lines, sep='\n', file=sys.stderr)


def show_rows(cfg, tokenizer):
    """Prints the first cfg.show rows of each file of data: what is context and what carries
    loss."""
    for path in cfg.data:
        rows = read_rows(path, require=('messages',))[:cfg.show]
        for number, row in enumerate(rows, 1):
            with at_row(path, number):
                ids, mask = tokenizer.apply_chat_template(row['messages'])
            if cfg.loss_on == 'all':
                mask = [1] * len(ids)
            print(f'{path}, row {number}: {len(ids)} tokens, {sum(mask)} with loss')
            start = 0
            for has_loss, stretch in groupby(mask):
                end = start + len(list(stretch))
                text = visible(tokenizer, ids[start:end])
                print('  loss' if has_loss else '  context')
                print(textwrap.indent(text, '    ', bool))
                start = end
            print()


# --------------------------------------------------------------------------------------------------
# the loss

LOSSES = ('loss', 'mtp_loss', 'balance_loss')  # as logged: next token, the one after, balance


def has_mtp_loss(cfg, model):
    return bool(model.cfg.num_nextn_predict_layers) and cfg.mtp_weight > 0


def has_experts(model):
    return any(hasattr(layer.mlp, 'gate') for layer in model.model.layers)


def accumulate(cfg, model, batch, world):
    """Adds up the gradient of a step's loss over micro-batches.

    batch: tensors [B, row_len] of this rank, as PackedBatches makes them.
    -> {name of LOSSES: number}, over all ranks; tokens that each expert got on all ranks, [MoE
    layers, E] int64, or [] for a model without experts. Called by every rank."""
    device = batch['labels'].device
    labelled = total((batch['labels'] != -100).sum(), device).item()
    rows = len(batch['labels'])
    meter = Meter(LOSSES, device)
    counts = 0
    for i in range(0, rows, cfg.micro_rows):
        part = {name: t[i:i + cfg.micro_rows] for name, t in batch.items()}
        share = len(part['labels']) / rows
        loss, part_counts = micro_loss(cfg, model, part, labelled, share, world, meter)
        loss.backward()
        counts = counts + part_counts
    losses = meter.read()
    if not has_experts(model):
        return losses, []
    return losses, total(counts, device)


def micro_loss(cfg, model, part, labelled, share, world, meter):
    """What a micro-batch adds to the loss of the step.

    part: tensors [b, row_len]. labelled: the step's labelled tokens, over all ranks. share: of this
    rank's rows that are in the part. meter: gets the terms of LOSSES.
    -> loss, a tensor of one number; tokens that each expert got, 0 without experts"""
    device = part['labels'].device
    is_token = (part['doc_ids'] >= 0).long()   # 0: padding
    routes = [] if has_experts(model) else None
    with autocast(cfg, device):
        logp, _, mtp_logp = model.logprobs(**part, mtp=has_mtp_loss(cfg, model), routes=routes)

    # cross-entropy: the mean over the step's labelled tokens. FSDP averages gradients over ranks:
    # `world` undoes it.
    cross_entropy = -logp.sum() / labelled
    loss = cross_entropy * world
    meter.add(loss=cross_entropy)

    # the same for the token after next, by the MTP layer
    if has_mtp_loss(cfg, model):
        mtp_sum = -mtp_logp.sum()
        loss = loss + cfg.mtp_weight * mtp_sum / labelled * world
        meter.add(mtp_loss=mtp_sum / labelled)

    # balance: the mean over sequences, the sum over layers; logged as the mean over layers
    if not routes:
        return loss, 0
    if cfg.balance_alpha:
        terms = [sequence_balance_loss(scores, chosen, is_token) for scores, chosen in routes]
        balance = sum(terms)
        loss = loss + cfg.balance_alpha * share * balance
        meter.add(balance_loss=balance * share / world / len(routes))
    return loss, expert_counts(routes, model.cfg.n_routed_experts, is_token.flatten())


# --------------------------------------------------------------------------------------------------
# the run


@dataclass
class Progress:
    """How far a run is: the numbers that go on from a checkpoint."""
    step: int = 0              # optimizer steps that are done
    seconds: float = 0.0       # of training
    flops: float = 0.0
    tokens: int = 0            # trained on, without padding
    skipped_in_a_row: int = 0  # updates, up to the last one

    def advance(self, batch, flops_per_token, clock):
        """One step more, on this batch. Called by every rank."""
        is_token = batch['doc_ids'] >= 0
        tokens = total(is_token.sum(), is_token.device).item()
        self.step += 1
        self.tokens += tokens
        self.flops += flops_per_token * tokens
        self.seconds = clock.seconds()


def load(cfg, device, rank, world):
    """-> tokenizer, batches (PackedBatches), problems to evaluate, model, optimizers. ValueError
    says what is wrong with settings, rows or problems before the model is loaded."""
    check_ranks(cfg, world)
    check_out_dir(cfg)
    tokenizer = load_tokenizer(cfg)
    shape = model_config(cfg, tokenizer)
    tell_idle(cfg, idle_settings(cfg, shape, world))

    docs = tokenise(cfg, tokenizer, shape.max_position_embeddings)
    batches = PackedBatches(docs, cfg.batch_rows, cfg.row_len, cfg.seed, rank, world,
                            learn_all=cfg.loss_on == 'all')
    rewards.use_file(cfg.reward_file)
    problems = eval_problems(cfg, tokenizer, device)

    model, _ = load_model(cfg, device, tokenizer=tokenizer)
    model = shard(model, cfg, device)
    return tokenizer, batches, problems, model, make_optimizers(model, cfg)


def idle_settings(cfg, shape, world):
    """Cases for configurator.idle. shape: the model's ModelConfig"""
    has_moe = any(shape.is_moe(layer) for layer in range(shape.num_hidden_layers))
    grading = ('preference', 'reward_file', 'unsafe_code', 'reward_workers')
    return [*idle_in_training(cfg, world),
            (not has_moe, ('balance_alpha', 'bias_rate'), 'the model has no experts'),
            (not shape.num_nextn_predict_layers, ('mtp_weight',), 'it has no MTP layer'),
            (cfg.loss_on == 'all', ('skip_turns',), 'every token carries loss'),
            (not cfg.eval_data, grading, 'no eval_data')]


def go_on(cfg, model, optimizers, batches, rank):
    """-> Progress and Log, from the newest checkpoint in out_dir if there is one"""
    state = resume(cfg, model, optimizers)
    progress = Progress()
    if state:
        batches.load_state(state['batches'])
        progress = Progress(state['step'], state['seconds'], state['flops'], state['tokens'],
                            skipped_in_a_row=state['bad'])
    log = Log(cfg, rank, progress.step, cfg.steps)
    if state and (change := rewards.file_changed(state.get('reward_file'))):
        log.warn(f'from step {progress.step} on others score: {change}')
    if rank == 0:
        line = (f'{model.num_params() / 1e6:.2f}M parameters '
                f'({model.num_params(active=True) / 1e6:.2f}M active), '
                f'{len(batches.docs)} documents, {batches.docs.tokens} tokens')
        print(line + (f', from step {progress.step}' if progress.step else ''), file=sys.stderr)
    return progress, log


def save(cfg, progress, clock, model, optimizers, batches, tokenizer):
    """Writes a checkpoint of this step. Called by every rank."""
    state = {
        'seconds': clock.seconds(),
        'flops': progress.flops,
        'tokens': progress.tokens,
        'bad': progress.skipped_in_a_row,
        'batches': batches.state(),
        'date': tokenizer.date.isoformat(),
        'reward_file': rewards.file_stamp(),
    }
    checkpoint.save(cfg.out_dir, progress.step, model, optimizers, state,
                    cfg.keep_checkpoints)


SHOWN = ('loss', 'mtp_loss', 'grad_norm', 'expert_max_load', 'tokens_per_second')  # while it runs


def numbers_of(cfg, model, progress, losses, norm, counts, device, world):
    """-> the numbers of a step for metrics.jsonl. norm, losses, counts: of optimizer_step and
    accumulate."""
    numbers = {
        'step': progress.step,
        'loss': losses['loss'],
        'lr': schedule(progress.step - 1, cfg) * cfg.learning_rate,
        'grad_norm': norm or 0.0,
        'skipped': int(norm is None),
        'tokens': progress.tokens,
        'flops': progress.flops,
        'seconds': progress.seconds,
        'tokens_per_second': progress.tokens / progress.seconds,
        'memory_gib': peak_memory(device),
        **utilisation(cfg, progress.flops, progress.seconds, device, world),
    }
    if has_mtp_loss(cfg, model):
        numbers['mtp_loss'] = losses['mtp_loss']
    if len(counts):
        numbers['balance_loss'] = losses['balance_loss']
        numbers['expert_max_load'] = expert_max_load(counts)
        numbers.update(router_bias(model))
    return numbers


def evaluate_problems(cfg, model, tokenizer, problems, step, log, device):
    """Samples and grades the problems; the numbers go to metrics.jsonl, the first samples to
    samples.txt."""
    failures = rewards.FAILURES.copy()
    with Unsharded(model), autocast(cfg, device):
        numbers, scored = evaluate(model, tokenizer, problems, n=1, greedy=False,
                                   max_new_tokens=cfg.eval_max_new_tokens, seed=cfg.seed,
                                   progress='evaluation')
    if rewards.FAILURES - failures:
        log.warn(f'step {step}: evaluation with rewards that failed: {rewards.told()}')
    log.evaluation(step, numbers)
    log.samples(step, evaluated(tokenizer, problems, '', scored))


def main(cfg):
    """Loads; for each step: batch, loss, backward, optimizer, log, evaluate, save. The finished
    model is in cfg.out_dir."""
    check_start(cfg)
    if cfg.plan:
        return show_plan(cfg)
    device, rank, world = start_processes(cfg)
    if cfg.show:
        tokenizer = load_tokenizer(cfg)      # on all ranks: rank 0 tells the others the date
        return show_rows(cfg, tokenizer) if rank == 0 else None

    # load, and go on from the newest checkpoint
    tokenizer, batches, problems, model, optimizers = load(cfg, device, rank, world)
    progress, log = go_on(cfg, model, optimizers, batches, rank)
    flops_per_token = 6.0 * model.num_params(active=True)
    stop = Stop()
    clock = Clock(progress.seconds)
    saved = progress.step

    for step in range(progress.step, cfg.steps):
        # batch
        batch = {name: t.to(device) for name, t in next(batches).items()}

        # loss and backward
        losses, counts = accumulate(cfg, model, batch, world)

        # optimizer and router bias, unless something is not finite
        norm = optimizer_step(model, optimizers, schedule(step, cfg), cfg.grad_clip,
                              sum(losses.values()))
        if norm is None:
            progress.skipped_in_a_row += 1
            report_skip(cfg, log, step, progress.skipped_in_a_row, batch, rank)
        else:
            progress.skipped_in_a_row = 0
            update_router_bias(model, counts, cfg.bias_rate)

        # log
        progress.advance(batch, flops_per_token, clock)
        log.tick()
        done = progress.step
        if is_due(done, cfg.log_every, cfg.steps):
            numbers = numbers_of(cfg, model, progress, losses, norm, counts, device, world)
            log.write(numbers, SHOWN)

        # evaluate
        if problems and is_due(done, cfg.eval_every, cfg.steps):
            evaluate_problems(cfg, model, tokenizer, problems, done, log, device)

        # save
        if is_due(done, cfg.save_every) or stop.wanted(device):
            save(cfg, progress, clock, model, optimizers, batches, tokenizer)
            saved = done
            if stop.wanted(device):
                stop.leave(log, done, cfg.out_dir)

    if saved != progress.step:   # for more steps, some day
        save(cfg, progress, clock, model, optimizers, batches, tokenizer)
    finish(cfg, model, tokenizer, rank)
    log.close()


if __name__ == '__main__':
    run(main, Config)
    if dist.is_initialized():
        dist.destroy_process_group()
