# Distillation: the student on the final model's samples, right ones only.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/distill'
init_from = f'{_run}/student_base'
data = [f'{_run}/final/samples.jsonl']
row_len = 136
long_rows = 'drop'          # a sample whose control tokens take more tokens as text
batch_rows = micro_rows = 28
steps = 250
learning_rate = 2e-3
muon_learning_rate = 0.006
schedule = 'linear'
min_lr = 0.02
warmup_steps = 10
save_every = 100
