# R1-Zero on Qwen2.5-1.5B and GSM8K.
#     python data/gsm8k/prepare.py
#     python grpo.py config/grpo_qwen2.5_1.5b.py --plan=1x80          # what it needs
#     torchrun --nproc_per_node=8 grpo.py config/grpo_qwen2.5_1.5b.py
out_dir = 'out/grpo-qwen2.5-1.5b'
init_from = 'Qwen/Qwen2.5-1.5B'
data = ['data/gsm8k/train.jsonl']
eval_data = ['data/gsm8k/test.jsonl']
chat_template = 'r1_zero'   # asks for the <think> and <answer> that the rewards look for
prefill = ' <think>'
stop = ['</answer>']       # a base model goes on with the next question
rewards = {'accuracy': 1.0, 'format': 0.2}
dtype = 'bfloat16'
activation_checkpointing = True
steps = 200
prompts = 64
group = 8
updates = 2
max_new_tokens = 1024
micro_tokens = 16384
slots = 256
learning_rate = 1e-6
clip_low, clip_high = 0.2, 0.28
tis = 2.0
eval_every = 20
save_every = 20
