# RL from the cold start: accuracy, format, and the share of English words in the reasoning.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/rl'
init_from = f'{_run}/cold'
data = [f'{_run}/data/rl.jsonl']
rewards = {'accuracy': 1.0, 'format': 0.5, 'language': 0.5}
steps = 16
prompts = 64
slots = 512
group = 8
learning_rate = 3e-4
schedule = 'linear'
max_new_tokens = 126
eval_data = [f'{_run}/data/test.jsonl']
eval_every = 10
