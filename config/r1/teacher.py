# Rejection sampling over the problems of RL and of the corpus, one sample a problem and order:
# give --checkpoint and --out.
import os
_run = os.environ.get('RUN', 'out/r1')

data = [f'{_run}/data/rl.jsonl', f'{_run}/data/distill.jsonl']
n = 1
greedy = False
temperature = 1.0
max_new_tokens = 126
keep = {'accuracy': 1, 'format': 1, 'language': 1}
keep_per_prompt = 1
slots = 1024
