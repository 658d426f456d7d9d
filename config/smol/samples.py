# Rejection sampling: two samples of every training problem, of which those that are right,
# well-formed and different are kept. Give --checkpoint and --out.
import os
_run = os.environ.get('RUN', 'out/smol')

data = [f'{_run}/data/rl.jsonl']
n = 2
greedy = False
temperature = 1.0
max_new_tokens = 96
rewards = {'accuracy': 1.0, 'format': 1.0}
keep = {'accuracy': 1, 'format': 1}
keep_per_prompt = 2
slots = 128
