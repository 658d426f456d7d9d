"""
Rewards: plain functions `name_reward(response: str, row: dict) -> float`.

`response` is the decoded completion without its end-of-turn token. `row` is the data row; the keys used here are `prefill` (what
the prompt already wrote for the assistant, for example '<think>'; every reward puts it before the response), `task`, `answer`,
`numbers`, `target`, `language` ... A row that lacks what its reward needs raises; a response, whatever it holds, only ever scores.
No model text is evaluated as code but in the sandbox, and no input is slow.

ACCURACY names the tasks, REWARDS what `combined` can weigh; `use_file` adds the functions of a file
of one's own to both. `grade` scores a batch, `check_row` and `prepare` say before a run what its
rewards would lack, `right` is what counts as right. The grader of mathematics is graders/maths.py,
programs run in graders/sandbox.py, the learned reward is preference.py."""
import builtins
import difflib
import hashlib
import inspect
import itertools
import math
import os
import re
import sys
import textwrap
import time
import traceback
import types
import unicodedata
import zlib
from collections import ChainMap, Counter
from fractions import Fraction
from pathlib import Path

from graders import sandbox
from graders.language import language_counts
from graders.maths import FONTS, echoes, is_numeral, lists_equal, load, math_equal
from graders.pool import Pool

FAILURES = Counter()  # (reward, exception) -> samples that it scored 0; of this process
EXAMPLES = {}  # (reward, exception) -> what the first of them said

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
NO_ANSWER = re.compile(  # in a box: here the answer will stand
    r'(?:[\s.…~$]|\\[lc]?dots)*|(?:\\text\{)?(?:(?:the|your|my) )?(?:final )?answer(?: here)?\}?')


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


def _tagged(response, row):
    """The answers between `<answer>` tags, as answers_of has them; [] without such tags."""
    parts = re.split(r'(</?answer>)', split_response(response, row)[1])
    return answers_of(''.join(f'<answer>{part}</answer>' for part in parts[2::4]), {})


def answer_of(response, row, task=None):
    """The final answer as a string: the first of answers_of, where the others only spell it anew.

    What is the same answer is the task's to say (SAME[task], by default of row['task']), or else
    the words'. None when there is no answer and when there are several different ones.
    """
    found, end = answers_of(response, row), time.perf_counter() + 1.0
    same = SAME.get(task or row.get('task'), same_words)
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
    neither part blank; else 0.0. Anchored at both ends: nothing may come before or after, not even
    a newline (white space at the start of row['prefill'] is the prompt's)."""
    text = row.get('prefill', '').lstrip() + response
    once = all(text.count(tag) == 1 for tag in ('<think>', '</think>', '<answer>', '</answer>'))
    m = once and THINK_ANSWER.fullmatch(text)
    return float(bool(m) and not _blank(m[1]) and not _blank(m[2]))


def match_reward(response, row):
    """1.0 when the answer is row['answer'], as same_words has it."""
    answer = answer_of(response, row, 'match')
    return float(answer is not None and same_words(answer, str(row['answer']), row))


def same_words(one, other, row):
    """Whether two answers are alike but for case, white space (all around commas) and a last full
    stop."""
    plain = [re.sub(r' ?, ?', ',', ' '.join(text.casefold().split())) for text in (one, other)]
    return plain[0].removesuffix('.') == plain[1].removesuffix('.')


# ---------------------------------------------------------------- countdown

RATIONAL = re.compile(r'(-?[0-9]+(?:\.[0-9]+)?)(?:/([1-9][0-9]*))?')


def _exact(value):
    """A number of a row, 10, 10.0 or '10', as a Fraction; ValueError for what is none."""
    if type(value) is float and math.isfinite(value) or type(value) in (int, Fraction):
        return Fraction(value)
    if isinstance(value, str) and (m := RATIONAL.fullmatch(value.strip())):
        return Fraction(m[1]) / int(m[2] or 1)
    raise ValueError(f'{value!r} is no number')


def _whole(value):
    """A number of a row as an int from 0; ValueError for what is none."""
    exact = _exact(value)
    if exact.denominator != 1 or exact < 0:
        raise ValueError(f'{value!r} is no whole number from 0')
    return int(exact)


CLOSING = {'(': ')', '[': ']', '{': '}'}


def _countdown_value(expression, numbers):
    """Exact value (Fraction) of an expression over + - * / and brackets that uses each of `numbers`
    exactly once.

    expr := term (('+'|'-') term)*;  term := atom (('*'|'/') atom)*
    atom := integer | '(' expr ')' | '[' expr ']' | '{' expr '}' | '\\frac' part part
    part := digit | '{' expr '}', as in TeX
    There are no signs, powers, decimals or juxtaposition. Raises ValueError or ZeroDivisionError on
    anything else.
    """
    # reversed: the next token is tokens[-1], taken by pop()
    tokens = re.findall(r'[0-9]+|\\frac|[^\s]', expression)[::-1]
    unused = Counter(str(n) for n in numbers)

    def take(kinds):
        return tokens.pop() if tokens and tokens[-1] in kinds else None

    def expr():
        value = term()
        while op := take(('+', '-')):
            value = value + term() if op == '+' else value - term()
        return value

    def term():
        value = atom()
        while op := take(('*', '/')):
            value = value * atom() if op == '*' else value / atom()
        return value

    def atom():
        if take(('\\frac',)):
            top = part()
            return top / part()
        if bracket := take(CLOSING):
            value = expr()
            if not take((CLOSING[bracket],)):
                raise ValueError('unbalanced bracket')
            return value
        token = tokens.pop() if tokens else ''
        if unused[token] <= 0:
            raise ValueError(f'{token!r} is not a number that is left to use')
        unused[token] -= 1
        return Fraction(int(token))

    def part():
        token = tokens[-1] if tokens else ''
        if not token.isdigit() and token != '{':
            raise ValueError(f'{token!r} is no part of a fraction')
        if len(token) > 1:
            tokens[-1:] = token[1:], token[0]
        return atom()

    value = expr()
    if tokens or any(unused.values()):
        raise ValueError('text or numbers left over')
    return value


SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (FONTS, r' \1 '), (r'^\s+|\s+$', ''),
    (r'\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])', ''),
    (r'\\[dtc]frac(?![A-Za-z])', r'\\frac'), (r'\\(?:times|cdot|ast|bullet)(?![A-Za-z])', '*'),
    (r'\\div(?![A-Za-z])|[÷∕⁄／]', '/'), (r'[×∗·⋅∙•✕✖⨯＊]', '*'),
    (r'[−–—‒‐‑﹣－]', '-'), ('＋', '+'), ('＝', '='),
    (r'\\(?:lparen|lbrack)(?![A-Za-z])|（', '('), (r'\\(?:rparen|rbrack)(?![A-Za-z])|）', ')'),
    (r'\\q?quad(?![A-Za-z])|\\[,;:!> ]|~', ' '), (r'\\([{}])', r'\1'), (r'\\[()\[\]]|\$', ''),
    (r'^ ?(?:\*\*?|__|`)(.*?)(?:\*\*?|__|`)( ?(?:=.*)?)$', r'\1\2'),
    (r'(?<=[0-9)\]}]) ?[xX] ?(?=[0-9(\[{\\])', '*'))]


def countdown_value(answer, numbers):
    """Exact value (Fraction) of an answer, in ASCII, Unicode or LaTeX, that is an expression over
    numbers, each used once; else None.

    A trailing `= value` is allowed if right. The answer may be 20 characters a number long, three
    times as many before LaTeX's own are taken away.
    """
    longest = 20 * len(numbers) + 20
    if len(answer) > 3 * longest:
        return None
    for pattern, new in SPELLINGS:
        answer = pattern.sub(new, answer)
    if len(answer) > longest:
        return None
    expression, equals, stated = answer.partition('=')
    try:
        value = _countdown_value(expression, numbers)
        return None if equals and _exact(stated) != value else value
    except (ValueError, ZeroDivisionError):
        return None


def countdown_reward(response, row):
    """1.0 when the answer is an expression over row['numbers'] (see countdown_value) of value
    row['target']. ValueError where these are no numbers."""
    numbers, target = [_whole(n) for n in row['numbers']], _exact(row['target'])
    answer = answer_of(response, row, 'countdown')
    return float(answer is not None and countdown_value(answer, numbers) == target)


def same_value(one, other, row):
    """Whether two answers are expressions over row['numbers'] of one value."""
    numbers = [_whole(n) for n in row['numbers']]
    value = countdown_value(one, numbers)
    return value is not None and value == countdown_value(other, numbers)


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
    """1.0 when the answer, whose spellings are all equal, says the same as row['answer'], as
    graders/maths.py understands it; where that is a list, several answers may be its elements.

    An expression that row['prompt'] holds and that is not worked out is no answer, unless the
    gold is written so; with row['form'] == 'number' the answer must be a number. What cannot be
    decided in time scores 0.0 and is counted in FAILURES.
    """
    load()  # is on no answer's clock
    gold, answers, end = str(row['answer']), answers_of(response, row), time.perf_counter() + 1.0
    if not gold.strip():
        raise ValueError("the row's answer is empty")
    number, elements = row.get('form') == 'number', False
    try:
        for answer in answers:
            if time.perf_counter() > end:
                raise TimeoutError
            if not math_equal(gold, answer):
                elements = len(answers) > 1 and lists_equal(gold, answers)
                tagged = _tagged(response, row)
                if not elements or tagged and not lists_equal(gold, tagged):
                    return 0.0
                break
        for one, other in itertools.combinations(answers, 2) if not elements else ():
            if not math_equal(one, other) and not math_equal(other, one):
                return 0.0  # 10 and 0.1 for 10%
            if time.perf_counter() > end:
                raise TimeoutError
        prompt = _prompt_text(row.get('prompt'))
        for answer in answers:
            worked_out = (is_numeral(answer) or not number) and not echoes(gold, answer, prompt)
            if worked_out != elements:  # of spellings one does, of the elements of a list all
                return float(worked_out)
            if time.perf_counter() > end:
                raise TimeoutError
        return float(elements)
    except TimeoutError:
        FAILURES['math', 'TimeoutError'] += 1
        return 0.0


def _prompt_text(prompt):
    """The text of a prompt, which may be a list of messages, one a line."""
    if isinstance(prompt, list):
        contents = [m.get('content') for m in prompt if isinstance(m, dict)]
        return '\n'.join(content for content in contents if isinstance(content, str))
    return prompt if isinstance(prompt, str) else ''


def same_in_math(one, other, row):
    """Whether two answers say the same, `one` taken for gold: math_equal is not symmetrical."""
    return math_equal(one, other)


# ---------------------------------------------------------------- multiple choice

HENCE = re.compile(r'^(?i:so|thus|hence|therefore|then|finally)\b[, ]*')
LEAD = re.compile(  # The best answer is; 所以选
    r'(?:(?:(?:i(?: would|\'d)? )?(?:choose|pick|select|say)|it(?: is|\'s)'
    r'|(?:(?:the|my|our|final|correct|best|right|most likely|most appropriate) )*'
    r'(?:answer|ans|option|choice|letter|statement)'
    r'(?: (?:is|was|would be|should be|must be))?)(?![a-z])'
    r'|[所以因此故综上述本题我应该,]*(?:正确|最佳|最终)?的?'
    r'(?:答案|选项|选择|选)(?:应该|应)?[是为选]?)'
    r'(?:[ :."]|[=–—-] )*', re.IGNORECASE)
CHOICE = re.compile(r'[(\[{"\'“‘「]*([A-Ea-e])(?![A-Za-z0-9])'
                    r'( [-–—](?= )|[)\]}.:,;。"\'”’」]*)(.*)')
CORRECT = re.compile(r'(?i:is (?:the )?(?:(?:correct|right|best)(?: (?:answer|option|choice))?'
                     r'|answer))|选?项?(?:是?正确的?)?')
REASON = re.compile(r'(?i:explanation|reason|rationale|justification|because|since)\b'
                    r'|解析|解释|理由|因为')
EXPLAINED = re.compile(  # it may speak of the other letters, but choose none
    r'(?i)^\W*(?:explanation|reason(?:ing)?|rationale|justification|解析|解释|理由) ?[:：]'
    r'(?!.*(?:\b(?:no|not|wait|actually|answer|correct|right|best|instead|rather|choose|pick'
    r'|select|or)\b|选|对|正确)).*')
LONE = re.compile(r'(?<![A-Za-z0-9])[A-E](?![A-Za-z0-9])')
ARTICLE = re.compile(  # A beta blocker; but A can, A should
    r'(?<![A-Za-z0-9])A (?!(?:and|but|not|nor|are|was|has|can|may|for|because|should|would|could'
    r'|also|with|seems?|might|must|instead|rather|then|than|too|does|only|looks|plus|versus)\b)'
    r'(?=[a-z]{3})')
QUOTES = ' $"\'“”‘’「」`_{}'


def _words(text):
    """A text as options are compared: one spelling of fonts, case, white space and what ends it."""
    text = unicodedata.normalize('NFKC', re.sub(FONTS, r' \1 ', str(text))).replace('*', '')
    return ' '.join(text.casefold().split()).strip(QUOTES + '.。!')


def choice_of(answer, row):
    """The letter A-E that an answer chooses, or None: 'B', '(b)', '**B.**', '\\text{B}', '选B',
    'Answer: B', 'B - Aspirin', 'B (Aspirin)', 'B because ...', and an option's text alone.

    What follows the letter may name no other letter, and not the text of another of row['choices'],
    unless it is the text of its own.
    """
    text = unicodedata.normalize('NFKC', re.sub(FONTS, r' \1 ', answer)).replace('*', '')
    text = re.sub(r'\\[,;:! ()\[\]]|~', ' ', text).split('####')[-1].strip(QUOTES)
    text, alone = HENCE.sub('', text), {_words(answer)}
    for _ in range(2):
        alone.add(_words(text))
        text = text[lead.end():].strip(QUOTES) if (lead := LEAD.match(text)) else text
    alone.add(_words(text))
    options = [_words(option) for option in row.get('choices') or ()]
    named = [i for i, option in enumerate(options) if option in alone]
    m = CHOICE.fullmatch(text)
    letter, mark, rest = (m[1].upper(), m[2], m[3].strip(' .。!')) if m else (None, '', '')
    if m and (not rest or CORRECT.fullmatch(rest)):
        return letter
    inner = rest[1:-1] if rest[:1] + rest[-1:] == '()' else rest
    own = options[ord(letter) - ord('A'):][:1] if m else []
    if m and own == [_words(inner)]:
        return letter
    if len(named) == 1:
        return 'ABCDE'[named[0]]
    if not m or _words(inner) in options:
        return None
    after = rest[len(own[0]):] if own and rest.casefold().startswith(own[0]) else rest
    after = EXPLAINED.sub('', after)
    if set(LONE.findall(ARTICLE.sub('', after))) - {letter}:
        return None
    told = mark or inner != rest or REASON.match(rest)
    return letter if told and m[1].isupper() else None


def choice_reward(response, row):
    """1.0 when the answer chooses row['answer'], a letter A-E, see choice_of."""
    gold, answer = str(row['answer']).strip(), answer_of(response, row, 'choice')
    if gold not in ('A', 'B', 'C', 'D', 'E'):
        raise ValueError(f"the row's answer is {gold!r} where one letter A-E should be")
    return float(answer is not None and choice_of(answer, row) == gold)


def same_choice(one, other, row):
    """Whether two answers choose the same letter."""
    return choice_of(one, row) is not None and choice_of(one, row) == choice_of(other, row)


# ---------------------------------------------------------------- code

PROGRAM_SECONDS = 30  # for all tests of a program together; those that did not run by then are failed


LISTED = r'(?:(?:[-*+]|\d+[.)])[ \t]+)?'  # a fence may begin a list's item
FENCE = re.compile(r'([ \t]*' + LISTED + r')(`{3,}|~{3,}(?!~))([^`]*)')
PYTHON = re.compile(r'py(?:thon)?[\d.]*')
STRING = re.compile(r"""#.*|\"{3}|'{3}|"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?""")
DEFINED = re.compile(r'^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)', re.MULTILINE)
ASSIGNED = re.compile(r'^[ \t]*(\w+)[ \t]*=(?!=)', re.MULTILINE)
IMPORTED = re.compile(r'^[ \t]*(?:from[ \t]+\S+[ \t]+)?import[ \t]+(.*)', re.MULTILINE)
BUILTINS = set(dir(builtins))
CALLED = re.compile(r'(?<![.\w])(?<!def )(?<!class )(\w+)[ \t]*\(')
READS = re.compile(r'\binput\s*\(|\bstdin\b|\bopen\(0\b|\bfileinput\b|/dev/stdin')
PRINTS = re.compile(r'\bprint\b|\bstdout\b|\bos\.write\b')


def _open_string(line, quote):
    """The triple quote that is open after a line of Python, or ''; `quote`: that open before it."""
    pos = 0
    while True:
        if quote:
            end = line.find(quote, pos)
            if end < 0:
                return quote
            pos, quote = end + 3, ''
        found = STRING.search(line, pos)
        if not found:
            return ''
        pos = found.end()
        quote = found[0] if found[0] in ('"""', "'''") else ''


def _fenced(text, strings):
    """Blocks fenced with ``` or ~~~, three or more, as (kind, text without the indent of its
    fence); None where one is never closed. strings: what a triple-quoted string of Python holds is
    no fence."""
    blocks, lines, quote = [], None, ''
    for line in text.split('\n'):
        if lines is None:
            if fence := FENCE.fullmatch(line.rstrip()):
                lines, quote, indent, marks = [], '', len(fence[1]), fence[2]
                kind = re.split(r'[\s{:,]', fence[3].strip().lower())[0]
                python = PYTHON.fullmatch(kind)
            continue
        end = line.strip()
        if not quote and len(end) >= len(marks) and not end.strip(marks[0]):
            blocks.append((kind, '\n'.join(lines)))
            lines = None
            continue
        lines.append(line[:indent].lstrip(' \t') + line[indent:])
        quote = _open_string(line, quote) if python and strings else ''
    return blocks if lines is None else None


def _asked(programs, row):
    """Of several programs the one that is graded: the last that defines what the row's asserts
    call, or else the last that reads and prints. What calls a function that only an earlier one
    defines shows how to use that one, and is no program."""
    entry, earlier, whole = row.get('entry_point'), set(), []
    for program in programs:
        names = {*DEFINED.findall(program), *ASSIGNED.findall(program)}
        imported = re.findall(r'\w+', ' '.join(IMPORTED.findall(program)))
        called = set(CALLED.findall(program)).difference(names, imported, BUILTINS)
        if called.isdisjoint(earlier):
            whole.append((program, names))
        earlier.update(DEFINED.findall(program))
    if entry or row.get('asserts'):
        wanted = {entry} if entry else set(CALLED.findall('\n'.join(row['asserts'])))
        ranks = [not names.isdisjoint(wanted) for _, names in whole]
    else:
        ranks = [(bool(PRINTS.search(p)), bool(READS.search(p))) for p, _ in whole]
    best = max(ranks)
    return [program for (program, _), rank in zip(whole, ranks) if rank == best][-1]


def program_of(response, row):
    """The program in the answer, inside `<answer>` where there is such a tag: of the fenced blocks
    those that are marked as Python, or else as nothing, and of several the one that _asked chooses;
    what is between the tags where nothing is fenced; else None, and also where a block is never
    closed."""
    parts = re.split(r'(</?answer>)', split_response(response, row)[1])
    if len(parts) > 1 and parts[1::2] != ['<answer>', '</answer>']:
        return None
    text = parts[2 if len(parts) > 1 else 0]
    blocks = _fenced(text, strings=True)
    if blocks is None:
        blocks = _fenced(text, strings=False)  # a quote that is never closed
    if blocks is None:
        return None
    marked = [block for kind, block in blocks if PYTHON.fullmatch(kind)]
    programs = marked or [block for kind, block in blocks if not kind]
    if not blocks:
        return text if len(parts) > 1 and text.strip() else None
    last = row.get('starter', '').rstrip().split('\n')[-1]
    if not last[:1].isspace() and not last.endswith(':'):  # else it goes on with a function's body
        programs = [textwrap.dedent(program) for program in programs]
    return _asked(programs, row) if programs else None


NUMBER = re.compile(r'[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?')
INNER_NUMBER = re.compile(rf'({NUMBER.pattern})')  # of x=0.5 or [0.5,1.5]


def _printed(text):
    """[tokens and the white space between them]: none at the ends of lines and of the text, and one
    space between two numbers, whatever stood there."""
    first = text.split(None, 1)[:1]
    if first and NUMBER.fullmatch(first[0]):
        text = text.lstrip()
    parts = re.split(r'(\s+)', '\n'.join(line.rstrip() for line in text.rstrip().splitlines()))
    numbers = [bool(NUMBER.fullmatch(part)) for part in parts]
    for i in range(1, len(parts), 2):
        if numbers[i - 1] and numbers[i + 1]:
            parts[i] = ' '
    return parts


def _same_output(wanted, printed, tolerance):
    """Is what a program printed what it should print? tolerance: largest error of a number,
    absolute or as a share of the wanted one; two whole numbers must be equal."""
    wanted, printed = _printed(wanted), _printed(printed)
    return len(wanted) == len(printed) and all(
        a == b or tolerance > 0 and _close(a, b, tolerance) for a, b in zip(wanted, printed))


def _close(wanted, printed, tolerance):
    """Are two words alike but for their decimals, which are within the tolerance?"""
    wanted, printed = INNER_NUMBER.split(wanted), INNER_NUMBER.split(printed)
    return len(wanted) == len(printed) and wanted[::2] == printed[::2] and all(
        a == b or _close_number(a, b, tolerance) for a, b in zip(wanted[1::2], printed[1::2]))


def _close_number(wanted, number, tolerance):
    if not set('.eE') & set(wanted + number):
        return False
    a, b = float(wanted), float(number)
    return abs(a - b) <= tolerance * max(1.0, abs(a)) < math.inf


FUTURE = re.compile(r'^from __future__ import .*\n?', re.MULTILINE)


def code_reward(response, row):
    """1.0 when the program in the answer passes every test; with row['partial'] the share that it
    passes. See graders/sandbox.py.

    row['tests']: [{'input': text for stdin, 'output': what must be printed}], up to white space at
    the ends of lines and between numbers; row['tolerance']: error that a number may have, or 0.
    row['asserts']: statements about functions of the program (or methods of its class Solution),
    with row['setup'] and row['entry_point'] as in run_asserts.
    row['starter']: what is put before the program; row['seconds']: CPU time of a run.
    """
    tests, asserts, tolerance = row.get('tests'), row.get('asserts'), row.get('tolerance', 0.0)
    seconds = row.get('seconds', sandbox.SECONDS)
    if not tests and not asserts:
        raise ValueError("the row has no tests: give it 'tests' (input, output) or 'asserts'")
    if not is_tolerance(tolerance):
        raise ValueError(f"'tolerance' must be a number from 0 to below 1, not {tolerance!r}")
    program = program_of(response, row)
    if program is None:
        return 0.0
    starter = row.get('starter', '')
    if starter and (first := FUTURE.findall(program)):
        program = ''.join(first) + '\n' + starter + FUTURE.sub('', program)
    else:
        program = starter + program
    if asserts:
        setup = row.get('setup') or ''
        passed = sandbox.run_asserts(program, asserts, setup, row.get('entry_point'), seconds)
    else:
        passed, end = [], time.monotonic() + PROGRAM_SECONDS
        for test in tests:
            if (passed and not passed[-1] and not row.get('partial')) or time.monotonic() > end:
                break
            result = sandbox.run(program, test['input'], seconds)
            right = _same_output(test['output'], result.stdout, tolerance)
            passed.append(result.code == 0 and not result.timed_out and right)
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
            'preference': preference_reward}  # task -> its reward
# task -> same(one, other, row): are two answers one in two spellings? Without an entry by words
SAME = {'countdown': same_value, 'math': same_in_math, 'choice': same_choice}
JUDGED = {'preference'}  # tasks that know better and worse, but no right and wrong


def accuracy_reward(response, row):
    """The reward of the row's task, ACCURACY[row['task']]."""
    if row['task'] not in ACCURACY:
        raise ValueError(f"unknown task {row['task']!r} in the row: use one of {', '.join(ACCURACY)}")
    return ACCURACY[row['task']](response, row)


def random_reward(response, row):
    """0 or 1 by a hash of problem and response: the control that a reward must beat."""
    return float(zlib.crc32(f"{row['prompt']} {response}".encode()) >> 7 & 1)


# a view: what is a task is a reward too, whenever it was added to ACCURACY
REWARDS = ChainMap({
    'accuracy': accuracy_reward, 'random': random_reward, 'format': format_reward,
    'language': language_reward, 'length': length_reward, 'overlong': overlong_reward,
    'repetition': repetition_reward}, ACCURACY)


def accuracy_of(scored):
    """The unweighted reward of a scored sample's task, as 'accuracy' or by the task's name; None
    where nobody scored it. scored: {"task": name, "rewards": {name: unweighted reward}, ...}."""
    return scored['rewards'].get('accuracy', scored['rewards'].get(scored.get('task')))


def right(scored):
    """Whether a scored sample is right: the reward of its row's task is 1 or more, that is fully
    right. All that counts right answers asks here: pass@k, greedy, maj@k, the best of n, `right` of
    a training step, pass rates.

    None where right has no meaning: the task is judged rather than checked (JUDGED), or nobody
    scored its reward.
    """
    score = accuracy_of(scored)
    return None if score is None or scored.get('task') in JUDGED else score >= 1


def check_names(weights):
    for name in weights:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown reward {name!r} in the weights: did you mean {near!r}? "
                             f"Known: {', '.join(REWARDS)}; one of your own comes from reward_file")
        if not math.isfinite(weights[name]):
            raise ValueError(f'the weight of reward {name!r} must be finite, not {weights[name]!r}')


def _components(response, row, names):
    """{name: unweighted reward}; one that raises or is no finite number is 0.0 and counted in
    FAILURES."""
    components = {}
    for name in names:
        try:
            components[name] = float(REWARDS[name](response, row))
            if not math.isfinite(components[name]):
                raise ValueError(f'{components[name]} is no finite reward')
        except (Exception, SystemExit) as error:
            components[name] = 0.0
            _count(name, error)
    return components


def _total(components, weights):
    # in decimals, so that sums that are equal on paper are equal: 0.1 + 0.2 and 0.3
    terms = (Fraction(str(weights[name])) * Fraction(str(components[name])) for name in weights)
    return float(sum(terms))


def combined(response, row, weights):
    """-> (total, components): total = sum of weights[name] * components[name], components the unweighted rewards.

    weights: {name in REWARDS: weight}; another name raises ValueError. A reward that raises, or returns what is not a
    finite number, scores 0.0 for this sample and is counted in FAILURES.
    """
    check_names(weights)
    components = _components(response, row, weights)
    return _total(components, weights), components


# ---------------------------------------------------------------- rewards that fail

def _count(name, error):
    """A reward failed: FAILURES counts it, EXAMPLES keeps what the first of its kind said."""
    kind = name, type(error).__name__
    FAILURES[kind] += 1
    if kind not in EXAMPLES:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f' ({f.filename}:{f.lineno})' for f in frames if _file and f.filename == _file[0]]
        EXAMPLES[kind] = f'{kind[1]}: {str(error)[:300]}' + ''.join(lines[-1:])


def told():
    """FAILURES in words, the most frequent first: "math: KeyError 16 times (KeyError:
    'answer')"."""
    return ', '.join(f'{name}: {kind} {count} times ({EXAMPLES.get((name, kind), kind)})'
                     for (name, kind), count in FAILURES.most_common(3))


def failures(before, weights):
    """-> {reward in weights: samples that it failed on since FAILURES was `before`}, in this
    process."""
    since = Counter()
    for (name, _), count in (FAILURES - before).items():
        since[name] += count
    return {name: since[name] + since['worker'] for name in weights}


def require_working(failed, n):
    """failed: {reward: samples that it failed on}, of n. ValueError where one failed on all."""
    for name, count in failed.items():
        if 0 < n <= count:
            said = [text for (of, _), text in EXAMPLES.items() if of in (name, 'worker')]
            raise ValueError(f'the reward {name!r} failed on all of {n} samples: '
                             + (said or ['see the other ranks'])[0])


# ---------------------------------------------------------------- what a row must hold

def is_text(value):
    return isinstance(value, str) and value.strip() != ''


def is_number(value):
    return type(value) is int or type(value) is float and math.isfinite(value)


def is_answer(value):
    return is_text(value) or is_number(value)


def is_whole(value):
    return type(value) is int


def is_wholes(value):
    """A list of whole numbers from 0, each perhaps as a decimal or text."""
    return isinstance(value, list) and value != [] and all(map(is_exact, value)) and all(
        _exact(n).denominator == 1 and _exact(n) >= 0 for n in value)


def is_exact(value):
    try:
        return _exact(value) is not None
    except ValueError:
        return False


def is_letter(value):
    return isinstance(value, str) and value.strip() in ('A', 'B', 'C', 'D', 'E')


def is_form(value):
    return value == 'number'


def is_texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def is_texts_or_null(value):
    return value is None or is_texts(value)


def is_tests_or_null(value):
    return value is None or isinstance(value, list) and all(
        isinstance(test, dict) and is_texts([test.get('input'), test.get('output')])
        for test in value)


def is_count(value):
    return is_whole(value) and value > 0


def is_positive(value):
    return is_number(value) and value > 0


def is_string(value):
    return isinstance(value, str)


def is_string_or_null(value):
    return value is None or isinstance(value, str)


def is_bool(value):
    return isinstance(value, bool)


def is_tolerance(value):
    return is_number(value) and 0 <= value < 1


TESTS = 'a list of {"input": text, "output": text}'
# task or reward -> {key of the row that it reads: (what that must be, its test)}; ?: or nothing
NEEDS = {
    'countdown': {'numbers': ('a list of whole numbers', is_wholes),
                  'target': ('a number', is_exact)},
    'match': {'answer': ('text or a number', is_answer)},
    'math': {'answer': ('text or a number', is_answer), 'form?': ("'number'", is_form)},
    'choice': {'answer': ('one letter A-E', is_letter),
               'choices?': ('a list of texts', is_texts_or_null)},
    'code': {'tests?': (TESTS, is_tests_or_null), 'asserts?': ('a list of texts', is_texts_or_null),
             'starter?': ('text', is_string), 'setup?': ('text', is_string_or_null),
             'entry_point?': ('a name', is_string_or_null),
             'seconds?': ('a number above 0', is_positive), 'partial?': ('true or false', is_bool),
             'tolerance?': ('a number from 0 to below 1', is_tolerance)},
    'preference': {'judge?': ('the name of a reward model', is_text)},
    'overlong': {'overlong_margin?': ('a number above 0', is_positive)},
    'repetition': {'ngram?': ('a whole number above 0', is_count)},
}


def check_row(row, weights):
    """Raises ValueError, which names the key, unless the row has what the rewards in `weights` read
    of it.

    A function of a reward file says what it needs as `name_reward.needs = ('key', ...)`, or is not
    checked."""
    task = row.get('task')
    if not isinstance(task, str) or task not in ACCURACY:
        raise ValueError(f"unknown task {task!r} in the data: use one of {', '.join(ACCURACY)}, "
                         "or define your own in a reward_file")
    language_counts('', row.get('language', 'en'))   # raises for one that it does not know
    if not isinstance(row.get('prefill', ''), str):
        raise ValueError(f"'prefill' must be text, not {repr(row['prefill'])[:60]}")
    names = (task if name in ('accuracy', 'length') else name for name in weights)
    for name in dict.fromkeys(names):
        needs = getattr(REWARDS[name], 'needs', ())
        for key in (needs,) if isinstance(needs, str) else needs:
            if row.get(key) is None:
                raise ValueError(f'{key!r} is missing, which the reward {name!r} reads')
        for key, (form, fits) in NEEDS.get(name, {}).items():
            plain = key.removesuffix('?')
            if key == plain and row.get(key) is None:
                raise ValueError(f'{key!r} is missing, which the reward {name!r} reads')
            if key == plain == 'answer' and str(row[key]).strip() == '':
                raise ValueError("the row's answer is empty")
            if plain in row and not fits(row[plain]):
                raise ValueError(f'{plain!r} must be {form} for the reward {name!r}, '
                                 f'not {repr(row[plain])[:60]}')
        if name == 'code' and not row.get('tests') and not row.get('asserts'):
            raise ValueError(f"the reward 'code' needs 'tests' ({TESTS}) or 'asserts'")


def check_answer(row):
    """Raises ValueError where a row of one of our tasks has an answer (numbers, tests, asserts)
    that the task's reward could not read. A row without any may be of use to others."""
    task, keys = row.get('task'), ('answer', 'numbers', 'tests', 'asserts')
    if isinstance(task, str) and task in ACCURACY and any(row.get(k) is not None for k in keys):
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
    path, source = _file or ('', None)
    return {'path': path, 'sha256': hashlib.sha256(source).hexdigest() if path else ''}


def file_changed(before):
    """before: a checkpoint's stamp, or None -> what to say if it was of another file, else None."""
    now, before = file_stamp(), before or {'path': '', 'sha256': ''}
    if now['sha256'] != before['sha256']:
        one, other = (f'{f["path"]} (sha256 {f["sha256"][:12]})' if f['path'] else 'none'
                      for f in (before, now))
        return f'the reward_file of the checkpoint was {one}, now it is {other}'


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
    if file:
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
    module.__file__, sys.modules['reward_file'] = path, module
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
        name = key.removesuffix('_reward')
        if name == key or key[0] == '_' or not callable(function) or function is globals().get(key):
            continue
        where = f'{path}:{getattr(getattr(function, "__code__", None), "co_firstlineno", 1)}'
        if name in REWARDS or name in ('worker', 'equal'):     # which FAILURES counts under, too
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
    """Final answers to a problem (None: no answer) -> for each the answer that it is a vote for,
    the first that is the same in the eyes of its task's grader (SAME). None: no vote."""
    same, firsts, vote = SAME.get(row.get('task'), same_words), [], {None: None}
    end = time.monotonic() + VOTE_SECONDS
    for answer in answers:
        if row.get('task') in NO_VOTE or answer in vote:
            continue
        vote[answer] = answer
        for first in firsts:
            if time.monotonic() > end:
                break
            try:
                if same(first, answer, row) or same(answer, first, row):
                    vote[answer] = first
                    break
            except Exception as error:
                _count('equal', error)
        if vote[answer] == answer:
            firsts.append(answer)
    return [vote.get(answer) for answer in answers]


# ---------------------------------------------------------------- batches

SECONDS = 120  # that a worker may take over one sample before it is killed
_pool = None   # made by prepare()


def grade(samples, weights):
    """[(response, row)] -> [(total, components)] as `combined` gives them, in the processes that `prepare` started, if any.

    A sample whose worker takes more than SECONDS, or is killed twice, scores 0.0 in every component
    that is graded there and is counted. What a reward model judges is graded here, where the model
    is."""
    check_names(weights)
    here = [[name for name in weights if not _pool or _is_judged(name, row)] for _, row in samples]
    try:  # in batches; where that fails each sample asks for itself, and the failing ones are counted
        asked = [_judge_of(*sample) for sample in samples if 'preference' in weights or sample[1].get('task') == 'preference']
        for judge in JUDGES.values():
            judge.read([what for other, what in asked if other is judge and what])
    except Exception:
        pass
    graded = [_components(*sample, names) for sample, names in zip(samples, here)]
    away = [(i, [name for name in weights if name not in names]) for i, names in enumerate(here)]
    away = [(i, names) for i, names in away if names]
    values = elsewhere('_components', [(*samples[i], names) for i, names in away])
    for (i, names), value in zip(away, values):
        graded[i].update(dict.fromkeys(names, 0.0) if isinstance(value, Exception) else value)
    graded = [{name: components[name] for name in weights} for components in graded]
    return [(_total(components, weights), components) for components in graded]


def _is_judged(name, row):
    by_task = name in ('accuracy', 'length')
    return name == 'preference' or by_task and row.get('task') == 'preference'


def count_votes(problems):
    """[(answers, row)] -> [votes(answers, row)], in the processes that `prepare` started, if
    any."""
    if not _pool:
        return [votes(*problem) for problem in problems]
    values = elsewhere('votes', problems)
    return [answers if isinstance(value, Exception) else value
            for (answers, _), value in zip(problems, values)]


def elsewhere(name, arguments):
    """Calls of a function of this module in the pool -> their values; where one failed its
    exception, counted."""
    calls = [(name, args, sandbox.unsafe, _file) for args in arguments]
    values = _pool.map('rewards', 'grading', calls) if calls else []
    for i, value in enumerate(values):
        if isinstance(value, Exception):
            _count('worker', value)
        else:
            values[i], failed, examples = value
            FAILURES.update(failed)
            EXAMPLES.update({kind: text for kind, text in examples.items() if kind not in EXAMPLES})
    return values


def grading(name, args, unsafe, file):
    """In a worker: the function's value, the failures that it counted and their examples."""
    sandbox.unsafe = unsafe
    FAILURES.clear()
    EXAMPLES.clear()
    _take(file)
    return globals()[name](*args), dict(FAILURES), dict(EXAMPLES)


def prepare(weights, tasks, unsafe_code=False, workers=-1, preference=None, device='cpu'):
    """Before a run: raises unless every reward in `weights` is known and those of `tasks`, the kinds of tasks of its rows, can work
    on this machine: sandbox.SandboxError where programs cannot be contained (unsafe_code: only warns).

    workers: processes that grade; -1: one a core (shared by the machine's ranks) where programs are
    run or a reward file is used, whose functions may hang, else none. preference: {name: folder of
    a reward model}, on `device`."""
    global _pool
    check_names(weights)
    for task in set(tasks) - set(ACCURACY):
        raise ValueError(f"unknown task {task!r} in the data: use one of {', '.join(ACCURACY)}, "
                         "or define your own in a reward_file")
    if _own and not _own.keys() & {*weights, *tasks} and os.environ.get('RANK', '0') == '0':
        print(f'warning: no reward or task asks for what {_file[0]} defines: {", ".join(_own)}',
              file=sys.stderr)
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
        cores = (os.cpu_count() or 1) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        workers = max(1, cores) if programs or _file else 0
    if _pool:
        _pool.close()
    _pool = Pool(workers, SECONDS) if workers else None
