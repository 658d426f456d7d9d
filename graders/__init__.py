"""
What the rewards stand on, one file each: maths.py (whether two answers say the same), units.py
(what the words after a number say), sandbox.py (programs of a model), language.py (which languages
a text is in), pool.py (processes that may hang or die). They import nothing of the project but each
other.
"""
