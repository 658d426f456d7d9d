"""
Evaluation, test-time compute, sample files. The sampler itself is in sample.py.

    python evaluate.py config/r1/eval.py --checkpoint=out/r1/final   # pass@1, greedy, pass@k and
                                                                     # maj@k with intervals
    python evaluate.py config/eval_gsm8k.py config/eval_deepseek.py --checkpoint=<folder> \
        --out=out/gsm8k.jsonl
    python evaluate.py --checkpoint=out/r1/zero --data=out/r1/data/rl.jsonl \
        --keep="{'accuracy': 1}" --out=samples.jsonl
    torchrun --nproc_per_node=8 evaluate.py config/x.py    # one share of the problems and one file
                                           # a rank (n in the file: torchrun takes --n for its own)

The way of a token:

    main               reads the problems, loads the model, and evaluates file after file
    evaluate           has n samples drawn of each problem, and the greedy one, and counts them
    sample_problems    asks the sampler for those of this rank that are not known yet; with a budget
                       for the thinking, budget_forcing does, in turns
    Sampler.generate   samples them: sample.py
    score              gives the text of each completion to the rewards

With `out`, finished problems are noted in OUT.partial while sampling goes on: the same command goes
on from there after a stop, to the same samples. With `keep` only samples that pass its filters are
written, as rows for SFT (rejection sampling).

Test-time compute: a majority vote (maj@k, where answers that the task's grader calls equal are one
vote), the best of n by a reward (best_of), and budget forcing (think_budget, think_at_least).
What is right: rewards.right, everywhere; what the numbers are called: `statistics`.
"""

import json
import os
import sys
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

# before torch: says so where it is missing
from configurator import at_least, idle, run, tell_idle

import torch
import torch.distributed as dist

import hub
import plan
import rewards
from data import teacher
from data.countdown.prepare import solve
from data.prompts import encode_prompts, fitting, instructed, visible
from data.source import at_row, read_rows
from data.tokenizer import Tokenizer
from judge import load_judges
from model import ModelConfig
from progress import Bar, glance, tell
from sample import Completion, Sampler, Sampling, load, present, until_stop, use_device

# name -> weight, where no others are set
REWARDS = {'accuracy': 1.0, 'format': 1.0, 'language': 1.0}


@dataclass
class Config(Sampling):
    # problems
    data: list[str] = field(default_factory=lambda: ['out/r1/data/test.jsonl'])  # problem files:
                                           # rows with "prompt", "task", ...
    limit: int = 0                         # use the first so many problems; 0: all
    long_prompts: Literal['error', 'drop'] = 'error'  # what to do with prompts that leave no room
                                           # for max_new_tokens
    show: int = 0                          # print the first so many prompts of each file and what
                                           # their own answers earn, then stop
    plan: bool | str = False               # print what the run needs in memory and stop: on this
                                           # machine, or on ranks x GB as 8x80
    # samples
    n: int = 8                             # samples a problem (under torchrun, which takes --n for
                                           # its own, in a config file)
    greedy: bool = True                    # evaluate the greedy answer too
    # rewards
    rewards: dict[str, float] = field(default_factory=REWARDS.copy)  # what to score samples by
    preference: dict[str, str] = field(default_factory=dict)  # reward models of the reward
                                           # 'preference', {name: folder}
    reward_file: str = ''                  # Python file of your own rewards and tasks, functions
                                           # name_reward(response, row)
    reward_workers: int = -1               # processes that grade; -1: one a core where programs are
                                           # run or there is a reward_file, else none
    unsafe_code: bool = False              # let programs of the model run without a sandbox where
                                           # there is none
    # test-time compute
    best_of: dict[str, float] = field(default_factory=dict)  # report the best of n by these rewards
                                           # and weights, e.g. {'preference': 1.0}
    think_budget: int = 0                  # cut the thinking after so many tokens and have it
                                           # answer; 0: no limit
    think_at_least: int = 0                # keep it thinking up to so many tokens: an earlier end
                                           # is replaced by `wait`
    think_end: str = '</think>'            # the text that ends the thinking
    wait: str = 'Wait'                     # the text that keeps it going
    # files
    out: str | None = None                 # write every sample with its rewards to this JSONL file
                                           # (several ranks: one each)
    summary: str | None = None             # write the numbers to this JSON file
    # rejection sampling: which samples are written
    keep: dict[str, float] = field(default_factory=dict)  # write only samples with rewards at least
                                           # these, e.g. {'accuracy': 1, 'format': 1}
    keep_length: list[int] = field(default_factory=list)  # of [shortest, longest] tokens
    keep_pass_rate: list[float] = field(default_factory=list)  # of problems of which [least, most]
                                           # of the samples are right, e.g. [0.1, 0.9]
    keep_per_prompt: int = 0               # of those, at most so many different ones a problem; 0:
                                           # all
    keep_rows: int = 0                     # and at most so many in all; 0: all
    # a server instead of a checkpoint
    endpoint: str | None = None            # ask an OpenAI-compatible server instead; `checkpoint`
                                           # is then the model's name there
    remote: dict = field(default_factory=dict)  # more settings for that, see data/teacher.py

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'n')
        at_least(self, 0, 'show', 'limit', 'think_budget', 'think_at_least', 'keep_per_prompt',
                 'keep_rows')
        if not self.data:
            raise ValueError('data is empty: give it files of problems')
        unknown = self.keep.keys() - self.rewards.keys()
        if unknown:
            raise ValueError(f'keep asks for {min(unknown)!r}, which is none of the rewards: '
                             f'{", ".join(self.rewards)}')
        for key in ('keep_length', 'keep_pass_rate'):
            band = getattr(self, key)
            if band and (len(band) != 2 or band[0] > band[1]):
                raise ValueError(f'{key} must be [least, most], not {band}')


# --------------------------------------------------------------------------------------------------
# evaluation: sample, score, count


def evaluate(model, tokenizer, rows, n=8, temperature=1.0, top_p=1.0, max_new_tokens=192, seed=1,
             greedy=True, prefill='', slots=256, weights=None, progress='', top_k=0, min_p=0.0,
             stop=(), speculate=None, best=None, think=None, partial=None, answers=None,
             examples=0):
    """
    rows: problems -> (numbers, scored samples), the same on every rank of a process group, each of
    which samples every world-th row.

    numbers: as of `statistics`; with `best` also "best_of<n>", with `greedy` also "greedy", each
        with its interval; "drafts_accepted" where an MTP layer drafted
    scored samples: for each row a list of n, as of `score`
    n, temperature, top_p, top_k, min_p: of the samples; the greedy answer is one more, at 0
    weights: {reward: weight} to score by; None: REWARDS
    best: {reward: weight} to choose the best of n by
    think: keywords of `budget_forcing`; None: the thinking is free
    partial: a Partial, which knows this rank's samples of an earlier run and takes the new ones
    answers: a list, which takes the scored greedy answer to each problem
    progress: what the bar is called; '': none. examples: so many of the samples that are finished
        first are printed, to be seen before all are
    """
    weights = with_unweighted(weights or REWARDS, best)
    sampler = Sampler(model, tokenizer.stop_ids, slots, stop_strings=stop, tokenizer=tokenizer,
                      speculate=speculate)
    share = Share(tokenizer, rows, prefill, max_new_tokens)
    bar = Bar(progress, len(share.rows) * samples_each(n, greedy), 'samples', show=bool(progress))
    how = {'max_new_tokens': max_new_tokens, 'seed': seed, 'progress': bar}

    # n samples of each problem
    completions = sample_problems(sampler, share, 'samples', n, think, partial, **how,
                                  examples=examples, temperature=temperature, top_p=top_p,
                                  top_k=top_k, min_p=min_p)
    scored = score(tokenizer, share.rows, completions, weights, stop)
    if n > 1:
        vote(scored, share.rows)
    scored = share.gather(scored)
    numbers = statistics(scored)
    if best and (right := best_of(scored, best)):
        numbers[f'best_of{n}'], numbers[f'best_of{n}_ci'] = mean_ci(right)

    # the greedy answer to each
    if greedy:
        completions = sample_problems(sampler, share, 'greedy', 1, think, partial, **how,
                                      temperature=0.0)
        greedily = share.gather(score(tokenizer, share.rows, completions, weights, stop))
        right = [rewards.right(answer) for (answer,) in greedily]
        right = [float(r) for r in right if r is not None]
        if right:
            numbers['greedy'], numbers['greedy_ci'] = mean_ci(right)
        if answers is not None:
            answers += [answer for (answer,) in greedily]

    drafted, accepted = share.add_up(sampler.drafted, sampler.accepted)
    if drafted:
        numbers['drafts_accepted'] = accepted / drafted
    bar.close()
    return numbers, scored


def with_unweighted(weights, best):
    """-> weights with the accuracy, and what the best of n is chosen by, at weight 0 where they
    have none: they are computed too"""
    return {'accuracy': 0.0, **dict.fromkeys(best or (), 0.0), **weights}


def samples_each(n, greedy):
    """How many samples a problem has in all."""
    return n + 1 if greedy else n


class Share:
    """The problems of this rank, every world-th of `rows`.

    numbers: their places in `rows`, from which their noise is drawn, so that samples do not depend
        on the number of ranks
    rows: the problems, with "max_length", which the reward 'overlong' reads, and the "prefill" of
        encode_prompts
    prompts: their token ids, a list each
    """

    def __init__(self, tokenizer, rows, prefill, max_new_tokens):
        self.count = len(rows)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.numbers = range(self.count)[self.rank::self.world]
        mine = [{'max_length': max_new_tokens, **rows[number]} for number in self.numbers]
        self.prompts, self.rows = encode_prompts(tokenizer, mine, prefill)

    def gather(self, values):
        """values: one for each problem of the share -> those of all ranks, in the order of all
        rows. Called by every rank."""
        if self.world == 1:
            return values
        of_ranks = [None] * self.world
        dist.all_gather_object(of_ranks, values)
        gathered = [None] * self.count
        for rank, of_rank in enumerate(of_ranks):
            gathered[rank::self.world] = of_rank
        return gathered

    def add_up(self, *counts):
        """-> of each count the sum over all ranks. Called by every rank."""
        of_ranks = [counts] * self.world
        if self.world > 1:
            dist.all_gather_object(of_ranks, counts)
        return [sum(column) for column in zip(*of_ranks)]


def sample_problems(sampler, share, kind, n, think, partial, progress, examples=0, **how):
    """
    -> n Completions for each problem of the share; those that `partial` knows are not sampled again

    kind: 'samples' or 'greedy', under which `partial` keeps them
    think, partial: as in `evaluate`
    progress: a Bar, which counts samples; examples: so many of the first to end are printed
    how: more keywords of Sampler.generate
    """
    completions = [None] * len(share.numbers)
    if partial is not None:
        completions = [partial.get(kind, number) for number in share.numbers]
    missing = [i for i, known in enumerate(completions) if known is None]
    progress.skip(n * (len(completions) - len(missing)))
    if not missing:
        return completions
    to_print = iter(range(examples))

    def note(i, s, completion):
        if partial is not None:
            partial.add(kind, share.numbers[missing[i]], s, n, completion)
        if next(to_print, None) is not None:
            print_example(sampler.tokenizer, share, missing[i], completion)

    prompts = [share.prompts[i] for i in missing]
    how['keys'] = [share.numbers[i] for i in missing]
    how['progress'] = progress
    how['on_done'] = note
    if think is None:
        sampled = sampler.generate(prompts, n, **how)
    else:
        sampled = budget_forcing(sampler, sampler.tokenizer, prompts, n, **think, **how)
    for i, samples in zip(missing, sampled):
        completions[i] = samples
    return completions


def print_example(tokenizer, share, i, completion):
    """One of the first Completions, of the problem i of the share; it is not graded yet."""
    tell(f'problem {share.numbers[i] + 1}, {len(completion.tokens)} tokens\n'
         f'{glance(visible(tokenizer, share.prompts[i]), 2)}\n'
         f'{glance(visible(tokenizer, completion.tokens))}')


def score(tokenizer, rows, completions, weights, stop=()):
    """
    rows: problems; completions: a list for each -> for each a list of scored samples, dicts:

    response     its text, up to the end of the first of the texts `stop` in it
    total        the weighted sum of its rewards
    rewards      {name: reward}, unweighted, of all names in weights
    length       its tokens
    finished     whether it ended by itself, not at the limit
    answer       what it gives as its answer, or None
    mixed        whether it mixes languages
    task         of the row
    """
    said = []
    for samples in completions:
        texts = [until_stop(text_of(tokenizer, sample.tokens), stop) for sample in samples]
        said.append([Said(text, len(sample.tokens), sample.finished)
                     for text, sample in zip(texts, samples)])
    return score_said(rows, said, weights)


class Said(NamedTuple):
    """A response as it is graded."""
    text: str
    length: int       # tokens
    finished: bool    # by itself, not at the limit


def score_said(rows, said, weights):
    """rows: problems; said: for each a list of Said -> the same as `score`"""
    responses = []   # (response, row with lengths) of all samples, row after row
    for row, samples in zip(rows, said):
        lengths = [sample.length for sample in samples]
        for sample in samples:
            told = {'completion_tokens': sample.length, 'shortest': min(lengths),
                    'longest': max(lengths)}
            responses.append((sample.text, {**row, **told}))

    graded = iter(rewards.grade(responses, weights))
    scored = []
    for row, samples in zip(rows, said):
        scored.append([])
        for sample in samples:
            total, parts = next(graded)
            scored[-1].append({
                'response': sample.text,
                'total': total,
                'rewards': parts,
                'length': sample.length,
                'finished': sample.finished,
                'answer': rewards.answer_of(sample.text, row),
                'mixed': rewards.language_mixed(sample.text, row),
                'task': row['task'],
            })
    return scored


def text_of(tokenizer, tokens):
    """The text of a completion, without its stop token."""
    return tokenizer.decode([token for token in tokens if token not in tokenizer.stop_ids])


def evaluated(tokenizer, rows, prefill, scored, count=4):
    """-> of the first problems the first sample, for Log.samples of train.py: tuples (title,
    {name: number}, prompt, response)"""
    prompts, _ = encode_prompts(tokenizer, rows[:count], prefill)
    samples = []
    for number, (prompt, (first, *_)) in enumerate(zip(prompts, scored), 1):
        numbers = {**first['rewards'], 'total': first['total'], 'tokens': first['length']}
        title = f'evaluation, problem {number}'
        samples.append((title, numbers, visible(tokenizer, prompt), first['response']))
    return samples


# --------------------------------------------------------------------------------------------------
# the numbers


def statistics(scored):
    """
    scored: a list of n scored samples for each problem -> dict of numbers, with 95% intervals over
    problems as [low, high] under "..._ci":

    pass1        share of samples that are right (rewards.right)
    passK        share of problems with a right one among K samples, for K = 2, 4, 8, ... up to n
    majK         share of problems whose majority of the first K is right
    accuracy     mean reward of the task, which is pass1 where that reward is 0 or 1
    judged       mean reward of tasks without right and wrong
    length, length_right, length_wrong, length_p50, ...     tokens: mean, and quantiles in percent
    truncated, truncated_right, truncated_wrong     share that was cut at the limit
    mixing       share that mixes languages
    <reward>     mean of any other reward; reward_<reward> where the name is one of those above

    What counts right answers leaves out tasks without right and wrong; majorities also leave out
    tasks whose answers cannot be compared (rewards.NO_VOTE). A number of nothing is None or absent.
    """
    n = len(scored[0])
    every = list(chain.from_iterable(scored))
    checked = [samples for samples in scored if rewards.right(samples[0]) is not None]
    right = [sum(map(rewards.right, samples)) for samples in checked]   # of n, of each problem
    voting = [samples for samples in checked if samples[0].get('task') not in rewards.NO_VOTE]
    judged = [s for s in every if s.get('task') in rewards.JUDGED]
    numbers = {'problems': len(scored), 'samples': n}

    # one sample
    if checked:
        numbers['pass1'], numbers['pass1_ci'] = mean_ci([count / n for count in right])
        accuracies = map(rewards.accuracy_of, chain.from_iterable(checked))
        numbers['accuracy'] = average(list(accuracies))
    if judged:
        numbers['judged'] = average([rewards.accuracy_of(s) for s in judged])
    numbers.update(length_statistics(every, bool(checked)))
    for name in every[0]['rewards']:
        if name != 'accuracy':
            key = f'reward_{name}' if name in numbers else name     # `length` is a reward too
            numbers[key] = average([s['rewards'][name] for s in every])

    # k samples
    k = 2
    while k <= n:
        if checked:
            numbers[f'pass{k}'] = average([pass_at_k(n, count, k) for count in right])
        if voting:
            majorities = [majority(samples[:k]) for samples in voting]
            numbers[f'maj{k}'], numbers[f'maj{k}_ci'] = mean_ci(majorities)
        k *= 2
    return numbers


def length_statistics(samples, checked):
    """samples: scored ones; checked: whether any of them can be right or wrong -> dict of lengths
    in tokens, of shares that were cut at the limit or mix languages"""
    numbers = {'length': average([s['length'] for s in samples]),
               'truncated': average([not s['finished'] for s in samples])}
    if checked:
        for name, wanted in (('right', True), ('wrong', False)):
            these = [s for s in samples if rewards.right(s) is wanted]
            numbers[f'length_{name}'] = average([s['length'] for s in these])
            numbers[f'truncated_{name}'] = average([not s['finished'] for s in these])
    numbers['mixing'] = average([s['mixed'] for s in samples])

    lengths = sorted(s['length'] for s in samples)
    for percent in (10, 50, 90):
        place = len(lengths) * percent // 100
        numbers[f'length_p{percent}'] = lengths[min(len(lengths) - 1, place)]
    numbers['length_max'] = lengths[-1]
    return numbers


def average(values):
    """-> their mean; None where there are none"""
    return sum(values) / len(values) if values else None


def pass_at_k(n, right, k):
    """
    The probability that k of n samples, drawn without putting back, hold a right one, when `right`
    of the n are: the unbiased estimate of pass@k (arXiv 2107.03374)

        1 - C(n - right, k) / C(n, k)  =  1 - product over i from n - right + 1 to n of (1 - k / i)
    """
    if n - right < k:
        return 1.0
    i = torch.arange(n - right + 1, n + 1, dtype=torch.float64)
    return 1.0 - torch.prod(1.0 - k / i).item()


def mean_ci(values, groups=None):
    """
    values: of problems, in [0, 1] -> mean, [low, high]: their mean and its 95% interval

    The interval is Wilson's, as of `effective_number` answers of yes or no with this mean; it does
    not collapse where all values are alike.

    groups: of each value what it shares with others, as several pairs share a prompt. The spread is
    then that of the groups' sums.
    """
    mean = sum(values) / len(values)
    n = effective_number(values, mean, groups)
    return mean, wilson_interval(mean, n)


def wilson_interval(p, n, z=1.96):
    """
    Wilson's score interval of a share p of n answers, at z standard deviations (1.96: 95%):

        (p + z²/2n  ±  z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)
    """
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def effective_number(values, mean, groups=None):
    """
    How many answers of yes or no have a mean as uncertain as that of these N values, which may lie
    between 0 and 1 and be alike in groups:

        mean (1 - mean) / n  =  variance / N
        variance             =  sum over the G groups of (sum of value - mean)² / N * G / (G - 1)

    Without groups each value is one of its own; with groups n is at most N. Where all values are
    alike, or there is one group, n is G.
    """
    N = len(values)
    deviations = defaultdict(float)   # group -> sum of value - mean
    for value, group in zip(values, range(N) if groups is None else groups):
        deviations[group] += value - mean
    G = len(deviations)

    variance = 0.0
    if G > 1:
        variance = sum(d * d for d in deviations.values()) / N * G / (G - 1)
    if variance > 1e-12:
        n = N * mean * (1 - mean) / variance
        return n if groups is None else min(N, n)
    return G if mean in (0.0, 1.0) or G == 1 else N


# --------------------------------------------------------------------------------------------------
# test-time compute: votes, the best of n, budget forcing


def vote(scored, rows):
    """Adds "vote" to the scored samples of each row: the answer that theirs counts as, the first
    one that the task's grader calls the same (see rewards.votes); None: no vote."""
    problems = []
    for row, samples in zip(rows, scored):
        problems.append(([sample['answer'] for sample in samples], row))
    for samples, votes in zip(scored, rewards.count_votes(problems)):
        for sample, answer in zip(samples, votes):
            sample['vote'] = answer


def majority(samples):
    """samples: scored ones of a problem -> 1.0 if the answer with the most votes (the first of
    equals) is right as it was first spelled, else 0.0. Samples without an answer do not vote."""
    votes = [sample.get('vote', sample['answer']) for sample in samples]
    counts = Counter(answer for answer in votes if answer is not None)
    if not counts:
        return 0.0
    [(winner, _)] = counts.most_common(1)
    first = samples[votes.index(winner)]
    return float(rewards.right(first))


def best_of(scored, weights):
    """-> for each problem that knows right and wrong 1.0 or 0.0: whether its sample of the highest
    weighted reward, the first of equals, is right"""
    def value(sample):
        return sum(weight * sample['rewards'][name] for name, weight in weights.items())

    best = [max(samples, key=value) for samples in scored]
    right = [rewards.right(sample) for sample in best]
    return [float(r) for r in right if r is not None]


@dataclass
class Forced:
    """A completion of budget forcing that is being written."""
    prompt: list                # the token ids before it
    key: int                    # number that its noise is drawn from
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    stopped: bool = False       # whether a stop, not the limit, ended what was sampled last
    done: bool = False          # whether it stopped inside its thinking: no answer follows

    def write(self, ids):
        """Adds tokens that the model did not choose."""
        self.tokens += ids
        self.logprobs += [0.0] * len(ids)


def budget_forcing(sampler, tokenizer, prompts, n, max_new_tokens, temperature, seed=0, keys=None,
                   progress=None, on_done=None, think_budget=0, think_at_least=0,
                   think_end='</think>', wait='Wait', **how):
    """
    Budget forcing (s1, arXiv 2501.19393): completions whose thinking

    - is cut at `think_budget` tokens (0: max_new_tokens), by writing `think_end`;
    - goes on until it has `think_at_least` tokens, by writing `wait` in place of an earlier end;

    and which then answer, up to max_new_tokens in all. Arguments and result are those of
    Sampler.generate. What was written for the model counts as its tokens, with log-prob 0.
    ValueError: a text to write is empty.
    """
    end_ids = tokenizer.encode_assistant(think_end)
    wait_ids = tokenizer.encode_assistant(wait)
    if not end_ids:
        raise ValueError('think_end is empty: it needs the text that ends the thinking')
    if think_at_least and not wait_ids:
        raise ValueError(f'think_at_least={think_at_least} needs a text to go on with: '
                         f'wait={wait!r}')
    completions = []   # n of each prompt, prompt after prompt
    for prompt, key in zip(prompts, range(len(prompts)) if keys is None else keys):
        completions += [Forced(prompt, key * 1_000_003 + s) for s in range(n)]

    # think, in turns, each with a seed of its own
    budget = min(think_budget or max_new_tokens, max_new_tokens)
    thinking = completions
    turn = 0
    while thinking:
        extend(sampler, thinking, budget, [think_end], temperature, seed + 7919 * turn, **how)
        turn += 1
        prolonged = []
        for completion in thinking:
            has_end = think_end in text_of(tokenizer, completion.tokens)
            if completion.stopped and len(completion.tokens) < think_at_least:    # too early
                remove_end(completion, tokenizer, think_end)
                completion.write(wait_ids)
                prolonged.append(completion)
            elif completion.stopped and not has_end:    # by a stop of the sampler's
                completion.done = True
            elif not has_end:                           # the budget is spent
                completion.write(end_ids)
        thinking = prolonged

    # answer
    answering = [completion for completion in completions if not completion.done]
    extend(sampler, answering, max_new_tokens, [], temperature, seed + 7919 * turn, **how)
    return as_completions(completions, n, progress, on_done)


def extend(sampler, completions, length, stop_strings, temperature, seed, **how):
    """Samples on where each completion is: up to `length` tokens in all, or a stop of the sampler's
    or one of stop_strings. Each goes on as a prompt of its own, with noise of its own."""
    for completion in completions:
        completion.stopped = False
    short = [completion for completion in completions if len(completion.tokens) < length]
    if not short:
        return
    contexts = [completion.prompt + completion.tokens for completion in short]
    limits = [length - len(completion.tokens) for completion in short]
    keys = [completion.key for completion in short]

    own_stop_strings = sampler.stop_strings
    sampler.stop_strings = own_stop_strings + stop_strings
    try:
        sampled = sampler.generate(contexts, 1, limits, temperature, seed=seed, keys=keys, **how)
    finally:
        sampler.stop_strings = own_stop_strings
    for completion, (new,) in zip(short, sampled):
        completion.tokens += new.tokens
        completion.logprobs += new.logprobs
        completion.stopped = new.finished


def remove_end(completion, tokenizer, think_end):
    """Removes from a completion its stop token, and its last think_end with what follows. Tokens
    are removed whole, with text that stands before think_end in the same token."""
    text = text_of(tokenizer, completion.tokens)
    if think_end in text:
        text = text.rpartition(think_end)[0]
    places = [i for i, t in enumerate(completion.tokens) if t not in tokenizer.stop_ids]
    tokens = [completion.tokens[i] for i in places]
    while tokens and len(tokenizer.decode(tokens)) > len(text):
        tokens.pop()
    completion.tokens = tokens
    completion.logprobs = [completion.logprobs[i] for i in places[:len(tokens)]]


def as_completions(completions, n, progress, on_done):
    """completions: Forced ones, n of each prompt -> lists of n Completions; each is told to on_done
    and progress, as Sampler.generate does"""
    results = []
    for i, forced in enumerate(completions):
        prompt, sample = divmod(i, n)
        if sample == 0:
            results.append([])
        completion = Completion(forced.tokens, forced.logprobs, forced.stopped)
        results[prompt].append(completion)
        if on_done:
            on_done(prompt, sample, completion)
        if progress is not None:
            progress.update()
    return results


# --------------------------------------------------------------------------------------------------
# files


class Partial:
    """
    Finished samples of a run under way, a line a problem, in a file that begins with the settings
    that they depend on: a run with other settings starts anew.

    date: when the run began, in ISO form, which is none of these settings
    """

    def __init__(self, path, settings, date=None):
        self.path = Path(path)
        self.known = {}     # (kind, number of the problem) -> its Completions
        self.waiting = {}   # (kind, number) -> {sample: (tokens, finished)} until it has all
        settings = json.loads(json.dumps(settings))   # as they will be read
        header = {**settings, 'date': date}
        lines = self.read_lines()
        begun = json.loads(lines[0]) if lines else header
        changed = [key for key in settings if begun.get(key) != settings[key]]
        if changed:
            print(f'{path} was begun with other settings ({", ".join(changed)}) and is begun anew; '
                  f'the old one is {self.path.name}.old', file=sys.stderr)
            os.replace(self.path, f'{path}.old')
            lines = []
            begun = header
        self.date = begun.get('date') or date

        for line in lines[1:]:
            kind, number, samples = json.loads(line)
            completions = [Completion(tokens, [], finished) for tokens, finished in samples]
            self.known[kind, number] = completions

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = lines or [json.dumps(header)]
        self.path.write_text(''.join(line + '\n' for line in lines), encoding='utf-8')
        self.file = open(self.path, 'a', encoding='utf-8')

    def read_lines(self):
        """The whole lines of the file; what follows them is cut short, or empty."""
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_text(encoding='utf-8').split('\n')
        return lines

    def get(self, kind, number):
        """-> the Completions of a problem, or None where they are not known"""
        return self.known.get((kind, number))

    def add(self, kind, number, sample, n, completion):
        """Takes a sample of a problem, and writes the problem when its n samples are there."""
        samples = self.waiting.setdefault((kind, number), {})
        samples[sample] = completion.tokens, completion.finished
        if len(samples) == n:
            line = json.dumps([kind, number, [samples[s] for s in range(n)]])
            self.file.write(line + '\n')
            self.file.flush()

    def remove(self):
        self.file.close()
        self.path.unlink()


def kept(cfg, rows, scored):
    """
    rows: problems; scored: the samples of each -> rows for SFT, {"messages", "task", "rewards"}:

    - of problems whose share of right samples is within keep_pass_rate,
    - finished samples whose rewards reach `keep` and whose tokens are within keep_length,
    - of those different ones, at most keep_per_prompt a problem,
    - the first of every problem, then the second of every problem, ..., at most keep_rows.
    """
    chosen = []   # (place among the problem's good samples, row)
    for row, samples in zip(rows, scored):
        rate = average([bool(rewards.right(sample)) for sample in samples])
        if not within(cfg.keep_pass_rate, rate):
            continue
        good = [sample for sample in samples if is_good(cfg, sample)]
        good = list({sample['response']: sample for sample in good}.values())
        for place, sample in enumerate(good[:cfg.keep_per_prompt or None]):
            chosen.append((place, sft_row(row, sample)))
    chosen.sort(key=lambda pair: pair[0])
    return [row for _, row in chosen][:cfg.keep_rows or None]


def is_good(cfg, sample):
    if not sample['finished']:
        return False
    if cfg.keep_length and not within(cfg.keep_length, sample['length']):
        return False
    return all(sample['rewards'][name] >= least for name, least in cfg.keep.items())


def within(band, value):
    """band: [least, most], or [] for any value"""
    return not band or band[0] <= value <= band[1]


def sft_row(row, sample):
    """A problem and one of its scored samples, as a conversation to train on."""
    messages = row['prompt']
    if not isinstance(messages, list):
        messages = [{'role': 'user', 'content': messages}]
    answer = {'role': 'assistant', 'content': row.get('prefill', '') + sample['response']}
    return {'messages': [*messages, answer], 'task': row['task'], 'rewards': sample['rewards']}


def write_jsonl(path, rows):
    """Complete or not at all: written beside the target, then moved."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(path.name + '.tmp')
    with open(temp, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    os.replace(temp, path)


# --------------------------------------------------------------------------------------------------
# what is asked, and what an answer would earn


def show_problems(tokenizer, files, cfg, weights):
    """Prints the first cfg.show prompts of each file, their lengths, and what the row's own answer
    would be rewarded with. files: {path: rows}"""
    for path, rows in files.items():
        for number, row in enumerate(rows[:cfg.show], 1):
            with at_row(path, number):
                (prompt,), (row,) = encode_prompts(tokenizer, [row], cfg.prefill)
            print(f'{path}, row {number}, task {row["task"]}: {len(prompt)} tokens')
            print(indented(visible(tokenizer, prompt)))
            show_own_answer(tokenizer, row, cfg.max_new_tokens, weights)


def show_own_answer(tokenizer, row, max_new_tokens, weights):
    response = own_answer(row)
    if response is None:
        print('  no answer of its own that could be scored\n')
        return
    length = len(tokenizer.encode_assistant(response)) + 1
    lengths = dict.fromkeys(('completion_tokens', 'shortest', 'longest'), length)
    row = {'max_length': max_new_tokens, **row, **lengths}
    [(total, parts)] = rewards.grade([(response, row)], weights)
    earned = ', '.join(f'{name} {value:.3g}' for name, value in parts.items())
    print(f'  its own answer is rewarded with {earned}, total {total:.3g}:\n'
          f'{indented(response)}\n')


def indented(text):
    return textwrap.indent(text, '    ', bool)   # bool: blank lines, too


def own_answer(row):
    """A response in the expected format that gives the row's own answer, or None where it has none.
    row: with the "prefill" of encode_prompts."""
    answer = row.get('solution', row.get('answer'))
    if row['task'] == 'countdown' and answer is None:
        answer = solve(row['numbers'], row['target'])
    if answer is None:
        return None
    if row['task'] == 'code':
        answer = f'\n```python\n{answer}\n```\n'
    else:
        answer = f' {answer}'

    thought = ' I know the answer.</think>'
    if '</think>' in row['prefill']:
        thought = ''
    if '<think>' not in row['prefill']:
        thought = f'<think>{thought}'
    return f'{thought}<answer>{answer}</answer>'


# --------------------------------------------------------------------------------------------------
# the script


FILTERS = ('keep', 'keep_length', 'keep_pass_rate')
FILTER_LIMITS = ('keep_per_prompt', 'keep_rows')
FORCING = ('think_budget', 'think_at_least', 'think_end', 'wait')   # keywords of budget_forcing
SAMPLES_DEPEND_ON = ('limit', 'n', 'temperature', 'top_p', 'top_k', 'min_p', 'max_new_tokens',
                     'stop', *FORCING, 'instruction', 'prefill', 'seed', 'dtype', 'checkpoint')


def main(cfg):
    """-> {problem file: its numbers}, the same on every rank; with a plan what that returns; None
    with `show`"""
    check_settings(cfg)
    if cfg.endpoint:
        return evaluate_remote(cfg)
    if cfg.plan:
        return plan.show(cfg, cfg.checkpoint, cfg.plan)
    device = use_device(cfg)
    rank, world = join_ranks()

    # read problems
    tokenizer = Tokenizer.from_pretrained(cfg.checkpoint, cfg.chat_template, cfg.template_args)
    rewards.use_file(cfg.reward_file)
    weights = with_unweighted(cfg.rewards, cfg.best_of)
    rewards.check_names(weights)
    files = read_problems(cfg, weights)
    prepare_rewards(cfg, files, weights, device)
    if cfg.show:
        if rank == 0:
            show_problems(tokenizer, files, cfg, weights)
        return None
    files = only_fitting(cfg, tokenizer, files)

    # evaluate each file
    model = load(cfg, tokenizer, device)
    output = Output(cfg, rank, world)
    numbers = {}
    for path, rows in files.items():
        partial = output.begin(tokenizer, path, rows)
        numbers[path], scored, answers = evaluate_file(cfg, model, tokenizer, rows, weights,
                                                       partial, rank, world)
        output.add(tokenizer, rows, scored, answers)
        if rank == 0:
            print_numbers(path, numbers[path])

    # write the samples, or those to keep
    output.write(files)

    # summarise
    if rewards.FAILURES:
        print(f'rewards failed and counted 0.0: {rewards.told()}', file=sys.stderr)
    if cfg.summary and rank == 0:
        write_jsonl(cfg.summary, [numbers])
    return numbers


def check_settings(cfg):
    """Tells of settings that do nothing. ValueError: filters without a file to write, or a limit on
    what no filter lets through; FileNotFoundError: no checkpoint."""
    forced = cfg.think_budget or cfg.think_at_least
    tell_idle(cfg, [
        (not forced, ('think_end', 'wait'), 'think_budget and think_at_least are 0'),
        (cfg.temperature == 0, ('top_p', 'top_k', 'min_p'), 'at temperature 0 nothing is drawn'),
        (not cfg.endpoint, ('remote',), 'there is no endpoint'),
        (cfg.endpoint, ('top_k', 'min_p', 'stop', 'think_budget', 'think_at_least', *FILTERS,
                        *FILTER_LIMITS, 'prefill', 'chat_template', 'template_args',
                        'long_prompts', 'show'),
         'a server only samples')])
    if cfg.endpoint:
        if not cfg.out:
            raise ValueError('an endpoint needs a file for its answers: --out=FILE')
        return
    # here an error: the file would hold something else than was asked for
    lines = idle(cfg, [
        (not cfg.out, (*FILTERS, *FILTER_LIMITS), 'no file is written, set out'),
        (not is_filtered(cfg), FILTER_LIMITS, f'set one of {", ".join(FILTERS)} too')])
    if lines:
        raise ValueError(lines[0])
    present(cfg, 'checkpoint')


def evaluate_remote(cfg):
    """Asks a server, and grades what it answers -> {problem file: its numbers}"""
    rewards.use_file(cfg.reward_file)
    weights = with_unweighted(cfg.rewards, cfg.best_of)
    rewards.check_names(weights)
    files = read_problems(cfg, weights)
    prepare_rewards(cfg, files, weights, use_device(cfg))

    answers = teacher.from_sample(cfg, list(chain.from_iterable(files.values())))
    numbers = {}
    for path, rows in files.items():
        said = [[said_by_server(answer) for answer in next(answers)] for _ in rows]
        scored = score_said(rows, said, weights)
        if len(said[0]) > 1:
            vote(scored, rows)
        numbers[path] = statistics(scored)
        if cfg.best_of and (right := best_of(scored, cfg.best_of)):
            n = len(said[0])
            numbers[path][f'best_of{n}'], numbers[path][f'best_of{n}_ci'] = mean_ci(right)
        print_numbers(path, numbers[path])
    if rewards.FAILURES:
        print(f'rewards failed and counted 0.0: {rewards.told()}', file=sys.stderr)
    if cfg.summary:
        write_jsonl(cfg.summary, [numbers])
    return numbers


def said_by_server(answer):
    """An answer of data/teacher.py -> Said, with its reasoning in <think>; of 0 tokens where the
    server counts none"""
    text = answer['content']
    if answer['reasoning']:
        end = '</think>' if text else ''
        text = f'<think>{answer["reasoning"]}{end}{text}'
    length = (answer['usage'] or {}).get('completion_tokens', 0)
    return Said(text, length, answer['finish_reason'] != 'length')


def is_filtered(cfg):
    """Whether `out` gets rows for SFT, of samples that pass filters, in place of all samples."""
    return any(getattr(cfg, key) for key in FILTERS)


def join_ranks():
    """-> this process's rank, number of ranks; under torchrun they become a process group"""
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:    # the ranks meet when the slowest has sampled all of its problems
        dist.init_process_group('gloo', timeout=timedelta(days=1))
    return rank, world


def read_problems(cfg, weights):
    """-> {path: rows}, each row checked for what the rewards in `weights` read, and with the
    instruction in its prompt"""
    files = {}
    for path in cfg.data:
        files[path] = read_rows(path, require=('prompt', 'task'))[:cfg.limit or None]
    for path, rows in files.items():
        rewards.checked(path, rows, weights)
    for path, rows in files.items():
        files[path] = [instructed(row, cfg.instruction) for row in rows]
    return files


def prepare_rewards(cfg, files, weights, device):
    """Loads judges and starts graders. Raises where a reward cannot work here."""
    tasks = {row['task'] for row in chain.from_iterable(files.values())}
    judges = load_judges(cfg.preference, device)
    rewards.prepare(weights, tasks, cfg.unsafe_code, cfg.reward_workers, judges)


def only_fitting(cfg, tokenizer, files):
    """-> files with the rows whose prompts leave room for max_new_tokens, see `fitting`"""
    folder = hub.local_folder(cfg.checkpoint, ('config.json',))
    context = ModelConfig.read(folder / 'config.json').max_position_embeddings
    fit = {}
    for path, rows in files.items():
        numbers = fitting(tokenizer, path, rows, context, cfg.max_new_tokens, cfg.prefill,
                          cfg.long_prompts)
        fit[path] = [rows[i] for i in numbers]
    return fit


def evaluate_file(cfg, model, tokenizer, rows, weights, partial, rank, world):
    """-> numbers and scored samples as of `evaluate`, and the scored greedy answers, [] without
    greedy. ValueError: a reward failed on all samples of this rank."""
    answers = []
    think = None
    if cfg.think_budget or cfg.think_at_least:
        think = {name: getattr(cfg, name) for name in FORCING}
    before = rewards.FAILURES.copy()
    numbers, scored = evaluate(
        model, tokenizer, rows, n=cfg.n, temperature=cfg.temperature, top_p=cfg.top_p,
        max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, greedy=cfg.greedy, prefill=cfg.prefill,
        slots=cfg.slots, weights=weights, progress='sampling', top_k=cfg.top_k, min_p=cfg.min_p,
        stop=cfg.stop, speculate=cfg.speculate, best=cfg.best_of, think=think, partial=partial,
        answers=answers, examples=2)
    graded = len(rows[rank::world]) * samples_each(cfg.n, cfg.greedy)
    rewards.require_working(rewards.failures(before, weights), graded)
    return numbers, scored, answers


def print_numbers(path, numbers):
    print(path)
    for name, value in numbers.items():
        ends = value if isinstance(value, list) else [value]   # of an interval
        told = [f'{end:.4g}' if isinstance(end, float) else str(end) for end in ends]
        print(f'  {name:14s}', ' to '.join(told))


class Output:
    """The samples of this rank, of all files: what is known of them while sampling goes on, and the
    JSONL file at the end. Nothing is written without `out`."""

    def __init__(self, cfg, rank, world):
        self.cfg = cfg
        self.rank = rank
        self.world = world
        self.path = cfg.out and Path(cfg.out)
        if self.path and world > 1:
            name = f'{self.path.stem}-{rank:05d}-of-{world:05d}{self.path.suffix}'
            self.path = self.path.with_name(name)
        self.partials = []
        self.rows = []      # problems of this rank
        self.scored = []    # scored samples of each
        self.answers = []   # scored greedy answer to each, if any

    def begin(self, tokenizer, path, rows):
        """-> Partial of a problem file, or None without `out`. The tokenizer gets the date when the
        file was begun, which templates print as today's."""
        if not self.path:
            return None
        cfg = self.cfg
        config = hub.local_folder(cfg.checkpoint) / 'config.json'
        settings = {name: getattr(cfg, name) for name in SAMPLES_DEPEND_ON}
        settings |= {
            'stamp': config.stat().st_mtime_ns,
            'data': path,
            'problems': len(rows),
            'ranks': self.world,
            'template': tokenizer.chat_template,
            'arguments': tokenizer.template_args,
        }
        number = len(self.partials) or ''
        partial = Partial(f'{self.path}.partial{number}', settings, tokenizer.date.isoformat())
        tokenizer.date = datetime.fromisoformat(partial.date)
        self.partials.append(partial)
        return partial

    def add(self, tokenizer, rows, scored, answers):
        """rows, scored, answers: of all ranks, of which the file gets this rank's"""
        mine = rows[self.rank::self.world]
        if is_filtered(self.cfg):
            _, mine = encode_prompts(tokenizer, mine, self.cfg.prefill)   # gives rows their prefill
        self.rows += mine
        self.scored += scored[self.rank::self.world]
        self.answers += answers[self.rank::self.world]

    def write(self, files):
        """Writes `out`; then OUT.partial is not needed any more. files: {path: rows}"""
        if not self.path:
            return
        rows = self.rows_to_write()
        write_jsonl(self.path, rows)
        why = '' if rows else ': nothing was good enough for the keep settings'
        if all(len(problems) <= self.rank for problems in files.values()):
            why = ': there are fewer problems than ranks'
        print(f'{len(rows)} rows -> {self.path}{why}')
        for partial in self.partials:
            partial.remove()

    def rows_to_write(self):
        """-> problems with all of their samples and the "greedy" answer, or rows for SFT of those
        that are kept"""
        if not is_filtered(self.cfg):
            rows = [{**row, 'samples': samples} for row, samples in zip(self.rows, self.scored)]
            for row, answer in zip(rows, self.answers):
                row['greedy'] = answer
            return rows
        rows = kept(self.cfg, self.rows, self.scored)
        if self.cfg.keep_rows:    # of these, this rank's share
            rows = rows[:(self.cfg.keep_rows + self.world - 1 - self.rank) // self.world]
        return rows


if __name__ == '__main__':
    run(main, Config)
    if dist.is_initialized():
        dist.destroy_process_group()
