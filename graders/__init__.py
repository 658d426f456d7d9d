"""
What the rewards stand on, one file each:

    maths.py        whether two answers to a mathematics problem say the same
    units.py        what the words after a number say
    countdown.py    the value of an expression over given numbers
    choice.py       which letter an answer chooses
    programs.py     which program an answer holds, whether it printed what it should
    sandbox.py      programs of a model, contained; inside.py: what runs in there
    language.py     which languages a text is in
    rows.py         what the values of a data row may be
    pool.py         processes that may hang or die

They import nothing of the project but each other.
"""
