# The released model again, on the samples of RL that rejection sampling kept. Give it after
# cold.py.
import os
_run = os.environ.get('RUN', 'out/smol')

out_dir = f'{_run}/reject'
data = [f'{_run}/rl/samples.jsonl']
