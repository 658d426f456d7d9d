"""
What may the values of a data row be?

    exact('10.0')                        # Fraction(10, 1)
    is_tests([{'input': '1'}])           # False: no 'output'

A test is_...(value) says whether a value is of a form; NEEDS in rewards.py says which keys must be.
"""
import math
import re
from fractions import Fraction

# ---------------------------------------------------------------- numbers of a row

RATIONAL = re.compile(r'(-?[0-9]+(?:\.[0-9]+)?)(?:/([1-9][0-9]*))?')


def exact(value):
    """A number of a row, 10, 10.0 or '10', as a Fraction; ValueError for what is none."""
    if type(value) is float and math.isfinite(value):
        return Fraction(value)
    if type(value) in (int, Fraction):
        return Fraction(value)
    if isinstance(value, str) and (m := RATIONAL.fullmatch(value.strip())):
        return Fraction(m[1]) / int(m[2] or 1)
    raise ValueError(f'{value!r} is no number')


def whole(value):
    """A number of a row as an int from 0; ValueError for what is none."""
    number = exact(value)
    if number.denominator != 1 or number < 0:
        raise ValueError(f'{value!r} is no whole number from 0')
    return int(number)


# ---------------------------------------------------------------- tests

def is_text(value):
    return isinstance(value, str) and value.strip() != ''


def is_string(value):
    return isinstance(value, str)


def is_bool(value):
    return isinstance(value, bool)


def is_number(value):
    return type(value) is int or type(value) is float and math.isfinite(value)


def is_positive(value):
    return is_number(value) and value > 0


def is_count(value):
    return type(value) is int and value > 0


def is_tolerance(value):
    return is_number(value) and 0 <= value < 1


def is_exact(value):
    try:
        exact(value)
    except ValueError:
        return False
    return True


def is_whole(value):
    try:
        whole(value)
    except ValueError:
        return False
    return True


def is_wholes(value):
    """A list of whole numbers from 0, each perhaps as a decimal or text."""
    return isinstance(value, list) and value != [] and all(map(is_whole, value))


def is_answer(value):
    return is_text(value) or is_number(value)


def is_letter(value):
    return isinstance(value, str) and value.strip() in ('A', 'B', 'C', 'D', 'E')


def is_form(value):
    return value == 'number'


def is_texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def is_test(value):
    return isinstance(value, dict) and is_texts([value.get('input'), value.get('output')])


def is_tests(value):
    return isinstance(value, list) and all(map(is_test, value))


def or_null(fits):
    """The test `fits`, passed by None, too."""
    def test(value):
        return value is None or fits(value)
    return test
