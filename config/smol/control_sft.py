# Control: as many SFT steps instead of RL, on the written-out equations of all training problems.
import os
_run = os.environ.get('RUN', 'out/smol')

out_dir = f'{_run}/control_sft'
init_from = f'{_run}/cold'
data = [f'{_run}/data/sft.jsonl']
row_len = 256
long_rows = 'drop'
batch_rows = micro_rows = 8
steps = 80      # as many as rl.py
learning_rate = 1e-4
schedule = 'linear'
min_lr = 0.05
warmup_steps = 5
log_every = 1
save_every = 10
save_dtype = 'float32'
