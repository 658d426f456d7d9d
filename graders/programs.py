"""
Which program does an answer hold, and did it print what it should?

    fenced_blocks('Here:\\n```python\\nprint(7)\\n```')     # [('python', 'print(7)')]
    chosen_program([('python', 'print(7)')], row={})       # 'print(7)'
    same_output('0.50', '0.5000001', tolerance=1e-6)       # True

Programs run in graders/sandbox.py.
"""
import builtins
import math
import re
import textwrap

# ---------------------------------------------------------------- fences

LISTED = r'(?:(?:[-*+]|\d+[.)])[ \t]+)?'  # a fence may begin a list's item
FENCE = re.compile(r'([ \t]*' + LISTED + r')(`{3,}|~{3,}(?!~))([^`]*)')
STRING = re.compile(r"""#.*|\"{3}|'{3}|"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?""")
PYTHON = re.compile(r'py(?:thon)?[\d.]*')


def fenced_blocks(text):
    """Blocks fenced with ``` or ~~~, three or more, as (language, text without the indent of its
    fence); None where one is never closed. A fence within a triple-quoted string of Python is no
    fence, unless the string is never closed."""
    blocks = _blocks(text, strings=True)
    if blocks is None:
        blocks = _blocks(text, strings=False)
    return blocks


def _blocks(text, strings):
    """As fenced_blocks. strings: what a string of Python holds is no fence."""
    blocks = []
    lines = None  # of the block that is open
    for line in text.split('\n'):
        if lines is None:
            if fence := FENCE.fullmatch(line.rstrip()):
                indent = len(fence[1])
                marks = fence[2]
                language = re.split(r'[\s{:,]', fence[3].strip().lower())[0]
                is_python = bool(PYTHON.fullmatch(language))
                lines = []
                quote = ''
            continue

        if not quote and _closes(line, marks):
            blocks.append((language, '\n'.join(lines)))
            lines = None
            continue

        lines.append(line[:indent].lstrip(' \t') + line[indent:])
        if is_python and strings:
            quote = _open_quote(line, quote)
    return blocks if lines is None else None


def _closes(line, marks):
    """Whether a line is a fence of the same character that is as long or longer."""
    end = line.strip()
    return len(end) >= len(marks) and end.strip(marks[0]) == ''


def _open_quote(line, quote):
    """The triple quote that is open after a line of Python, or ''; `quote`: that open before it."""
    pos = 0
    while True:
        if quote:
            end = line.find(quote, pos)
            if end < 0:
                return quote
            pos = end + 3
            quote = ''
        found = STRING.search(line, pos)
        if not found:
            return ''
        pos = found.end()
        if found[0] in ('"""', "'''"):
            quote = found[0]


# ---------------------------------------------------------------- one of several

DEFINED = re.compile(r'^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)', re.MULTILINE)
ASSIGNED = re.compile(r'^[ \t]*(\w+)[ \t]*=(?!=)', re.MULTILINE)
IMPORTED = re.compile(r'^[ \t]*(?:from[ \t]+\S+[ \t]+)?import[ \t]+(.*)', re.MULTILINE)
CALLED = re.compile(r'(?<![.\w])(?<!def )(?<!class )(\w+)[ \t]*\(')
READS = re.compile(r'\binput\s*\(|\bstdin\b|\bopen\(0\b|\bfileinput\b|/dev/stdin')
PRINTS = re.compile(r'\bprint\b|\bstdout\b|\bos\.write\b')
BUILTINS = set(dir(builtins))


def chosen_program(blocks, row):
    """The program that is graded, of [(language, text)]: those marked as Python, or else those
    marked as nothing; of several the one that _asked_for says. None where there is none."""
    programs = [text for language, text in blocks if PYTHON.fullmatch(language)]
    if not programs:
        programs = [text for language, text in blocks if language == '']
    if not programs:
        return None

    last = row.get('starter', '').rstrip().split('\n')[-1]
    goes_on = last[:1].isspace() or last.endswith(':')  # with the body of the starter's function
    if not goes_on:
        programs = [textwrap.dedent(program) for program in programs]
    return _asked_for(programs, row)


def _asked_for(programs, row):
    """The last program that defines what the row's asserts call, or else the last that reads and
    prints."""
    programs = _without_examples(programs)
    entry = row.get('entry_point')
    if entry or row.get('asserts'):
        wanted = {entry} if entry else set(CALLED.findall('\n'.join(row['asserts'])))
        ranks = [not _defined(program).isdisjoint(wanted) for program in programs]
    else:
        ranks = [(bool(PRINTS.search(p)), bool(READS.search(p))) for p in programs]
    best = max(ranks)
    return [program for program, rank in zip(programs, ranks) if rank == best][-1]


def _without_examples(programs):
    """The programs but for those that call a function that only an earlier one defines: they show
    how to use that one."""
    kept = []
    earlier = set()
    for program in programs:
        imported = re.findall(r'\w+', ' '.join(IMPORTED.findall(program)))
        called = set(CALLED.findall(program))
        foreign = called.difference(_defined(program), imported, BUILTINS)
        if foreign.isdisjoint(earlier):
            kept.append(program)
        earlier.update(DEFINED.findall(program))
    return kept


def _defined(program):
    return {*DEFINED.findall(program), *ASSIGNED.findall(program)}


FUTURE = re.compile(r'^from __future__ import .*\n?', re.MULTILINE)


def after_starter(starter, program):
    """The program with a row's starter before it; imports from __future__ stay the first lines."""
    if starter and (first := FUTURE.findall(program)):
        return ''.join(first) + '\n' + starter + FUTURE.sub('', program)
    return starter + program


# ---------------------------------------------------------------- output

NUMBER = re.compile(r'[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?')
INNER_NUMBER = re.compile(rf'({NUMBER.pattern})')  # of x=0.5 or [0.5,1.5]


def same_output(wanted, printed, tolerance):
    """Whether a program printed what it should, up to white space at the ends of lines and between
    numbers. tolerance: largest error of a number, absolute or as a share of the wanted one; two
    whole numbers must be equal."""
    wanted = _tokens(wanted)
    printed = _tokens(printed)
    if len(wanted) != len(printed):
        return False
    return all(_same_token(a, b, tolerance) for a, b in zip(wanted, printed))


def _tokens(text):
    """[token, white space, token, ...]: no white space at the ends of lines and of the text, and
    one space between two numbers, whatever stood there."""
    first = text.split(None, 1)[:1]
    if first and NUMBER.fullmatch(first[0]):
        text = text.lstrip()
    lines = [line.rstrip() for line in text.rstrip().splitlines()]
    tokens = re.split(r'(\s+)', '\n'.join(lines))

    is_number = [bool(NUMBER.fullmatch(token)) for token in tokens]
    for i in range(1, len(tokens), 2):
        if is_number[i - 1] and is_number[i + 1]:
            tokens[i] = ' '
    return tokens


def _same_token(wanted, printed, tolerance):
    """Whether two tokens are alike but for their decimals, which are within the tolerance."""
    if wanted == printed:
        return True
    if tolerance == 0:
        return False
    wanted = INNER_NUMBER.split(wanted)  # text, number, text, ...
    printed = INNER_NUMBER.split(printed)
    if len(wanted) != len(printed) or wanted[::2] != printed[::2]:
        return False
    pairs = zip(wanted[1::2], printed[1::2])
    return all(a == b or _is_close(a, b, tolerance) for a, b in pairs)


def _is_close(wanted, number, tolerance):
    decimals = set('.eE')
    if decimals.isdisjoint(wanted + number):
        return False
    a = float(wanted)
    b = float(number)
    return abs(a - b) <= tolerance * max(1.0, abs(a)) < math.inf
