# Evaluation on the second task, sorting: give --checkpoint and --summary.
import os
_run = os.environ.get('RUN', 'out/r1')

data = [f'{_run}/data/sort_test.jsonl']
n = 1
greedy = True
temperature = 1.0
max_new_tokens = 126
seed = 1234
slots = 1024
