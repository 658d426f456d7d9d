# The released model before any training, asked for the tags that the others learn.
# Give --checkpoint, --summary and --out.
import os
_run = os.environ.get('RUN', 'out/smol')

data = [f'{_run}/data/{name}.jsonl' for name in ('test', 'svamp')]
instruction = ('Think step by step inside <think> and </think>, then write only the number inside '
               '<answer> and </answer>.')
limit = 320
n = 4
greedy = True
temperature = 1.0
max_new_tokens = 96
seed = 1234
slots = 128
rewards = {'accuracy': 1.0, 'format': 1.0}
