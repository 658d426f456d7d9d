"""
Rewards: plain functions `name_reward(response: str, row: dict) -> float`.

`response` is the decoded completion without its end-of-turn token. `row` is the data row; the keys used here are `prefill` (what
the prompt already wrote for the assistant, for example '<think>'; every reward puts it before the response), `task`, `answer`,
`numbers`, `target`, `language` ... A row that lacks what its reward needs raises; a response, whatever it holds, only ever scores.
No model text is evaluated as code but in the sandbox, and no input is slow.

REWARDS names what `combined` can weigh, `grade` scores a batch, `prepare` checks before a run that its rewards can work.
The grader of mathematics is graders/maths.py, programs run in graders/sandbox.py, the learned reward is preference.py.
"""
import difflib
import math
import os
import re
import time
import unicodedata
import zlib
from collections import Counter
from fractions import Fraction

from graders import sandbox
from graders.language import language_counts
from graders.maths import FONTS, lists_equal, math_equal
from graders.pool import Pool

FAILURES = Counter()  # (reward, exception) -> samples that it scored 0; of this process

# ---------------------------------------------------------------- reasoning and answer

def split_response(response, row):
    """-> (reasoning, answer_text): the text before and after `</think>`, tags removed.

    Without any think tag everything is answer. A `<think>` that is never closed, and any think tag after the first
    `</think>`, means that there is no answer: answer_text is ''.
    """
    text = row.get('prefill', '') + response
    reasoning, closed, answer = text.partition('</think>')
    if not closed:
        return (text.replace('<think>', ''), '') if '<think>' in text else ('', text)
    if '<think>' in answer or '</think>' in answer:
        answer = ''
    return reasoning.replace('<think>', ''), answer


def close_brace(text, start):
    """Index of the brace that closes the one at `start`, or -1. `\\{` and `\\}` do not count."""
    depth, skip = 0, False
    for i in range(start, len(text)):
        c = text[i]
        if skip or c == '\\':
            skip = not skip
        elif c == '{':
            depth += 1
        elif c == '}':
            depth -= 1
            if depth == 0:
                return i
    return -1


BOX = re.compile(r'\\(?:boxed|fbox)(?![A-Za-z])\s*')
BARE = re.compile(r'-?\d+(?:\.\d+)?(?!\w)|[A-Za-z](?![\w\'’-])(?!\s+\w)')  # TeX's \boxed 5
NO_ANSWER = re.compile(r'(?:[\s.…~$]|\\[lc]?dots)*')  # in a box: here the answer will stand


def _boxes(text):
    """Contents of every `\\boxed{...}` (and `\\fbox{...}`) in text, outermost first; None where one
    is never closed. Without braces it holds the number or letter after it, or is only spoken of."""
    found, pos = [], 0
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


def answers_of(response, row):
    """The answers as a list of strings in their order: the contents of `<answer>...</answer>` and
    of `\\boxed{...}` after the reasoning, white space as single spaces.

    Boxes inside the answer tags win over the text around them. Blank ones are ignored and
    repetitions count once; [] when there is no answer, or when a tag or a box is never closed.
    """
    answer = split_response(response, row)[1]
    parts = re.split(r'(</?answer>)', answer)  # text, tag, text, tag, ..., text
    if parts[1::2] != ['<answer>', '</answer>'] * (len(parts) // 4):
        return []
    found = []
    for i, part in enumerate(parts[::2]):
        boxes = _boxes(part)
        if boxes is None:
            return []
        found += boxes if boxes or i % 2 == 0 else [part]
    spelled = dict.fromkeys(' '.join(a.split()) for a in found)
    return [a for a in spelled if a]


def answer_of(response, row, task=None):
    """The final answer as a string: the first of answers_of, where the others only spell it anew.

    What is the same answer is the task's to say (SAME[task], by default of row['task']), or else
    the words'. None when there is no answer and when there are several different ones.
    """
    found, end = answers_of(response, row), time.perf_counter() + 1.0
    same = SAME.get(task or row.get('task'), _same_words)
    try:
        for other in found[1:]:
            if time.perf_counter() > end or not same(found[0], other, row):
                return None
    except TimeoutError:
        return None
    return found[0] if found else None


# ---------------------------------------------------------------- format and exact match

THINK_ANSWER = re.compile(r'<think>(.*?)</think>\s*<answer>(.*?)</answer>', re.DOTALL)
INVISIBLE = '\u115f\u1160\u2800\u3164\uffa0'  # letters and symbols that Unicode shows as nothing


def _blank(text):
    """True when nothing in text is visible: only separators (Z), controls and zero-width characters (C), marks (M)."""
    return all(unicodedata.category(c)[0] in 'ZCM' or c in INVISIBLE for c in text)


def format_reward(response, row):
    """1.0 when the whole text is `<think>reasoning</think>` white space `<answer>answer</answer>`, each tag once and
    neither part blank; else 0.0. Anchored at both ends: nothing may come before or after, not even a newline."""
    text = row.get('prefill', '') + response
    once = all(text.count(tag) == 1 for tag in ('<think>', '</think>', '<answer>', '</answer>'))
    m = once and THINK_ANSWER.fullmatch(text)
    return float(bool(m) and not _blank(m[1]) and not _blank(m[2]))


def match_reward(response, row):
    """1.0 when the answer equals row['answer'] but for case, white space (all around commas) and a full stop at the end."""
    answer = answer_of(response, row, 'match')
    return float(answer is not None and _same_words(answer, str(row['answer']), row))


def _same_words(one, other, row):
    plain = [re.sub(r' ?, ?', ',', ' '.join(text.casefold().split())) for text in (one, other)]
    return plain[0].removesuffix('.') == plain[1].removesuffix('.')


# ---------------------------------------------------------------- countdown

def _countdown_value(expression, numbers):
    """Exact value (Fraction) of an expression over + - * / and parentheses that uses each of `numbers` exactly once.

    expr := term (('+'|'-') term)*;  term := atom (('*'|'/') atom)*;  atom := integer | '(' expr ')'
    There are no signs, powers, decimals or juxtaposition. Raises ValueError or ZeroDivisionError on anything else.
    """
    tokens = re.findall(r'[0-9]+|[^\s]', expression)[::-1]  # reversed: the next token is tokens[-1], taken by pop()
    unused = Counter(str(n) for n in numbers)

    def take(kinds):
        return tokens.pop() if tokens and tokens[-1] in kinds else None

    def expr():
        value = term()
        while op := take('+-'):
            value = value + term() if op == '+' else value - term()
        return value

    def term():
        value = atom()
        while op := take('*/'):
            value = value * atom() if op == '*' else value / atom()
        return value

    def atom():
        if take('('):
            value = expr()
            if not take(')'):
                raise ValueError('unbalanced parenthesis')
            return value
        token = tokens.pop() if tokens else ''
        if unused[token] <= 0:
            raise ValueError(f'{token!r} is not a number that is left to use')
        unused[token] -= 1
        return Fraction(int(token))

    value = expr()
    if tokens or any(unused.values()):
        raise ValueError('text or numbers left over')
    return value


OPERATORS = {'×': '*', '÷': '/', '−': '-', '∗': '*', '·': '*', '\\times': '*', '\\cdot': '*', '\\div': '/'}


def countdown_reward(response, row):
    """1.0 when the answer is an expression over row['numbers'], each used once, that equals row['target'] exactly.

    A trailing `= target` is allowed if right. The answer may be 20 characters a number long.
    """
    numbers, target = row['numbers'], row['target']
    answer = answer_of(response, row, 'countdown')
    if answer is None or len(answer) > 20 * len(numbers) + 20:
        return 0.0
    for sign, op in OPERATORS.items():
        answer = answer.replace(sign, op)
    expression, equals, stated = answer.partition('=')
    if equals and stated.strip() != str(target):
        return 0.0
    try:
        return float(_countdown_value(expression, numbers) == target)
    except (ValueError, ZeroDivisionError):
        return 0.0


# ---------------------------------------------------------------- language

def language_reward(response, row):
    """Share of the reasoning's words that are in row['language'] (default 'en'); 0.0 without any words.

    A run of letters is a word, as is each Han, kana or hangul character; numbers, symbols, code and LaTeX are neutral.
    """
    target = row.get('language', 'en')
    counts = language_counts(split_response(response, row)[0], target)
    return counts[target] / counts.total() if counts else 0.0


def language_mixed(response, row):
    """True when the reasoning holds words of more than one language or script (for reports)."""
    return len(language_counts(split_response(response, row)[0], row.get('language', 'en'))) > 1


# ---------------------------------------------------------------- math

def math_reward(response, row):
    """1.0 when the answer, in every spelling of it, says the same as row['answer'], as
    graders/maths.py understands it; where that is a list, several answers may be its elements.
    What cannot be decided in time scores 0.0 and is counted in FAILURES."""
    gold, answers, end = str(row['answer']), answers_of(response, row), time.perf_counter() + 1.0
    if not gold.strip():
        raise ValueError("the row's answer is empty")
    try:
        for answer in answers:
            if time.perf_counter() > end:
                raise TimeoutError
            if not math_equal(gold, answer):
                return float(len(answers) > 1 and lists_equal(gold, answers))
    except TimeoutError:
        FAILURES['math', 'TimeoutError'] += 1
        return 0.0
    return float(bool(answers))


def _same_in_math(one, other, row):
    return math_equal(one, other)


# ---------------------------------------------------------------- multiple choice

CHOICE = re.compile(r'(?i:(?:the )?(?:(?:final|correct|best) )?(?:answer|option|choice|(?:正确)?答案|选项)(?: is|是|为)?[ :]*){0,2}'
                    r'[(\[]*([A-Ea-e])(?![A-Za-z0-9])( [-–—](?= )|[)\].:,。]*)(.*)')


def choice_reward(response, row):
    """1.0 when the answer is row['answer'], a letter A-E: 'B', '(b)', '**B.**', '\\text{B}', '**Answer:** B', '答案：B', 'B - Aspirin'.

    Text after the letter may not hold another letter A-E by itself, unless it is that option's in row['choices'].
    """
    gold, answer = str(row['answer']).strip(), answer_of(response, row, 'choice')
    if gold not in ('A', 'B', 'C', 'D', 'E'):
        raise ValueError(f"the row's answer is {gold!r} where one letter A-E should be")
    m = answer and CHOICE.fullmatch(unicodedata.normalize('NFKC', re.sub(FONTS, r' \1 ', answer)).replace('*', '').strip(' $'))
    if not m or m[1].upper() != gold:
        return 0.0
    choices, mark, text = list(row.get('choices', ()))[ord(gold) - ord('A'):], m[2], m[3].strip()
    if not text or choices and text.casefold() == str(choices[0]).casefold():
        return 1.0
    return float(m[1].isupper() and mark != '' and not re.search(r'(?<![A-Za-z0-9])[A-E](?![A-Za-z0-9])', text))


# ---------------------------------------------------------------- code

PROGRAM_SECONDS = 30  # for all tests of a program together; those that did not run by then are failed


def program_of(response, row):
    """The program in the answer: the last block fenced with ``` that is marked as Python, or else as nothing, inside `<answer>` where
    there is such a tag; what is between the tags where nothing is fenced; else None, and also where a block is never closed."""
    parts = re.split(r'(</?answer>)', split_response(response, row)[1])
    if len(parts) > 1 and parts[1::2] != ['<answer>', '</answer>']:
        return None
    text, programs, block = parts[2 if len(parts) > 1 else 0], {}, None
    for line in text.split('\n'):
        if block is None and line.lstrip().startswith('```'):
            block, kind = [], re.split(r'[\s{]', line.strip('` \t\r').lower())[0]
        elif block is not None and line.strip() == '```':
            programs[kind in ('python', 'python3', 'py') or kind], block = '\n'.join(block), None
        elif block is not None:
            block.append(line)
    if '```' in text:
        return programs.get(True, programs.get('')) if block is None else None
    return text if len(parts) > 1 and text.strip() else None


def _printed(text):
    """Lines without white space at their ends, and without blank lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def code_reward(response, row):
    """1.0 when the program in the answer passes every test; with row['partial'] the share that it passes. See graders/sandbox.py.

    row['tests']: [{'input': text for stdin, 'output': what must be printed}], up to white space at the ends of lines.
    row['asserts']: statements about functions of the program, with row['setup'] and row['entry_point'] as in run_asserts.
    row['starter']: what is put before the program; row['seconds']: CPU time of a run.
    """
    tests, asserts, seconds = row.get('tests'), row.get('asserts'), row.get('seconds', sandbox.SECONDS)
    if not tests and not asserts:
        raise ValueError("the row has no tests: give it 'tests' (input, output) or 'asserts'")
    program = program_of(response, row)
    if program is None:
        return 0.0
    program = row.get('starter', '') + program
    if asserts:
        passed = sandbox.run_asserts(program, asserts, row.get('setup') or '', row.get('entry_point'), seconds)
    else:
        passed, end = [], time.monotonic() + PROGRAM_SECONDS
        for test in tests:
            if (passed and not passed[-1] and not row.get('partial')) or time.monotonic() > end:
                break
            result = sandbox.run(program, test['input'], seconds)
            passed.append(result.code == 0 and not result.timed_out and _printed(result.stdout) == _printed(test['output']))
    share = sum(passed) / len(asserts or tests)
    return share if row.get('partial') else float(share == 1.0)


# ---------------------------------------------------------------- preference

JUDGES = {}  # name -> preference.Judge, set by prepare()


def preference_reward(response, row):
    """0..1: how likely the answer is preferred to a typical one, by the reward model JUDGES[row['judge']] (default: the first). It reads
    row['prompt'] and the final summary, or the whole response (helpfulness, safety: its training said which). 0.0 without an answer."""
    judge, asked = _judge_of(response, row)
    return judge(*asked) if asked else 0.0


def _judge_of(response, row):
    """-> Judge, (prompt, text) to ask it, or None in place of these where there is no answer"""
    if not JUDGES:
        raise ValueError("no reward model: name its folder in the config, preference={'helpfulness': 'out/reward'}")
    asked = (row['prompt'], row.get('prefill', '') + response) if split_response(response, row)[1].strip() else None
    return JUDGES[row.get('judge', next(iter(JUDGES)))], asked


# ---------------------------------------------------------------- length and repetition

def _length(response, row):
    return row.get('completion_tokens', len(response))


def length_reward(response, row):
    """Shorter right answers score more: l = 0.5 - (length - min) / (max - min), for a wrong answer min(0, l).

    length: row['completion_tokens'], or else characters. row['shortest'], row['longest']: of the group, in the same unit.
    0.0 when they are equal; between -0.5 and 0.5.
    """
    low, high = row['shortest'], row['longest']
    if high <= low:
        return 0.0
    score = 0.5 - min(1.0, max(0.0, (_length(response, row) - low) / (high - low)))
    return score if accuracy_reward(response, row) == 1.0 else min(0.0, score)


def overlong_reward(response, row):
    """DAPO's soft punishment: 0 up to max - margin, then falling to -1 at max = row['max_length'], and -1 beyond.

    length: row['completion_tokens'], or else characters; margin: row['overlong_margin'], by default a fifth of max.
    """
    longest = row['max_length']
    margin = row.get('overlong_margin', longest / 5)
    return -min(1.0, max(0.0, (_length(response, row) - (longest - margin)) / margin))


def repetition_reward(response, row):
    """-(1 - different / all) of the response's n-grams of words, n = row['ngram'] (default 20): 0 when none repeats,
    near -1 when it loops. A number, a symbol, a Han, kana or hangul character is a word; too short a response scores 0.

    Honest mathematics repeats itself: published R1 traces score -0.2 to -0.6 at n = 3, but 0 to -0.06 at n = 20.
    """
    n = row.get('ngram', 20)
    words = re.findall(r'[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[^\W\d_]+|\d+|[^\w\s]', response.lower())
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


# ---------------------------------------------------------------- choosing and combining

ACCURACY = {'countdown': countdown_reward, 'match': match_reward, 'math': math_reward, 'choice': choice_reward, 'code': code_reward,
            'preference': preference_reward}
SAME = {'math': _same_in_math}  # task -> are two answers one in two spellings? Else by words


def accuracy_reward(response, row):
    """The reward of the row's task, ACCURACY[row['task']]."""
    if row['task'] not in ACCURACY:
        raise ValueError(f"unknown task {row['task']!r} in the row: use one of {', '.join(ACCURACY)}")
    return ACCURACY[row['task']](response, row)


def random_reward(response, row):
    """0 or 1 by a hash of problem and response: the control that a reward must beat."""
    return float(zlib.crc32(f"{row['prompt']} {response}".encode()) >> 7 & 1)


REWARDS = {'accuracy': accuracy_reward, 'random': random_reward, 'format': format_reward, 'language': language_reward,
           'length': length_reward, 'overlong': overlong_reward, 'repetition': repetition_reward, **ACCURACY}


def check_names(weights):
    for name in weights:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown reward {name!r} in the weights: did you mean {near!r}? Known: {', '.join(REWARDS)}")
        if not math.isfinite(weights[name]):
            raise ValueError(f'the weight of reward {name!r} must be finite, not {weights[name]!r}')


def combined(response, row, weights):
    """-> (total, components): total = sum of weights[name] * components[name], components the unweighted rewards.

    weights: {name in REWARDS: weight}; another name raises ValueError. A reward that raises, or returns what is not a
    finite number, scores 0.0 for this sample and is counted in FAILURES.
    """
    check_names(weights)
    components = {}
    for name in weights:
        try:
            components[name] = float(REWARDS[name](response, row))
            if not math.isfinite(components[name]):
                raise ValueError('not a finite reward')
        except Exception as error:
            components[name] = 0.0
            FAILURES[name, type(error).__name__] += 1
    return sum(weights[name] * score for name, score in components.items()), components


# ---------------------------------------------------------------- batches

SECONDS = 120  # that a worker may take over one sample before it is killed
_pool = None   # made by prepare()


def grade(samples, weights):
    """[(response, row)] -> [(total, components)] as `combined` gives them, in the processes that `prepare` started, if any.

    A sample whose worker takes more than SECONDS, or is killed twice, scores 0.0 in every component and is counted. What a
    reward model judges is graded here, where the model is.
    """
    check_names(weights)
    local = [_pool is None or 'preference' in weights or row.get('task') == 'preference' for _, row in samples]
    try:  # in batches; where that fails each sample asks for itself, and the failing ones are counted
        asked = [_judge_of(*sample) for sample in samples if 'preference' in weights or sample[1].get('task') == 'preference']
        for judge in JUDGES.values():
            judge.read([what for other, what in asked if other is judge and what])
    except Exception:
        pass
    graded = [combined(*sample, weights) if here else None for sample, here in zip(samples, local)]
    away = [i for i, here in enumerate(local) if not here]
    values = _pool.map('rewards', '_combined_elsewhere', [(*samples[i], weights, sandbox.unsafe) for i in away]) if away else []
    for i, value in zip(away, values):
        if isinstance(value, Exception):
            FAILURES['worker', type(value).__name__] += 1
            value = 0.0, dict.fromkeys(weights, 0.0), {}
        FAILURES.update(value[2])
        graded[i] = value[:2]
    return graded


def _combined_elsewhere(response, row, weights, unsafe):
    """combined() in a worker, and the failures that it counted."""
    sandbox.unsafe = unsafe
    FAILURES.clear()
    return *combined(response, row, weights), dict(FAILURES)


def prepare(weights, tasks, unsafe_code=False, workers=-1, preference=None, device='cpu'):
    """Before a run: raises unless every reward in `weights` is known and those of `tasks`, the kinds of tasks of its rows, can work
    on this machine: sandbox.SandboxError where programs cannot be contained (unsafe_code: only warns).

    workers: processes that grade; -1: one a core (shared by the machine's ranks) where programs are run, else none.
    preference: {name: folder of a reward model}, on `device`.
    """
    global _pool
    check_names(weights)
    for task in set(tasks) - set(ACCURACY):
        raise ValueError(f"unknown task {task!r} in the data: use one of {', '.join(ACCURACY)}")
    programs = 'code' in weights or 'code' in tasks
    if programs:
        sandbox.require(unsafe_code)
    JUDGES.clear()
    if preference:
        from preference import Judge
        JUDGES.update((name, Judge(folder, device)) for name, folder in preference.items())
    if ('preference' in weights or 'preference' in tasks) and not JUDGES:
        raise ValueError("a preference reward needs a reward model: preference={'helpfulness': folder} in the config")
    if workers < 0:
        workers = max(1, (os.cpu_count() or 1) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))) if programs else 0
    if _pool:
        _pool.close()
    _pool = Pool(workers, SECONDS) if workers else None
