"""
Do two answers to a mathematics problem say the same?

    math_equal('\\frac{1}{2}', '0.5')     # True

text -> one spelling (_plain) -> a structure of lists, intervals, equations ... (_read) -> sympy expressions that sympy never
evaluates (_Parser) -> values computed here, within bounds (_Numbers). No text is evaluated as code: the grammar is ours. No input
is slow: characters, nesting and digits are bounded, and every loop looks at a clock of the thread's own, so that there is
no signal to fail off the main thread. Safe in threads and worker processes.
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

from graders.units import compound, conversions, number_of, split_words, unit_of


# ---------------------------------------------------------------- one spelling

SECONDS, LONGEST, DEEPEST, BITS = 1.0, 1000, 24, 1 << 16  # bounds: time, characters, nesting, size of exact numbers
COMMANDS = {  # LaTeX command -> a character, or nothing for style; the others stay
    **dict.fromkeys('left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle boxed fbox rm bf it'.split(), ''),
    **dict.fromkeys('dfrac tfrac cfrac'.split(), r'\frac '), **dict.fromkeys('quad qquad phantom'.split(), ' '),
    **dict.fromkeys('times cdot ast'.split(), '*'), **dict.fromkeys('le leq leqslant'.split(), '≤'),
    **dict.fromkeys('ge geq geqslant'.split(), '≥'), **dict.fromkeys('ne neq'.split(), '≠'), 'lt': '<', 'gt': '>',
    **dict.fromkeys('approx simeq'.split(), '≈'), **dict.fromkeys('lvert rvert vert mid'.split(), '|'), 'in': '∈',
    **dict.fromkeys('emptyset varnothing'.split(), '⦃⦄'), 'cup': '∪', 'cap': '∩',
    'forall': '', 'div': '/', 'pm': '±', 'mp': '∓', 'infty': '∞',
    **dict.fromkeys('circ degree'.split(), '°'), 'pi': 'π', 'sqrt': '√', 'lfloor': '⌊', 'rfloor': '⌋', 'lceil': '⌈',
    'angle': '∠', 'triangle': '△',
    **dict.fromkeys('setminus smallsetminus backslash'.split(), '∖'),
    **dict.fromkeys('ldots dots cdots dotsc dotsb'.split(), '⋯'), 'equiv': '≡', 'permil': '‰',
    **dict.fromkeys('land wedge'.split(), ','), **dict.fromkeys('lor vee'.split(), '∨'),
    'rceil': '⌉', 'langle': '(', 'rangle': ')', 'lbrace': '⦃', 'rbrace': '⦄', 'colon': ':', 'dbinom': r'\binom '}
SIGNS = str.maketrans({**dict.fromkeys('−–—', '-'), **dict.fromkeys('×·∙⋅∗', '*'), **dict.fromkeys('÷⁄∕', '/'),
                       '∅': '⦃⦄', '。': '.', '、': ','})
TEXT_FONTS, SYMBOL_FONTS = 'text(?:bf|it|rm|normal)?|mbox|mathrm|textup', \
    r'math(?:bf|it|sf)|boldsymbol|operatorname\*?'
INSIDE = r'\s*\{((?:[^{}]|\{[^{}]*\})*)\}'
FONTS = rf'\\(?:{TEXT_FONTS}|{SYMBOL_FONTS}){INSIDE}'
UPRIGHT = re.compile(rf'\\({TEXT_FONTS}){INSIDE}')
CURRENCIES = {  # symbol or code -> the unit that is put after the number
    '¤': 'dollar', 'USD': 'dollar', 'US¤': 'dollar', '€': 'euro', 'EUR': 'euro',
    '£': 'sterling', 'GBP': 'sterling', '₹': 'rupee', 'INR': 'rupee', 'Rs': 'rupee',
    '¥': 'yenyuan', 'JPY': 'yen', 'CNY': 'yuan', 'RMB': 'yuan', '₩': 'won', '₽': 'ruble',
    '¢': 'cent'}
CURRENCY = '(US¤|[¤€£₹¥₩₽]|(?<![A-Za-z])(?:USD|EUR|GBP|INR|JPY|CNY|RMB|Rs\\.?))'
MATRIX = r'\{(?:[pbBV]?(?:small)?matrix\*?|array)\}'
REALS = (r'(?i)^ ?(?:[a-z] (?:is|can be) )?(?:(?:the )?set of )?'
         r'(?:(?:all|any|every) (?:the )?(?:possible )?reals?(?: numbers?| values?)?'
         r'|the real numbers|real numbers)(?:,? ?(?:of|for|in)? [a-z])? ?$')


def _mixed(m):
    """1\\frac12 -> (1+1/2), but 2\\frac32 is a product."""
    whole, top, bottom = (g for g in m.groups() if g)
    return f'({whole}+{top}/{bottom})' if int(top) < int(bottom) else m[0]


def _dotted(m):
    """0.\\dot1 2\\dot3 -> 0.\\overline{123}"""
    return '\\overline{' + ''.join(re.findall(r'\d', m[0])) + '}'


def _system(m):
    """Equations below each other -> ⟬row⏎row⟭, without the marks that align them."""
    return '⟬' + (m[1] if m[1] else re.sub(r'(?<!\\)&', ' ', m[2])) + '⟭'


BEFORE_NFKC = [(re.compile(pattern), new) for pattern, new in (
    (r'[⁰¹²³⁴-⁹⁻]+', lambda m: '^{' + unicodedata.normalize('NFKC', m[0]).replace('−', '-') + '}'),
    (r'[₀-₉]+', lambda m: '_{' + unicodedata.normalize('NFKC', m[0]) + '}'),
    (r'[¼-¾⅐-⅞]', lambda m: ' ' + unicodedata.normalize('NFKC', m[0])),
    (r'[ℝℤℕℚℂ]', lambda m: f"\\mathbb{{{unicodedata.normalize('NFKC', m[0])}}}"),
)]
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r'\\left ?\\\{ ?\\begin ?\{array\}(?:\{[lcr| ]*\})?(.*?)\\end ?\{array\} ?\\right ?\.|'
     r'(?:\\left ?\\\{ ?)?\\begin ?\{(?:align(?:ed|\*)?|gathered|split)\}(.*?)'
     r'\\end ?\{(?:align(?:ed|\*)?|gathered|split)\}(?: ?\\right ?\.)?', _system),
    (r'\\begin ?\{d?cases\}', '⟬'), (r'\\end ?\{d?cases\}', '⟭'),
    (r'\\begin ?\{v(?:small)?matrix\}', '⟪'), (r'\\end ?\{v(?:small)?matrix\}', '⟫'),
    (r'\\begin ?' + MATRIX + r'(?:\{[lcr| ]*\}|\[[lcr]\])?', '⟦'), (r'\\end ?' + MATRIX, '⟧'),
    (r'\\\\(?:\[\w*\])?', '⏎'), (r',\\!\s*|\{,\}', ','), (r'\\!', ''), (r'\\[,;:> ]|~', ' '),
    (r'\\[()\[\]]|\$', ''), (r'\\%', '%'),
    (r'\\\{', '⦃'), (r'\\\}', '⦄'), (r'\\\|', '|'),
    (r'\\mathbb\s*(?:R|\{R\})|\\(?:R|reals)(?![A-Za-z])', '(-∞,∞)'),
    (r'\\mathbb\s*([A-Z])', r'\\mathbb{\1}'),
    (r'\\mu ?\\(?:mathrm|text)\{ ?(?=[A-Za-z])', r'\\mathrm{ μ'),
    *[(FONTS, r' \1 ')] * 2, (r'\s+', ' '),
    (REALS, '(-∞,∞)'),
    (REALS[:-3] + r' (?:except|but|other than)(?: for)? (.+)$', r'(-∞,∞)∖⦃\1⦄'),
    *[(rf'(?i)^ ?(?:the )?(?:set of )?(?:all )?{sign} (?:real numbers|reals)'
       rf'|\(-∞,∞\) ?[_^] ?\{{? ?{short} ?\}}?', interval) for sign, short, interval in (
           ('positive', r'(?:\+|> ?0)', '(0,∞)'), ('negative', '(?:-|< ?0)', '(-∞,0)'),
           ('non-?negative', r'(?:≥|\\geq?) ?0', '[0,∞)'))],
    (r'(?i)^ ?no (?:real )?(?:solutions?|roots?) ?$', '⦃⦄'), (r'^ ?DNE ?$', 'does not exist'),
    (r'(?i)^ ?(?:minus|negative) (?=\d)', '-'),
    (r' ?_ ?', '_'), (r'_\{ ?\( ?(\d+) ?\) ?\}', r'_{\1}'),
    (r'(?<=\d) ?\(? ?base (\d+|[a-z]{3,7}) ?\)? ?$', r'_{\1}'),
    (r'(?i)^ ?(?:the )?(?:set of )?(?:all )?(?:the )?integers ?$', r'\\mathbb{Z}'),
    (r'(?i)^ ?(?:the )?empty set ?$', '⦃⦄'),
    (r'(\d) and (?:a|one) half(?![a-z])', r'(\1+1/2)'),
    (r'\\([A-Za-z]+)\s*', lambda m: COMMANDS.get(m[1], m[0])), (r'\^\s*(?:°|\{\s*°\s*\})', '°'),
    ('([∠△]) ', r'\1'), (r'\{\s*\}', ''),
    (r'\| ?⟦([^⟦⟧]*)⟧ ?\||\\det ?\( ?⟦([^⟦⟧]*)⟧ ?\)|\\det ?⟦([^⟦⟧]*)⟧',
     lambda m: f'⟪{m[1] or m[2] or m[3]}⟫'),
    (r'° ?C(?![A-Za-z])', ' celsius'), (r'° ?F(?![A-Za-z])', ' fahrenheit'),
    (CURRENCY + r' ?(\d[\d.,]*) ?([kKMB])(?![A-Za-z])',
     lambda m: f'{m[1]}{m[2]} ' + {'K': 'thousand', 'M': 'million', 'B': 'billion'}[m[3].upper()]),
    (r'(^|[,;=≈∨(] ?)([-+]?) ?' + CURRENCY +
     r' ?([-+]?(?:\d[\d.,]*\d|\d))(?= ?$| ?[,;.∨)]| ?[A-Za-z/]{3})',
     lambda m: f"{m[1]}{m[2]}{m[4]} {CURRENCIES[m[3].strip('.')]} "),
    (r'(?<=[\d}]) ?([¤€£₹¥¢₩₽])(?= |$|,)', lambda m: f' {CURRENCIES[m[1]]}'),
    ('¤', ''),
    (r'\{([^{}]*)\\choose([^{}]*)\}', r'\\binom{\1}{\2}'),
    (r'\\dot ?\{? ?\d ?\}?(?:\d* ?\\dot ?\{? ?\d ?\}?)?', _dotted),
    (r'\d\u0307(?:\d*\d\u0307)?|(?:\d\u0305)+', _dotted),
    (r'\\(?:bar|overline) ?(\d)', r'\\overline{\1}'), 
    (r'\\(?:bar|widehat|overparen|wideparen) ?(?=\{ ?\d)', r'\\overline'),
    (r'(?<![\d)])(\d*\.\d*) ?\((\d+)\)(?![\d^!])', r'\1\\overline{\2}'),  # 0.(27)
    (r'\\overline ?\{ ?([A-Z]{2}) ?\}', r'\1'),  # a segment
    (r'(?<=\d) +([kM]?) ?\\Omega(?![A-Za-z])', r' \1Ω'),
    (r'(?i)(?<=[\d)]) factorial(?![a-z])', '!'),
    (r'\( ?(\d[\dA-F]*) ?\) ?(?=_)', r'\1'),  # (1101)_2
    (r'(?<=\d) ?_ ?\{ ?(two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen) ?\}',
     lambda m: f'_{{{number_of(m[1])}}}'),
    (r'\( ?\\?[pb]?mod(?:ulo)?(?![A-Za-z]) ?(?:\{([^{}]*)\}|(\w+)) ?\)|'
     r'\\?(?<![A-Za-z])[pb]?mod(?:ulo)?(?![A-Za-z]) ?(?:\{([^{}]*)\}|(\w+))',
     lambda m: f' (mod {next(filter(None, m.groups()), "")})'),
    (r'^ ?([A-Za-z]) *\(mod (\w+)\) ?= ?([^=]+)$', r'\1≡\3 (mod \2)'),  # x mod 7 = 3
    (r'(≡[^\[\]]*)\[ ?(\w+) ?\]$', r'\1 (mod \2)'),
    (r'(?<!\d)(\d+\.\d*?)(\d{1,6}?)\2{2,} ?(?:⋯|\.\.\.)', r'\1\\overline{\2}'),
    (r'\.{3,}|。{3,}', '⋯'),
    (r'^\*\*(.+)\*\*$', r'\1'),  # bold type
    (r'^([\[\]])([^\[\]]*[,;][^\[\]]*)([\[\]])$', lambda m: '[('[m[1] == ']'] + m[2] + '])'[m[3] == '[']),  # ]0, 1[ is (0, 1)
    (r'\*\*', '^'), (r'<=', '≤'), (r'>=', '≥'), (r'!=', '≠'), (r'\+/?-', '±'),
    (r'\b(sin|cos|tan) ?\^ ?(?:-1|\{ ?-1 ?\})', r'arc\1'), (r'(?<![A-Za-z])sqrt(?![A-Za-z])', '√'),
    (r'(?<![A-Za-z])pi(?![A-Za-z])', 'π'), (r'(?<![A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])', '∞'),
    (r'\s+', ' '), (r' ?,? ?(?<![A-Za-z])or(?![a-z])', '∨'), (r' ?,? ?(?<![A-Za-z])and(?![A-Za-z])', ','),
    (r'(?i)^ *(?:(?:the )?(?:final )?answer(?: is)?|so|thus|therefore|hence)\b[:, ]*', ''),
    (r'^ ?≈', ''), (r'^ ?0(?=\d ?: ?[0-5]\d(?!\d))', ''),  # 05:00
    (r'(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)', lambda m: m[0].replace(' ', '')),  # 1 000
    (r'(?<!\d)(\d*)\.(\d*) ?\\overline ?\{ ?(\d+) ?\}',
     lambda m: f"(({m[1]}{m[2]}{m[3]}-{m[1]}{m[2] or '0' * (not m[1])})"
               f"/{'9' * len(m[3])}{'0' * len(m[2])})"),
    (r'(?<![\w.})^])(\d+) (\d+) ?/ ?(\d+)(?![\w.])', _mixed),
    (r'(?<![\w.})^])(\d+) ?\\frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))', _mixed),
)]


def _bounded(text):
    if len(text) > LONGEST:
        raise ValueError(f'an answer of more than {LONGEST} characters')
    return text


def _plain(text):
    """text with one spelling for what LaTeX, Unicode and ASCII write differently: operators as single characters."""
    _bounded(text)
    text = ''.join(c for c in text if unicodedata.category(c) != 'Cf').split('####')[-1].strip()
    boxed = re.match(r'[\s$]*\\(?:boxed|fbox) *\{', text)
    if boxed and _enclosed(inner := text[boxed.end() - 1:].rstrip(' .$')):
        text = inner[1:-1].strip()
    money = '\\$' in text or text.count('$') == 1 and text.lstrip('-')[:1] == '$'
    if money:
        text = re.sub(r'\\text\{ ?\\\$ ?\}', '¤', text).replace('\\$', '¤')
        text = text.replace('$', '¤') if '¤' not in text else text
    words = re.sub(FONTS, r' \1 ', text[:200]).strip(' .$')
    if re.fullmatch(r'[A-Za-z][A-Za-z -]*', words) and (value := number_of(words)) is not None:
        return str(value)
    for pattern, new in BEFORE_NFKC:
        text = pattern.sub(new, text)
    text = _bounded(unicodedata.normalize('NFKC', text).translate(SIGNS))  # 1 character may be 18
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip(' ').rstrip(' .,;')


def _upright(text):
    """The words of up to three letters in \\text{} and the like: names or units, no products."""
    found = set()
    for font, inside in UPRIGHT.findall(text[:LONGEST]):
        words = re.findall(r'(?<![A-Za-z\\])[A-Za-z]{1,3}(?![A-Za-z])', inside)
        found.update(word for word in words
                     if font != 'mathrm' or not (len(word) == 2 and word.isupper()))  # a segment
    return found


# ---------------------------------------------------------------- scalars to sympy

RENAMED = {'ln': 'log', 'abs': 'Abs', 'ceil': 'ceiling', 'tg': 'tan', 'ctg': 'cot', 'cotg': 'cot',
           'cosec': 'csc', 'sen': 'sin', 'arcsen': 'asin',
           'arctg': 'atan', 'arcctg': 'acot', 'arcctan': 'acot'}
FUNCTIONS = {name: RENAMED.get(name, name.replace('arc', 'a')) for name in (
    'sin cos tan cot sec csc sinh cosh tanh ln log lg exp abs floor ceil arcsin arccos arctan '
    'asin acos atan tg ctg cotg cosec sen arctg arcctg arccot arcsec arccsc arcsen'.split())}
# Letters that stand for things in a row, where the order tells: tosses, numerals, results ...
CODES = [set(code) for code in ('HT', 'IVX', 'XL', 'XC', 'CD', 'CM', 'WLD', 'BG', 'MF', 'TF', 'YN',
                                'RGBWY', 'NSEW', 'LRUD')]
GREEK = set('alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon '
            'phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell'.split())
def _is_word(token, upright):
    """Is a run of two or three letters a word, in which they do not commute? SAS, IV, HT, III,
    and all that stood in \\text{}; but xyz is a product and AB a segment."""
    if token.isupper():
        return len(token) > 2 or token in upright or token[0] == token[1] or \
            any(code.issuperset(token) for code in CODES)
    return token in upright or 'ii' in token and set(token) <= set('ivx')


WORDS = re.compile(  # A to B; Mia: but a b and Ax are products
    r'(?=.*[A-Za-z]{2})[A-Za-z]+(?: [A-Za-z]+)+|(?=...)[A-Z][a-z]*[aeiouy][a-z]*'
    r'|iv|vi|ix|xi|xiv|xvi')
SPELLED = re.compile(r'[A-Z](?: [A-Z])+|[A-Z](?:-[A-Z])+')  # H T H, H-T-H
TOKEN = re.compile(r'\d+(?:\.\d*)?(?:[eE][+-]?\d+(?![\d.]))?|\.\d+|\\[A-Za-z]+|[A-Za-z]+|\S')
CLOSING = {'(': ')', '[': ']', '{': '}', '|': '|', '⌊': '⌋', '⌈': '⌉', '⟪': '⟫'}


class _Clock:
    """tick() raises TimeoutError once the call's time is over; every loop ticks, so that no signal is needed."""

    def __init__(self, *texts):
        self.end = time.perf_counter() + SECONDS
        self.upright = set().union(*map(_upright, texts))  # words that are no products

    def tick(self):
        if time.perf_counter() > self.end:
            raise TimeoutError(f'more than {SECONDS} s')


@functools.lru_cache(maxsize=1)
def _sympy():
    import mpmath
    import sympy
    for constant in (mpmath.libmp.libelefun.pi_fixed, mpmath.libmp.libelefun.ln2_fixed, mpmath.libmp.libelefun.e_fixed):
        constant(1 << 15)  # mpmath's cache of constants is not safe in threads while it grows: grow it once
    return sympy


def load():
    """Imports sympy, which takes a second, before a clock runs."""
    _sympy()


class _Parser:
    """Recursive descent from a scalar spelled by _plain to a sympy expression. Raises ValueError on all else.

    sum := product (('+'|'-') product)*;  product := power (('*'|'/'|':')? power)*
    power := atom ('!'|'°'|'%'|'^' atom)*;  atom := number, symbol, group, root, fraction or function
    Nodes are built with evaluate=False: sympy computes nothing, so that parsing is linear whatever the text holds.
    `prime` is appended to the name of every variable.
    """

    def __init__(self, text, clock, prime=''):
        self.sp, self.clock, self.prime, self.depth, self.bars, self.tokens = _sympy(), clock, prime, 0, 0, []
        if WORDS.fullmatch(text) and FUNCTIONS.keys().isdisjoint(text.split()):
            raise ValueError('words')
        letters = re.sub('[ -]', '', text) if SPELLED.fullmatch(text) else ''
        if letters and _is_word(letters, clock.upright) and (
                '-' not in text or len({*letters}) < len(letters)):  # A - B - C is a difference
            text = letters
        for m in TOKEN.finditer(text):
            token = m[0]
            if token.lstrip('\\') in FUNCTIONS and (
                    token not in ('tg', 'ctg') or re.match(r' ?[\w(\\^{√°]', text[m.end():])):
                self.tokens.append(token.lstrip('\\'))
            elif token.isascii() and token.isalpha():  # xy is x times y, but longer runs are words
                if len(token) > 3 or token.lower() in ('yes', 'no', 'odd', 'all'):
                    raise ValueError(f'a word: {token!r}')
                if len(token) > 1 and _is_word(token, clock.upright):
                    self.tokens.append(token)
                else:
                    self.tokens += token
            else:
                self.tokens.append(token)
        self.tokens.reverse()  # the next token is tokens[-1]

    def parse(self):
        tree = self.sum()
        if self.tokens:
            raise ValueError(f'unexpected {self.peek()!r}')
        return tree

    def peek(self):
        return self.tokens[-1] if self.tokens else ''

    def take(self, *wanted):
        """The next token if it is one of `wanted` (any, when none are given), else ''."""
        return self.tokens.pop() if self.tokens and (not wanted or self.tokens[-1] in wanted) else ''

    def node(self, name, *args):
        return args[0] if name in ('Add', 'Mul') and len(args) == 1 else getattr(self.sp, name)(*args, evaluate=False)

    def negative(self, tree):
        return self.node('Mul', self.sp.S.NegativeOne, tree)

    def inverse(self, tree):
        return self.node('Pow', tree, self.sp.S.NegativeOne)

    def sum(self, closing=None):
        terms = []
        while not terms or self.peek() in ('+', '-'):
            sign = 1
            while op := self.take('+', '-'):
                sign = -sign if op == '-' else sign
            terms.append(self.product() if sign > 0 else self.negative(self.product()))
        if closing and not self.take(closing):
            raise ValueError(f'no {closing!r} where {self.peek()!r} is')
        return self.node('Add', *terms)

    def product(self, argument=False):
        """argument: of a function without brackets, sin 2x cos y, which ends at operators, brackets and functions."""
        factors = [self.power()]
        while token := self.peek():
            if token in ('*', '/', ':') and not argument:
                self.take()
                minus = self.take('-')
                factor = self.power() if token == '*' else self.inverse(self.power())
                factors.append(self.negative(factor) if minus else factor)
            elif token[0] in '0123456789.' or argument and (token in FUNCTIONS or token == '('):
                break
            elif token[0].isalpha() or token[0] in '([{√⌊⌈⟪∞\\' or \
                    token == '|' and not self.bars:
                factors.append(self.power())
            else:
                break
        return self.node('Mul', *factors)

    def power(self):
        tree = self.atom()
        for _ in range(4):
            sign = self.take('!', '°', '%', '^')
            if sign == '^':
                tree = self.node('Pow', tree, self.exponent())
            elif sign == '!':
                tree = self.node('factorial', tree)
            elif sign:
                parts = (self.sp.pi, self.sp.Rational(1, 180)) if sign == '°' else (self.sp.Rational(1, 100),)
                tree = self.node('Mul', tree, *parts)
        return tree

    def exponent(self):
        minus = self.take('-')
        tree = self.atom(chained=True)
        return self.negative(tree) if minus else tree

    def atom(self, digit=False, chained=False):
        """digit: take no more than one digit, as TeX does in \\frac12; chained: a^b^c is a^(b^c)."""
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
            tree = self.node('Pow', tree, self.exponent())
        self.depth -= 1
        return tree

    def primary(self, token):
        if token[:1].isdigit() or token[:1] == '.' and len(token) > 1:
            if self.peek() == '_':  # 52_8, a numeral in base 8, equals only itself
                return self.sp.Symbol(token + self.subscript())
            if any(abs(int(power)) > 5000 for power in re.split('[eE]', token)[1:]):
                raise ValueError('an exponent too large')
            value = Fraction(token)
            return self.sp.Rational(value.numerator, value.denominator)
        if token == '⟪':
            return self.determinant()
        if token in CLOSING:
            self.bars += token == '|'
            tree = self.sum(CLOSING[token])
            self.bars -= token == '|'
            name = {'|': 'Abs', '⌊': 'floor', '⌈': 'ceiling'}.get(token)
            return self.node(name, tree) if name else tree
        if token == '√':
            index = self.sum(']') if self.take('[') else self.sp.Integer(2)
            return self.node('Pow', self.atom(), self.inverse(index))
        if token == '\\frac':
            return self.node('Mul', self.atom(digit=True), self.inverse(self.atom(digit=True)))
        if token == '\\binom':
            return self.node('binomial', self.atom(digit=True), self.atom(digit=True))
        if token in FUNCTIONS:
            return self.function(token)
        if token in ('π', 'e', 'i', '∞'):
            return {'π': self.sp.pi, 'e': self.sp.E, 'i': self.sp.I, '∞': self.sp.oo}[token]
        if token.isalpha() or token[1:] in GREEK:
            return self.sp.Symbol(token + self.subscript() + self.prime)
        raise ValueError(f"unexpected {token or 'end'!r}")

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
        terms = [self.node('Mul', x, self.minors([row[:i] + row[i + 1:] for row in rows[1:]]))
                 for i, x in enumerate(rows[0])]
        return self.node('Add', *(self.negative(t) if i % 2 else t for i, t in enumerate(terms)))

    def function(self, name):
        base = self.atom(digit=True) if self.take('_') else self.sp.Integer(10) if name == 'lg' else None
        power = self.exponent() if self.take('^') else None
        opening = self.take('(', '[', '{')
        inside = self.sum(CLOSING[opening]) if opening else self.product(argument=True)
        if name == 'exp':
            tree = self.node('Pow', self.sp.E, inside)
        else:
            tree = self.node('log' if name == 'lg' else FUNCTIONS[name], inside)
        if base is not None:
            tree = self.node('Mul', tree, self.inverse(self.node('log', base)))
        return tree if power is None else self.node('Pow', tree, power)


# ---------------------------------------------------------------- are two scalars equal?

_thread = threading.local()


class _Numbers:
    """Values of expressions at a point {symbol name: Fraction}: a Fraction where that is exact, else mpmath at `bits`.

    `height`: bits of the longest exact number met; `real`: complex values raise ValueError.
    """

    def __init__(self, bits, real, clock):
        if not hasattr(_thread, 'mp'):
            from mpmath import MPContext
            _thread.mp = MPContext()  # mpmath's own context is shared by all threads, precision included
        self.mp = _thread.mp
        self.mp.prec, self.real, self.clock, self.height, self.largest = bits, real, clock, 0, 0

    def inexact(self, x):
        return self.mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x

    def value(self, node, point):
        self.clock.tick()
        name = type(node).__name__
        if node.is_Rational:
            result = Fraction(int(node.p), int(node.q))
        elif node.is_Symbol:
            result = point[node.name]
        elif not node.args:
            result = getattr(self.mp, {'Pi': 'pi', 'Exp1': 'e', 'ImaginaryUnit': 'j', 'Infinity': 'inf'}[name]) * 1
        else:
            args = [self.value(arg, point) for arg in node.args]
            result = self.exact(name, args) if all(isinstance(x, Fraction) for x in args) else None
            if result is None:
                result = self.approximate(name, [self.inexact(x) for x in args], args)
        if isinstance(result, Fraction):
            self.bounded(result)
        else:
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
            if abs(y) * max(x.numerator.bit_length(), x.denominator.bit_length()) > BITS and abs(x) not in (0, 1):
                raise ValueError('a power of too many digits')
            return x ** int(y)
        if name in ('floor', 'ceiling', 'Abs'):
            return Fraction({'floor': math.floor, 'ceiling': math.ceil, 'Abs': abs}[name](x))
        if name in ('factorial', 'binomial'):
            if x.denominator != 1 or y.denominator != 1 or x < 0 or y < 0 or x > 4000:
                raise ValueError('factorial or binomial of what is not a small natural number')
            return Fraction(math.factorial(int(x)) if name == 'factorial' else math.comb(int(x), int(y)))
        return None

    def approximate(self, name, args, given):
        mp, x = self.mp, args[0]
        if name != 'Mul' and any(map(mp.isinf, args)):
            raise ValueError('arithmetic with infinity')
        if name == 'Add':
            return mp.fsum(args)
        if name == 'Mul':
            return mp.fprod(args)
        if name == 'Pow':
            if isinstance(given[1], Fraction) and given[1].denominator == 1 and abs(given[1]) < 10 ** 6:
                return x ** int(given[1])
            if x == 0:
                if mp.re(args[1]) <= 0:
                    raise ZeroDivisionError
                return x
            if not abs(args[1] * mp.log(x)) < 1 << 32:
                raise ValueError('a power too large')
            return x ** args[1]
        if not abs(x) < 1 << 64:
            raise ValueError('an argument too large')
        if name in ('floor', 'ceiling'):
            near = mp.nint(x)  # floor(sqrt(4)) must not depend on the last bit
            if abs(x - near) < mp.ldexp(1, -mp.prec // 2):
                return near
            return mp.floor(x) if name == 'floor' else mp.ceil(x)
        if name in ('factorial', 'binomial'):
            raise ValueError(f'{name} of what is not a small natural number')
        return getattr(mp, {'Abs': 'fabs'}.get(name, name))(x)


def _same_value(a, b, point, real, deep, clock):
    """Exactly for rationals. Else the difference must vanish at 256 bits and, if deep, go on vanishing at 1,024 bits
    and more, beyond all the digits in the expressions: so e^-1000 is not e^-1001, nor sqrt(2) the same + 10^-500."""
    gaps, bits = [], 256
    while len(gaps) < 1 + deep:
        numbers = _Numbers(bits, real, clock)
        x, y = numbers.value(a, point), numbers.value(b, point)
        if isinstance(x, Fraction) and isinstance(y, Fraction) or numbers.mp.isinf(x) or numbers.mp.isinf(y):
            return x == y
        x, y = numbers.inexact(x), numbers.inexact(y)
        gaps.append(abs(x - y))
        if not gaps[0] <= numbers.mp.ldexp(max(abs(x), abs(y), numbers.largest), -100):
            return False
        magnitude = max(0, numbers.mp.mag(numbers.largest)) if numbers.largest else 0
        if max(numbers.height, magnitude) > 8192:
            raise ValueError('too many digits')
        bits = 1024 + 2 * numbers.height + magnitude
    scale = max(abs(x), abs(y), numbers.largest if gaps[0] else 0)
    return not deep or gaps[1] == 0 or bool(gaps[1] <= numbers.mp.ldexp(scale, 200 - numbers.mp.prec) and
                                            (gaps[0] == 0 or gaps[1] <= numbers.mp.ldexp(gaps[0], -300)))


def _equal(a, b, clock):
    """True when a and b agree at several points: where both are real, or, where that is too seldom, at any."""
    names = sorted({s.name for s in a.free_symbols | b.free_symbols})
    sp = _sympy()
    natural = {s.name for x in (a, b) for f in x.atoms(sp.factorial, sp.binomial) for s in f.free_symbols}  # n! is n (n-1)!
    imaginary = a.has(sp.I) or b.has(sp.I)
    for real in (False,) if imaginary or not names else (True, False):
        agreeing = 0
        for k, scale in enumerate((1, 1, -1, 1, 30, -30, 90) if names else (1,)):  # at k = 3 the signs are mixed
            point = {n: Fraction(100_003 + (k * 1_299_709 + i * 611_953 + 7919) % 3_900_007, 10 ** 6) *
                     scale * (-1) ** (k == 3 and i) for i, n in enumerate(names)}
            point.update({n: Fraction(4 + 2 * k + 3 * i) for i, n in enumerate(names) if n in natural})
            try:
                if not _same_value(a, b, point, real, not agreeing, clock):
                    return False
                agreeing += 1
            except (ValueError, ArithmeticError):
                continue  # outside the domain
        if agreeing >= (5 if natural else min(2, 1 + len(names))):
            return True
    return False


def _proportional(sides, others, clock):
    """Sign of the constant c in l - r = c (L - R), for two pairs of sides as text; 0 when there is none."""
    def difference(pair, prime):
        left, right = (_Parser(side, clock, prime).parse() for side in pair)
        return sp.Add(left, sp.Mul(-1, right, evaluate=False), evaluate=False)

    sp = _sympy()
    f, g, f2, g2 = (difference(pair, prime) for prime in ('', "'") for pair in (sides, others))
    if any(_equal(h, sp.S.Zero, clock) for h in (f, g)) or not _equal(
            sp.Mul(f, g2, evaluate=False), sp.Mul(f2, g, evaluate=False), clock):
        return 0
    numbers = _Numbers(256, True, clock)
    point = {s.name: Fraction(11, 7) + i for i, s in enumerate(sorted(f.free_symbols | g.free_symbols, key=str))}
    return 1 if numbers.value(f, point) * numbers.value(g, point) > 0 else -1


# ---------------------------------------------------------------- structure

NAMED = r"[A-Za-zα-ορ-ω∠△|:/(),'\s\\{}]*"
NAME = re.compile(NAMED + '[A-Za-zα-ορ-ω]' + NAMED)
ABSOLUTE = re.compile(r'\| ?([A-Za-z]) ?(?:([+-])([^|A-Za-z]+))?\|')  # |x - 3|
FLIP = {'<': '>', '>': '<', '≤': '≥', '≥': '≤', '≠': '≠'}
THOUSANDS = re.compile(r'(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)')


DEPTH = {**dict.fromkeys('([{⦃⟦⌊⌈⟪⟬', 1), **dict.fromkeys(')]}⦄⟧⌋⌉⟫⟭', -1)}


def _depths(text):
    """How many brackets are open after each character."""
    return list(itertools.accumulate(DEPTH.get(c, 0) for c in text))


def _enclosed(text):
    """True when the first bracket closes at the very end."""
    return text[-1:] in list(')]}⦄⟧⟭') and 0 not in _depths(text[:-1])


def _split(text, separators):
    """[piece, separator, piece, ...], cut at the separators outside of all brackets."""
    pieces = ['']
    for c, depth in zip(text, _depths(text)):
        if depth == 0 and c in separators:
            pieces += [c, '']
        else:
            pieces[-1] += c
    return [piece.strip() for piece in pieces]


def _name(side):
    """x_1, f(2), |AB|, (p,q), V_1:V_2 -> the name without the arguments' letters; None when side is not a mere name."""
    bare = re.sub(r'_(?:\{[^{}]*\}|\w)|(?<=[A-Za-z])\([^()]*\)', '', side)
    return re.sub(r'\([a-z]\)$|\s', '', side) if NAME.fullmatch(bare) else None


def _read(text, clock, depth=0):
    """An answer as a tuple: ('scalar', tree, Words or None, text if a numeral, text), ('list' or
    'set' or 'union', items), ('tuple', brackets, items), ('matrix', rows), ('eq', name, sides,
    texts), ('rel', operators, texts, interval, name), ('mod', name, residue, modulus), ('approx',
    exact, rounded), ('given', main, letter, domain, text), ('cases', rows), or, where nothing else
    can be read, ('text', words)."""
    clock.tick()
    try:
        if depth > DEEPEST or not text:
            raise ValueError('empty, or nested too deep')
        return _structure(text, clock, depth + 1)
    except (ValueError, ArithmeticError):
        return 'text', ' '.join(re.sub(r'\{ ?(\w) ?\}', r'\1', text.strip(" .,'\"()")).casefold().split())


GIVEN = [(re.compile(pattern), domain) for pattern, domain in (  # x = 3k, k ∈ ℤ
    (r'(.*[^,; ])(?:[,;]| ?\(|(?= ?(?:where|for|with|when)\b)) ?(?:where |for |with |when )?'
     r'(?:all |any |some |every |each )?(?:integers? )?([A-Za-z]) ?∈ ?([^,;]+?) ?\)?', None),
    (r'(.*[^,; ])(?:[,;]| ?\(| (?=where|for|with|when)) ?(?:where |for |with |when )?'
     r'(?:([A-Za-z]) (?:is )?)?(?:all |any |an? |some |every )?(?:arbitrary )?integers?'
     r'(?: ([A-Za-z]))? ?\)?', '\\mathbb{Z}'))]
SETS = {'Z': '\\mathbb{Z}', 'N': '\\mathbb{N}', 'Q': '\\mathbb{Q}', 'R': '(-∞,∞)',
        'C': '\\mathbb{C}'}
VARIABLES = re.compile(r'(?<![A-Za-z\\])[A-Za-z]{1,3}(?![A-Za-z])')


def _given(text, clock, depth):
    """'x = 3k, k ∈ ℤ' -> ('given', 'x = 3k' as read, 'k', 'ℤ', 'x = 3k'); None where the text
    does not end in such a condition on a letter of it."""
    if '∈' not in text and 'integer' not in text:
        return None
    for pattern, domain in GIVEN:
        if m := pattern.fullmatch(text):
            main, letter = m[1].strip(), m[2] or domain and m[3]
            where = domain or m[3].replace(' ', '')
            letters = {c for run in VARIABLES.findall(main) if run not in FUNCTIONS for c in run}
            if letter in letters and _depths(main)[-1] == 0:
                return 'given', _read(main, clock, depth), letter, SETS.get(where, where), main
    return None


def _congruence(text, clock):
    """'x ≡ 3 (mod 7)' -> ('mod', 'x', 3, 7), a list of such for several residues; None for
    other texts."""
    m = re.fullmatch(r'(.*\S) ?\(mod ([^()]+)\)', text)
    if not m or '(mod' in m[1]:
        return None
    modulus, name, items = _Parser(m[2], clock).parse(), None, []
    for item in _split(m[1], '∨,')[::2]:
        sides = _split(item, '≡=')[::2]
        if len(sides) > 2 or len(sides) == 2 and not _name(sides[0]):
            raise ValueError('a congruence that is not solved')
        name = _name(sides[0]) if len(sides) == 2 else name
        items.append(('mod', name, _Parser(sides[-1], clock).parse(), modulus))
    return ('list', items) if len(items) > 1 else items[0]


def _all_of(items, clock):
    """x > 1, x < 5, as _read gives them -> 1 < x < 5; where nothing is in all, what is in any."""
    numbers = _Numbers(256, True, clock)

    def end(tree):
        if tree[0] != 'scalar' or tree[1].free_symbols:
            raise ValueError('an end that is no number')
        return numbers.inexact(numbers.value(tree[1], {}))

    parts, every = None, []
    for item in items:
        intervals = item[3][1] if item[3][0] == 'union' else [item[3]]
        every += intervals
        both = []
        for one, other in itertools.product(parts or intervals, intervals if parts else [None]):
            if other:
                (low, a), (high, b) = ((x[2], x[1]) for x in (one, other))
                (low, a) = max(((one[2][0], one[1][0]), (other[2][0], other[1][0])),
                               key=lambda x: (end(x[0]), x[1] == '('))
                (high, b) = min(((one[2][1], one[1][1]), (other[2][1], other[1][1])),
                                key=lambda x: (end(x[0]), x[1] == ']'))
                if not (end(low) < end(high) or end(low) == end(high) and a + b == '[]'):
                    continue
                one = 'tuple', a + b, [low, high]
            both.append(one)
        parts = both
        if not parts or len(parts) > 20:
            break
    parts = parts or every
    interval = parts[0] if len(parts) == 1 else ('union', sorted(parts, key=lambda x: end(x[2][0])))
    return 'rel', [], [], interval, items[0][4]


def _cases(text, clock, depth):
    """'x & x > 0 ⏎ -x & x ≤ 0' -> ('cases', [(value, condition), ...]); a system of equations
    is the list of them."""
    rows = [[cell.strip(' ,;.') for cell in _split(row, '&')[::2]]
            for row in _split(text, '⏎')[::2] if row]
    rows = [[''.join(row)] if len(row) == 2 and row[1][:1] in tuple('=<>≤≥') else row
            for row in rows]
    if not 1 <= len(rows) <= 20 or len({len(row) for row in rows}) > 1 or len(rows[0]) > 2:
        raise ValueError('neither cases nor a system')
    if len(rows[0]) == 1:
        return _read(', '.join(row[0] for row in rows), clock, depth)
    return 'cases', [(_read(value, clock, depth),
                      _read(re.sub(r'^(?:if|when|for|where)\b ?', '', condition), clock, depth))
                     for value, condition in rows]


def _structure(text, clock, depth):
    if '⟬' in text:
        if text[0] == '⟬' and _enclosed(text):
            return _cases(text[1:-1], clock, depth)
        if text[0] == '(' and _enclosed(text):
            return _read(text[1:-1].strip(), clock, depth)
    if given := _given(text, clock, depth):
        return given
    if said := compound(text):
        value, words = said
        tree = _sympy().Rational(value.numerator, value.denominator)
        return _scalar(tree, words, '', text)
    if '(mod' in text and (congruence := _congruence(text, clock)):
        return congruence
    for separators in (';', '∨,'):
        pieces = _split(text, separators)
        texts = pieces[::2] if separators == ';' else [t for piece in pieces[::2] for t in _signs(piece)]
        if len(texts) > 1:
            items = [_read(t, clock, depth) for t in texts]
            if separators == ';':
                items = [('tuple', '()', item[1]) if item[0] == 'list' else item for item in items]
            if all(item[0] == 'rel' and item[3] for item in items):
                if '∨' in pieces:
                    return 'union', [item[3] for item in items]
                if len({item[4] for item in items}) == 1 and len(items) < 13:
                    try:
                        return _all_of(items, clock)
                    except (ValueError, ArithmeticError):
                        pass  # ends that are no numbers
            return 'list', items
    pieces = _split(text, '=≈<>≤≥≠∈')
    if len(pieces) > 1:
        return _relation(pieces[::2], pieces[1::2], clock, depth)
    pieces = _split(text, '∪')
    if len(pieces) > 1:
        return 'union', [_read(t, clock, depth) for t in pieces[::2]]
    pieces = _split(text, '∩')
    if len(pieces) > 1:
        sets = [_read(t, clock, depth) for t in pieces[::2]]
        parts = [part for item in sets for part in (item[1] if item[0] == 'union' else [item])]
        if {(part[0], len(part[-1])) for part in parts} == {('tuple', 2)}:
            return _all_of([('rel', [], [], item, None) for item in sets], clock)
    pieces = _split(text, '∖')
    if len(pieces) == 3 and pieces[0] == '(-∞,∞)':
        points = _read(pieces[2], clock, depth)
        return _without(points[1] if points[0] == 'set' else [points], clock)
    if text[0] in '([{⦃⟦' and _enclosed(text):
        inner = text[1:-1].strip()
        if text[0] == '⟦':
            rows = [_split(row, '&')[::2] for row in _split(inner, '⏎')[::2] if row]
            return 'matrix', [[_read(cell, clock, depth) for cell in row] for row in rows]
        given = re.fullmatch(r'([^|:]+?) ?[|:] ?([A-Za-z] ?∈ ?[^|:]+)', inner)
        if text[0] == '⦃' and given and (given := _given(f'{given[1]},{given[2]}', clock, depth)):
            return given  # {3k | k ∈ ℤ}
        builder = re.fullmatch(r'[A-Za-z](?: ?∈ ?\(-∞,∞\))? ?[|:](.*[=<>≤≥≠].*)', inner) if text[0] == '⦃' else None
        if builder:  # {x | x > 1}
            return _read(builder[1].strip(), clock, depth)
        pieces = _split(inner, ',;')[::2]
        if text[0] in '⦃{' and (len(pieces) > 1 or text[0] == '⦃'):
            inside = _read(inner, clock, depth) if inner else ('list', [])
            return 'set', inside[1] if inside[0] == 'list' else [inside]
        if len(pieces) > 1:
            return 'tuple', text[0] + text[-1], [_read(t, clock, depth) for t in pieces]
        if text[0] in '{(' or inner[:1] == '⟦':
            return _read(inner, clock, depth)
    if '⟦' in text:
        return 'matrix', [[_scalar(cell) for cell in row] for row in _matrix(text, clock)]
    if (number := number_of(text)) is not None:
        return _scalar(_sympy().Rational(number.numerator, number.denominator))
    pieces = _split(text, ':')
    if len(pieces) > 3:  # 1:2:3
        first, *others = (_Parser(t, clock).parse() for t in pieces[::2])
        inverse = _sympy().Pow(first, -1, evaluate=False)
        return 'tuple', '::', [_scalar(_sympy().Mul(x, inverse, evaluate=False)) for x in others]
    text, head, words = _in_digits(text), text, None
    if not re.search(r'(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc|c?tg) ?[^A-Za-z]*°', text):
        head, words = split_words(text, clock.upright, FUNCTIONS)
    return _quantity(head, words, text, clock)


def _quantity(head, words, text, clock):
    """A text as a scalar, once it is split into what is computed and the words after it."""
    tree = _Parser(head, clock).parse()
    if words and words.scale != 1:
        scale = _sympy().Rational(words.scale.numerator, words.scale.denominator)
        tree = _sympy().Mul(scale, tree, evaluate=False)
    if words and words.power > 1:
        tree = _sympy().Pow(tree, words.power, evaluate=False)
    return _scalar(tree, words, head if re.fullmatch(r'-?\d*\.?\d+', head) else '', text)


def _in_digits(text):
    """'twenty dollars' -> '20 dollars'; 'five apples' stays: only before units."""
    words = text.split(' ')
    for n in range(min(8, len(words) - 1), 0, -1) if text[:1].isalpha() else ():
        if (number := number_of(' '.join(words[:n]))) is not None:
            spelled = f'({number}) ' + ' '.join(words[n:])
            said = split_words(spelled, functions=FUNCTIONS)[1]
            return spelled if said and said.units and not said.nouns else text
    return text


def _scalar(tree, words=None, numeral='', text=''):
    return 'scalar', tree, words, numeral, text


def _matrix(text, clock):
    """A sum of products of numbers and matrices -> rows of expressions."""
    sp, total, sign = _sympy(), None, 1
    add, mul = (lambda *xs: sp.Add(*xs, evaluate=False)), (lambda *xs: sp.Mul(*xs, evaluate=False))
    for i, term in enumerate(_split(text, '+-')):
        if i % 2:
            sign = -1 if term == '-' else 1
            continue
        if not term and i == 0:
            continue  # -2⟦...⟧
        scalars, factors = [sp.Integer(sign)], []
        for part in re.split('(⟦[^⟦⟧]*⟧)', term):
            power = re.fullmatch(r' ?\^ ?\{? ?([23T]|\\top) ?\}?[ *]*', part)
            if part[:1] == '⟦':
                factors.append([[_Parser(cell, clock).parse() for cell in _split(row, '&')[::2]]
                                for row in _split(part[1:-1], '⏎')[::2] if row.strip()])
                if len({len(row) for row in factors[-1]}) != 1:
                    raise ValueError('rows of different lengths')
            elif power and factors and power[1] in '23':
                factors += [factors[-1]] * (int(power[1]) - 1)
            elif power and factors:
                factors[-1] = [list(column) for column in zip(*factors[-1])]
            elif part.strip(' *'):
                scalars.append(_Parser(('1' if part.strip()[0] == '/' else '') + part.strip(' *'), clock).parse())
        if not 1 <= len(factors) <= 4:
            raise ValueError('no matrix, or too many, in a product')
        product = factors[0]
        for factor in factors[1:]:
            if len(product[0]) != len(factor):
                raise ValueError('a product of matrices that do not fit')
            product = [[add(*[mul(a, b) for a, b in zip(row, column)]) for column in zip(*factor)] for row in product]
        product = [[mul(*scalars, cell) for cell in row] for row in product]
        if total and (len(total), len(total[0])) != (len(product), len(product[0])):
            raise ValueError('a sum of matrices that do not fit')
        total = [[add(a, b) for a, b in zip(*rows)] for rows in zip(total, product)] if total else product
    return total


def _without(points, clock):
    """The real numbers but for some points, as a union of intervals."""
    if not points or any(point[0] != 'scalar' or point[1].free_symbols for point in points):
        raise ValueError('points that are no numbers')
    numbers = _Numbers(256, True, clock)
    points = sorted(points, key=lambda point: numbers.inexact(numbers.value(point[1], {})))
    ends = [_read('-∞', clock), *points, _read('∞', clock)]
    return 'union', [('tuple', '()', list(pair)) for pair in itertools.pairwise(ends)]


def _signs(text):
    """'1 ± 2' -> '1 + 2', '1 - 2'; a set keeps its own."""
    if not ('±' in text or '∓' in text) or text[0] in '⦃{' and _enclosed(text):
        return [text]
    return [text.translate(str.maketrans('±∓', signs)) for signs in ('+-', '-+')]


def _relation(sides, ops, clock, depth):
    if '∈' in ops:
        if len(ops) > 1:
            raise ValueError('a chain through ∈')
        return _read(sides[1], clock, depth)
    if set(ops) <= {'=', '≈'}:
        if '≈' in ops:
            k = ops.index('≈')
            if k == 0 and _name(sides[0]):  # x ≈ 11
                sides = sides[:2]
            else:
                exact = _read(sides[0], clock, depth) if k == 0 else \
                    _relation(sides[:k + 1], ops[:k], clock, depth)
                rounded = [side.rstrip('⋯') for side in sides[k + 1:]]
                return 'approx', exact, [_read(side, clock, depth) for side in rounded]
        if _name(sides[-1]) and not _name(sides[0]):
            sides = sides[::-1]
        name = _name(sides[0])
        return 'eq', name, [_read(s, clock, depth) for s in sides[bool(name):]], (sides[0], sides[-1])
    if ops[0] in '>≥':
        sides, ops = sides[::-1], [FLIP.get(op, '') for op in ops[::-1]]
    name = interval = None
    distance = next(filter(None, map(ABSOLUTE.fullmatch, sides[:2])), None)
    if ops == ['≠'] and _name(sides[0]):
        try:
            name, interval = _name(sides[0]), _without([_read(sides[1], clock, depth)], clock)
        except (ValueError, ArithmeticError):
            pass  # x ≠ y
    elif distance and set(ops) <= {'<', '≤'} and len(ops) <= 1 + (sides[1] == distance[0]):  # |x - 3| < 2, 2 < |x - 3|, 1 < |x - 3| < 2
        name, center, at = distance[1], f'({distance[3]})' if distance[3] else '0', sides.index(distance[0])
        end = lambda sign, side: _read(f"{'-' * (distance[2] == '+')}{center}{sign}({side})", clock, depth)  # noqa: E731
        below, above = ('<≤'.index(op) for op in (ops[0] if at else '<', ops[-1] if at < len(ops) else '<'))
        inner, outer = sides[0] if at else None, sides[-1] if at < len(ops) else '∞'
        if inner is None:
            interval = 'tuple', '(['[above] + ')]'[above], [end('-', outer), end('+', outer)]
        else:
            low, high = (_read(f'{sign}∞', clock, depth) if outer == '∞' else end(sign or '+', outer) for sign in ('-', ''))
            interval = 'union', [('tuple', '(['[above] + ')]'[below], [low, end('-', inner)]),
                                 ('tuple', '(['[below] + ')]'[above], [end('+', inner), high])]
    elif set(ops) <= {'<', '≤'} and len(sides) < 4:
        bounded = [*sides, '∞'] if len(sides) == 2 and _name(sides[1]) else ['-∞', *sides][-3:]
        low, name, high = bounded[0], _name(bounded[1]), bounded[2]
        brackets = ('[' if ops[0] == '≤' and low != '-∞' else '(') + (']' if ops[-1] == '≤' and high != '∞' else ')')
        interval = name and ('tuple', brackets, [_read(low, clock, depth), _read(high, clock, depth)])
    return 'rel', ops, sides, interval, name


# ---------------------------------------------------------------- are two answers the same?

def _same(g, p, clock):
    """Is the answer p the same as the gold g? Both as _read returns them."""
    clock.tick()
    kinds = {g[0], p[0]}
    if 'approx' in kinds:
        return _same_rounded(g, p, clock)
    if 'given' in kinds:
        return _same_given(g, p, clock)
    if kinds == {'mod'}:
        return _same_congruence(g, p, clock)
    if kinds == {'cases'}:
        return len(g[1]) == len(p[1]) and all(any(
            _same(a, c, clock) and _same(b, d, clock) for c, d in p[1]) for a, b in g[1])
    if 'eq' in kinds:
        return _same_equation(g, p, clock)
    if kinds == {'rel'}:
        return _same_relation(g, p, clock)
    if 'rel' in kinds:
        g, p = (x[3] if x[0] == 'rel' else x for x in (g, p))
        return bool(g and p) and _same(g, p, clock)
    if kinds == {'scalar'}:
        return _same_scalar(g, p, clock)
    if kinds == {'text'}:
        return g[1] == p[1]
    if kinds == {'matrix'}:
        return [len(r) for r in g[1]] == [len(r) for r in p[1]] and all(
            _same(a, b, clock) for r, s in zip(g[1], p[1]) for a, b in zip(r, s))
    if kinds == {'matrix', 'tuple'}:  # a vector
        rows, items = (g[1], p[-1]) if g[0] == 'matrix' else (p[1], g[-1])
        rows = [cell for row in rows for cell in row] if min(len(rows), max(map(len, rows))) == 1 else []
        return _same_ordered(rows, items, clock)
    if kinds == {'tuple'}:
        return (g[1] == p[1] or len(g[2]) > 2) and _same_ordered(g[2], p[2], clock)
    if kinds == {'list', 'tuple'}:  # x = 3, y = 4 for (3, 4)
        return any(_distinct(x[-1]) for x in (g, p) if x[0] == 'list') and _same_ordered(_by_letter(g[-1]), _by_letter(p[-1]), clock)
    if kinds <= {'list', 'set'} or kinds == {'union'}:
        if _distinct(g[1]) != _distinct(p[1]):
            return _same_ordered(_by_letter(g[1]), _by_letter(p[1]), clock)
        return _same_unordered(g[1], p[1], 'set' in kinds or {x[0] for x in g[1]} == {'tuple'}, clock)
    if kinds == {'set', 'scalar'}:
        items, other = (g[1], p) if g[0] == 'set' else (p[1], g)
        return len(items) == 1 and _same(items[0], other, clock)
    return False


def _distinct(items):
    """True when every item is an equation with a name of its own, so that the order of bare values tells."""
    names = [item[1] for item in items if item[0] == 'eq' and item[1]]
    return len(set(names)) == len(items) > 1


def _by_letter(items):
    """y = 4, x = 3 as x = 3, y = 4, the order that bare values would have; other names than letters stay in theirs."""
    letters = [re.fullmatch(r'([A-Za-z])_?\{?(\d*)\}?', item[1]) for item in items] if _distinct(items) else [None]
    if not all(letters):
        return items
    return [item for _, item in sorted(zip(letters, items), key=lambda pair: (pair[0][1].lower(), int(pair[0][2] or 0)))]


def _same_ordered(g, p, clock):
    return len(g) == len(p) > 0 and all(_same(a, b, clock) for a, b in zip(g, p))


def _same_unordered(g, p, repeats, clock):
    """repeats: {1, 1, 2} is {1, 2}; else each item of p is matched once."""
    left = list(p)
    for a in g:
        match = next((i for i, b in enumerate(left) if _same(a, b, clock)), None)
        if match is None:
            return False
        if not repeats:
            del left[match]
    return all(any(_same(a, b, clock) for a in g) for b in left) if repeats else not left


def _same_equation(g, p, clock):
    if g[0] != p[0]:  # x = 5 for 5, and 2 + 3 = 5 for 5: every side must be right
        sides, other = (g[2], p) if g[0] == 'eq' else (p[2], g)
        return all(_same(other, side, clock) for side in sides)
    if g[1] == p[1] and all(_same(g[2][-1], side, clock) for side in p[2][:None if g[1] else 0] + p[2][-1:]):
        if g[1] or _same(g[2][0], p[2][0], clock):
            return True
    try:
        return len(g[2]) + bool(g[1]) == len(p[2]) + bool(p[1]) == 2 and _proportional(g[3], p[3], clock) != 0
    except (ValueError, ArithmeticError):
        return False


def _same_relation(g, p, clock):
    if g[3] and p[3] and _same(g[3], p[3], clock):
        return g[4] == p[4]
    try:
        sign = len(g[2]) == len(p[2]) == 2 and _proportional(g[2], p[2], clock)
        return bool(sign) and g[1][0] == (p[1][0] if sign > 0 else FLIP[p[1][0]])
    except (ValueError, ArithmeticError):
        return False


def _same_rounded(g, p, clock):
    """100/3 ≈ 33.3 is the same as its exact part, and as 33.3 where that is what it rounds to.
    But 41 ≈ 42 is neither."""
    if not all(_about(x, clock) for x in (g, p) if x[0] == 'approx'):
        return False
    if _same(*(x[1] if x[0] == 'approx' else x for x in (g, p)), clock):
        return True
    if g[0] == p[0]:
        return False
    (_, exact, rounded), other = (g, p) if g[0] == 'approx' else (p, g)
    exact, other = (x[2][-1] if x[0] == 'eq' else x for x in (exact, other))
    if {exact[0], other[0], *(r[0] for r in rounded)} != {'scalar'}:
        return False
    numeral, places = other[3], len(other[3].partition('.')[2])
    return ('.' in numeral or len(numeral.strip('-')) > 1) and any(
        _rounds_to(exact[1], r[3], clock) and len(r[3].partition('.')[2]) >= places and
        conversions(other[2], r[2]) for r in rounded) and bool(
        conversions(other[2], exact[2])) and _rounds_to(exact[1], numeral, clock)


def _about(approximation, clock):
    """False for 41 ≈ 42: where number and rounded number differ by a unit of the last place that
    is written, and by 2%."""
    _, exact, rounded = approximation
    exact = exact[2][-1] if exact[0] == 'eq' else exact
    for one in rounded:
        if exact[0] != 'scalar' or not one[0] == 'scalar' or not one[3]:
            continue
        if exact[1].free_symbols or conversions(exact[2], one[2])[:1] != [(1, 1, 0)]:
            continue
        try:
            numbers = _Numbers(256, True, clock)
            value = numbers.inexact(numbers.value(exact[1], {}))
            gap = abs(value - numbers.inexact(Fraction(one[3])))
        except (ValueError, ArithmeticError):
            continue
        place = Fraction(1, 10 ** len(one[3].partition('.')[2]))
        if gap >= numbers.inexact(place) and gap * 50 > abs(value):
            return False
    return True


def _rounds_to(tree, numeral, clock):
    """Is numeral, a text, what tree rounds to at as many places?"""
    if not numeral or tree.free_symbols:
        return False
    try:
        numbers, places = _Numbers(256, True, clock), len(numeral.partition('.')[2])
        gap = numbers.inexact(numbers.value(tree, {})) - numbers.inexact(Fraction(numeral))
        return bool(abs(gap) <= numbers.inexact(Fraction(1, 2 * 10 ** places)))
    except (ValueError, ArithmeticError):
        return False


def _same_given(g, p, clock):
    """x = 3k, k ∈ ℤ: the same but for the name of the letter, in the same domain."""
    if g[0] != p[0]:
        one, other = (g, p) if g[0] == 'given' else (p, g)
        integers = one[1][0] == 'rel' and one[3] != '(-∞,∞)'  # those between 1 and 5, not all
        return not integers and _same(one[1], other, clock)
    if g[3] != p[3]:
        return False
    if g[2] == p[2]:
        return _same(g[1], p[1], clock)
    runs = VARIABLES.findall(p[4])  # the letter is bound: 3n, n ∈ ℤ is 3k, k ∈ ℤ
    if any(g[2] in run for run in runs if run not in FUNCTIONS):
        return False
    renamed = VARIABLES.sub(
        lambda m: m[0] if m[0] in FUNCTIONS else m[0].replace(p[2], g[2]), p[4])
    return _same(g[1], _read(renamed, clock), clock)


def _same_congruence(g, p, clock):
    if g[1] and p[1] and g[1] != p[1] or not _equal(g[3], p[3], clock):
        return False
    if _equal(g[2], p[2], clock):
        return True
    trees = g[2], p[2], g[3]
    if not (g[1] or p[1]) or any(tree.free_symbols for tree in trees):
        return False
    a, b, m = (_Numbers(256, True, clock).value(tree, {}) for tree in trees)
    return all(isinstance(x, Fraction) for x in (a, b, m)) and m > 0 and (a - b) % m == 0


def _same_scalar(g, p, clock):
    if _same_quantity(g, p, clock):
        return True
    if bool(g[2]) == bool(p[2]):
        return False
    if (g[2] or p[2]).sure:  # 5 amperes, 3 dogs: then 5 A and 3 dog are no products either
        (_, _, _, _, text), other = (p, g) if g[2] else (g, p)
        short = {*re.findall(r'[A-Za-z]+', text)}
        head, words = split_words(text, short, FUNCTIONS) if short else (text, None)
        return words is not None and _same_quantity(
            other, _quantity(head, words, text, clock), clock)
    try:  # 5 N as the product that it may be too
        return _equal(*(x[1] if not x[2] else _Parser(x[4], clock).parse() for x in (g, p)), clock)
    except (ValueError, ArithmeticError):
        return False


def _same_quantity(g, p, clock):
    """Do two scalars agree in value, once their units are the same?"""
    sp, (_, a, one, numeral, _), (_, b, other, other_numeral, _) = _sympy(), g, p
    pairs, units = conversions(one, other), [words.units if words else {} for words in (one, other)]
    if not pairs:
        return False

    def times(tree, factor, pi=0):
        factor = sp.Rational(factor.numerator, factor.denominator)
        return sp.Mul(tree, factor, sp.Pow(sp.pi, pi), evaluate=False)

    for unit, factor, pi in (('percent', Fraction(1, 100), 0), ('degree', Fraction(1, 180), 1)):
        if {unit: 1} in units and {} in units:  # 28% is 0.28, and 28 too
            scaled = [times(x, factor, pi) if u else x for x, u in zip((a, b), units)]
            if _equal(*scaled, clock):
                return True
    for first, second, pi in pairs[:4]:
        if (first, second, pi) != (1, 1, 0):
            if _equal(times(a, first), times(b, second, pi), clock):
                return True
            continue
        if a.is_Symbol and b.is_Integer and a.name[0].isdigit():  # 52 for 52_8
            return a.name.split('_')[0] == str(b)
        if b.is_Symbol and a.is_Integer and b.name == f'{a}_10' or _equal(a, b, clock):
            return True
    decimal, exact = (numeral, b) if '.' in numeral else (other_numeral, a)
    if '.' in numeral and '.' in other_numeral or '.' not in decimal or \
            len(decimal.strip('-0.').replace('.', '')) < 10:
        return False
    return _rounds_to(exact, decimal, clock)  # ten digits or more, rounded right


def _one_number(text):
    """1,000 as 1000"""
    return THOUSANDS.sub(lambda m: m[0].replace(',', ''), text)


def _spellings(text):
    """An answer as _plain spells it, and then in other readings of its commas and segments."""
    plain = _plain(text)
    plains = [plain, _one_number(plain)]
    if any(',0' in number for number in THOUSANDS.findall(plain)):
        plains[0] = plains[1]  # 1,000 is no list of 1 and 000
    if reversed_ := re.sub(r'(\\overline\s*\{ ?)([A-Z])([A-Z])(?= ?\})', r'\1\3\2', text):
        plains += [_plain(reversed_)] if reversed_ != text else []
    return plains


LETTERED = re.compile(r'\(?([A-J])(?:\)|[.:] )(?! ?\(?[A-J]\)?$) ?(.+)')  # (B) 12, B. 12


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
    _sympy()  # its import is not on the clock
    clock = _Clock(gold, answer)
    try:
        golds, answers = (_spellings(text) for text in (gold, answer))
        if golds[0] and golds[0] == answers[0]:
            return True
        for texts, others, comma in ((golds, answers, r'-?0,\d{3,}'), (answers, golds, r'-?\d+,\d+')):
            if '.' in others[0] and re.fullmatch(comma, texts[1]):
                texts.append(texts[1].replace(',', '.'))  # a decimal comma; a gold 1,5 is two solutions
        times = [re.fullmatch(r'([1-5]?\d) ?: ?([0-5]\d)(?: ?[AaPp]\.?[Mm]\.?)?', texts[0]) for texts in (golds, answers)]
        if all(times) and times[0].groups() != times[1].groups():
            return False  # 3:30 and 1:10 are times rather than ratios
        for one, other in ((golds[0], answers[0]), (answers[0], golds[0])):
            letter, choice = re.fullmatch(r'\(?([A-J])\)?', one), LETTERED.fullmatch(other)
            if letter and choice and letter[1] == choice[1] and _read(choice[2], clock)[0] == 'scalar':  # (B) 12 for B
                return True
        return any(_same(g, p, clock) for g in [_read(text, clock) for text in dict.fromkeys(golds)]
                   for p in [_read(text, clock) for text in dict.fromkeys(answers)])
    except (ValueError, ArithmeticError, RecursionError):
        pass
    return False


def lists_equal(gold, answers):
    """Is `gold` a list or set, and are `answers`, a text each, its elements?

    Every one of the gold's and nothing else, in any order; repetitions count as one. TimeoutError
    as for math_equal.
    """
    load()
    clock = _Clock(gold, *answers[:100])
    try:
        g, *others = (_read(_one_number(_plain(text)), clock)
                      for text in [gold, *dict.fromkeys(answers)])
        if g[0] not in ('list', 'set') or len(g[1]) < 2 or not others:
            return False
        items = [item for other in others
                 for item in (other[1] if other[0] in ('list', 'set') else [other])]
        return _same((g[0], _unrepeated(g[1], clock)), ('list', _unrepeated(items, clock)), clock)
    except (ValueError, ArithmeticError, RecursionError):
        return False


def _unrepeated(items, clock):
    kept = []
    for item in items:
        if not any(_same(other, item, clock) for other in kept):
            kept.append(item)
    return kept


# ---------------------------------------------------------------- is an answer worked out?

FRACTION = re.compile(r'\\frac ?(\{[^{}]*\}|\d) ?(\{[^{}]*\}|\d)')
BINOMIAL = re.compile(r'\\binom ?(\{[^{}]*\}|\d) ?(\{[^{}]*\}|\d)')
NUMERAL = r'(?:\d+(?:\.\d*)?|\.\d+)'
NUMBER = re.compile(  # what is left of one once its braces are dropped
    rf'[-+]? ?(?:{NUMERAL}(?:[eE][+-]?\d+|_\d+| ?\* ?10 ?\^ ?-?\d+)?'
    r'|\(\d+\+\d+/\d+\)|\(\(\d+-\d+\)/9+0*\)|(?P<top>\d+) ?/ ?(?P<bottom>-?[1-9]\d*))')
NUMERALS = rf'[-+]? ?{NUMERAL}(?: ?, ?[-+]? ?{NUMERAL})*'
PAIR = rf'of ({NUMERAL}) ?, ?({NUMERAL})'
WORDED = [(re.compile(pattern), new) for pattern, new in (  # 6 times 7, the sum of 6 and 7
    (rf'product {PAIR}', r'\1*\2'), (rf'sum {PAIR}', r'\1+\2'), (rf'difference {PAIR}', r'\1-\2'),
    (r'(?<=[\d)}]) ?(?:times|multiplied by) ?(?=[\d({])', '*'),
    (r'(?<=[\d)}%]) of ?(?=[\d({])', '*'), (r'(?<=[\d)}]) ?divided by ?(?=[\d({])', '/'),
    (r'(?<=[\d)}]) ?plus ?(?=[\d({])', '+'), (r'(?<=[\d)}]) ?minus ?(?=[\d({])', '-'),
    (r'(?<=[\d)}]) ?squared', '^2'), (r'(?<=[\d)}]) ?cubed', '^3'),
    (r'square root of ?(?=\d)', '√'), (r'cube root of ?(?=\d)', '√[3]'),
    (r'√ ?\[ ?2 ?\]', '√'))]
PADDING = re.compile(  # what changes nothing: 1 * 6 * 7, 6 * 7 + 0, (6 * 7)^1
    r'(?<![\d.^_*/-])(?<![*/^_-] )1 ?\*|[*/^] ?(?:1|\{ ?1 ?\})(?![\d.^!_])'
    r'|[+-] ?0(?![\d.^!_]|\)/9)|(?<![\d.^_*/])0 ?\+')


def is_numeral(answer):
    """Is an answer a number that is worked out: an integer, a decimal, a fraction that is no
    integer, a mixed number, 1.2 * 10^6, a numeral in another base; with a unit or not?"""
    try:
        return any(_is_numeral(side) for side in _sides(_one_number(_plain(answer))))
    except ValueError:
        return False


def _is_numeral(side):
    head, words = split_words(side, functions=FUNCTIONS)
    m = NUMBER.fullmatch(_divided(head).replace('{', '').replace('}', '').strip())
    if not m or words and words.power != 1:
        return False
    return not m['top'] or int(m['top'][:300]) % int(m['bottom'][:300]) != 0


def _sides(text):
    """'x = 6 * 7 = 42' -> ['6 * 7', '42']: what an answer says, but for its name."""
    sides = _split(text, '=≈')[::2]
    return sides[1:] if len(sides) > 1 and _name(sides[0]) else sides


def _divided(text):
    """\\frac{a}{b} as a/b"""
    for _ in range(4):
        text = FRACTION.sub(r'\1/\2', text)
    return BINOMIAL.sub(r'\\binom{\1}{\2}', text)


def _tokens(text):
    """What an expression is written with, but for its brackets and the signs between factors."""
    text = _one_number(_divided(text))
    tokens, closed = [], False
    for token in TOKEN.findall(text):
        if token in '(){}[]⦃⦄⟦⟧':
            closed = True
            continue
        if token[0].isdigit() or token[0] == '.' and len(token) > 1:
            mantissa = re.match(NUMERAL, token)[0]
            token = token if len(token) > 40 else str(Fraction(mantissa)) + token[len(mantissa):]
            if closed and tokens and tokens[-1][0].isdigit() and tokens[-2:-1] != ['_']:
                tokens.append('*')  # (6)(7), but log_{2}{8}
        elif token.isalpha() and token.isascii() and len(token) < 4 and not unit_of(token):
            tokens += token[:-1]
            token = token[-1]
        elif token.isalpha() or token in '°%':
            token = unit_of(token) or token
        tokens.append(token)
        closed = False
    return [token for i, token in enumerate(tokens) if token != '*' or  # 2*π is 2π
            i and tokens[i - 1][0].isdigit() and tokens[i + 1:] and tokens[i + 1][0].isdigit()]


def echoes(gold, answer, prompt):
    """Is an answer only an expression that the prompt holds, and that is not worked out?

    True for 6 * 7 where the prompt asks for it and the gold is 42: whatever the spelling and order.
    Numerals, words and variables are no such expressions, nor is what the gold is written as; but
    1.45 is one where the gold is a fraction, and 2 hours where it is 120 minutes.
    """
    clock = _Clock(gold, answer)
    try:
        plain, plain_gold = (_worded(_plain(text)) for text in (answer, gold))
        golds = [plain_gold, *_sides(plain_gold), *_split(plain_gold.strip('⦃⦄'), ',;∨')[::2]]
        golds = [_unpadded(text) for text in golds]
        golds += [split_words(text, clock.upright, FUNCTIONS)[0] for text in golds]
        golds = [_tokens(text) for text in dict.fromkeys(golds)]
        asked = [_asked(side.lstrip('+ '), golds, clock)
                 for side in ([plain] if re.search('[<>≤≥≠∈]', plain) else _sides(plain))]
        if not all(asked):
            return False
        held = _held(prompt, clock)
        return all(_holds(held, tokens) for tokens in asked)
    except (ValueError, ArithmeticError, RecursionError):
        return False


def _worded(text):
    """'6 times 7' as 6*7"""
    for pattern, new in WORDED:
        text = pattern.sub(new, text)
    return text


def _unpadded(text):
    """Without 1 *, + 0 and the like."""
    return PADDING.sub('', _divided(text))


def _asked(side, golds, clock):
    """The tokens of what an answer says, where that may be a question; [] where it is none."""
    side = _unpadded(side)
    head, words = split_words(side, clock.upright, FUNCTIONS)
    number = re.fullmatch(NUMERALS, head.strip())
    tokens = _tokens(side if number else head)
    written = any(sorted(tokens) == sorted(gold) for gold in golds)
    if written or _read(side, clock)[0] == 'text':
        return []
    if number and not words:
        return tokens if '.' in side and any('/' in gold for gold in golds) else []
    if number and (words.scale, words.power) == (1, 1):  # the gold's numeral with a unit
        numeral = _tokens(head.strip(' -+'))
        return [] if any(numeral[0] in gold for gold in golds) else tokens
    return tokens if len(tokens) > 1 else []


def _holds(held, tokens):
    """Do some len(tokens) in a row of `held` hold the same, in any order?"""
    wanted, window = Counter(tokens), Counter(held[:len(tokens) - 1])
    for first, last in zip(held, held[len(tokens) - 1:]):
        window[last] += 1
        if window == wanted:
            return True
        window[first] -= 1
    return False


DRAWING = re.compile(r'\[asy\](?:(?!\[asy\]).)*?\[/asy\]', re.DOTALL)


def _held(prompt, clock):
    """The tokens of a prompt, of a long one those of its beginning and its end; in parts that
    overlap, so that one of them holds what another cuts."""
    prompt = DRAWING.sub(' ', prompt)
    if len(prompt) > 20_000:
        prompt = prompt[:10_000] + '\n' + prompt[-10_000:]
    tokens, length = [], LONGEST - 100
    for start in range(0, max(1, len(prompt) - 200), length - 200):
        clock.tick()
        try:
            part = prompt[start:start + length].replace('####', ' ')
            tokens += [*_tokens(_worded(_plain(part))), '\n']
        except ValueError:
            continue  # longer than that once it is spelled
    return tokens
