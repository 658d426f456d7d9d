# Control: RL straight from the released model, with R1-Zero's template and no example. Give it
# after rl.py.
import os
_run = os.environ.get('RUN', 'out/smol')

out_dir = f'{_run}/control_zero'
init_from = os.environ.get('MODEL', 'HuggingFaceTB/SmolLM2-135M-Instruct')
chat_template = 'r1_zero'   # asks for the <think> and <answer> that the rewards look for
prefill = ' <think>'
stop = ['</answer>']
