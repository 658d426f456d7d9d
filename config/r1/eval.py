# Evaluation of a stage on the held-out problems: give --checkpoint, --summary and --out.
import os
_run = os.environ.get('RUN', 'out/r1')

data = [f'{_run}/data/test.jsonl']
n = 8
greedy = True
temperature = 1.0
max_new_tokens = 126
seed = 1234
slots = 1024
