# A control of distillation: the same student on the corpus's own clean searches, no teacher at all.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/student_sft'
init_from = f'{_run}/student_base'
data = [f'{_run}/data/searches.jsonl']
row_len = 136
batch_rows = micro_rows = 28
steps = 250
learning_rate = 2e-3
muon_learning_rate = 0.006
schedule = 'linear'
min_lr = 0.02
warmup_steps = 10
save_every = 100
