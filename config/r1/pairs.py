# Samples of the second task, sorting, right and wrong, from which the reward model's pairs are
# made: give --checkpoint and --out.
import os
_run = os.environ.get('RUN', 'out/r1')

data = [f'{_run}/data/sort_pairs.jsonl']
n = 8
greedy = False
temperature = 1.3
max_new_tokens = 32
seed = 4321
slots = 1024
rewards = {'accuracy': 1.0, 'format': 0.5}
