# Right, well-formed, English-only samples for SFT: give --checkpoint and --out.
import os
_run = os.environ.get('RUN', 'out/r1')

data = [f'{_run}/data/rl.jsonl']
n = 4
greedy = False
temperature = 1.0
max_new_tokens = 126
keep = {'accuracy': 1, 'format': 1, 'language': 1}
keep_per_prompt = 2
slots = 1024
