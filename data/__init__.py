import sys

if hasattr(sys, 'set_int_max_str_digits'):  # rows may hold longer integers than Python would read
    sys.set_int_max_str_digits(0)
