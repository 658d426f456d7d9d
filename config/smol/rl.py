# RL from the cold start, on all training problems: accuracy and format.
import os
_run = os.environ.get('RUN', 'out/smol')

out_dir = f'{_run}/rl'
init_from = f'{_run}/cold'
data = [f'{_run}/data/rl.jsonl']
rewards = {'accuracy': 1.0, 'format': 0.2}
steps = 80
prompts = 16
group = 8
slots = 128
max_new_tokens = 96
micro_tokens = 2048
learning_rate = 1e-5
schedule = 'constant'
warmup_steps = 2
eval_data = [f'{_run}/data/test.jsonl']
eval_every = 10
eval_rows = 128
samples_every = 10
save_every = 5
