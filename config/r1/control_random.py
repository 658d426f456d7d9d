# Control: R1-Zero's run with a coin for a reward; accuracy is logged but weighs nothing.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/control_random'
init_from = f'{_run}/base'
data = [f'{_run}/data/rl.jsonl']
rewards = {'random': 1.0, 'accuracy': 0.0}
steps = 56
schedule = 'linear'
min_lr = 0.1
prompts = 32
group = 8
learning_rate = 6e-4
max_new_tokens = 126
eval_data = [f'{_run}/data/test.jsonl']
eval_every = 10
