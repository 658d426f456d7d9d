# Cold start: the base again, on about a thousand of R1-Zero's right, well-formed, English-only
# samples.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/cold'
init_from = f'{_run}/base'
data = [f'{_run}/zero/samples.jsonl']
row_len = 136
long_rows = 'drop'          # a sample whose control tokens take more tokens as text
batch_rows = micro_rows = 28
steps = 80
learning_rate = 1e-3
schedule = 'linear'
min_lr = 0.02
warmup_steps = 5
save_every = 0
