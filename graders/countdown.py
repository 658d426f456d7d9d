"""
What is the value of an expression that uses each of the given numbers once?

    countdown_value('(3 + 7) × 8 = 80', [3, 7, 8])     # Fraction(80, 1)
    countdown_value('3 + 7', [3, 7, 8])                # None: 8 is left over

An answer is first brought from LaTeX and Unicode to ASCII (SPELLINGS), then read by the grammar of
`Expression`. No text is evaluated as code, and values are exact.
"""
import re
from collections import Counter
from fractions import Fraction

from graders.maths import FONTS
from graders.rows import exact

# ---------------------------------------------------------------- expressions

CLOSING = {'(': ')', '[': ']', '{': '}'}


class Expression:
    """
    An expression over + - * / and brackets, computed while it is read:

        expr := term (('+' | '-') term)*
        term := atom (('*' | '/') atom)*
        atom := integer | '(' expr ')' | '[' expr ']' | '{' expr '}' | '\\frac' part part
        part := digit | '{' expr '}', as in TeX

    There are no signs, powers, decimals or juxtaposition. Every method takes what it reads from
    `tokens` and returns its value, a Fraction; it raises ValueError or ZeroDivisionError on
    anything else.
    """

    def __init__(self, text, numbers):
        tokens = re.findall(r'[0-9]+|\\frac|[^\s]', text)
        self.tokens = tokens[::-1]  # the next one is last, so that pop() takes it
        self.unused = Counter(str(n) for n in numbers)

    def value(self):
        """The value of the whole text, which uses every number."""
        value = self.expr()
        if self.tokens or any(self.unused.values()):
            raise ValueError('text or numbers left over')
        return value

    def take(self, *wanted):
        """The next token where it is one of those wanted, else None."""
        if self.tokens and self.tokens[-1] in wanted:
            return self.tokens.pop()
        return None

    def expr(self):
        value = self.term()
        while sign := self.take('+', '-'):
            if sign == '+':
                value = value + self.term()
            else:
                value = value - self.term()
        return value

    def term(self):
        value = self.atom()
        while sign := self.take('*', '/'):
            if sign == '*':
                value = value * self.atom()
            else:
                value = value / self.atom()
        return value

    def atom(self):
        if self.take('\\frac'):
            top = self.part()
            return top / self.part()
        if bracket := self.take(*CLOSING):
            value = self.expr()
            if not self.take(CLOSING[bracket]):
                raise ValueError('unbalanced bracket')
            return value
        return self.number()

    def number(self):
        token = self.tokens.pop() if self.tokens else ''
        if self.unused[token] <= 0:
            raise ValueError(f'{token!r} is not a number that is left to use')
        self.unused[token] -= 1
        return Fraction(int(token))

    def part(self):
        token = self.tokens[-1] if self.tokens else ''
        if not token.isdigit() and token != '{':
            raise ValueError(f'{token!r} is no part of a fraction')
        if len(token) > 1:  # \frac82 is 8 over 2
            self.tokens[-1:] = token[1:], token[0]
        return self.atom()


# ---------------------------------------------------------------- answers

SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    # LaTeX that only styles
    (FONTS, r' \1 '),
    (r'^\s+|\s+$', ''),
    (r'\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])', ''),

    # signs
    (r'\\[dtc]frac(?![A-Za-z])', r'\\frac'),
    (r'\\(?:times|cdot|ast|bullet)(?![A-Za-z])', '*'),
    (r'\\div(?![A-Za-z])|[÷∕⁄／]', '/'),
    (r'[×∗·⋅∙•✕✖⨯＊]', '*'),
    (r'[−–—‒‐‑﹣－]', '-'),
    ('＋', '+'),
    ('＝', '='),

    # brackets, white space, and the marks around mathematics
    (r'\\(?:lparen|lbrack)(?![A-Za-z])|（', '('),
    (r'\\(?:rparen|rbrack)(?![A-Za-z])|）', ')'),
    (r'\\q?quad(?![A-Za-z])|\\[,;:!> ]|~', ' '),
    (r'\\([{}])', r'\1'),
    (r'\\[()\[\]]|\$', ''),

    # **3 + 7** = 10, and x for times
    (r'^ ?(?:\*\*?|__|`)(.*?)(?:\*\*?|__|`)( ?(?:=.*)?)$', r'\1\2'),
    (r'(?<=[0-9)\]}]) ?[xX] ?(?=[0-9(\[{\\])', '*'),
)]


def countdown_value(answer, numbers):
    """The exact value (Fraction) of an answer, in ASCII, Unicode or LaTeX, that is an expression
    over numbers, each used once; else None.

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
        value = Expression(expression, numbers).value()
        if equals and exact(stated) != value:
            return None
    except (ValueError, ZeroDivisionError):
        return None
    return value
