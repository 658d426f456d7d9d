# Control: the base trained on for as many steps as R1-Zero's RL, on its own corpus, at about
# the same tokens a step.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/control_sft'
init_from = f'{_run}/base'
data = [f'{_run}/data/corpus.jsonl']
loss_on = 'all'
row_len = 136
batch_rows = 112
micro_rows = 28
steps = 56
learning_rate = 1e-3
schedule = 'constant'
warmup_steps = 2
save_every = 0
