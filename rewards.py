"""
Rewards: plain functions `name_reward(response: str, row: dict) -> float`.

    response   the decoded completion without its end-of-turn token
    row        the data row: 'task', 'answer' and what else the reward reads (see NEEDS). 'prefill'
               is what the prompt already wrote for the assistant, for example '<think>': every
               reward puts it before the response.

A row that lacks what its reward needs raises; a response, whatever it holds, only ever scores. No
model text is evaluated as code but in the sandbox, and no input is slow.

    ACCURACY   {task: reward}: what a row's 'task' may be
    REWARDS    {name: reward}: what may be weighed, that is every task's, and 'accuracy' (that of
               the row's task), 'format', 'language', 'length', 'overlong', 'repetition', 'random'
    right      what counts as right
    combined   the weighted sum for a sample
    grade      the same for a batch, in worker processes

`check_row` and `prepare` say before a run what its rewards would lack. To add a reward, write it
into a file of one's own; it is then also a task of that name (see `use_file`):

    def brief_reward(response, row):
        return float(len(response) <= row['limit'])

    brief_reward.needs = ('limit',)

    python grpo.py --reward_file=brief.py --rewards="{'accuracy': 1.0, 'brief': 0.1}"

What takes long to say is in graders/: mathematics in maths.py, choices, countdown's expressions,
programs and the sandbox that they run in, languages. The learned reward is judge.py.
"""
import difflib
import hashlib
import inspect
import itertools
import math
import os
import re
import sys
import time
import traceback
import types
import unicodedata
import zlib
from collections import ChainMap, Counter
from fractions import Fraction
from pathlib import Path

from graders import sandbox
from graders.choice import choice_of
from graders.countdown import countdown_value
from graders.language import language_counts
from graders.maths import echoes, is_numeral, lists_equal, load, math_equal
from graders.pool import Pool
from graders.programs import after_starter, chosen_program, fenced_blocks, same_output
from graders.rows import (exact, is_answer, is_bool, is_count, is_exact, is_form, is_letter,
                          is_positive, is_string, is_tests, is_text, is_texts, is_tolerance,
                          is_wholes, or_null, whole)
from progress import Bar

FAILURES = Counter()  # (reward, exception) -> samples that it scored 0; of this process
EXAMPLES = {}         # (reward, exception) -> what the first of them said


# ---------------------------------------------------------------- an answer from a response

def split_response(response, row):
    """-> (reasoning, answer_text): the text before and after `</think>`, tags removed.

    Without any think tag everything is answer. A `<think>` that is never closed, and any think tag
    after the first `</think>`, means that there is no answer: answer_text is ''.
    """
    text = row.get('prefill', '') + response
    before, closed, after = text.partition('</think>')
    if not closed and '<think>' not in text:
        return '', text
    if '<think>' in after or '</think>' in after:
        after = ''
    return before.replace('<think>', ''), after


BOX = re.compile(r'\\(?:boxed|fbox)(?![A-Za-z])\s*')
BARE = re.compile(r'-?\d+(?:\.\d+)?(?!\w)|[A-Za-z](?![\w\'’-])(?!\s+\w)')  # TeX's \boxed 5
NO_ANSWER = re.compile(  # what holds an answer's place: \boxed{...}, \boxed{your answer}
    r'(?:[\s.…~$]|\\[lc]?dots)*|(?:\\text\{)?(?:(?:the|your|my) )?(?:final )?answer(?: here)?\}?')


def close_brace(text, start):
    """Index of the brace that closes the one at `start`, or -1. `\\{` and `\\}` do not count."""
    depth = 0
    escaped = False
    for i in range(start, len(text)):
        c = text[i]
        if escaped or c == '\\':
            escaped = not escaped
        elif c == '{':
            depth += 1
        elif c == '}':
            depth -= 1
            if depth == 0:
                return i
    return -1


def _boxes(text):
    """Contents of every `\\boxed{...}` (and `\\fbox{...}`) in text, outermost first; None where one
    is never closed. Without braces it holds the number or letter after it, or is only spoken of."""
    found = []
    pos = 0
    while m := BOX.search(text, pos):
        pos = m.end()
        if text[pos:pos + 1] == '{':
            end = close_brace(text, pos)
            if end < 0:
                return None
            found.append(text[pos + 1:end])
            pos = end + 1
        elif bare := BARE.match(text, pos):
            found.append(bare[0])
    return [box for box in found if not NO_ANSWER.fullmatch(box)]


def _around_tags(text):
    """[text, tag, text, tag, ..., text] with the tags `<answer>` and `</answer>`."""
    return re.split(r'(</?answer>)', text)


def answers_of(response, row):
    """The answers as a list of strings in their order: the contents of `<answer>...</answer>` and
    of `\\boxed{...}` after the reasoning, white space as single spaces.

    Boxes inside the answer tags win over the text around them. Blank ones are ignored and
    repetitions count once; [] when there is no answer, or when a tag or a box is never closed.
    """
    parts = _around_tags(split_response(response, row)[1])
    texts = parts[::2]
    tags = parts[1::2]
    if tags != ['<answer>', '</answer>'] * (len(tags) // 2):
        return []

    found = []
    for i, text in enumerate(texts):
        boxes = _boxes(text)
        if boxes is None:
            return []
        is_tagged = i % 2 == 1
        found += [text] if is_tagged and not boxes else boxes

    spelled = dict.fromkeys(' '.join(answer.split()) for answer in found)
    return [answer for answer in spelled if answer]


def _tagged_answers(response, row):
    """The answers between `<answer>` tags, as answers_of has them; [] without such tags."""
    parts = _around_tags(split_response(response, row)[1])
    tagged = [f'<answer>{text}</answer>' for text in parts[2::4]]
    return answers_of(''.join(tagged), {})


def answer_of(response, row, task=None):
    """The final answer as a string: the first of answers_of, where the others only spell it anew;
    None when there is no answer, and when there are several different ones.

    SAME[task] says whether two answers are the same (task: by default row['task']), or same_words
    for a task that is not there.
    """
    found = answers_of(response, row)
    same = SAME.get(task or row.get('task'), same_words)
    end = time.perf_counter() + 1.0
    try:
        for other in found[1:]:
            if time.perf_counter() > end or not same(found[0], other, row):
                return None
    except TimeoutError:
        return None
    return found[0] if found else None


# ---------------------------------------------------------------- tasks: match

def match_reward(response, row):
    """1.0 when the answer is row['answer'], compared by same_words."""
    answer = answer_of(response, row, 'match')
    return float(answer is not None and same_words(answer, str(row['answer']), row))


def same_words(one, other, row):
    """Whether two answers are alike but for case, white space (around commas none counts) and a
    last full stop."""
    return _plain_words(one) == _plain_words(other)


def _plain_words(text):
    text = ' '.join(text.casefold().split())
    return re.sub(r' ?, ?', ',', text).removesuffix('.')


# ---------------------------------------------------------------- tasks: countdown

def countdown_reward(response, row):
    """1.0 when the answer is an expression that uses each of row['numbers'] once and has the value
    row['target'] (see countdown_value). ValueError where these are no numbers."""
    numbers = [whole(n) for n in row['numbers']]
    target = exact(row['target'])
    answer = answer_of(response, row, 'countdown')
    return float(answer is not None and countdown_value(answer, numbers) == target)


def same_value(one, other, row):
    """Whether two answers are expressions of row['numbers'] that have one value."""
    numbers = [whole(n) for n in row['numbers']]
    value = countdown_value(one, numbers)
    return value is not None and value == countdown_value(other, numbers)


# ---------------------------------------------------------------- tasks: math

def math_reward(response, row):
    """1.0 when the answer, whose spellings are all equal, says the same as row['answer'], as
    graders/maths.py understands it; where that is a list, several answers may be its elements.

    An expression that row['prompt'] holds and that is not worked out is no answer, unless the
    gold is written so; with row['form'] == 'number' the answer must be a number. What cannot be
    decided in time scores 0.0 and is counted in FAILURES.
    """
    load()  # sympy, which takes no answer's time
    gold = str(row['answer'])
    answers = answers_of(response, row)
    if not gold.strip():
        raise ValueError("the row's answer is empty")
    end = time.perf_counter() + 1.0
    try:
        is_list = not _all_equal(gold, answers, end)
        if is_list and not _are_elements(gold, answers, _tagged_answers(response, row)):
            return 0.0
        if not is_list and not _spell_one_answer(answers, end):
            return 0.0
        return float(_are_worked_out(answers, row, is_list, end))
    except TimeoutError:
        FAILURES['math', 'TimeoutError'] += 1
        return 0.0


def _check_time(end):
    if time.perf_counter() > end:
        raise TimeoutError


def _all_equal(gold, answers, end):
    """Whether every answer says the same as the gold."""
    for answer in answers:
        _check_time(end)
        if not math_equal(gold, answer):
            return False
    return True


def _are_elements(gold, answers, tagged):
    """Whether several answers are the elements of the gold's list; those between tags are all."""
    if len(answers) < 2 or not lists_equal(gold, answers):
        return False
    return not tagged or lists_equal(gold, tagged)


def _spell_one_answer(answers, end):
    """Whether the answers equal each other, too: 10 and 0.1 both equal 10%, but are two answers."""
    for one, other in itertools.combinations(answers, 2):
        if not math_equal(one, other) and not math_equal(other, one):
            return False
        _check_time(end)
    return True


def _are_worked_out(answers, row, is_list, end):
    """Whether the answers are more than expressions of the prompt: of several spellings one must
    be, of the elements of a list all."""
    gold = str(row['answer'])
    prompt = _prompt_text(row.get('prompt'))
    for answer in answers:
        has_form = is_numeral(answer) or row.get('form') != 'number'
        is_worked_out = has_form and not echoes(gold, answer, prompt)
        if is_worked_out and not is_list:
            return True
        if is_list and not is_worked_out:
            return False
        _check_time(end)
    return is_list


def _prompt_text(prompt):
    """The text of a prompt, which may be a list of messages, one a line."""
    if isinstance(prompt, list):
        contents = [m.get('content') for m in prompt if isinstance(m, dict)]
        return '\n'.join(content for content in contents if isinstance(content, str))
    return prompt if isinstance(prompt, str) else ''


def same_in_math(one, other, row):
    """Whether two answers say the same, `one` taken for gold: math_equal is not symmetrical."""
    return math_equal(one, other)


# ---------------------------------------------------------------- tasks: multiple choice

def choice_reward(response, row):
    """1.0 when the answer chooses row['answer'], a letter A-E, see choice_of."""
    gold = str(row['answer']).strip()
    answer = answer_of(response, row, 'choice')
    if gold not in ('A', 'B', 'C', 'D', 'E'):
        raise ValueError(f"the row's answer is {gold!r} where one letter A-E should be")
    return float(answer is not None and choice_of(answer, row) == gold)


def same_choice(one, other, row):
    """Whether two answers choose the same letter."""
    letter = choice_of(one, row)
    return letter is not None and letter == choice_of(other, row)


# ---------------------------------------------------------------- tasks: code

PROGRAM_SECONDS = 30  # for all tests of a program together; those not run by then are failed


def code_reward(response, row):
    """1.0 when the program in the answer passes every test; with row['partial'] the share that it
    passes. See graders/sandbox.py.

    row['tests']: [{'input': text for stdin, 'output': what must be printed}], up to white space at
    the ends of lines and between numbers; row['tolerance']: error that a number may have, or 0.
    row['asserts']: statements about functions of the program (or methods of its class Solution),
    with row['setup'] and row['entry_point'] as in run_asserts.
    row['starter']: what is put before the program; row['seconds']: CPU time of a run.
    """
    tests = row.get('tests')
    asserts = row.get('asserts')
    if not tests and not asserts:
        raise ValueError("the row has no tests: give it 'tests' (input, output) or 'asserts'")
    tolerance = row.get('tolerance', 0.0)
    if not is_tolerance(tolerance):
        raise ValueError(f"'tolerance' must be a number from 0 to below 1, not {tolerance!r}")

    program = program_of(response, row)
    if program is None:
        return 0.0
    program = after_starter(row.get('starter', ''), program)
    if asserts:
        setup = row.get('setup') or ''
        seconds = row.get('seconds', sandbox.SECONDS)
        passed = sandbox.run_asserts(program, asserts, setup, row.get('entry_point'), seconds)
    else:
        passed = _run_tests(program, row)
    share = sum(passed) / len(asserts or tests)
    return share if row.get('partial') else float(share == 1.0)


def program_of(response, row):
    """The program in the answer, inside `<answer>` where there is such a tag: of the fenced blocks
    those that are marked as Python, or else as nothing, and of several the one that chosen_program
    says; what is between the tags where nothing is fenced; else None, and also where a block is
    never closed."""
    parts = _around_tags(split_response(response, row)[1])
    is_tagged = len(parts) > 1
    if is_tagged and parts[1::2] != ['<answer>', '</answer>']:
        return None
    text = parts[2] if is_tagged else parts[0]

    blocks = fenced_blocks(text)
    if blocks is None:
        return None
    if not blocks:
        return text if is_tagged and text.strip() else None
    return chosen_program(blocks, row)


def _run_tests(program, row):
    """-> [did it print what it should?], one a test; ends at the first failure unless the row gives
    partial credit, and after PROGRAM_SECONDS."""
    seconds = row.get('seconds', sandbox.SECONDS)
    tolerance = row.get('tolerance', 0.0)
    end = time.monotonic() + PROGRAM_SECONDS
    passed = []
    for test in row['tests']:
        failed = not all(passed)
        if failed and not row.get('partial') or time.monotonic() > end:
            break
        result = sandbox.run(program, test['input'], seconds)
        ended_well = result.code == 0 and not result.timed_out
        passed.append(ended_well and same_output(test['output'], result.stdout, tolerance))
    return passed


# ---------------------------------------------------------------- tasks: preference

JUDGES = {}  # name -> judge.Judge, handed to prepare()


def preference_reward(response, row):
    """0..1: how likely the answer is preferred to a typical one, by the reward model
    JUDGES[row['judge']] (default: the first). It reads row['prompt'] and the final summary, or the
    whole response (helpfulness, safety: its training said which). 0.0 without an answer."""
    judge, question = _judge_of(response, row)
    return judge(*question) if question else 0.0


def _judge_of(response, row):
    """-> the row's Judge, (prompt, text) to ask it; None for the latter where there is no
    answer."""
    if not JUDGES:
        raise ValueError('no reward model: name its folder in the config, '
                         "preference={'helpfulness': 'out/reward'}")
    question = None
    if split_response(response, row)[1].strip():
        question = row['prompt'], row.get('prefill', '') + response
    name = row.get('judge', next(iter(JUDGES)))
    return JUDGES[name], question


# ---------------------------------------------------------------- the form of a response

THINK_ANSWER = re.compile(r'<think>(.*?)</think>\s*<answer>(.*?)</answer>', re.DOTALL)
INVISIBLE = '\u115f\u1160\u2800\u3164\uffa0'  # letters and symbols that Unicode shows as nothing


def format_reward(response, row):
    """1.0 when the whole text is `<think>reasoning</think>` white space `<answer>answer</answer>`,
    each tag once and neither part blank; else 0.0.

    Anchored at both ends: nothing may come before or after, not even a newline (white space at the
    start of row['prefill'] is the prompt's).
    """
    text = row.get('prefill', '').lstrip() + response
    tags = ('<think>', '</think>', '<answer>', '</answer>')
    if any(text.count(tag) != 1 for tag in tags):
        return 0.0
    m = THINK_ANSWER.fullmatch(text)
    if not m or _is_blank(m[1]) or _is_blank(m[2]):
        return 0.0
    return 1.0


def _is_blank(text):
    """Whether nothing in text is visible: there are only separators (Z), controls and zero-width
    characters (C), marks (M)."""
    return all(unicodedata.category(c)[0] in 'ZCM' or c in INVISIBLE for c in text)


def language_reward(response, row):
    """Share of the reasoning's words that are in row['language'] (default 'en'); 0.0 without any
    words.

    A run of letters is a word, as is each Han, kana or hangul character; numbers, symbols, code and
    LaTeX are neutral.
    """
    target = row.get('language', 'en')
    reasoning = split_response(response, row)[0]
    counts = language_counts(reasoning, target)
    return counts[target] / counts.total() if counts else 0.0


def language_mixed(response, row):
    """True when the reasoning holds words of more than one language or script (for reports)."""
    reasoning = split_response(response, row)[0]
    counts = language_counts(reasoning, row.get('language', 'en'))
    return len(counts) > 1


def length_reward(response, row):
    """Shorter right answers score more, as in Kimi k1.5 (arXiv:2501.12599):

        l = 0.5 - (length - min) / (max - min), for a wrong answer min(0, l)

    length: row['completion_tokens'], or else characters. row['shortest'], row['longest']: min and
    max of the group, in the same unit. 0.0 when they are equal; between -0.5 and 0.5.
    """
    shortest = row['shortest']
    longest = row['longest']
    if longest <= shortest:
        return 0.0
    share = (_length(response, row) - shortest) / (longest - shortest)
    score = 0.5 - min(1.0, max(0.0, share))
    is_right = accuracy_reward(response, row) == 1.0
    return score if is_right else min(0.0, score)


def overlong_reward(response, row):
    """DAPO's soft punishment (arXiv:2503.14476): 0 up to max - margin, then falling to -1 at max =
    row['max_length'], and -1 beyond.

    length: row['completion_tokens'], or else characters; margin: row['overlong_margin'], by default
    a fifth of max.
    """
    longest = row['max_length']
    margin = row.get('overlong_margin', longest / 5)
    share = (_length(response, row) - (longest - margin)) / margin
    return -min(1.0, max(0.0, share))


def _length(response, row):
    return row.get('completion_tokens', len(response))


WORD = re.compile(r'[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[^\W\d_]+|\d+|[^\w\s]')


def repetition_reward(response, row):
    """-(1 - different / all) of the response's n-grams of words, n = row['ngram'] (default 20): 0
    when none repeats, near -1 when it loops. A number, a symbol, a Han, kana or hangul character is
    a word; too short a response scores 0.

    Honest mathematics repeats itself: published R1 traces score -0.2 to -0.6 at n = 3, but 0 to
    -0.06 at n = 20.
    """
    n = row.get('ngram', 20)
    words = WORD.findall(response.lower())
    ngrams = list(zip(*(words[i:] for i in range(n))))
    if not ngrams:
        return 0.0
    return len(set(ngrams)) / len(ngrams) - 1.0


def random_reward(response, row):
    """0 or 1 by a hash of problem and response: the control that a reward must beat."""
    return float(zlib.crc32(f"{row['prompt']} {response}".encode()) >> 7 & 1)


# ---------------------------------------------------------------- the two dicts

def accuracy_reward(response, row):
    """The reward of the row's task, ACCURACY[row['task']]."""
    task = row['task']
    if task not in ACCURACY:
        raise ValueError(f"unknown task {task!r} in the row: use one of {', '.join(ACCURACY)}")
    return ACCURACY[task](response, row)


ACCURACY = {  # task -> its reward
    'countdown': countdown_reward,
    'match': match_reward,
    'math': math_reward,
    'choice': choice_reward,
    'code': code_reward,
    'preference': preference_reward,
}

SAME = {  # task -> same(one, other, row): are two answers one in two spellings? Else same_words
    'countdown': same_value,
    'math': same_in_math,
    'choice': same_choice,
}

JUDGED = {'preference'}  # tasks that know better and worse, but no right and wrong

# A view: every task is a reward too, whenever it was added to ACCURACY.
REWARDS = ChainMap({
    'accuracy': accuracy_reward,
    'random': random_reward,
    'format': format_reward,
    'language': language_reward,
    'length': length_reward,
    'overlong': overlong_reward,
    'repetition': repetition_reward,
}, ACCURACY)


# ---------------------------------------------------------------- what is right

def accuracy_of(scored):
    """The unweighted reward of a scored sample's task, as 'accuracy' or by the task's name; None
    where nobody scored it. scored: {"task": name, "rewards": {name: unweighted reward}, ...}."""
    rewards = scored['rewards']
    return rewards.get('accuracy', rewards.get(scored.get('task')))


def right(scored):
    """Whether a scored sample is right: the reward of its row's task is 1 or more, that is fully
    right. All that counts right answers asks here: pass@k, greedy, maj@k, the best of n, `right` of
    a training step, pass rates.

    None where right has no meaning: the task is judged rather than checked (JUDGED), or nobody
    scored its reward.
    """
    score = accuracy_of(scored)
    if score is None or scored.get('task') in JUDGED:
        return None
    return score >= 1


# ---------------------------------------------------------------- the weighted sum

def combined(response, row, weights):
    """-> (total, components): total = sum of weights[name] * components[name], components the
    unweighted rewards.

    weights: {name in REWARDS: weight}; another name raises ValueError. A reward that raises, or
    returns what is not a finite number, scores 0.0 for this sample and is counted in FAILURES.
    """
    check_names(weights)
    components = _components(response, row, weights)
    return _total(components, weights), components


def check_names(weights):
    for name, weight in weights.items():
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown reward {name!r} in the weights: did you mean {near!r}? "
                             f"Known: {', '.join(REWARDS)}; one of your own comes from reward_file")
        if not math.isfinite(weight):
            raise ValueError(f'the weight of reward {name!r} must be finite, not {weight!r}')


def _components(response, row, names):
    """{name: unweighted reward}; one that fails is 0.0 and counted."""
    components = {}
    for name in names:
        try:
            components[name] = float(REWARDS[name](response, row))
            if not math.isfinite(components[name]):
                raise ValueError(f'{components[name]} is no finite reward')
        except (Exception, SystemExit) as error:
            components[name] = 0.0
            _count_failure(name, error)
    return components


def _total(components, weights):
    # in decimals, so that sums that are equal on paper are equal: 0.1 + 0.2 and 0.3
    terms = [Fraction(str(weights[name])) * Fraction(str(components[name])) for name in weights]
    return float(sum(terms))


# ---------------------------------------------------------------- rewards that fail

def _count_failure(name, error):
    """FAILURES counts it, EXAMPLES keeps what the first of its kind said, and where in the reward
    file."""
    kind = name, type(error).__name__
    FAILURES[kind] += 1
    if kind in EXAMPLES:
        return
    said = f'{kind[1]}: {str(error)[:300]}'
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if _file and frame.filename == _file[0]]
    if lines:
        said += f' ({_file[0]}:{lines[-1]})'
    EXAMPLES[kind] = said


def told():
    """FAILURES in words, the most frequent first: "math: KeyError 16 times (KeyError:
    'answer')"."""
    said = []
    for (name, error), count in FAILURES.most_common(3):
        example = EXAMPLES.get((name, error), error)
        said.append(f'{name}: {error} {count} times ({example})')
    return ', '.join(said)


def failures(before, weights):
    """-> {reward in weights: samples that it failed on since FAILURES was `before`}, in this
    process. What a worker died of counts for every reward."""
    since = Counter()
    for (name, _), count in (FAILURES - before).items():
        since[name] += count
    return {name: since[name] + since['worker'] for name in weights}


def require_working(failed, n):
    """failed: {reward: samples that it failed on}, of n. ValueError where one failed on all."""
    for name, count in failed.items():
        if 0 < n <= count:
            said = [text for (of, _), text in EXAMPLES.items() if of in (name, 'worker')]
            example = said[0] if said else 'see the other ranks'
            raise ValueError(f'the reward {name!r} failed on all of {n} samples: {example}')


# ---------------------------------------------------------------- what a row must hold

TESTS = 'a list of {"input": text, "output": text}'

# task or reward -> {key of the row that it reads: (what that must be, its test)}; ?: or nothing
NEEDS = {
    'countdown': {
        'numbers': ('a list of whole numbers', is_wholes),
        'target': ('a number', is_exact),
    },
    'match': {
        'answer': ('text or a number', is_answer),
    },
    'math': {
        'answer': ('text or a number', is_answer),
        'form?': ("'number'", is_form),
    },
    'choice': {
        'answer': ('one letter A-E', is_letter),
        'choices?': ('a list of texts', or_null(is_texts)),
    },
    'code': {
        'tests?': (TESTS, or_null(is_tests)),
        'asserts?': ('a list of texts', or_null(is_texts)),
        'starter?': ('text', is_string),
        'setup?': ('text', or_null(is_string)),
        'entry_point?': ('a name', or_null(is_string)),
        'seconds?': ('a number above 0', is_positive),
        'partial?': ('true or false', is_bool),
        'tolerance?': ('a number from 0 to below 1', is_tolerance),
    },
    'preference': {
        'judge?': ('the name of a reward model', is_text),
    },
    'overlong': {
        'overlong_margin?': ('a number above 0', is_positive),
    },
    'repetition': {
        'ngram?': ('a whole number above 0', is_count),
    },
}


def check_row(row, weights):
    """Raises ValueError, which names the key, unless the row has what the rewards in `weights` read
    of it.

    A function of a reward file says what it needs as `name_reward.needs = ('key', ...)`, or is not
    checked.
    """
    task = row.get('task')
    if not isinstance(task, str) or task not in ACCURACY:
        raise _unknown_task(task)
    language_counts('', row.get('language', 'en'))  # raises for one that it does not know
    if not isinstance(row.get('prefill', ''), str):
        raise ValueError(f"'prefill' must be text, not {repr(row['prefill'])[:60]}")
    names = [task if name in ('accuracy', 'length') else name for name in weights]
    for name in dict.fromkeys(names):
        _check_needs(row, name)


def _unknown_task(task):
    return ValueError(f"unknown task {task!r} in the data: use one of {', '.join(ACCURACY)}, "
                      "or define your own in a reward_file")


def _check_needs(row, name):
    """check_row for one reward."""
    needs = getattr(REWARDS[name], 'needs', ())  # of a function of a reward file
    for key in [needs] if isinstance(needs, str) else needs:
        _check_present(row, key, name)

    for key, (form, fits) in NEEDS.get(name, {}).items():
        if not key.endswith('?'):
            _check_present(row, key, name)
        key = key.removesuffix('?')
        if key == 'answer' and str(row[key]).strip() == '':
            raise ValueError("the row's answer is empty")
        if key in row and not fits(row[key]):
            said = repr(row[key])[:60]
            raise ValueError(f'{key!r} must be {form} for the reward {name!r}, not {said}')

    if name == 'code' and not row.get('tests') and not row.get('asserts'):
        raise ValueError(f"the reward 'code' needs 'tests' ({TESTS}) or 'asserts'")


def _check_present(row, key, name):
    if row.get(key) is None:
        raise ValueError(f'{key!r} is missing, which the reward {name!r} reads')


def check_answer(row):
    """Raises ValueError where a row of one of our tasks has an answer (numbers, tests, asserts)
    that the task's reward could not read. A row without any may be of use to others."""
    task = row.get('task')
    if not isinstance(task, str) or task not in ACCURACY:
        return
    keys = ('answer', 'numbers', 'tests', 'asserts')
    if any(row.get(key) is not None for key in keys):
        check_row(row, {'accuracy': 1.0})


def checked(path, rows, weights):
    """The rows of a problem file, row i from line i + 1, once each passed check_row. ValueError
    names the line."""
    for number, row in enumerate(rows, 1):
        try:
            check_row(row, weights)
        except ValueError as error:
            raise ValueError(f'{path}:{number}: {error}') from error
    return rows


# ---------------------------------------------------------------- rewards of one's own

_file = None  # (path, source) of the file whose functions are among ours
_own = {}     # name -> its function


def use_file(path):
    """Makes every function `name_reward(response, row)` of a Python file a reward and a task of
    that name beside ours, in place of an earlier file's; '' takes them away. `name_equal(a, b,
    row)` says which answers are one vote (see votes), `name_reward.needs` which keys a row must
    have. ValueError: file and line of what is wrong."""
    try:
        _take((path, Path(path).read_bytes()) if path else None)
    except OSError as error:
        raise ValueError(f'reward_file={path!r}: {error.strerror}') from error


def file_stamp():
    """The reward file as it was read, for checkpoints: {"path", "sha256"}, both '' without one."""
    if not _file:
        return {'path': '', 'sha256': ''}
    path, source = _file
    return {'path': path, 'sha256': hashlib.sha256(source).hexdigest()}


def file_changed(before):
    """before: a checkpoint's stamp, or None -> what to say if it was of another file, else None."""
    before = before or {'path': '', 'sha256': ''}
    now = file_stamp()
    if now['sha256'] == before['sha256']:
        return None
    return (f'the reward_file of the checkpoint was {_stamp_in_words(before)}, '
            f'now it is {_stamp_in_words(now)}')


def _stamp_in_words(stamp):
    if not stamp['path']:
        return 'none'
    return f"{stamp['path']} (sha256 {stamp['sha256'][:12]})"


def _take(file):
    """file as in _file. The workers get the source that the run began with: editing it changes
    nothing."""
    global _file
    if file == _file:
        return
    for name in _own:
        del ACCURACY[name]
        SAME.pop(name, None)
    _own.clear()
    _file = None
    if not file:
        return
    module = _module(*file)
    _own.update(_functions(file[0], module))
    ACCURACY.update(_own)
    for name in _own:
        if equal := getattr(module, f'{name}_equal', None):
            SAME[name] = equal
    _file = file


def _module(path, source):
    """The module that the source makes; it may import its neighbours."""
    module = types.ModuleType('reward_file')
    module.__file__ = path
    sys.modules['reward_file'] = module
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        exec(compile(source, path, 'exec'), vars(module))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [1, *(frame.lineno for frame in frames if frame.filename == path)]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines.append(error.lineno)
        said = getattr(error, 'msg', None) or error
        raise ValueError(f'{path}:{lines[-1]}: {type(error).__name__}: {said}') from error
    return module


def _functions(path, module):
    """{name: function} of the module's functions name_reward, without private ones and those from
    here."""
    found = {}
    for key, function in vars(module).items():
        if not key.endswith('_reward') or key.startswith('_'):
            continue
        if not callable(function) or function is globals().get(key):
            continue
        name = key.removesuffix('_reward')
        line = getattr(getattr(function, '__code__', None), 'co_firstlineno', 1)
        where = f'{path}:{line}'
        if name in REWARDS or name in ('worker', 'equal'):  # which FAILURES counts under, too
            raise ValueError(f'{where}: {key}: the name {name!r} is taken, choose another')
        try:
            inspect.signature(function).bind('response', {})
        except TypeError:
            raise ValueError(f'{where}: {key} must take (response, row); if it is no reward, call '
                             f'it _{key}') from None
        found[name] = function
    if not found:
        raise ValueError(f'{path}: no function name_reward(response, row) in it')
    return found


# ---------------------------------------------------------------- votes

NO_VOTE = {'code', *JUDGED}  # tasks whose answers nobody can tell to be the same: programs, texts
VOTE_SECONDS = 10.0          # for the answers of one problem; after it they go by spelling


def votes(answers, row):
    """Final answers to a problem (None: no answer) -> for each the answer that it votes for: the
    first that the task's grader (SAME) calls the same. None: no vote."""
    if row.get('task') in NO_VOTE:
        return [None] * len(answers)
    end = time.monotonic() + VOTE_SECONDS
    firsts = []
    vote = {None: None}
    for answer in answers:
        if answer not in vote:
            vote[answer] = _first_equal(answer, firsts, row, end)
            if vote[answer] == answer:
                firsts.append(answer)
    return [vote[answer] for answer in answers]


def _first_equal(answer, firsts, row, end):
    """The first of `firsts` that is the same as the answer, or the answer itself."""
    same = SAME.get(row.get('task'), same_words)
    for first in firsts:
        if time.monotonic() > end:
            break
        try:
            if same(first, answer, row) or same(answer, first, row):
                return first
        except Exception as error:
            _count_failure('equal', error)
    return answer


# ---------------------------------------------------------------- batches, in workers

SECONDS = 120  # that a worker may take over one sample before it is killed
_pool = None   # made by prepare()


def grade(samples, weights):
    """[(response, row)] -> [(total, components)] as `combined` gives them, in the processes that
    `prepare` started, if any.

    A sample whose worker takes more than SECONDS, or is killed twice, scores 0.0 in every component
    that is graded there and is counted. What a reward model judges is graded here, where the model
    is.
    """
    check_names(weights)
    _ask_judges(samples, weights)

    graded = []  # {name: unweighted reward} of each sample
    away = []    # (sample, names) for the workers
    bar = Bar('grading', len(samples), 'samples')
    for i, (response, row) in enumerate(samples):
        here = [name for name in weights if not _pool or _is_judged(name, row)]
        graded.append(_components(response, row, here))
        others = [name for name in weights if name not in here]
        if others:
            away.append((i, others))
        else:
            bar.update()

    calls = [(*samples[i], names) for i, names in away]
    for (i, names), value in zip(away, _in_workers('_components', calls, bar.update)):
        if isinstance(value, Exception):
            value = dict.fromkeys(names, 0.0)
        graded[i].update(value)
    bar.close()

    ordered = [{name: components[name] for name in weights} for components in graded]
    return [(_total(components, weights), components) for components in ordered]


def _is_judged(name, row):
    """Whether a reward of a row asks a reward model."""
    by_task = name in ('accuracy', 'length')
    return name == 'preference' or by_task and row.get('task') == 'preference'


def _ask_judges(samples, weights):
    """Has the reward models read in batches what they will be asked. Where that fails each sample
    asks for itself, and the failing ones are counted."""
    try:
        asked = []
        for response, row in samples:
            if 'preference' in weights or row.get('task') == 'preference':
                asked.append(_judge_of(response, row))
        for judge in JUDGES.values():
            judge.read([question for other, question in asked if other is judge and question])
    except Exception:
        pass


def count_votes(problems):
    """[(answers, row)] -> [votes(answers, row)], in the processes that `prepare` started, if any.
    Where one fails its answers go by spelling."""
    if not _pool:
        return [votes(answers, row) for answers, row in problems]
    counted = []
    for (answers, _), value in zip(problems, _in_workers('votes', problems)):
        counted.append(answers if isinstance(value, Exception) else value)
    return counted


def _in_workers(name, arguments, update=None):
    """Calls of a function of this module in the pool -> their values; where one failed its
    exception, counted. update: as of Pool.map"""
    if not arguments:
        return []
    calls = [(name, args, sandbox.unsafe, _file) for args in arguments]
    values = []
    for answer in _pool.map('rewards', '_work', calls, update):
        if isinstance(answer, Exception):
            _count_failure('worker', answer)
            values.append(answer)
            continue
        value, failed, examples = answer
        values.append(value)
        FAILURES.update(failed)
        for kind, said in examples.items():
            EXAMPLES.setdefault(kind, said)
    return values


def _work(name, args, unsafe, file):
    """In a worker: the function's value, the failures that it counted and their examples."""
    sandbox.unsafe = unsafe
    FAILURES.clear()
    EXAMPLES.clear()
    _take(file)
    return globals()[name](*args), dict(FAILURES), dict(EXAMPLES)


def prepare(weights, tasks, unsafe_code=False, workers=-1, judges=None):
    """Before a run: raises unless every reward in `weights` is known and those of `tasks`, the
    kinds of tasks of its rows, can work on this machine: sandbox.SandboxError where programs cannot
    be contained (unsafe_code: only warns).

    workers: processes that grade; -1: one a core (shared by the machine's ranks) where programs are
    run or a reward file is used, whose functions may hang, else none. judges: {name: judge.Judge},
    the reward models.
    """
    global _pool
    check_names(weights)
    for task in set(tasks) - set(ACCURACY):
        raise _unknown_task(task)
    wanted = {*weights, *tasks}
    if _own and wanted.isdisjoint(_own) and os.environ.get('RANK', '0') == '0':
        print(f'warning: no reward or task asks for what {_file[0]} defines: {", ".join(_own)}',
              file=sys.stderr)

    runs_programs = 'code' in wanted
    if runs_programs:
        sandbox.require(unsafe_code)

    JUDGES.clear()
    JUDGES.update(judges or {})
    if 'preference' in wanted and not JUDGES:
        raise ValueError('a preference reward needs a reward model: '
                         "preference={'helpfulness': folder} in the config")

    if workers < 0:
        ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        cores = (os.cpu_count() or 1) // ranks
        workers = max(1, cores) if runs_programs or _file else 0
    if _pool:
        _pool.close()
    _pool = Pool(workers, SECONDS) if workers else None
