# The last RL, over both kinds of task: countdown is checked, sorting is scored by the reward model.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/final'
init_from = f'{_run}/reject'
data = [f'{_run}/data/rl.jsonl', f'{_run}/data/sort_judged.jsonl']
preference = {'helpfulness': f'{_run}/reward'}
rewards = {'accuracy': 1.0, 'format': 0.5, 'language': 0.2}
steps = 16
prompts = 64
slots = 512
group = 8
# at 3e-4 the policy finds what the reward model overlooks: sorting falls from 0.8 to 0.5
learning_rate = 1e-4
schedule = 'linear'
max_new_tokens = 126
eval_data = [f'{_run}/data/test.jsonl']
eval_every = 10
