# Control: RL straight from the released model, with R1-Zero's template and no example.
import os
_run = os.environ.get('RUN', 'out/smol')

out_dir = f'{_run}/control_zero'
init_from = os.environ.get('MODEL', 'HuggingFaceTB/SmolLM2-135M-Instruct')
chat_template = 'r1_zero'   # asks for the <think> and <answer> that the rewards look for
prefill = ' <think>'
stop = ['</answer>']

data = [f'{_run}/data/rl.jsonl']
rewards = {'accuracy': 1.0, 'format': 0.2}
steps = 80
prompts = 16
group = 8
slots = 128
max_new_tokens = 96
micro_tokens = 2048
learning_rate = 1e-5
schedule = 'constant'
warmup_steps = 2
eval_data = [f'{_run}/data/test.jsonl']
eval_every = 10
eval_rows = 128
samples_every = 10
save_every = 5
