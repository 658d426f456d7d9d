# Control: as many SFT steps instead of RL, on the written-out equations of all training problems.
# Give it after cold.py.
import os
_run = os.environ.get('RUN', 'out/smol')

out_dir = f'{_run}/control_sft'
init_from = f'{_run}/cold'
data = [f'{_run}/data/sft.jsonl']
steps = 80      # as many as rl.py
learning_rate = 1e-4
