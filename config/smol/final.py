# The last RL, as the first, from what rejection sampling made. Give it after rl.py.
import os
_run = os.environ.get('RUN', 'out/smol')

out_dir = f'{_run}/final'
init_from = f'{_run}/reject'
steps = 20
