# The released model before any training, asked for the tags that the others learn; half the
# samples, since its answers are long. Give it after eval.py.
instruction = ('Think step by step inside <think> and </think>, then write only the number inside '
               '<answer> and </answer>.')
n = 4
