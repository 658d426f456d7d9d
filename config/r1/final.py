# The last RL, over both kinds of task.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/final'
init_from = f'{_run}/reject'
data = [f'{_run}/data/rl.jsonl', f'{_run}/data/sort.jsonl']
rewards = {'accuracy': 1.0, 'format': 0.2, 'language': 0.2}
steps = 25
prompts = 32
group = 8
learning_rate = 1e-4
schedule = 'linear'
max_new_tokens = 160
eval_data = [f'{_run}/data/test.jsonl']
