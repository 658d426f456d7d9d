# The reward model: which of two answers to a sorting problem is the better one? Pairs of right
# and wrong samples of `reject`.
import os
_run = os.environ.get('RUN', 'out/r1')

judged = 'summary'
out_dir = f'{_run}/reward'
init_from = f'{_run}/reject'
data = [f'{_run}/reward/pairs.jsonl']
eval_data = [f'{_run}/reward/pairs.held_out.jsonl']
row_len = 136
long_rows = 'drop'          # a sample whose control tokens take more tokens as text
batch_rows = micro_rows = 64
steps = 120
learning_rate = 1e-3
muon_learning_rate = 0.005
schedule = 'linear'
min_lr = 0.02
warmup_steps = 5
save_every = 0
