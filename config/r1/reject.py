# The second SFT: the base once more, on the RL model's right and readable samples and on the
# second task, sorting.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/reject'
init_from = f'{_run}/base'
data = [f'{_run}/rl/samples.jsonl', f'{_run}/data/sort_sft.jsonl']
row_len = 136
long_rows = 'drop'          # a sample whose control tokens take more tokens as text
batch_rows = micro_rows = 28
steps = 150
learning_rate = 1e-3
muon_learning_rate = 0.004
schedule = 'linear'
min_lr = 0.02
warmup_steps = 5
save_every = 0
