# The released model again, on the samples of RL that rejection sampling kept.
import os
_run = os.environ.get('RUN', 'out/smol')

out_dir = f'{_run}/reject'
init_from = os.environ.get('MODEL', 'HuggingFaceTB/SmolLM2-135M-Instruct')
data = [f'{_run}/rl/samples.jsonl']
row_len = 256
long_rows = 'drop'
batch_rows = micro_rows = 8
steps = 80
learning_rate = 2e-4
schedule = 'linear'
min_lr = 0.05
warmup_steps = 5
log_every = 1
save_every = 10
save_dtype = 'float32'
