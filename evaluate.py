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

With `out`, finished problems are noted in OUT.partial while sampling goes on: the same command goes on from there after a stop, to the
same samples. With `keep` only samples that pass its filters are written, as rows for SFT (rejection sampling).

Test-time compute: a majority vote (maj@k, where answers that the task's grader calls equal are one
vote), the best of n by a reward (best_of), and budget forcing (think_budget, think_at_least).
What is right: rewards.right, everywhere; what the numbers are called: `statistics`.
"""

import json
import os
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

# before torch: says so where it is missing
from configurator import at_least, idle, run, tell_idle

import torch
import torch.distributed as dist
from tqdm import tqdm

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
from sample import Completion, Sampler, Sampling, load, present, until_stop, use_device


@dataclass
class Config(Sampling):
    data: list[str] = field(default_factory=lambda: ['out/r1/data/test.jsonl'])  # problem files:
                                           # rows with "prompt", "task", ...
    limit: int = 0                         # use the first so many problems; 0: all
    n: int = 8                             # samples a problem (under torchrun, which takes --n for its own, in a config file)
    greedy: bool = True                    # evaluate the greedy answer too
    think_budget: int = 0                  # cut the thinking after so many tokens and have it answer; 0: no limit
    think_at_least: int = 0                # keep it thinking up to so many tokens: an earlier end is replaced by `wait`
    think_end: str = '</think>'            # the text that ends the thinking
    wait: str = 'Wait'                     # the text that keeps it going
    best_of: dict[str, float] = field(default_factory=dict)  # report the best of n by these rewards and weights, e.g. {'preference': 1.0}
    rewards: dict[str, float] = field(default_factory=lambda: {'accuracy': 1.0, 'format': 1.0, 'language': 1.0})  # what to score samples by
    preference: dict[str, str] = field(default_factory=dict)  # reward models of the reward 'preference', {name: folder}
    unsafe_code: bool = False              # let programs of the model run without a sandbox where there is none
    reward_file: str = ''                  # Python file of your own rewards and tasks, functions
                                           # name_reward(response, row)
    reward_workers: int = -1               # processes that grade; -1: one a core where programs are
                                           # run or there is a reward_file, else none
    out: str | None = None                 # write every sample with its rewards to this JSONL file (several ranks: one each)
    summary: str | None = None             # write the numbers to this JSON file
    keep: dict[str, float] = field(default_factory=dict)  # write only samples with rewards at least these, e.g. {'accuracy': 1, 'format': 1}
    keep_length: list[int] = field(default_factory=list)  # of [shortest, longest] tokens
    keep_pass_rate: list[float] = field(default_factory=list)  # of problems of which [least, most] of the samples are right, e.g. [0.1, 0.9]
    keep_per_prompt: int = 0               # of those, at most so many different ones a problem; 0: all
    keep_rows: int = 0                     # and at most so many in all; 0: all
    long_prompts: Literal['error', 'drop'] = 'error'  # what to do with prompts that leave no room
                                           # for max_new_tokens
    show: int = 0                          # print the first so many prompts of each file and what
                                           # their own answers earn, then stop
    plan: bool | str = False               # print what the run needs in memory and stop: on this machine, or on ranks x GB as 8x80
    endpoint: str | None = None            # ask an OpenAI-compatible server instead; `checkpoint` is then the model's name there
    remote: dict = field(default_factory=dict)  # more settings for that, see data/teacher.py

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'n')
        at_least(self, 0, 'show', 'limit', 'think_budget', 'think_at_least', 'keep_per_prompt',
                 'keep_rows')
        if not self.data:
            raise ValueError('data is empty: give it files of problems')
        if unknown := self.keep.keys() - self.rewards.keys():
            raise ValueError(f'keep asks for {min(unknown)!r}, which is none of the rewards: {", ".join(self.rewards)}')
        for key in ('keep_length', 'keep_pass_rate'):
            if (band := getattr(self, key)) and (len(band) != 2 or band[0] > band[1]):
                raise ValueError(f'{key} must be [least, most], not {band}')


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def score(tokenizer, rows, completions, weights, stop=()):
    """Completions of each row -> list of dicts {"response", "total", "rewards", "answer", "mixed",
    "length", "finished", "task"}. stop: texts that end a completion, and with it the response."""
    scored, responses = [], []
    for row, samples in zip(rows, completions):
        lengths = [len(sample.tokens) for sample in samples]
        for sample, length in zip(samples, lengths):
            text = tokenizer.decode([t for t in sample.tokens if t not in tokenizer.stop_ids])
            response = until_stop(text, stop)
            responses.append((response, {**row, 'completion_tokens': length, 'shortest': min(lengths), 'longest': max(lengths)}))
    graded = iter(zip(responses, rewards.grade(responses, weights)))
    for row, samples in zip(rows, completions):
        scored.append([])
        for sample, ((response, _), (total, parts)) in zip(samples, graded):
            scored[-1].append({'response': response, 'total': total, 'rewards': parts, 'length': len(sample.tokens),
                               'finished': sample.finished, 'answer': rewards.answer_of(response, row),
                               'mixed': rewards.language_mixed(response, row), 'task': row['task']})
    return scored


def evaluated(tokenizer, rows, prefill, scored, count=4):
    """-> of the first problems the first sample, for Log.samples of train.py"""
    prompts, _ = encode_prompts(tokenizer, rows[:count], prefill)
    return [(f'evaluation, problem {i}',
             {**s['rewards'], 'total': s['total'], 'tokens': s['length']},
             visible(tokenizer, prompt), s['response'])
            for i, (prompt, (s, *_)) in enumerate(zip(prompts, scored), 1)]


def own_answer(row):
    """A response in the expected format that gives the row's own answer, or None where it has none.
    row: with the "prefill" of encode_prompts."""
    answer = row.get('solution', row.get('answer'))
    if row['task'] == 'countdown' and answer is None:
        answer = solve(row['numbers'], row['target'])
    if answer is None:
        return None
    answer = f'\n```python\n{answer}\n```\n' if row['task'] == 'code' else f' {answer}'
    thought = '' if '</think>' in row['prefill'] else ' I know the answer.</think>'
    return f'{"" if "<think>" in row["prefill"] else "<think>"}{thought}<answer>{answer}</answer>'


def show_problems(tokenizer, files, cfg, weights):
    """Prints the first cfg.show prompts of each file, their lengths, and what the row's own answer
    would be rewarded with. files: {path: rows}"""
    for path, rows in files.items():
        for number, row in enumerate(rows[:cfg.show], 1):
            with at_row(path, number):
                (prompt,), (row,) = encode_prompts(tokenizer, [row], cfg.prefill)
            print(f'{path}, row {number}, task {row["task"]}: {len(prompt)} tokens')
            print(textwrap.indent(visible(tokenizer, prompt), '    ', bool))
            if (response := own_answer(row)) is None:
                print('  no answer of its own that could be scored\n')
                continue
            n = len(tokenizer.encode_assistant(response)) + 1
            lengths = dict.fromkeys(('completion_tokens', 'shortest', 'longest'), n)
            row = {'max_length': cfg.max_new_tokens, **row, **lengths}
            (total, parts), = rewards.grade([(response, row)], weights)
            print('  its own answer is rewarded with '
                  + ', '.join(f'{name} {value:.3g}' for name, value in parts.items())
                  + f', total {total:.3g}:\n{textwrap.indent(response, "    ", bool)}\n')


def mean_ci(values, groups=None):
    """-> mean, [low, high]: the 95% interval over problems, whose values lie in [0, 1]. Wilson's
    score interval, with the n that yes and no would need for the spread of these values, so that it
    does not collapse where all are alike.

    groups: of each value what it shares with others, as several pairs share a prompt; the spread is
    then that of the groups' sums, and n at most the number of values."""
    n, p, z, sums = len(values), sum(values) / len(values), 1.96, Counter()
    for value, group in zip(values, range(n) if groups is None else groups):
        sums[group] += value - p
    G = len(sums)
    variance = sum(s * s for s in sums.values()) / n * G / (G - 1) if G > 1 else 0.0
    if variance > 1e-12:
        n = n * p * (1 - p) / variance if groups is None else min(n, n * p * (1 - p) / variance)
    elif p in (0.0, 1.0) or G == 1:
        n = G
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return p, [max(0.0, centre - half), min(1.0, centre + half)]


def pass_at_k(n, right, k):
    """Unbiased estimate from n samples of which `right` are: 1 - C(n - right, k) / C(n, k)."""
    if n - right < k:
        return 1.0
    return 1.0 - torch.prod(1.0 - k / torch.arange(n - right + 1, n + 1, dtype=torch.float64)).item()


def vote(scored, rows):
    """Adds "vote" to the scored samples of each row: the answer that theirs counts as, the first
    one that the task's grader calls the same (see rewards.votes)."""
    problems = [([s['answer'] for s in samples], row) for samples, row in zip(scored, rows)]
    for samples, votes in zip(scored, rewards.count_votes(problems)):
        for s, answer in zip(samples, votes):
            s['vote'] = answer


def majority(samples):
    """1.0 if the answer with the most votes, as it was first spelled, is right (the first of
    equals); samples without an answer do not vote."""
    votes = [s.get('vote', s['answer']) for s in samples]
    counts = Counter(answer for answer in votes if answer is not None)
    if not counts:
        return 0.0
    return float(rewards.right(samples[votes.index(counts.most_common(1)[0][0])]))


def average(values):
    """-> their mean; None where there are none"""
    return sum(values) / len(values) if values else None


def statistics(scored):
    """-> dict of numbers over the scored samples of all problems, with 95% intervals over problems.

    pass1: share of right samples (rewards.right); passK: of problems with a right one among K;
    majK: of problems whose majority of K is right. accuracy: mean reward of the task, which is
    pass1 where that reward is 0 or 1. Of tasks without right and wrong `judged` is the mean reward,
    and what counts right answers leaves them out; majorities leave out tasks whose answers cannot
    be compared, too (rewards.NO_VOTE). A number of nothing is None or not there."""
    n, every = len(scored[0]), [s for samples in scored for s in samples]
    checked = [samples for samples in scored if rewards.right(samples[0]) is not None]
    right = [[rewards.right(s) for s in samples] for samples in checked]
    voting = [samples for samples in checked if samples[0].get('task') not in rewards.NO_VOTE]
    out = {'problems': len(scored), 'samples': n}
    if checked:
        out['pass1'], out['pass1_ci'] = mean_ci([average(r) for r in right])
        out['accuracy'] = average([rewards.accuracy_of(s) for samples in checked for s in samples])
    if judged := [rewards.accuracy_of(s) for s in every if s.get('task') in rewards.JUDGED]:
        out['judged'] = average(judged)
    lengths = sorted(s['length'] for s in every)
    out.update(length=average(lengths), truncated=average([not s['finished'] for s in every]))
    for name, wanted in (('right', True), ('wrong', False)) if checked else ():
        these = [s for s in every if rewards.right(s) is wanted]
        out[f'length_{name}'] = average([s['length'] for s in these])
        out[f'truncated_{name}'] = average([not s['finished'] for s in these])
    out['mixing'] = average([s['mixed'] for s in every])
    for q in (10, 50, 90):
        out[f'length_p{q}'] = lengths[min(len(lengths) - 1, len(lengths) * q // 100)]
    out['length_max'] = lengths[-1]
    for name in every[0]['rewards']:
        if name != 'accuracy':
            key = f'reward_{name}' if name in out else name     # `length` is a reward too
            out[key] = average([s['rewards'][name] for s in every])
    k = 2
    while k <= n:
        if checked:
            out[f'pass{k}'] = average([pass_at_k(n, sum(r), k) for r in right])
        if voting:
            majorities = [majority(samples[:k]) for samples in voting]
            out[f'maj{k}'], out[f'maj{k}_ci'] = mean_ci(majorities)
        k *= 2
    return out


def best_of(scored, weights):
    """-> for each problem that knows right and wrong 1.0 or 0.0: whether its sample of the highest
    weighted reward, the first of equals, is right"""
    def value(s):
        return sum(w * s['rewards'][name] for name, w in weights.items())
    chosen = [max(samples, key=value) for samples in scored]
    return [float(rewards.right(s)) for s in chosen if rewards.right(s) is not None]


def evaluate(model, tokenizer, rows, n=8, temperature=1.0, top_p=1.0, max_new_tokens=192, seed=1, greedy=True, prefill='', slots=256,
             weights=None, progress=False, top_k=0, min_p=0.0, stop=(), speculate=None, best=None, think=None, partial=None):
    """-> (numbers, scored samples), the same on every rank of a process group, each of which samples every world-th row. Greedy accuracy is
    under "greedy" with its interval. best: weights of rewards to choose the best of n by. think: keywords of `forced`, for budget
    forcing. partial: a Partial that knows this rank's samples of an earlier run and takes new ones."""
    weights = {**dict.fromkeys(('accuracy', *(best or ())), 0.0), **(weights or {'accuracy': 1.0, 'format': 1.0, 'language': 1.0})}
    sampler = Sampler(model, tokenizer.stop_ids, slots, stop_strings=stop, tokenizer=tokenizer, speculate=speculate)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    numbers = list(range(len(rows)))[rank::world]
    asked = [{'max_length': max_new_tokens, **row} for row in rows[rank::world]]   # as in grpo.py
    ids, mine = encode_prompts(tokenizer, asked, prefill)
    bar = tqdm(total=len(ids) * (n + greedy), desc='sampling', disable=not progress, leave=False)

    def draw(kind, n, temperature, **how):
        completions = [partial.get(kind, number) if partial else None for number in numbers]
        left = [i for i, c in enumerate(completions) if c is None]
        bar.update(n * (len(ids) - len(left)))
        if left:
            note = (lambda i, s, c: partial.add(kind, numbers[left[i]], s, n, c)) if partial else None  # noqa: E731
            sample = sampler.generate if think is None else lambda *a, **k: forced(sampler, tokenizer, *a, **think, **k)
            new = sample([ids[i] for i in left], n, max_new_tokens, temperature, seed=seed, keys=[numbers[i] for i in left], progress=bar,
                         on_done=note, **how)
            for i, c in zip(left, new):
                completions[i] = c
        scored = score(tokenizer, mine, completions, weights, stop)
        if n > 1:
            vote(scored, mine)
        if world == 1:
            return scored
        shares, every = [None] * world, [None] * len(rows)
        dist.all_gather_object(shares, scored)
        for i, share in enumerate(shares):
            every[i::world] = share
        return every

    scored = draw('samples', n, temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    out = statistics(scored)
    if best and (values := best_of(scored, best)):
        out[f'best_of{n}'], out[f'best_of{n}_ci'] = mean_ci(values)
    if greedy:
        answers = [rewards.right(s) for s, in draw('greedy', 1, 0.0)]
        if answers := [float(r) for r in answers if r is not None]:
            out['greedy'], out['greedy_ci'] = mean_ci(answers)
    drafts = [(sampler.drafted, sampler.accepted)] * world
    if world > 1:
        dist.all_gather_object(drafts, drafts[0])
    drafted, accepted = map(sum, zip(*drafts))
    if drafted:
        out['drafts_accepted'] = accepted / drafted
    bar.close()
    return out, scored


def forced(sampler, tokenizer, prompts, n, max_new_tokens, temperature, seed=0, keys=None, progress=None, on_done=None, think_budget=0,
           think_at_least=0, think_end='</think>', wait='Wait', **how):
    """Budget forcing (s1, arXiv 2501.19393): completions whose thinking is cut at `think_budget` tokens (by writing `think_end`) or
    goes on, with `wait` written in place of an earlier end, until it has `think_at_least`. As Sampler.generate; what was written for
    the model counts as its tokens, with log-prob 0."""
    keys = range(len(prompts)) if keys is None else keys
    budget = think_budget or max_new_tokens
    end, go_on = tokenizer.encode_assistant(think_end), tokenizer.encode_assistant(wait)
    if not end:
        raise ValueError('think_end is empty: it needs the text that ends the thinking')
    if think_at_least and not go_on:
        raise ValueError(f'think_at_least={think_at_least} needs a text to go on with: wait={wait!r}')
    drafts = [[[] for _ in range(n)] for _ in prompts]                   # [(token, log-prob)] of each sample
    state = {(p, s): 'thinking' for p in range(len(prompts)) for s in range(n)}

    def more(which, limit, turn, stop):
        """Goes on with some samples; each is a prompt of its own with noise of its own."""
        which = [ps for ps in which if limit(ps) > 0]
        plain, sampler.stop_strings = sampler.stop_strings, sampler.stop_strings + stop
        try:
            contexts = [prompts[p] + [t for t, _ in drafts[p][s]] for p, s in which]
            got = sampler.generate(contexts, 1, [limit(ps) for ps in which], temperature, seed=seed + 7919 * turn,
                                   keys=[keys[p] * 1_000_003 + s for p, s in which], **how) if which else []
        finally:
            sampler.stop_strings = plain
        for (p, s), (c,) in zip(which, got):
            drafts[p][s] += zip(c.tokens, c.logprobs)
            state[p, s] = c
        return which

    used = lambda ps: len(drafts[ps[0]][ps[1]])  # noqa: E731
    turn, ended = 0, {}
    while thinking := [ps for ps in state if state[ps] == 'thinking']:
        went = more(thinking, lambda ps: min(budget, max_new_tokens) - used(ps), turn, [think_end])
        turn += 1
        for ps in thinking:
            p, s = ps
            text = tokenizer.decode([t for t, _ in drafts[p][s] if t not in tokenizer.stop_ids])
            if ps in went and state[ps].finished and think_end not in text and used(ps) >= think_at_least:
                ended[ps] = True                                         # it stopped without closing its thinking
            elif ps in went and state[ps].finished and used(ps) < think_at_least:
                before = text.rpartition(think_end)[0] if think_end in text else text
                drafts[p][s] = [pair for pair in drafts[p][s] if pair[0] not in tokenizer.stop_ids]
                while drafts[p][s] and len(tokenizer.decode([t for t, _ in drafts[p][s]])) > len(before):
                    drafts[p][s].pop()
                drafts[p][s] += [(t, 0.0) for t in go_on]
                state[ps] = 'thinking'
                continue
            elif think_end not in text:
                drafts[p][s] += [(t, 0.0) for t in end]
            state[ps] = 'answering'
    answering = [ps for ps in state if ps not in ended]
    answered = more(answering, lambda ps: max_new_tokens - used(ps), turn, [])
    out = [[None] * n for _ in prompts]
    for (p, s), last in state.items():
        tokens, logps = (list(column) for column in zip(*drafts[p][s]))
        out[p][s] = Completion(tokens, logps, (p, s) in ended or ((p, s) in answered and last.finished))
        if on_done:
            on_done(p, s, out[p][s])
        if progress is not None:
            progress.update()
    return out


class Partial:
    """Finished samples of a run under way, a line a problem, in a file that begins with the settings that they depend on: a run with
    other settings starts anew. `date`: when it began, which is none of these."""

    def __init__(self, path, settings, date=None):
        self.path, self.known, self.waiting = Path(path), {}, {}
        new = json.loads(json.dumps({**settings, 'date': date}))
        lines = self.path.read_text(encoding='utf-8').split('\n')[:-1] if self.path.exists() else []   # the last is cut short or empty
        old = json.loads(lines[0]) if lines else new
        changed = [key for key in new if key != 'date' and old.get(key) != new[key]]
        if changed:
            print(f'{path} was begun with other settings ({", ".join(changed)}) and is begun anew; '
                  f'the old one is {self.path.name}.old', file=sys.stderr)
            os.replace(self.path, f'{path}.old')
            lines, old = [], new
        self.date = old.get('date') or date
        for line in lines[1:]:
            kind, number, samples = json.loads(line)
            self.known[kind, number] = [Completion(tokens, [], finished) for tokens, finished in samples]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = lines or [json.dumps(new)]
        self.path.write_text(''.join(line + '\n' for line in lines), encoding='utf-8')
        self.file = open(self.path, 'a', encoding='utf-8')

    def get(self, kind, number):
        return self.known.get((kind, number))

    def add(self, kind, number, sample, n, completion):
        """Writes the problem when its n samples are there."""
        mine = self.waiting.setdefault((kind, number), {})
        mine[sample] = completion.tokens, completion.finished
        if len(mine) == n:
            self.file.write(json.dumps([kind, number, [mine[s] for s in range(n)]]) + '\n')
            self.file.flush()

    def remove(self):
        self.file.close()
        self.path.unlink()


def kept(cfg, rows, scored):
    """Rows for SFT: samples whose rewards reach `cfg.keep`, of a length and of problems of a pass rate in their bands, different ones only,
    at most keep_per_prompt each and keep_rows in all (round-robin over the problems)."""
    inside = lambda band, value: not band or band[0] <= value <= band[1]  # noqa: E731
    chosen = []
    for row, samples in zip(rows, scored):
        rate = average([bool(rewards.right(s)) for s in samples])
        if cfg.keep_pass_rate and not inside(cfg.keep_pass_rate, rate):
            continue
        good = [s for s in samples if s['finished'] and all(s['rewards'][name] >= low for name, low in cfg.keep.items())
                and (not cfg.keep_length or inside(cfg.keep_length, s['length']))]
        good = list({s['response']: s for s in good}.values())
        for rank, s in enumerate(good[:cfg.keep_per_prompt or None]):
            prompt = row['prompt'] if isinstance(row['prompt'], list) else [{'role': 'user', 'content': row['prompt']}]
            text = row.get('prefill', '') + s['response']
            chosen.append((rank, {'messages': [*prompt, {'role': 'assistant', 'content': text}], 'task': row['task'], 'rewards': s['rewards']}))
    chosen.sort(key=lambda pair: pair[0])
    return [row for _, row in chosen][:cfg.keep_rows or None]


def write_jsonl(path, rows):
    """Complete or not at all: written beside the target, then moved."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(path.name + '.tmp')
    with open(temp, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    os.replace(temp, path)


def main(cfg):
    tell_idle(cfg, [
        (not (cfg.think_budget or cfg.think_at_least), ('think_end', 'wait'),
         'think_budget and think_at_least are 0'),
        (cfg.temperature == 0, ('top_p', 'top_k', 'min_p'), 'at temperature 0 nothing is drawn'),
        (not cfg.endpoint, ('remote',), 'there is no endpoint'),
        (cfg.endpoint, ('top_k', 'min_p', 'stop', 'think_budget', 'think_at_least', 'best_of',
                        'keep', 'keep_length', 'keep_pass_rate', 'keep_per_prompt', 'keep_rows',
                        'summary', 'instruction', 'prefill', 'chat_template', 'template_args',
                        'long_prompts', 'show', 'rewards'),
         'a server only samples')])
    if cfg.endpoint:
        return teacher.from_sample(cfg)
    filters, limits = ('keep', 'keep_length', 'keep_pass_rate'), ('keep_per_prompt', 'keep_rows')
    none = not any(getattr(cfg, key) for key in filters)
    for line in idle(cfg, [(not cfg.out, (*filters, *limits), 'no file is written, set out'),
                           (none, limits, f'set one of {", ".join(filters)} too')]):
        raise ValueError(line)      # the file would hold something else than was asked for
    present(cfg, 'checkpoint')
    if cfg.plan:
        return plan.show(cfg, cfg.checkpoint, cfg.plan)
    device = use_device(cfg)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:    # the ranks meet when the slowest has sampled all of its problems
        dist.init_process_group('gloo', timeout=timedelta(days=1))
    tokenizer = Tokenizer.from_pretrained(cfg.checkpoint, cfg.chat_template, cfg.template_args)
    out = cfg.out and Path(cfg.out)
    out = out.with_name(f'{out.stem}-{rank:05d}-of-{world:05d}{out.suffix}') if out and world > 1 else out
    think = {name: getattr(cfg, name) for name in ('think_budget', 'think_at_least', 'think_end', 'wait')}
    think = think if cfg.think_budget or cfg.think_at_least else None
    rewards.use_file(cfg.reward_file)
    weights = {'accuracy': 0.0, **dict.fromkeys(cfg.best_of, 0.0), **cfg.rewards}
    rewards.check_names(weights)
    files = {path: read_rows(path, require=('prompt', 'task'))[:cfg.limit or None] for path in cfg.data}
    files = {path: rewards.checked(path, rows, weights) for path, rows in files.items()}
    files = {path: [instructed(row, cfg.instruction) for row in rows] for path, rows in files.items()}
    tasks = {row['task'] for rows in files.values() for row in rows}
    judges = load_judges(cfg.preference, device)
    rewards.prepare(weights, tasks, cfg.unsafe_code, cfg.reward_workers, judges)
    if cfg.show:
        return show_problems(tokenizer, files, cfg, weights) if rank == 0 else None
    folder = hub.local_folder(cfg.checkpoint, ('config.json',))
    context = ModelConfig.read(folder / 'config.json').max_position_embeddings
    for path, rows in files.items():
        fit = fitting(tokenizer, path, rows, context, cfg.max_new_tokens, cfg.prefill,
                      cfg.long_prompts)
        files[path] = [rows[i] for i in fit]
    model = load(cfg, tokenizer, device)
    numbers, written, partials, asked, drawn = {}, [], [], [], []
    for i, (path, rows) in enumerate(files.items()):
        partial = None
        if out:
            matters = ('limit', 'n', 'temperature', 'top_p', 'top_k', 'min_p', 'max_new_tokens', 'stop', 'think_budget', 'think_at_least', 'think_end',
                       'wait', 'instruction', 'prefill', 'seed', 'dtype', 'checkpoint')
            settings = {name: getattr(cfg, name) for name in matters}
            stamp = (hub.local_folder(cfg.checkpoint) / 'config.json').stat().st_mtime_ns
            settings |= {'stamp': stamp, 'data': path, 'problems': len(rows), 'ranks': world}
            settings |= {'template': tokenizer.chat_template, 'arguments': tokenizer.template_args}
            partial = Partial(f'{out}.partial{i or ""}', settings, tokenizer.date.isoformat())
            tokenizer.date = datetime.fromisoformat(partial.date)
            partials.append(partial)
        before = rewards.FAILURES.copy()
        numbers[path], scored = evaluate(
            model, tokenizer, rows, cfg.n, cfg.temperature, cfg.top_p, cfg.max_new_tokens, cfg.seed, cfg.greedy, cfg.prefill,
            cfg.slots, weights, progress=rank == 0, top_k=cfg.top_k, min_p=cfg.min_p, stop=cfg.stop, speculate=cfg.speculate, best=cfg.best_of,
            think=think, partial=partial)
        mine = rows[rank::world], scored[rank::world]
        graded = len(mine[0]) * (cfg.n + cfg.greedy)
        rewards.require_working(rewards.failures(before, weights), graded)
        if cfg.keep or cfg.keep_length or cfg.keep_pass_rate:
            asked += encode_prompts(tokenizer, mine[0], cfg.prefill)[1]
            drawn += mine[1]
        else:
            written += [{**row, 'samples': samples} for row, samples in zip(*mine)]
        if rank == 0:
            print(path)
            for name, value in numbers[path].items():
                show = lambda v: f'{v:.4g}' if isinstance(v, float) else str(v)  # noqa: E731
                print(f'  {name:14s}', ' to '.join(map(show, value)) if isinstance(value, list) else show(value))
    if asked:                  # of all files, and of keep_rows what is this rank's share
        share = (cfg.keep_rows + world - 1 - rank) // world if cfg.keep_rows else None
        written = kept(cfg, asked, drawn)[:share]
    if out:
        write_jsonl(out, written)
        why = '' if written else ': nothing was good enough for the keep settings'
        if all(len(rows) <= rank for rows in files.values()):
            why = ': there are fewer problems than ranks'
        print(f'{len(written)} rows -> {out}{why}')
        for partial in partials:
            partial.remove()
    if rewards.FAILURES:
        print(f'rewards failed and counted 0.0: {rewards.told()}', file=sys.stderr)
    if cfg.summary and rank == 0:
        write_jsonl(cfg.summary, [numbers])
    return numbers


if __name__ == '__main__':
    run(main, Config)
    if dist.is_initialized():
        dist.destroy_process_group()
