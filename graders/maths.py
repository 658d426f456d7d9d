"""
Do two answers to a mathematics problem say the same?

    math_equal('\\frac{1}{2}', '0.5')     # True

The way from two texts to a verdict is the order of this file's sections:

    bounds in time and size     Clock
    what the grader accepts     math_equal, lists_equal
    cut out, in one spelling    plain: the answer out of its text; LaTeX, Unicode and ASCII alike
    brackets and names
    structure                   read: lists, sets, intervals, equations, matrices ...
    scalars to sympy            Parser: expressions that sympy never evaluates
    values of expressions       Numbers: exact fractions, or as many bits as it takes
    equal expressions           equal: they agree in value at several points
    the same answer             same: each kind in its own way, piece by piece
    worked out or not           is_numeral, echoes: is an answer only the question again?

No text is evaluated as code: the grammar is ours. No input is slow: characters, nesting and digits
are bounded, and every loop looks at a clock of the thread's own, so that there is no signal to fail
off the main thread. Safe in threads and worker processes.
"""
import functools
import itertools
import math
import re
import threading
import time
import unicodedata
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from graders.units import compound, conversions, number_of, split_words, unit_of

# ---------------------------------------------------------------- bounds in time and size

SECONDS = 1.0     # of a call
LONGEST = 1000    # characters of an answer
DEEPEST = 24      # brackets within each other
BITS = 1 << 16    # of an exact number


class Clock:
    """tick() raises TimeoutError once the call's time is over: every loop ticks, so that no signal
    is needed. `upright`: the words of the call's texts that are no products."""

    def __init__(self, *texts):
        self.end = time.perf_counter() + SECONDS
        self.upright = set().union(*map(upright_words, texts))

    def tick(self):
        if time.perf_counter() > self.end:
            raise TimeoutError(f'more than {SECONDS} s')


@functools.lru_cache(maxsize=1)
def load():
    """Imports sympy, which takes a second, before a clock runs -> sympy."""
    import mpmath
    import sympy
    functions = mpmath.libmp.libelefun
    for constant in (functions.pi_fixed, functions.ln2_fixed, functions.e_fixed):
        constant(1 << 15)   # mpmath's cache is not safe in threads while it grows: grow it once
    return sympy


def check_length(text):
    if len(text) > LONGEST:
        raise ValueError(f'an answer of more than {LONGEST} characters')


# ---------------------------------------------------------------- what the grader accepts

CLOCK_TIME = re.compile(r'([1-5]?\d) ?: ?([0-5]\d)(?: ?[AaPp]\.?[Mm]\.?)?')
LETTER = re.compile(r'\(?([A-J])\)?')
LETTERED = re.compile(r'\(?([A-J])(?:\)|[.:] )(?! ?\(?[A-J]\)?$) ?(.+)')   # (B) 12, B. 12
THOUSANDS = re.compile(r'(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)')


def math_equal(gold, answer):
    """Do two answers, as text in LaTeX, Unicode or ASCII, say the same? TimeoutError when SECONDS
    do not suffice to tell.

    Numbers, fractions, mixed numbers, percent, units, thousands separators, degrees, intervals,
    inequalities, congruences, sets, lists, tuples, matrices, equations, expressions and words.
    Exact but for decimals of ten digits or more, which may be rounded, and for what says itself
    that it is rounded, 100/3 ≈ 33.3. A unit may be missing on one side; where both name one, or a
    counted noun, these must be the same or convert into each other.
    """
    if gold.strip() == answer.strip():
        return True
    load()
    clock = Clock(gold, answer)
    try:
        golds = readings(gold)
        answers = readings(answer)
        if golds[0] and golds[0] == answers[0]:
            return True
        add_decimal_comma(golds, answers, r'-?0,\d{3,}')   # a gold 1,5 is two solutions
        add_decimal_comma(answers, golds, r'-?\d+,\d+')
        if are_different_times(golds[0], answers[0]):
            return False
        if is_choice(golds[0], answers[0], clock) or is_choice(answers[0], golds[0], clock):
            return True
        golds = [read(text, clock) for text in dict.fromkeys(golds)]
        answers = [read(text, clock) for text in dict.fromkeys(answers)]
        return any(same(*pair, clock) for pair in itertools.product(golds, answers))
    except (ValueError, ArithmeticError, RecursionError):
        return False


def lists_equal(gold, answers):
    """Is `gold` a list or set, and are `answers`, a text each, its elements?

    Every one of the gold's and nothing else, in any order; repetitions count as one. TimeoutError
    as for math_equal.
    """
    load()
    clock = Clock(gold, *answers[:100])
    try:
        texts = [gold, *dict.fromkeys(answers)]
        gold, *others = (read(without_separators(plain(text)), clock) for text in texts)
        if not isinstance(gold, (List, Set)) or len(gold.items) < 2 or not others:
            return False
        items = []
        for other in others:
            items += other.items if isinstance(other, (List, Set)) else [other]
        elements = type(gold)(without_repetitions(gold.items, clock))
        return same(elements, List(without_repetitions(items, clock)), clock)
    except (ValueError, ArithmeticError, RecursionError):
        return False


def readings(text):
    """An answer as plain() spells it, and then with other meanings of its commas and segments."""
    spelled = plain(text)
    joined = without_separators(spelled)
    found = [spelled, joined]
    if any(',0' in number for number in THOUSANDS.findall(spelled)):
        found[0] = joined   # 1,000 is no list of 1 and 000
    turned = re.sub(r'(\\overline\s*\{ ?)([A-Z])([A-Z])(?= ?\})', r'\1\3\2', text)
    if turned != text:
        found.append(plain(turned))   # the segment BA is AB
    return found


def without_separators(text):
    """1,000 as 1000"""
    return THOUSANDS.sub(lambda m: m[0].replace(',', ''), text)


def add_decimal_comma(texts, others, comma):
    """One more reading of 0,111 where the other side is written with a point."""
    if '.' in others[0] and re.fullmatch(comma, texts[1]):
        texts.append(texts[1].replace(',', '.'))


def are_different_times(one, other):
    """3:30 and 1:10, which are times rather than ratios"""
    one = CLOCK_TIME.fullmatch(one)
    other = CLOCK_TIME.fullmatch(other)
    return bool(one and other) and one.groups() != other.groups()


def is_choice(letter, choice, clock):
    """B and (B) 12: is `choice` that letter and a value?"""
    letter = LETTER.fullmatch(letter)
    choice = LETTERED.fullmatch(choice)
    if not letter or not choice or letter[1] != choice[1]:
        return False
    return isinstance(read(choice[2], clock), Scalar)


def without_repetitions(items, clock):
    kept = []
    for item in items:
        if not any(same(other, item, clock) for other in kept):
            kept.append(item)
    return kept


# ---------------------------------------------------------------- cut out, in one spelling

# Signs of ours, none of which an answer is written with, for what LaTeX says with many:
#     ⦃ ⦄ a set    ⟦ ⟧ a matrix    ⟪ ⟫ a determinant    ⟬ ⟭ cases or a system
#     ⏎ the next row    ¤ a dollar that is money

COMMANDS_OF = {   # a character -> the LaTeX commands for it; all others stay as they are
    '': 'left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle boxed fbox rm bf it forall',
    ' ': 'quad qquad phantom',
    r'\frac ': 'dfrac tfrac cfrac', r'\binom ': 'dbinom',
    '*': 'times cdot ast', '/': 'div', '±': 'pm', '∓': 'mp',
    '√': 'sqrt', '∞': 'infty', 'π': 'pi',
    '≤': 'le leq leqslant', '≥': 'ge geq geqslant', '<': 'lt', '>': 'gt', '≠': 'ne neq',
    '≈': 'approx simeq', '≡': 'equiv',
    '|': 'lvert rvert vert mid', '⌊': 'lfloor', '⌋': 'rfloor', '⌈': 'lceil', '⌉': 'rceil',
    '(': 'langle', ')': 'rangle', '⦃': 'lbrace', '⦄': 'rbrace', '⦃⦄': 'emptyset varnothing',
    '∈': 'in', '∪': 'cup', '∩': 'cap', '∖': 'setminus smallsetminus backslash',
    '°': 'circ degree', '∠': 'angle', '△': 'triangle', '‰': 'permil',
    ',': 'land wedge', '∨': 'lor vee', ':': 'colon', '⋯': 'ldots dots cdots dotsc dotsb'}
COMMANDS = {}
for character, commands in COMMANDS_OF.items():
    COMMANDS.update(dict.fromkeys(commands.split(), character))

SIGNS = str.maketrans({
    **dict.fromkeys('−–—', '-'),
    **dict.fromkeys('×·∙⋅∗', '*'),
    **dict.fromkeys('÷⁄∕', '/'),
    '∅': '⦃⦄', '。': '.', '、': ','})

CURRENCIES = {   # symbol or code -> the unit that is put after the number; ¤ is a dollar sign
    '¤': 'dollar', 'USD': 'dollar', 'US¤': 'dollar', '€': 'euro', 'EUR': 'euro',
    '£': 'sterling', 'GBP': 'sterling', '₹': 'rupee', 'INR': 'rupee', 'Rs': 'rupee',
    '¥': 'yenyuan', 'JPY': 'yen', 'CNY': 'yuan', 'RMB': 'yuan', '₩': 'won', '₽': 'ruble',
    '¢': 'cent'}
CURRENCY = '(US¤|[¤€£₹¥₩₽]|(?<![A-Za-z])(?:USD|EUR|GBP|INR|JPY|CNY|RMB|Rs\\.?))'

TEXT_FONTS = 'text(?:bf|it|rm|normal)?|mbox|mathrm|textup'
SYMBOL_FONTS = r'math(?:bf|it|sf)|boldsymbol|operatorname\*?'
INSIDE = r'\s*\{((?:[^{}]|\{[^{}]*\})*)\}'
FONTS = rf'\\(?:{TEXT_FONTS}|{SYMBOL_FONTS}){INSIDE}'
UPRIGHT = re.compile(rf'\\({TEXT_FONTS}){INSIDE}')

MATRIX = r'\{(?:[pbBV]?(?:small)?matrix\*?|array)\}'
ALIGNED = r'\{(?:align(?:ed|\*)?|gathered|split)\}'
REALS = (   # all real numbers x
    r'(?i)^ ?(?:[a-z] (?:is|can be) )?(?:(?:the )?set of )?'
    r'(?:(?:all|any|every) (?:the )?(?:possible )?reals?(?: numbers?| values?)?'
    r'|the real numbers|real numbers)(?:,? ?(?:of|for|in)? [a-z])?')
BASES = 'two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen'


def half_of_reals(sign, short):
    """The pattern of 'all positive real numbers' and ℝ^+, ℝ_{>0}."""
    return (rf'(?i)^ ?(?:the )?(?:set of )?(?:all )?{sign} (?:real numbers|reals)'
            rf'|\(-∞,∞\) ?[_^] ?\{{? ?{short} ?\}}?')


def nfkc(text):
    return unicodedata.normalize('NFKC', text)


def superscript(m):
    """x² -> x^{2}"""
    return '^{' + nfkc(m[0]).replace('−', '-') + '}'


def subscript(m):
    """x₁ -> x_{1}"""
    return '_{' + nfkc(m[0]) + '}'


def vulgar_fraction(m):
    """1½ -> 1 1⁄2"""
    return ' ' + nfkc(m[0])


def double_struck(m):
    """ℤ -> \\mathbb{Z}"""
    return f'\\mathbb{{{nfkc(m[0])}}}'


def system(m):
    """Equations below each other -> ⟬row⏎row⟭, without the marks that align them."""
    array, aligned = m.groups()
    rows = re.sub(r'(?<!\\)&', ' ', aligned) if array is None else array
    return f'⟬{rows}⟭'


def command(m):
    """\\times -> *"""
    return COMMANDS.get(m[1], m[0])


def determinant_bars(m):
    """|⟦...⟧| and \\det ⟦...⟧ -> ⟪...⟫"""
    return f'⟪{m[1] or m[2] or m[3]}⟫'


def shortened_money(m):
    """¤5k -> ¤5 thousand"""
    scale = {'K': 'thousand', 'M': 'million', 'B': 'billion'}[m[3].upper()]
    return f'{m[1]}{m[2]} {scale}'


def currency_before(m):
    """-€5 -> -5 euro"""
    before, sign, symbol, number = m.groups()
    return f"{before}{sign}{number} {CURRENCIES[symbol.strip('.')]} "


def currency_after(m):
    """5€ -> 5 euro"""
    return f' {CURRENCIES[m[1]]}'


def dotted_period(m):
    """0.\\dot1 2\\dot3 -> 0.\\overline{123}"""
    return '\\overline{' + ''.join(re.findall(r'\d', m[0])) + '}'


def repeating_decimal(m):
    """0.1\\overline{6} -> ((016-01)/90)"""
    whole, start, period = m.groups()
    before = whole + start or '0'
    return f"(({whole}{start}{period}-{before})/{'9' * len(period)}{'0' * len(start)})"


def base_in_digits(m):
    """1101_{two} -> 1101_{2}"""
    return f'_{{{number_of(m[1])}}}'


def modulus(m):
    """\\pmod{7}, \\bmod 7 -> (mod 7)"""
    found = [group for group in m.groups() if group]
    return f" (mod {found[0] if found else ''})"


def outward_interval(m):
    """]0, 1[ -> (0, 1)"""
    opening, inside, closing = m.groups()
    return ('(' if opening == ']' else '[') + inside + (')' if closing == '[' else ']')


def without_spaces(m):
    """1 000 -> 1000"""
    return m[0].replace(' ', '')


def mixed_number(m):
    """1\\frac12 -> (1+1/2), but 2\\frac32 is a product."""
    whole, top, bottom = (group for group in m.groups() if group)
    return f'({whole}+{top}/{bottom})' if int(top) < int(bottom) else m[0]


BEFORE_NFKC = [(re.compile(pattern), new) for pattern, new in (
    (r'[⁰¹²³⁴-⁹⁻]+', superscript),
    (r'[₀-₉]+', subscript),
    (r'[¼-¾⅐-⅞]', vulgar_fraction),
    (r'[ℝℤℕℚℂ]', double_struck),
)]

# In this order: later rules build on what earlier ones leave.
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    # systems, cases, determinants, matrices
    (r'\\left ?\\\{ ?\\begin ?\{array\}(?:\{[lcr| ]*\})?(.*?)\\end ?\{array\} ?\\right ?\.|'
     rf'(?:\\left ?\\\{{ ?)?\\begin ?{ALIGNED}(.*?)\\end ?{ALIGNED}(?: ?\\right ?\.)?', system),
    (r'\\begin ?\{d?cases\}', '⟬'),
    (r'\\end ?\{d?cases\}', '⟭'),
    (r'\\begin ?\{v(?:small)?matrix\}', '⟪'),
    (r'\\end ?\{v(?:small)?matrix\}', '⟫'),
    (r'\\begin ?' + MATRIX + r'(?:\{[lcr| ]*\}|\[[lcr]\])?', '⟦'),
    (r'\\end ?' + MATRIX, '⟧'),
    (r'\\\\(?:\[\w*\])?', '⏎'),

    # spaces, dollar signs around formulas, brackets
    (r',\\!\s*|\{,\}', ','),
    (r'\\!', ''),
    (r'\\[,;:> ]|~', ' '),
    (r'\\[()\[\]]|\$', ''),
    (r'\\%', '%'),
    (r'\\\{', '⦃'),
    (r'\\\}', '⦄'),
    (r'\\\|', '|'),

    # sets with a letter of their own; fonts
    (r'\\mathbb\s*(?:R|\{R\})|\\(?:R|reals)(?![A-Za-z])', '(-∞,∞)'),
    (r'\\mathbb\s*([A-Z])', r'\\mathbb{\1}'),
    (r'\\mu ?\\(?:mathrm|text)\{ ?(?=[A-Za-z])', r'\\mathrm{ μ'),
    (FONTS, r' \1 '),
    (FONTS, r' \1 '),   # within another
    (r'\s+', ' '),

    # sets and signs in words
    (REALS + ' ?$', '(-∞,∞)'),
    (REALS + r' (?:except|but|other than)(?: for)? (.+)$', r'(-∞,∞)∖⦃\1⦄'),
    (half_of_reals('positive', r'(?:\+|> ?0)'), '(0,∞)'),
    (half_of_reals('negative', '(?:-|< ?0)'), '(-∞,0)'),
    (half_of_reals('non-?negative', r'(?:≥|\\geq?) ?0'), '[0,∞)'),
    (r'(?i)^ ?no (?:real )?(?:solutions?|roots?) ?$', '⦃⦄'),
    (r'^ ?DNE ?$', 'does not exist'),
    (r'(?i)^ ?(?:minus|negative) (?=\d)', '-'),
    (r' ?_ ?', '_'),
    (r'_\{ ?\( ?(\d+) ?\) ?\}', r'_{\1}'),                               # 1101_{(2)}
    (r'(?<=\d) ?\(? ?base (\d+|[a-z]{3,7}) ?\)? ?$', r'_{\1}'),          # 1101 base two
    (r'(?i)^ ?(?:the )?(?:set of )?(?:all )?(?:the )?integers ?$', r'\\mathbb{Z}'),
    (r'(?i)^ ?(?:the )?empty set ?$', '⦃⦄'),
    (r'(\d) and (?:a|one) half(?![a-z])', r'(\1+1/2)'),

    # commands as characters, and what they leave
    (r'\\([A-Za-z]+)\s*', command),
    (r'\^\s*(?:°|\{\s*°\s*\})', '°'),
    ('([∠△]) ', r'\1'),
    (r'\{\s*\}', ''),
    (r'\| ?⟦([^⟦⟧]*)⟧ ?\||\\det ?\( ?⟦([^⟦⟧]*)⟧ ?\)|\\det ?⟦([^⟦⟧]*)⟧',
     determinant_bars),

    # temperature and money: the unit after the number
    (r'° ?C(?![A-Za-z])', ' celsius'),
    (r'° ?F(?![A-Za-z])', ' fahrenheit'),
    (CURRENCY + r' ?(\d[\d.,]*) ?([kKMB])(?![A-Za-z])', shortened_money),
    (r'(^|[,;=≈∨(] ?)([-+]?) ?' + CURRENCY +
     r' ?([-+]?(?:\d[\d.,]*\d|\d))(?= ?$| ?[,;.∨)]| ?[A-Za-z/]{3})', currency_before),
    (r'(?<=[\d}]) ?([¤€£₹¥¢₩₽])(?= |$|,)', currency_after),
    ('¤', ''),

    # binomials, periods of decimals, segments, ohms, factorials, bases
    (r'\{([^{}]*)\\choose([^{}]*)\}', r'\\binom{\1}{\2}'),
    (r'\\dot ?\{? ?\d ?\}?(?:\d* ?\\dot ?\{? ?\d ?\}?)?', dotted_period),
    (r'\d\u0307(?:\d*\d\u0307)?|(?:\d\u0305)+', dotted_period),
    (r'\\(?:bar|overline) ?(\d)', r'\\overline{\1}'),
    (r'\\(?:bar|widehat|overparen|wideparen) ?(?=\{ ?\d)', r'\\overline'),
    (r'(?<![\d)])(\d*\.\d*) ?\((\d+)\)(?![\d^!])', r'\1\\overline{\2}'),   # 0.(27)
    (r'\\overline ?\{ ?([A-Z]{2}) ?\}', r'\1'),                           # a segment
    (r'(?<=\d) +([kM]?) ?\\Omega(?![A-Za-z])', r' \1Ω'),
    (r'(?i)(?<=[\d)]) factorial(?![a-z])', '!'),
    (r'\( ?(\d[\dA-F]*) ?\) ?(?=_)', r'\1'),                              # (1101)_2
    (r'(?<=\d) ?_ ?\{ ?(' + BASES + r') ?\}', base_in_digits),

    # congruences
    (r'\( ?\\?[pb]?mod(?:ulo)?(?![A-Za-z]) ?(?:\{([^{}]*)\}|(\w+)) ?\)|'
     r'\\?(?<![A-Za-z])[pb]?mod(?:ulo)?(?![A-Za-z]) ?(?:\{([^{}]*)\}|(\w+))', modulus),
    (r'^ ?([A-Za-z]) *\(mod (\w+)\) ?= ?([^=]+)$', r'\1≡\3 (mod \2)'),    # x mod 7 = 3
    (r'(≡[^\[\]]*)\[ ?(\w+) ?\]$', r'\1 (mod \2)'),                       # x ≡ 3 [7]

    # dots, bold type, intervals that are open to the outside, operators of ASCII
    (r'(?<!\d)(\d+\.\d*?)(\d{1,6}?)\2{2,} ?(?:⋯|\.\.\.)', r'\1\\overline{\2}'),   # 0.1666...
    (r'\.{3,}|。{3,}', '⋯'),
    (r'^\*\*(.+)\*\*$', r'\1'),
    (r'^([\[\]])([^\[\]]*[,;][^\[\]]*)([\[\]])$', outward_interval),
    (r'\*\*', '^'),
    (r'<=', '≤'),
    (r'>=', '≥'),
    (r'!=', '≠'),
    (r'\+/?-', '±'),
    (r'\b(sin|cos|tan) ?\^ ?(?:-1|\{ ?-1 ?\})', r'arc\1'),
    (r'(?<![A-Za-z])sqrt(?![A-Za-z])', '√'),
    (r'(?<![A-Za-z])pi(?![A-Za-z])', 'π'),
    (r'(?<![A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])', '∞'),

    # words between answers and before them
    (r'\s+', ' '),
    (r' ?,? ?(?<![A-Za-z])or(?![a-z])', '∨'),
    (r' ?,? ?(?<![A-Za-z])and(?![A-Za-z])', ','),
    (r'(?i)^ *(?:(?:the )?(?:final )?answer(?: is)?|so|thus|therefore|hence)\b[:, ]*', ''),
    (r'^ ?≈', ''),

    # one number out of several
    (r'^ ?0(?=\d ?: ?[0-5]\d(?!\d))', ''),                                # 05:00
    (r'(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)', without_spaces),
    (r'(?<!\d)(\d*)\.(\d*) ?\\overline ?\{ ?(\d+) ?\}', repeating_decimal),
    (r'(?<![\w.})^])(\d+) (\d+) ?/ ?(\d+)(?![\w.])', mixed_number),
    (r'(?<![\w.})^])(\d+) ?\\frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))', mixed_number),
)]


def cut_out(text):
    """The answer in its text: what follows ####, what is in a \\boxed{} around all of it, without
    invisible characters; dollar signs that are money as ¤."""
    text = ''.join(c for c in text if unicodedata.category(c) != 'Cf')
    text = text.split('####')[-1].strip()
    boxed = re.match(r'[\s$]*\\(?:boxed|fbox) *\{', text)
    if boxed:
        inner = text[boxed.end() - 1:].rstrip(' .$')
        if enclosed(inner):
            text = inner[1:-1].strip()
    alone = text.count('$') == 1 and text.lstrip('-')[:1] == '$'
    if '\\$' in text or alone:
        text = re.sub(r'\\text\{ ?\\\$ ?\}', '¤', text).replace('\\$', '¤')
        if '¤' not in text:
            text = text.replace('$', '¤')
    return text


def plain(text):
    """The answer that a text holds, with one spelling for what LaTeX, Unicode and ASCII write
    differently: operators as single characters. ValueError where it is too long."""
    check_length(text)
    text = cut_out(text)
    words = re.sub(FONTS, r' \1 ', text[:200]).strip(' .$')
    if re.fullmatch(r'[A-Za-z][A-Za-z -]*', words):
        value = number_of(words)
        if value is not None:
            return str(value)
    for pattern, new in BEFORE_NFKC:
        text = pattern.sub(new, text)
    text = nfkc(text).translate(SIGNS)
    check_length(text)   # 1 character may have become 18
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip(' ').rstrip(' .,;')


def upright_words(text):
    """The words of up to three letters in \\text{} and the like: names or units, no products."""
    found = set()
    for font, inside in UPRIGHT.findall(text[:LONGEST]):
        for word in re.findall(r'(?<![A-Za-z\\])[A-Za-z]{1,3}(?![A-Za-z])', inside):
            segment = font == 'mathrm' and len(word) == 2 and word.isupper()
            if not segment:
                found.add(word)
    return found


# ---------------------------------------------------------------- brackets and names

DEPTH = {**dict.fromkeys('([{⦃⟦⌊⌈⟪⟬', 1), **dict.fromkeys(')]}⦄⟧⌋⌉⟫⟭', -1)}
NAMED = r"[A-Za-zα-ορ-ω∠△|:/(),'\s\\{}]*"
NAME = re.compile(NAMED + '[A-Za-zα-ορ-ω]' + NAMED)


def depths(text):
    """How many brackets are open after each character."""
    return list(itertools.accumulate(DEPTH.get(c, 0) for c in text))


def enclosed(text):
    """True when the first bracket closes at the very end."""
    return text[-1:] in list(')]}⦄⟧⟭') and 0 not in depths(text[:-1])


def split_outside(text, separators):
    """[piece, separator, piece, ...], cut at the separators outside of all brackets."""
    pieces = ['']
    for c, depth in zip(text, depths(text)):
        if depth == 0 and c in separators:
            pieces += [c, '']
        else:
            pieces[-1] += c
    return [piece.strip() for piece in pieces]


def parts_of(text, separators):
    """As split_outside, without the separators."""
    return split_outside(text, separators)[::2]


def rows_of(text):
    """'1 & 2 ⏎ 3 & 4' -> [['1', '2'], ['3', '4']]"""
    return [parts_of(row, '&') for row in parts_of(text, '⏎') if row]


def name_of(side):
    """x_1, f(2), |AB|, (p,q), V_1:V_2 -> the name without the arguments' letters; None when side is
    not a mere name."""
    bare = re.sub(r'_(?:\{[^{}]*\}|\w)|(?<=[A-Za-z])\([^()]*\)', '', side)
    if not NAME.fullmatch(bare):
        return None
    return re.sub(r'\([a-z]\)$|\s', '', side)


# ---------------------------------------------------------------- structure

class Scalar(NamedTuple):
    """One number or expression."""
    tree: object          # of sympy, see Parser
    words: object = None  # the Words after it
    numeral: str = ''     # how it is written, where that is a mere number: '33.30'
    text: str = ''        # all of it


class List(NamedTuple):
    """1, 2 or 3: in any order, each once."""
    items: list


class Set(NamedTuple):
    """{1, 2, 3}"""
    items: list


class Union(NamedTuple):
    """(0, 1) ∪ (2, 3)"""
    items: list


class Tuple(NamedTuple):
    """A point or an interval: the same text, (0, 1), is either. brackets '::': the ratio 1:2:3."""
    brackets: str
    items: list


class Matrix(NamedTuple):
    rows: list


class Equation(NamedTuple):
    """x = 6 * 7 = 42"""
    name: str     # x; None where the first side is no mere name
    sides: list   # but for the name, as read() returns them
    texts: tuple  # of the first side and the last


class Inequality(NamedTuple):
    """1 < x ≤ 5, x ≠ 3"""
    operators: list   # <, ≤ or ≠: turned round where they were > or ≥
    texts: list       # of the sides
    interval: object  # a Tuple or Union where it is solved, else None
    name: str         # of what is solved for


class Congruence(NamedTuple):
    """x ≡ 3 (mod 7)"""
    name: str
    residue: object
    modulus: object


class Rounded(NamedTuple):
    """100/3 ≈ 33.3"""
    exact: object
    rounded: list


class Family(NamedTuple):
    """x = 3k, k ∈ ℤ"""
    main: object   # x = 3k as read() returns it
    letter: str
    domain: str
    text: str      # of main


class Cases(NamedTuple):
    """x if x > 0, -x if x ≤ 0"""
    rows: list   # of (value, condition)


class Text(NamedTuple):
    """Words, and all else that cannot be read."""
    words: str


def read(text, clock, depth=0):
    """An answer as plain() spells it -> one of the classes above."""
    clock.tick()
    try:
        if depth > DEEPEST or not text:
            raise ValueError('empty, or nested too deep')
        return structure(text, clock, depth + 1)
    except (ValueError, ArithmeticError):
        bare = re.sub(r'\{ ?(\w) ?\}', r'\1', text.strip(" .,'\"()"))
        return Text(' '.join(bare.casefold().split()))


def structure(text, clock, depth):
    """What the first reader makes of a text that takes it. ValueError where none can."""
    readers = (
        read_system, read_family, read_compound, read_congruence, read_list, read_relation,
        read_union, read_intersection, read_reals_without, read_bracketed, read_matrices,
        read_number_words, read_ratio)
    for reader in readers:
        found = reader(text, clock, depth)
        if found is not None:
            return found
    return read_quantity(text, clock)


# ---- systems, families, congruences

def read_system(text, clock, depth):
    """⟬x & x > 0 ⏎ -x & x ≤ 0⟭ -> Cases; of a system of equations, the list of them"""
    if '⟬' not in text or not enclosed(text):
        return None
    if text[0] == '(':
        return read(text[1:-1].strip(), clock, depth)
    if text[0] != '⟬':
        return None
    rows = []
    for cells in rows_of(text[1:-1]):
        cells = [cell.strip(' ,;.') for cell in cells]
        if len(cells) == 2 and cells[1][:1] in tuple('=<>≤≥'):
            cells = [''.join(cells)]   # x & = 1
        rows.append(cells)
    if not 1 <= len(rows) <= 20 or len({len(cells) for cells in rows}) > 1 or len(rows[0]) > 2:
        raise ValueError('neither cases nor a system')
    if len(rows[0]) == 1:
        return read(', '.join(cells[0] for cells in rows), clock, depth)
    cases = []
    for value, condition in rows:
        condition = re.sub(r'^(?:if|when|for|where)\b ?', '', condition)
        cases.append((read(value, clock, depth), read(condition, clock, depth)))
    return Cases(cases)


GIVEN = [(re.compile(pattern), domain) for pattern, domain in (   # x = 3k, k ∈ ℤ
    (r'(.*[^,; ])(?:[,;]| ?\(|(?= ?(?:where|for|with|when)\b)) ?(?:where |for |with |when )?'
     r'(?:all |any |some |every |each )?(?:integers? )?([A-Za-z]) ?∈ ?([^,;]+?) ?\)?', None),
    (r'(.*[^,; ])(?:[,;]| ?\(| (?=where|for|with|when)) ?(?:where |for |with |when )?'
     r'(?:([A-Za-z]) (?:is )?)?(?:all |any |an? |some |every )?(?:arbitrary )?integers?'
     r'(?: ([A-Za-z]))? ?\)?', '\\mathbb{Z}'))]
DOMAINS = {
    'N': '\\mathbb{N}', 'Z': '\\mathbb{Z}', 'Q': '\\mathbb{Q}', 'C': '\\mathbb{C}',
    'R': '(-∞,∞)'}
VARIABLES = re.compile(r'(?<![A-Za-z\\])[A-Za-z]{1,3}(?![A-Za-z])')


def letters_of(text):
    """The letters of a text that may be variables."""
    runs = [run for run in VARIABLES.findall(text) if run not in FUNCTIONS]
    return set(''.join(runs))


def read_family(text, clock, depth):
    """'x = 3k, k ∈ ℤ' -> Family; None where the text does not end in such a condition on one of
    its letters"""
    if '∈' not in text and 'integer' not in text:
        return None
    for pattern, domain in GIVEN:
        m = pattern.fullmatch(text)
        if not m:
            continue
        main = m[1].strip()
        letter = m[2] if domain is None else m[2] or m[3]
        domain = domain or m[3].replace(' ', '')
        if letter in letters_of(main) and depths(main)[-1] == 0:
            return Family(read(main, clock, depth), letter, DOMAINS.get(domain, domain), main)
    return None


def read_congruence(text, clock, depth):
    """'x ≡ 3 (mod 7)' -> Congruence, a list of such for several residues"""
    m = re.fullmatch(r'(.*\S) ?\(mod ([^()]+)\)', text)
    if not m or '(mod' in m[1]:
        return None
    modulus = Parser(m[2], clock).parse()
    name = None
    items = []
    for item in parts_of(m[1], '∨,'):
        sides = parts_of(item, '≡=')
        if len(sides) == 2:
            name = name_of(sides[0])
        if len(sides) > 2 or len(sides) == 2 and not name:
            raise ValueError('a congruence that is not solved')
        items.append(Congruence(name, Parser(sides[-1], clock).parse(), modulus))
    return List(items) if len(items) > 1 else items[0]


# ---- lists and sets

def read_list(text, clock, depth):
    """'1, 2 ∨ 3' -> List, '1, 2; 3, 4' -> List of Tuples, 'x > 1, x < 5' -> Inequality
    1 < x < 5, 'x < 1 ∨ x > 5' -> Union of intervals"""
    texts = parts_of(text, ';')
    if len(texts) > 1:
        items = [read(t, clock, depth) for t in texts]
        items = [Tuple('()', item.items) if isinstance(item, List) else item for item in items]
        return both_or_either(items, False, clock) or List(items)

    pieces = split_outside(text, '∨,')
    texts = []
    for piece in pieces[::2]:
        texts += both_signs(piece)
    if len(texts) > 1:
        items = [read(t, clock, depth) for t in texts]
        return both_or_either(items, '∨' in pieces, clock) or List(items)
    return None


def both_signs(text):
    """'1 ± 2' -> '1 + 2', '1 - 2'; a set keeps its own."""
    if not ('±' in text or '∓' in text) or text[0] in '⦃{' and enclosed(text):
        return [text]
    upper = text.translate(str.maketrans('±∓', '+-'))
    lower = text.translate(str.maketrans('±∓', '-+'))
    return [upper, lower]


def both_or_either(items, either, clock):
    """Solved inequalities as what is in all or, with `either`, in any of them; None for others."""
    if not all(isinstance(item, Inequality) and item.interval for item in items):
        return None
    if either:
        return Union([item.interval for item in items])
    if len({item.name for item in items}) > 1 or len(items) > 12:
        return None
    try:
        return intersection([item.interval for item in items], items[0].name, clock)
    except (ValueError, ArithmeticError):
        return None   # ends that are no numbers


def read_union(text, clock, depth):
    parts = parts_of(text, '∪')
    return Union([read(part, clock, depth) for part in parts]) if len(parts) > 1 else None


def read_intersection(text, clock, depth):
    parts = parts_of(text, '∩')
    if len(parts) == 1:
        return None
    sets = [read(part, clock, depth) for part in parts]
    intervals = [interval for one in sets for interval in intervals_of(one)]
    if not all(isinstance(one, Tuple) and len(one.items) == 2 for one in intervals):
        return None
    return intersection(sets, None, clock)


def read_reals_without(text, clock, depth):
    """'(-∞,∞)∖⦃0, 1⦄' -> Union"""
    parts = parts_of(text, '∖')
    if len(parts) != 2 or parts[0] != '(-∞,∞)':
        return None
    points = read(parts[1], clock, depth)
    return reals_without(points.items if isinstance(points, Set) else [points], clock)


def read_bracketed(text, clock, depth):
    """'⦃1, 2⦄' -> Set, '(1, 2)' -> Tuple, '⟦1 & 2⟧' -> Matrix, '⦃x | x > 1⦄' as its
    condition"""
    if text[0] not in '([{⦃⟦' or not enclosed(text):
        return None
    inner = text[1:-1].strip()
    if text[0] == '⟦':
        return Matrix([[read(cell, clock, depth) for cell in row] for row in rows_of(inner)])
    if text[0] == '⦃':
        builder = read_builder(inner, clock, depth)
        if builder is not None:
            return builder
    pieces = parts_of(inner, ',;')
    if text[0] == '⦃' or text[0] == '{' and len(pieces) > 1:
        inside = read(inner, clock, depth) if inner else List([])
        return Set(inside.items if isinstance(inside, List) else [inside])
    if len(pieces) > 1:
        return Tuple(text[0] + text[-1], [read(piece, clock, depth) for piece in pieces])
    if text[0] in '{(' or inner[:1] == '⟦':
        return read(inner, clock, depth)
    return None


def read_builder(inner, clock, depth):
    """'3k | k ∈ ℤ' -> Family, 'x | x > 1' -> Inequality"""
    given = re.fullmatch(r'([^|:]+?) ?[|:] ?([A-Za-z] ?∈ ?[^|:]+)', inner)
    if given:
        family = read_family(f'{given[1]},{given[2]}', clock, depth)
        if family:
            return family
    condition = re.fullmatch(r'[A-Za-z](?: ?∈ ?\(-∞,∞\))? ?[|:](.*[=<>≤≥≠].*)', inner)
    return read(condition[1].strip(), clock, depth) if condition else None


# ---- equations and inequalities

FLIP = {'<': '>', '>': '<', '≤': '≥', '≥': '≤', '≠': '≠'}
DISTANCE = re.compile(r'\| ?([A-Za-z]) ?(?:([+-])([^|A-Za-z]+))?\|')   # |x - 3|


def read_relation(text, clock, depth):
    """'x = 5' -> Equation, 'x > 5' -> Inequality, '1/3 ≈ 0.33' -> Rounded, 'x ∈ S' as S"""
    pieces = split_outside(text, '=≈<>≤≥≠∈')
    sides = pieces[::2]
    operators = pieces[1::2]
    if not operators:
        return None
    if operators == ['∈']:
        return read(sides[1], clock, depth)
    if '∈' in operators:
        raise ValueError('a chain through ∈')
    if not set(operators) <= {'=', '≈'}:
        return inequality(sides, operators, clock, depth)
    if '≈' in operators:
        k = operators.index('≈')
        if k or not name_of(sides[0]):
            exact = equation(sides[:k + 1], clock, depth) if k else read(sides[0], clock, depth)
            rounded = [read(side.rstrip('⋯'), clock, depth) for side in sides[k + 1:]]
            return Rounded(exact, rounded)
        sides = sides[:2]   # x ≈ 11
    return equation(sides, clock, depth)


def equation(sides, clock, depth):
    if name_of(sides[-1]) and not name_of(sides[0]):
        sides = sides[::-1]
    name = name_of(sides[0])
    values = sides[1:] if name else sides
    return Equation(name, [read(side, clock, depth) for side in values], (sides[0], sides[-1]))


def inequality(sides, operators, clock, depth):
    if operators[0] in '>≥':
        sides = sides[::-1]
        operators = [FLIP.get(operator, '') for operator in operators[::-1]]
    name = interval = None
    rising = set(operators) <= {'<', '≤'}
    distance = DISTANCE.fullmatch(sides[0]) or DISTANCE.fullmatch(sides[1])
    most = 2 if distance and sides[1] == distance[0] else 1
    if operators == ['≠'] and name_of(sides[0]):
        try:
            interval = reals_without([read(sides[1], clock, depth)], clock)
            name = name_of(sides[0])
        except (ValueError, ArithmeticError):
            pass   # x ≠ y
    elif rising and distance and len(operators) <= most:
        name = distance[1]
        interval = within_distance(distance, sides, operators, clock, depth)
    elif rising and len(sides) < 4:
        name, interval = between(sides, operators, clock, depth)
    return Inequality(operators, sides, interval, name)


def brackets(low_closed, high_closed):
    """'[)' for 0 ≤ x < 1"""
    return ('[' if low_closed else '(') + (']' if high_closed else ')')


def between(sides, operators, clock, depth):
    """1 < x, x < 5 or 1 < x < 5 -> name and interval, or None and None"""
    if len(sides) == 2 and name_of(sides[1]):
        low, middle, high = *sides, '∞'
    else:
        low, middle, high = ['-∞', *sides][-3:]
    name = name_of(middle)
    if not name:
        return name, None
    low_closed = operators[0] == '≤' and low != '-∞'
    high_closed = operators[-1] == '≤' and high != '∞'
    ends = [read(low, clock, depth), read(high, clock, depth)]
    return name, Tuple(brackets(low_closed, high_closed), ends)


def within_distance(distance, sides, operators, clock, depth):
    """|x - 3| < 2, 2 < |x - 3| and 1 < |x - 3| < 2 -> interval"""
    _, sign, center = distance.groups()
    center = f'({center})' if center else '0'
    if sign == '+':
        center = '-' + center

    def end(side, radius):
        return read(f'{center}{side}({radius})', clock, depth)

    at = sides.index(distance[0])
    has_inner = at > 0
    has_outer = at < len(operators)
    outer = sides[-1] if has_outer else '∞'
    outer_closed = has_outer and operators[-1] == '≤'
    if not has_inner:
        return Tuple(brackets(outer_closed, outer_closed), [end('-', outer), end('+', outer)])

    inner = sides[0]
    inner_closed = operators[0] == '≤'
    if outer == '∞':
        low = read('-∞', clock, depth)
        high = read('∞', clock, depth)
    else:
        low = end('-', outer)
        high = end('+', outer)
    below = Tuple(brackets(outer_closed, inner_closed), [low, end('-', inner)])
    above = Tuple(brackets(inner_closed, outer_closed), [end('+', inner), high])
    return Union([below, above])


# ---- intervals

def intervals_of(one):
    return one.items if isinstance(one, Union) else [one]


def value_of(end, clock):
    """The number that an end of an interval is."""
    if not isinstance(end, Scalar) or end.tree.free_symbols:
        raise ValueError('an end that is no number')
    numbers = Numbers(256, True, clock)
    return numbers.inexact(numbers.value(end.tree, {}))


def intersection(sets, name, clock):
    """Intervals and unions of such -> what is in all of them, or in any where nothing is in all, as
    an Inequality of that name."""
    every = []
    parts = None
    for one in sets:
        intervals = intervals_of(one)
        every += intervals
        if parts is None:
            parts = intervals
        else:
            overlaps = [overlap(*pair, clock) for pair in itertools.product(parts, intervals)]
            parts = [part for part in overlaps if part]
        if not parts or len(parts) > 20:
            break
    parts = parts or every
    if len(parts) == 1:
        return Inequality([], [], parts[0], name)
    rising = sorted(parts, key=lambda part: value_of(part.items[0], clock))
    return Inequality([], [], Union(rising), name)


def overlap(one, other, clock):
    """The interval that lies in both, or None."""
    lows = [(part.items[0], part.brackets[0]) for part in (one, other)]
    highs = [(part.items[1], part.brackets[1]) for part in (one, other)]
    low, opening = max(lows, key=lambda end: (value_of(end[0], clock), end[1] == '('))
    high, closing = min(highs, key=lambda end: (value_of(end[0], clock), end[1] == ']'))
    bottom = value_of(low, clock)
    top = value_of(high, clock)
    if bottom < top or bottom == top and opening + closing == '[]':
        return Tuple(opening + closing, [low, high])
    return None


def reals_without(points, clock):
    """The real numbers but for some points, as a union of intervals."""
    if not points:
        raise ValueError('no points')
    points = sorted(points, key=lambda point: value_of(point, clock))
    ends = [read('-∞', clock), *points, read('∞', clock)]
    return Union([Tuple('()', list(pair)) for pair in itertools.pairwise(ends)])


# ---- matrices

def read_matrices(text, clock, depth):
    """'2⟦1 & 2⟧ + ⟦3⏎4⟧^T' -> Matrix, worked out entry by entry"""
    if '⟦' not in text:
        return None
    total = None
    sign = 1
    for i, term in enumerate(split_outside(text, '+-')):
        if i % 2:
            sign = -1 if term == '-' else 1
            continue
        if not term and i == 0:
            continue   # -2⟦...⟧
        product = matrix_product(term, sign, clock)
        total = matrix_sum(total, product) if total else product
    return Matrix([[Scalar(entry) for entry in row] for row in total])


def matrix_sum(one, other):
    """Two matrices, rows of expressions -> their sum"""
    if (len(one), len(one[0])) != (len(other), len(other[0])):
        raise ValueError('a sum of matrices that do not fit')
    return [[node('Add', a, b) for a, b in zip(*rows)] for rows in zip(one, other)]


def matrix_product(term, sign, clock):
    """Numbers and up to four matrices in a row, with powers 2, 3 and T -> rows of expressions"""
    scalars = [load().Integer(sign)]
    factors = []
    for part in re.split('(⟦[^⟦⟧]*⟧)', term):
        power = re.fullmatch(r' ?\^ ?\{? ?([23T]|\\top) ?\}?[ *]*', part)
        if part[:1] == '⟦':
            rows = rows_of(part[1:-1])
            factors.append([[Parser(cell, clock).parse() for cell in row] for row in rows])
            if len({len(row) for row in rows}) != 1:
                raise ValueError('rows of different lengths')
        elif power and factors and power[1] in '23':
            factors += [factors[-1]] * (int(power[1]) - 1)
        elif power and factors:
            factors[-1] = [list(column) for column in zip(*factors[-1])]
        elif part.strip(' *'):
            first = '1' if part.strip()[0] == '/' else ''
            scalars.append(Parser(first + part.strip(' *'), clock).parse())
    if not 1 <= len(factors) <= 4:
        raise ValueError('no matrix, or too many, in a product')

    product = factors[0]
    for factor in factors[1:]:
        if len(product[0]) != len(factor):
            raise ValueError('a product of matrices that do not fit')
        columns = list(zip(*factor))
        product = [[dot(row, column) for column in columns] for row in product]
    return [[node('Mul', *scalars, entry) for entry in row] for row in product]


def dot(row, column):
    return node('Add', *[node('Mul', a, b) for a, b in zip(row, column)])


# ---- numbers with words, ratios

def read_compound(text, clock, depth):
    """'1 hour 30 minutes' -> Scalar"""
    said = compound(text)
    if not said:
        return None
    value, words = said
    return Scalar(rational(value), words, '', text)


def read_number_words(text, clock, depth):
    """'twenty-one' -> Scalar"""
    number = number_of(text)
    return None if number is None else Scalar(rational(number))


def read_ratio(text, clock, depth):
    """'1:2:3' -> the Tuple of 2 and 3"""
    parts = parts_of(text, ':')
    if len(parts) < 3:
        return None
    first, *others = (Parser(part, clock).parse() for part in parts)
    unit = inverse(first)
    return Tuple('::', [Scalar(node('Mul', other, unit)) for other in others])


def read_quantity(text, clock):
    """'5 square feet' -> Scalar"""
    spelled = in_digits(text)
    if re.search(r'(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc|c?tg) ?[^A-Za-z]*°', spelled):
        return quantity(text, None, spelled, clock)
    head, words = split_words(spelled, clock.upright, FUNCTIONS)
    return quantity(head, words, spelled, clock)


def quantity(head, words, text, clock):
    """A text as a Scalar, once it is split into what is computed and the words after it."""
    tree = Parser(head, clock).parse()
    if words and words.scale != 1:
        tree = node('Mul', rational(words.scale), tree)
    if words and words.power > 1:
        tree = load().Pow(tree, words.power, evaluate=False)
    numeral = head if re.fullmatch(r'-?\d*\.?\d+', head) else ''
    return Scalar(tree, words, numeral, text)


def in_digits(text):
    """'twenty dollars' -> '20 dollars'; 'five apples' stays: only before units."""
    if not text[:1].isalpha():
        return text
    words = text.split(' ')
    for n in range(min(8, len(words) - 1), 0, -1):
        number = number_of(' '.join(words[:n]))
        if number is not None:
            spelled = f'({number}) ' + ' '.join(words[n:])
            _, said = split_words(spelled, functions=FUNCTIONS)
            return spelled if said and said.units and not said.nouns else text
    return text


# ---------------------------------------------------------------- scalars to sympy

RENAMED = {
    'ln': 'log', 'abs': 'Abs', 'ceil': 'ceiling', 'tg': 'tan', 'ctg': 'cot', 'cotg': 'cot',
    'cosec': 'csc', 'sen': 'sin', 'arcsen': 'asin',
    'arctg': 'atan', 'arcctg': 'acot', 'arcctan': 'acot'}
FUNCTIONS = {   # a name -> sympy's
    name: RENAMED.get(name, name.replace('arc', 'a')) for name in (
        'sin cos tan cot sec csc sinh cosh tanh ln log lg exp abs floor ceil arcsin arccos arctan '
        'asin acos atan tg ctg cotg cosec sen arctg arcctg arccot arcsec arccsc arcsen').split()}
GREEK = set(
    'alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma '
    'tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega '
    'ell'.split())
# Letters that stand for things in a row, where the order tells: tosses, numerals, results ...
CODES = [set(code) for code in (
    'HT', 'IVX', 'XL', 'XC', 'CD', 'CM', 'WLD', 'BG', 'MF', 'TF', 'YN', 'RGBWY', 'NSEW', 'LRUD')]
WORDS = re.compile(   # A to B; Mia: but a b and Ax are products
    r'(?=.*[A-Za-z]{2})[A-Za-z]+(?: [A-Za-z]+)+|(?=...)[A-Z][a-z]*[aeiouy][a-z]*'
    r'|iv|vi|ix|xi|xiv|xvi')
SPELLED = re.compile(r'[A-Z](?: [A-Z])+|[A-Z](?:-[A-Z])+')   # H T H, H-T-H
TOKEN = re.compile(r'\d+(?:\.\d*)?(?:[eE][+-]?\d+(?![\d.]))?|\.\d+|\\[A-Za-z]+|[A-Za-z]+|\S')
CLOSING = {'(': ')', '[': ']', '{': '}', '|': '|', '⌊': '⌋', '⌈': '⌉', '⟪': '⟫'}


def is_word(letters, upright):
    """Is a run of two or three letters a word, in which they do not commute? SAS, IV, HT, III, and
    all that stood in \\text{}; but xyz is a product and AB a segment."""
    if letters in upright:
        return True
    if letters.isupper():
        is_code = any(code.issuperset(letters) for code in CODES)
        return len(letters) > 2 or letters[0] == letters[1] or is_code
    return 'ii' in letters and set(letters) <= set('ivx')


def tokens_of(text, upright):
    """The tokens of a scalar; names of functions without their backslash, products of letters as
    one token a letter. ValueError for words."""
    if WORDS.fullmatch(text) and FUNCTIONS.keys().isdisjoint(text.split()):
        raise ValueError('words')
    if SPELLED.fullmatch(text):
        letters = re.sub('[ -]', '', text)
        repeats = len(set(letters)) < len(letters)
        if is_word(letters, upright) and ('-' not in text or repeats):   # A - B - C is a difference
            text = letters
    tokens = []
    for m in TOKEN.finditer(text):
        token = m[0]
        name = token.lstrip('\\')
        if name in FUNCTIONS and not is_tg_as_letters(token, text[m.end():]):
            tokens.append(name)
        elif not (token.isascii() and token.isalpha()):
            tokens.append(token)
        elif len(token) > 3 or token.lower() in ('yes', 'no', 'odd', 'all'):
            raise ValueError(f'a word: {token!r}')
        elif len(token) > 1 and is_word(token, upright):
            tokens.append(token)
        else:
            tokens += token   # xy is x times y
    return tokens


def is_tg_as_letters(token, rest):
    """tg and ctg are the tangent only before an argument."""
    return token in ('tg', 'ctg') and not re.match(r' ?[\w(\\^{√°]', rest)


def node(name, *args):
    """An expression of sympy's, which sympy does not evaluate."""
    if name in ('Add', 'Mul') and len(args) == 1:
        return args[0]
    return getattr(load(), name)(*args, evaluate=False)


def negative(tree):
    return node('Mul', load().S.NegativeOne, tree)


def inverse(tree):
    return node('Pow', tree, load().S.NegativeOne)


def rational(fraction):
    return load().Rational(fraction.numerator, fraction.denominator)


class Parser:
    """Recursive descent from a scalar spelled by plain() to a sympy expression. Raises ValueError
    on all else.

    sum := product (('+'|'-') product)*;  product := power (('*'|'/'|':')? power)*
    power := atom ('!'|'°'|'%'|'^' atom)*;  atom := number, symbol, group, root, fraction, function
    Nodes are built with evaluate=False: sympy computes nothing, so that parsing is linear whatever
    the text holds. `prime` is appended to the name of every variable.
    """

    def __init__(self, text, clock, prime=''):
        self.sympy = load()
        self.clock = clock
        self.prime = prime
        self.depth = 0   # atoms within each other
        self.bars = 0    # absolute values that are open: there a bar closes
        self.tokens = tokens_of(text, clock.upright)[::-1]   # the next one is the last

    def parse(self):
        tree = self.sum()
        if self.tokens:
            raise ValueError(f'unexpected {self.peek()!r}')
        return tree

    def peek(self):
        return self.tokens[-1] if self.tokens else ''

    def take(self, *wanted):
        """The next token if it is one of `wanted` (any, when none are given), else ''."""
        if self.tokens and (not wanted or self.tokens[-1] in wanted):
            return self.tokens.pop()
        return ''

    def sum(self, closing=None):
        terms = []
        while not terms or self.peek() in ('+', '-'):
            minus = False
            while sign := self.take('+', '-'):
                if sign == '-':
                    minus = not minus
            term = self.product()
            terms.append(negative(term) if minus else term)
        if closing and not self.take(closing):
            raise ValueError(f'no {closing!r} where {self.peek()!r} is')
        return node('Add', *terms)

    def product(self, argument=False):
        """argument: of a function without brackets, sin 2x cos y, which ends at operators, brackets
        and functions."""
        factors = [self.power()]
        while token := self.peek():
            if token in ('*', '/', ':') and not argument:
                self.take()
                minus = self.take('-')
                factor = self.power() if token == '*' else inverse(self.power())
                factors.append(negative(factor) if minus else factor)
            elif argument and (token in FUNCTIONS or token == '('):
                break
            elif self.begins_factor(token):
                factors.append(self.power())
            else:
                break
        return node('Mul', *factors)

    def begins_factor(self, token):
        """May a factor begin with this token where no sign stands before it? No number may."""
        if token == '|':
            return not self.bars
        return token[0].isalpha() or token[0] in '([{√⌊⌈⟪∞\\'

    def power(self):
        tree = self.atom()
        for _ in range(4):
            sign = self.take('!', '°', '%', '^')
            if sign == '^':
                tree = node('Pow', tree, self.exponent())
            elif sign == '!':
                tree = node('factorial', tree)
            elif sign == '°':
                tree = node('Mul', tree, self.sympy.pi, self.sympy.Rational(1, 180))
            elif sign == '%':
                tree = node('Mul', tree, self.sympy.Rational(1, 100))
        return tree

    def exponent(self):
        minus = self.take('-')
        tree = self.atom(chained=True)
        return negative(tree) if minus else tree

    def atom(self, digit=False, chained=False):
        """digit: take no more than one, as TeX does in \\frac12; chained: a^b^c is a^(b^c)."""
        self.clock.tick()
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f'nested deeper than {DEEPEST}')
        token = self.take()
        if digit and token.isdigit() and len(token) > 1:
            self.tokens.append(token[1:])
            token = token[0]
        tree = self.primary(token)
        if chained and self.take('^'):
            tree = node('Pow', tree, self.exponent())
        self.depth -= 1
        return tree

    def primary(self, token):
        sympy = self.sympy
        if token[:1].isdigit() or token[:1] == '.' and len(token) > 1:
            return self.number(token)
        if token == '⟪':
            return self.determinant()
        if token in CLOSING:
            return self.group(token)
        if token == '√':
            index = self.sum(']') if self.take('[') else sympy.Integer(2)
            return node('Pow', self.atom(), inverse(index))
        if token == '\\frac':
            return node('Mul', self.atom(digit=True), inverse(self.atom(digit=True)))
        if token == '\\binom':
            return node('binomial', self.atom(digit=True), self.atom(digit=True))
        if token in FUNCTIONS:
            return self.function(token)
        constants = {'π': sympy.pi, 'e': sympy.E, 'i': sympy.I, '∞': sympy.oo}
        if token in constants:
            return constants[token]
        if token.isalpha() or token[1:] in GREEK:
            return sympy.Symbol(token + self.subscript() + self.prime)
        raise ValueError(f"unexpected {token or 'end'!r}")

    def number(self, token):
        if self.peek() == '_':   # 52_8, a numeral in base 8, equals only itself
            return self.sympy.Symbol(token + self.subscript())
        exponents = re.split('[eE]', token)[1:]
        if any(abs(int(exponent)) > 5000 for exponent in exponents):
            raise ValueError('an exponent too large')
        return rational(Fraction(token))

    def group(self, opening):
        """What is in brackets, in bars or between ⌊ and ⌋."""
        if opening == '|':
            self.bars += 1
        tree = self.sum(CLOSING[opening])
        if opening == '|':
            self.bars -= 1
        name = {'|': 'Abs', '⌊': 'floor', '⌈': 'ceiling'}.get(opening)
        return node(name, tree) if name else tree

    def subscript(self):
        """'_1', '_{12}' or '_{n+1}' as text, '' when there is none."""
        if not self.take('_'):
            return ''
        parts = [self.take()]
        while parts[0] == '{' and parts[-1] not in ('}', ''):
            parts.append(self.take())
        return '_' + ''.join(parts).strip('{}')

    def determinant(self):
        """Of the rows up to ⟫, by the minors of the first."""
        rows = [[self.sum()]]
        while separator := self.take('&', '⏎'):
            if separator == '&':
                rows[-1].append(self.sum())
            elif self.peek() != '⟫':
                rows.append([self.sum()])
        if not self.take('⟫') or len(rows) > 4 or any(len(row) != len(rows) for row in rows):
            raise ValueError('a determinant that is not square, or too large')
        return self.minors(rows)

    def minors(self, rows):
        if len(rows) == 1:
            return rows[0][0]
        terms = []
        for i, entry in enumerate(rows[0]):
            minor = [row[:i] + row[i + 1:] for row in rows[1:]]
            term = node('Mul', entry, self.minors(minor))
            terms.append(negative(term) if i % 2 else term)
        return node('Add', *terms)

    def function(self, name):
        base = None
        if self.take('_'):
            base = self.atom(digit=True)
        elif name == 'lg':
            base = self.sympy.Integer(10)
        power = self.exponent() if self.take('^') else None
        opening = self.take('(', '[', '{')
        inside = self.sum(CLOSING[opening]) if opening else self.product(argument=True)
        if name == 'exp':
            tree = node('Pow', self.sympy.E, inside)
        elif name == 'lg':
            tree = node('log', inside)
        else:
            tree = node(FUNCTIONS[name], inside)
        if base is not None:
            tree = node('Mul', tree, inverse(node('log', base)))
        return tree if power is None else node('Pow', tree, power)


# ---------------------------------------------------------------- values of expressions

per_thread = threading.local()   # mpmath's own context is shared by all threads, precision included


class Numbers:
    """Values of expressions at a point {symbol name: Fraction}: a Fraction where that is exact,
    else a number of mpmath's at `bits`.

    `height`: bits of the longest exact number met; `largest`: the largest inexact one; `real`:
    complex values raise ValueError.
    """

    def __init__(self, bits, real, clock):
        if not hasattr(per_thread, 'mp'):
            from mpmath import MPContext
            per_thread.mp = MPContext()
        self.mp = per_thread.mp
        self.mp.prec = bits
        self.real = real
        self.clock = clock
        self.height = 0
        self.largest = 0

    def inexact(self, x):
        return self.mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x

    def value(self, tree, point):
        self.clock.tick()
        name = type(tree).__name__
        if tree.is_Rational:
            result = Fraction(int(tree.p), int(tree.q))
        elif tree.is_Symbol:
            result = point[tree.name]
        elif not tree.args:
            names = {'Pi': 'pi', 'Exp1': 'e', 'ImaginaryUnit': 'j', 'Infinity': 'inf'}
            result = getattr(self.mp, names[name]) * 1
        else:
            args = [self.value(arg, point) for arg in tree.args]
            result = None
            if all(isinstance(x, Fraction) for x in args):
                result = self.exact(name, args)
            if result is None:
                result = self.approximate(name, [self.inexact(x) for x in args], args)
        if isinstance(result, Fraction):
            return self.bounded(result)
        if self.real and isinstance(result, self.mp.mpc):
            raise ValueError('not real')
        self.largest = max(self.largest, abs(result))
        return result

    def bounded(self, x):
        self.clock.tick()
        self.height = max(self.height, x.numerator.bit_length() + x.denominator.bit_length())
        if self.height > BITS:
            raise ValueError('a number of too many digits')
        return x

    def exact(self, name, args):
        """Fraction, or None where the result may be irrational."""
        x, y = args[0], args[-1]
        if name == 'Add':
            return functools.reduce(lambda a, b: self.bounded(a + b), args)
        if name == 'Mul':
            return functools.reduce(lambda a, b: self.bounded(a * b), args)
        if name == 'Pow' and y.denominator == 1:
            bits = abs(y) * max(x.numerator.bit_length(), x.denominator.bit_length())
            if bits > BITS and abs(x) not in (0, 1):
                raise ValueError('a power of too many digits')
            return x ** int(y)
        if name in ('floor', 'ceiling', 'Abs'):
            function = {'floor': math.floor, 'ceiling': math.ceil, 'Abs': abs}[name]
            return Fraction(function(x))
        if name in ('factorial', 'binomial'):
            if x.denominator != 1 or y.denominator != 1 or x < 0 or y < 0 or x > 4000:
                raise ValueError('factorial or binomial of what is not a small natural number')
            if name == 'factorial':
                return Fraction(math.factorial(int(x)))
            return Fraction(math.comb(int(x), int(y)))
        return None

    def approximate(self, name, args, given):
        """args: numbers of mpmath's; given: the same, those that are exact as Fractions"""
        mp = self.mp
        x = args[0]
        if name != 'Mul' and any(map(mp.isinf, args)):
            raise ValueError('arithmetic with infinity')
        if name == 'Add':
            return mp.fsum(args)
        if name == 'Mul':
            return mp.fprod(args)
        if name == 'Pow':
            return self.power(x, args[1], given[1])
        if not abs(x) < 1 << 64:
            raise ValueError('an argument too large')
        if name in ('floor', 'ceiling'):
            near = mp.nint(x)   # floor(sqrt(4)) must not depend on the last bit
            if abs(x - near) < mp.ldexp(1, -mp.prec // 2):
                return near
            return mp.floor(x) if name == 'floor' else mp.ceil(x)
        if name in ('factorial', 'binomial'):
            raise ValueError(f'{name} of what is not a small natural number')
        return getattr(mp, {'Abs': 'fabs'}.get(name, name))(x)

    def power(self, x, y, given):
        """x ** y; given: y, as a Fraction where it is exact"""
        if isinstance(given, Fraction) and given.denominator == 1 and abs(given) < 10 ** 6:
            return x ** int(given)
        if x == 0:
            if self.mp.re(y) <= 0:
                raise ZeroDivisionError
            return x
        if not abs(y * self.mp.log(x)) < 1 << 32:
            raise ValueError('a power too large')
        return x ** y


# ---------------------------------------------------------------- equal expressions

def equal(one, other, clock):
    """True when two expressions agree at several points: where both are real, or, where that is too
    seldom, at any."""
    sympy = load()
    names = sorted({symbol.name for symbol in one.free_symbols | other.free_symbols})
    natural = set()   # the variables of n! and binomials: n! is n (n-1)!
    for tree in (one, other):
        for function in tree.atoms(sympy.factorial, sympy.binomial):
            natural.update(symbol.name for symbol in function.free_symbols)
    enough = 5 if natural else min(2, 1 + len(names))

    imaginary = one.has(sympy.I) or other.has(sympy.I)
    for real in (False,) if imaginary or not names else (True, False):
        agreeing = 0
        for point in points(names, natural):
            try:
                if not same_value(one, other, point, real, agreeing == 0, clock):
                    return False
                agreeing += 1
            except (ValueError, ArithmeticError):
                continue   # outside the domain
        if agreeing >= enough:
            return True
    return False


def points(names, natural):
    """Yields {name: Fraction}, seven with variables and one without: positive and negative, of
    mixed signs and far from nought; natural numbers for the names in `natural`."""
    scales = (1, 1, -1, 1, 30, -30, 90) if names else (1,)
    for k, scale in enumerate(scales):
        point = {}
        for i, name in enumerate(names):
            millionths = 100_003 + (k * 1_299_709 + i * 611_953 + 7919) % 3_900_007
            point[name] = Fraction(millionths, 10 ** 6) * scale
            if k == 3 and i % 2:
                point[name] = -point[name]
            if name in natural:
                point[name] = Fraction(4 + 2 * k + 3 * i)
        yield point


def same_value(one, other, point, real, deep, clock):
    """Exactly for rationals. Else the difference must vanish at 256 bits and, if deep, go on
    vanishing at 1,024 bits and more, beyond all the digits in the expressions: so e^-1000 is not
    e^-1001, nor sqrt(2) the same + 10^-500."""
    gaps = []
    bits = 256
    while len(gaps) < (2 if deep else 1):
        numbers = Numbers(bits, real, clock)
        mp = numbers.mp
        x = numbers.value(one, point)
        y = numbers.value(other, point)
        if isinstance(x, Fraction) and isinstance(y, Fraction) or mp.isinf(x) or mp.isinf(y):
            return x == y
        x = numbers.inexact(x)
        y = numbers.inexact(y)
        gaps.append(abs(x - y))
        size = max(abs(x), abs(y))
        if not gaps[0] <= mp.ldexp(max(size, numbers.largest), -100):
            return False
        magnitude = max(0, mp.mag(numbers.largest)) if numbers.largest else 0
        if max(numbers.height, magnitude) > 8192:
            raise ValueError('too many digits')
        bits = 1024 + 2 * numbers.height + magnitude
    if not deep or gaps[1] == 0:
        return True

    if gaps[0]:
        size = max(size, numbers.largest)
    vanishes = gaps[1] <= mp.ldexp(size, 200 - mp.prec)
    shrinks = gaps[0] == 0 or gaps[1] <= mp.ldexp(gaps[0], -300)
    return bool(vanishes and shrinks)


def proportional(sides, others, clock):
    """Sign of the constant c in l - r = c (L - R), for two pairs of sides as text; 0 when there is
    none."""
    def difference(pair, prime=''):
        left, right = (Parser(side, clock, prime).parse() for side in pair)
        return node('Add', left, negative(right))

    # f(x) g(x') = f(x') g(x) at all x and x', where f = c g
    f = difference(sides)
    g = difference(others)
    f2 = difference(sides, "'")
    g2 = difference(others, "'")
    zero = load().S.Zero
    if equal(f, zero, clock) or equal(g, zero, clock):
        return 0
    if not equal(node('Mul', f, g2), node('Mul', f2, g), clock):
        return 0
    symbols = sorted(f.free_symbols | g.free_symbols, key=str)
    point = {symbol.name: Fraction(11, 7) + i for i, symbol in enumerate(symbols)}
    numbers = Numbers(256, True, clock)
    return 1 if numbers.value(f, point) * numbers.value(g, point) > 0 else -1


# ---------------------------------------------------------------- the same answer

def same(gold, answer, clock):
    """Do two answers, as read() returns them, say the same?"""
    clock.tick()
    kinds = {type(gold), type(answer)}
    if Rounded in kinds:
        return same_rounded(gold, answer, clock)
    if Family in kinds:
        return same_family(gold, answer, clock)
    if kinds == {Congruence}:
        return same_congruence(gold, answer, clock)
    if kinds == {Cases}:
        return same_cases(gold, answer, clock)
    if Equation in kinds:
        return same_equation(gold, answer, clock)
    if Inequality in kinds:
        return same_inequality(gold, answer, clock)
    if kinds == {Scalar}:
        return same_scalar(gold, answer, clock)
    if kinds == {Text}:
        return gold.words == answer.words
    if kinds == {Matrix}:
        return same_matrix(gold, answer, clock)
    if kinds == {Matrix, Tuple}:
        return same_vector(gold, answer, clock)
    if kinds == {Tuple}:
        alike = gold.brackets == answer.brackets or len(gold.items) > 2   # of two: an interval?
        return alike and same_ordered(gold.items, answer.items, clock)
    if kinds == {List, Tuple}:   # x = 3, y = 4 for (3, 4)
        named = any(isinstance(one, List) and have_own_names(one.items) for one in (gold, answer))
        return named and same_ordered(by_letter(gold.items), by_letter(answer.items), clock)
    if kinds <= {List, Set} or kinds == {Union}:
        return same_items(gold, answer, clock)
    if kinds == {Set, Scalar}:
        items, other = (gold.items, answer) if isinstance(gold, Set) else (answer.items, gold)
        return len(items) == 1 and same(items[0], other, clock)
    return False


# ---- several items

def same_ordered(items, others, clock):
    if len(items) != len(others) or not items:
        return False
    return all(same(one, other, clock) for one, other in zip(items, others))


def same_unordered(items, others, repeats, clock):
    """repeats: {1, 1, 2} is {1, 2}; else each of `others` is matched once."""
    left = list(others)
    for one in items:
        match = next((i for i, other in enumerate(left) if same(one, other, clock)), None)
        if match is None:
            return False
        if not repeats:
            del left[match]
    if repeats:
        return all(any(same(one, other, clock) for one in items) for other in left)
    return not left


def same_items(gold, answer, clock):
    """Of lists, sets and unions."""
    if have_own_names(gold.items) != have_own_names(answer.items):
        return same_ordered(by_letter(gold.items), by_letter(answer.items), clock)
    points = {type(item) for item in gold.items} == {Tuple}
    repeats = points or isinstance(gold, Set) or isinstance(answer, Set)
    return same_unordered(gold.items, answer.items, repeats, clock)


def have_own_names(items):
    """True when every item is an equation with a name of its own, so that the order of bare values
    tells."""
    names = [item.name for item in items if isinstance(item, Equation) and item.name]
    return len(set(names)) == len(items) > 1


def by_letter(items):
    """y = 4, x = 3 as x = 3, y = 4, the order that bare values would have; other names than letters
    stay in theirs."""
    if not have_own_names(items):
        return items
    letters = [re.fullmatch(r'([A-Za-z])_?\{?(\d*)\}?', item.name) for item in items]
    if not all(letters):
        return items
    keys = [(letter[1].lower(), int(letter[2] or 0)) for letter in letters]
    return [item for _, item in sorted(zip(keys, items), key=lambda pair: pair[0])]


def same_matrix(gold, answer, clock):
    if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
        return False
    cells = zip(itertools.chain(*gold.rows), itertools.chain(*answer.rows))
    return all(same(one, other, clock) for one, other in cells)


def same_vector(gold, answer, clock):
    """A matrix of one row or column, and a tuple."""
    matrix, point = (gold, answer) if isinstance(gold, Matrix) else (answer, gold)
    if min(len(matrix.rows), max(map(len, matrix.rows))) != 1:
        return False
    return same_ordered(list(itertools.chain(*matrix.rows)), point.items, clock)


def same_cases(gold, answer, clock):
    """In any order."""
    def has(case, others):
        return any(same(case[0], value, clock) and same(case[1], condition, clock)
                   for value, condition in others)

    return len(gold.rows) == len(answer.rows) and all(has(case, answer.rows) for case in gold.rows)


# ---- equations, inequalities, congruences, families

def same_equation(gold, answer, clock):
    if type(gold) is not type(answer):   # x = 5 for 5, and 2 + 3 = 5: every side must be right
        one, other = (gold, answer) if isinstance(gold, Equation) else (answer, gold)
        return all(same(other, side, clock) for side in one.sides)
    if gold.name == answer.name:
        right = gold.sides[-1]
        sides = answer.sides if gold.name else answer.sides[-1:]
        if all(same(right, side, clock) for side in sides):
            if gold.name or same(gold.sides[0], answer.sides[0], clock):
                return True
    if any(len(one.sides) != (1 if one.name else 2) for one in (gold, answer)):
        return False
    try:
        return proportional(gold.texts, answer.texts, clock) != 0
    except (ValueError, ArithmeticError):
        return False


def same_inequality(gold, answer, clock):
    """Two inequalities, or one and what it may be solved to."""
    if type(gold) is not type(answer):
        intervals = [one.interval if isinstance(one, Inequality) else one for one in (gold, answer)]
        return all(intervals) and same(*intervals, clock)
    if gold.interval and answer.interval and same(gold.interval, answer.interval, clock):
        return gold.name == answer.name
    if len(gold.texts) != 2 or len(answer.texts) != 2:
        return False
    try:
        sign = proportional(gold.texts, answer.texts, clock)
    except (ValueError, ArithmeticError):
        return False
    operator = answer.operators[0]
    if sign < 0:
        operator = FLIP[operator]
    return sign != 0 and gold.operators[0] == operator


def same_congruence(gold, answer, clock):
    if gold.name and answer.name and gold.name != answer.name:
        return False
    if not equal(gold.modulus, answer.modulus, clock):
        return False
    if equal(gold.residue, answer.residue, clock):
        return True
    trees = gold.residue, answer.residue, gold.modulus
    if not (gold.name or answer.name) or any(tree.free_symbols for tree in trees):
        return False
    values = [Numbers(256, True, clock).value(tree, {}) for tree in trees]
    if not all(isinstance(value, Fraction) for value in values):
        return False
    residue, other, modulus = values
    return modulus > 0 and (residue - other) % modulus == 0


def same_family(gold, answer, clock):
    """The same but for the name of the letter, in one domain: 3n, n ∈ ℤ is 3k, k ∈ ℤ."""
    if type(gold) is not type(answer):
        one, other = (gold, answer) if isinstance(gold, Family) else (answer, gold)
        between = isinstance(one.main, Inequality) and one.domain != '(-∞,∞)'
        return not between and same(one.main, other, clock)   # 1 < k < 5 has fewer in ℤ
    if gold.domain != answer.domain:
        return False
    if gold.letter == answer.letter:
        return same(gold.main, answer.main, clock)
    if gold.letter in letters_of(answer.text):
        return False   # it stands for something else there

    def renamed(m):
        return m[0] if m[0] in FUNCTIONS else m[0].replace(answer.letter, gold.letter)

    return same(gold.main, read(VARIABLES.sub(renamed, answer.text), clock), clock)


# ---- rounded numbers

def same_rounded(gold, answer, clock):
    """100/3 ≈ 33.3 is the same as its exact part, and as 33.3 where that is what it rounds to.
    But 41 ≈ 42 is neither."""
    both = gold, answer
    if not all(is_close(one, clock) for one in both if isinstance(one, Rounded)):
        return False
    exact_parts = [one.exact if isinstance(one, Rounded) else one for one in both]
    if same(*exact_parts, clock):
        return True
    if type(gold) is type(answer):
        return False
    one, other = both if isinstance(gold, Rounded) else both[::-1]
    return is_rounding_of(last_side(other), last_side(one.exact), one.rounded, clock)


def is_rounding_of(other, exact, rounded, clock):
    """Is `other` a decimal that `exact` rounds to, with no more places than one of `rounded`?"""
    if not all(isinstance(one, Scalar) for one in (exact, other, *rounded)):
        return False
    numeral = other.numeral
    if '.' not in numeral and len(numeral.strip('-')) < 2:
        return False

    def bears_out(one):
        right = rounds_to(exact.tree, one.numeral, clock)
        fine = places(one.numeral) >= places(numeral)
        return right and fine and bool(conversions(other.words, one.words))

    if not any(bears_out(one) for one in rounded) or not conversions(other.words, exact.words):
        return False
    return rounds_to(exact.tree, numeral, clock)


def is_close(approximation, clock):
    """False for 41 ≈ 42: where number and rounded number differ by a unit of the last place that
    is written, and by 2%."""
    exact = last_side(approximation.exact)
    for one in approximation.rounded:
        if not isinstance(exact, Scalar) or not isinstance(one, Scalar) or not one.numeral:
            continue
        if exact.tree.free_symbols or conversions(exact.words, one.words)[:1] != [(1, 1, 0)]:
            continue
        try:
            numbers = Numbers(256, True, clock)
            value = numbers.inexact(numbers.value(exact.tree, {}))
            gap = abs(value - numbers.inexact(Fraction(one.numeral)))
        except (ValueError, ArithmeticError):
            continue
        place = numbers.inexact(Fraction(1, 10 ** places(one.numeral)))
        if gap >= place and gap * 50 > abs(value):
            return False
    return True


def rounds_to(tree, numeral, clock):
    """Is numeral, a text, what tree rounds to at as many places?"""
    if not numeral or tree.free_symbols:
        return False
    try:
        numbers = Numbers(256, True, clock)
        gap = numbers.inexact(numbers.value(tree, {})) - numbers.inexact(Fraction(numeral))
        half = numbers.inexact(Fraction(1, 2 * 10 ** places(numeral)))
        return bool(abs(gap) <= half)
    except (ValueError, ArithmeticError):
        return False


def places(numeral):
    """How many digits are after the point."""
    return len(numeral.partition('.')[2])


def last_side(one):
    return one.sides[-1] if isinstance(one, Equation) else one


# ---- scalars and their units

def same_scalar(gold, answer, clock):
    if same_quantity(gold, answer, clock):
        return True
    if bool(gold.words) == bool(answer.words):
        return False
    one, bare = (gold, answer) if gold.words else (answer, gold)
    if one.words.sure:   # 5 amperes, 3 dogs: then 5 A and 3 dog are no products either
        short = set(re.findall(r'[A-Za-z]+', bare.text))
        head, words = split_words(bare.text, short, FUNCTIONS) if short else (bare.text, None)
        if words is None:
            return False
        return same_quantity(one, quantity(head, words, bare.text, clock), clock)
    try:   # 5 N as the product that it may be too
        product = Parser(one.text, clock).parse()
        pair = (product, bare.tree) if one is gold else (bare.tree, product)
        return equal(*pair, clock)
    except (ValueError, ArithmeticError):
        return False


def same_quantity(gold, answer, clock):
    """Do two scalars agree in value, once their units are the same?"""
    found = conversions(gold.words, answer.words)
    if not found:
        return False
    if same_without_unit(gold, answer, 'percent', Fraction(1, 100), 0, clock):
        return True   # 28% is 0.28, and 28 too
    if same_without_unit(gold, answer, 'degree', Fraction(1, 180), 1, clock):
        return True
    for first, second, pi in found[:4]:
        if (first, second, pi) != (1, 1, 0):
            if equal(times(gold.tree, first), times(answer.tree, second, pi), clock):
                return True
        elif gold.tree.is_Symbol and gold.tree.name[0].isdigit() and answer.tree.is_Integer:
            return gold.tree.name.split('_')[0] == str(answer.tree)   # 52 for 52_8
        elif is_base_ten(answer.tree, gold.tree) or equal(gold.tree, answer.tree, clock):
            return True
    return same_to_ten_digits(gold, answer, clock)


def times(tree, factor, pi=0):
    """tree factor π^pi"""
    sympy = load()
    return node('Mul', tree, rational(factor), sympy.Pow(sympy.pi, pi))


def same_without_unit(gold, answer, unit, factor, pi, clock):
    """Where one is in `unit` and the other in none: are they equal once it is times factor
    π^pi?"""
    both = gold, answer
    units = [one.words.units if one.words else {} for one in both]
    if {unit: 1} not in units or {} not in units:
        return False
    trees = [times(one.tree, factor, pi) if its else one.tree for one, its in zip(both, units)]
    return equal(*trees, clock)


def is_base_ten(numeral, integer):
    """52_10 and 52"""
    return numeral.is_Symbol and integer.is_Integer and numeral.name == f'{integer}_10'


def same_to_ten_digits(gold, answer, clock):
    """Where one side alone is a decimal, of ten digits or more: is it the other, rounded right?"""
    if ('.' in gold.numeral) == ('.' in answer.numeral):
        return False
    decimal, exact = (gold, answer) if '.' in gold.numeral else (answer, gold)
    digits = decimal.numeral.strip('-0.').replace('.', '')
    return len(digits) >= 10 and rounds_to(exact.tree, decimal.numeral, clock)


# ---------------------------------------------------------------- worked out or not

FRACTION = re.compile(r'\\frac ?(\{[^{}]*\}|\d) ?(\{[^{}]*\}|\d)')
BINOMIAL = re.compile(r'\\binom ?(\{[^{}]*\}|\d) ?(\{[^{}]*\}|\d)')
NUMERAL = r'(?:\d+(?:\.\d*)?|\.\d+)'
NUMERALS = re.compile(rf'[-+]? ?{NUMERAL}(?: ?, ?[-+]? ?{NUMERAL})*')
NUMBER = re.compile(   # what is left of one once its braces are dropped
    rf'[-+]? ?(?:{NUMERAL}(?:[eE][+-]?\d+|_\d+| ?\* ?10 ?\^ ?-?\d+)?'
    r'|\(\d+\+\d+/\d+\)|\(\(\d+-\d+\)/9+0*\)|(?P<top>\d+) ?/ ?(?P<bottom>-?[1-9]\d*))')
PAIR = rf'of ({NUMERAL}) ?, ?({NUMERAL})'
WORDED = [(re.compile(pattern), new) for pattern, new in (   # 6 times 7, the sum of 6 and 7
    (rf'product {PAIR}', r'\1*\2'),
    (rf'sum {PAIR}', r'\1+\2'),
    (rf'difference {PAIR}', r'\1-\2'),
    (r'(?<=[\d)}]) ?(?:times|multiplied by) ?(?=[\d({])', '*'),
    (r'(?<=[\d)}%]) of ?(?=[\d({])', '*'),
    (r'(?<=[\d)}]) ?divided by ?(?=[\d({])', '/'),
    (r'(?<=[\d)}]) ?plus ?(?=[\d({])', '+'),
    (r'(?<=[\d)}]) ?minus ?(?=[\d({])', '-'),
    (r'(?<=[\d)}]) ?squared', '^2'),
    (r'(?<=[\d)}]) ?cubed', '^3'),
    (r'square root of ?(?=\d)', '√'),
    (r'cube root of ?(?=\d)', '√[3]'),
    (r'√ ?\[ ?2 ?\]', '√'),
)]
PADDING = re.compile(   # what changes nothing: 1 * 6 * 7, 6 * 7 + 0, (6 * 7)^1
    r'(?<![\d.^_*/-])(?<![*/^_-] )1 ?\*|[*/^] ?(?:1|\{ ?1 ?\})(?![\d.^!_])'
    r'|[+-] ?0(?![\d.^!_]|\)/9)|(?<![\d.^_*/])0 ?\+')
DRAWING = re.compile(r'\[asy\](?:(?!\[asy\]).)*?\[/asy\]', re.DOTALL)


def is_numeral(answer):
    """Is an answer a number that is worked out: an integer, a decimal, a fraction that is no
    integer, a mixed number, 1.2 * 10^6, a numeral in another base; with a unit or not?"""
    try:
        sides = values_of(without_separators(plain(answer)))
        return any(is_number(side) for side in sides)
    except ValueError:
        return False


def echoes(gold, answer, prompt):
    """Is an answer only an expression that the prompt holds, and that is not worked out?

    True for 6 * 7 where the prompt asks for it and the gold is 42: whatever the spelling and order.
    Numerals, words and variables are no such expressions, nor is what the gold is written as; but
    1.45 is one where the gold is a fraction, and 2 hours where it is 120 minutes.
    """
    clock = Clock(gold, answer)
    try:
        answer = worded(plain(answer))
        gold = worded(plain(gold))
        golds = tokens_of_gold(gold, clock)
        sides = [answer] if re.search('[<>≤≥≠∈]', answer) else values_of(answer)
        asked = [question(side.lstrip('+ '), golds, clock) for side in sides]
        if not all(asked):
            return False
        held = tokens_of_prompt(prompt, clock)
        return all(holds(held, tokens) for tokens in asked)
    except (ValueError, ArithmeticError, RecursionError):
        return False


def is_number(side):
    head, words = split_words(side, functions=FUNCTIONS)
    m = NUMBER.fullmatch(divided(head).replace('{', '').replace('}', '').strip())
    if not m or words and words.power != 1:
        return False
    return not m['top'] or int(m['top'][:300]) % int(m['bottom'][:300]) != 0


def values_of(text):
    """'x = 6 * 7 = 42' -> ['6 * 7', '42']: what an answer says, but for its name."""
    sides = parts_of(text, '=≈')
    return sides[1:] if len(sides) > 1 and name_of(sides[0]) else sides


def divided(text):
    """\\frac{a}{b} as a/b"""
    for _ in range(4):
        text = FRACTION.sub(r'\1/\2', text)
    return BINOMIAL.sub(r'\\binom{\1}{\2}', text)


def worded(text):
    """'6 times 7' as 6*7"""
    for pattern, new in WORDED:
        text = pattern.sub(new, text)
    return text


def unpadded(text):
    """Without 1 *, + 0 and the like."""
    return PADDING.sub('', divided(text))


# ---- the tokens that an expression is written with

def written_with(text):
    """What an expression is written with, but for its brackets and the signs between factors."""
    tokens = []
    closed = False   # a bracket was before this token
    for token in TOKEN.findall(without_separators(divided(text))):
        if token in '(){}[]⦃⦄⟦⟧':
            closed = True
            continue
        if token[0].isdigit() or token[0] == '.' and len(token) > 1:
            after_number = tokens and tokens[-1][0].isdigit() and tokens[-2:-1] != ['_']
            if closed and after_number:
                tokens.append('*')   # (6)(7), but log_{2}{8}
            token = one_spelling_of(token)
        elif token.isalpha() and token.isascii() and len(token) < 4 and not unit_of(token):
            tokens += token[:-1]
            token = token[-1]
        elif token.isalpha() or token in '°%':
            token = unit_of(token) or token
        tokens.append(token)
        closed = False
    return without_times(tokens)


def one_spelling_of(numeral):
    """'2.50' -> '5/2'"""
    if len(numeral) > 40:
        return numeral
    mantissa = re.match(NUMERAL, numeral)[0]
    return str(Fraction(mantissa)) + numeral[len(mantissa):]


def without_times(tokens):
    """2*π as 2π: the sign stays between numbers alone."""
    kept = []
    for i, token in enumerate(tokens):
        before = tokens[i - 1] if i else ' '
        after = tokens[i + 1] if i + 1 < len(tokens) else ' '
        if token != '*' or before[0].isdigit() and after[0].isdigit():
            kept.append(token)
    return kept


def tokens_of_gold(gold, clock):
    """Every way to write the gold: all of it, a side, an element, with its unit or without."""
    texts = [gold, *values_of(gold), *parts_of(gold.strip('⦃⦄'), ',;∨')]
    texts = [unpadded(text) for text in texts]
    texts += [split_words(text, clock.upright, FUNCTIONS)[0] for text in texts]
    return [written_with(text) for text in dict.fromkeys(texts)]


def question(side, golds, clock):
    """The tokens of what an answer says, where that may be a question; [] where it is none."""
    side = unpadded(side)
    head, words = split_words(side, clock.upright, FUNCTIONS)
    number = NUMERALS.fullmatch(head.strip())
    tokens = written_with(side if number else head)
    as_gold = any(sorted(tokens) == sorted(gold) for gold in golds)
    if as_gold or isinstance(read(side, clock), Text):
        return []
    if number and not words:   # 1.45, where the gold is a fraction
        fraction = any('/' in gold for gold in golds)
        return tokens if '.' in side and fraction else []
    if number and (words.scale, words.power) == (1, 1):   # the gold's numeral with a unit
        numeral = written_with(head.strip(' -+'))[0]
        return [] if any(numeral in gold for gold in golds) else tokens
    return tokens if len(tokens) > 1 else []


def tokens_of_prompt(prompt, clock):
    """The tokens of a prompt, of a long one those of its beginning and its end; in parts that
    overlap, so that one of them holds what another cuts."""
    prompt = DRAWING.sub(' ', prompt)
    if len(prompt) > 20_000:
        prompt = prompt[:10_000] + '\n' + prompt[-10_000:]
    tokens = []
    length = LONGEST - 100
    step = length - 200
    for start in range(0, max(1, len(prompt) - 200), step):
        clock.tick()
        part = prompt[start:start + length].replace('####', ' ')
        try:
            tokens += [*written_with(worded(plain(part))), '\n']
        except ValueError:
            continue   # longer than that once it is spelled
    return tokens


def holds(held, tokens):
    """Do some len(tokens) in a row of `held` hold the same, in any order?"""
    wanted = Counter(tokens)
    window = Counter(held[:len(tokens) - 1])
    for first, last in zip(held, held[len(tokens) - 1:]):
        window[last] += 1
        if window == wanted:
            return True
        window[first] -= 1
    return False
