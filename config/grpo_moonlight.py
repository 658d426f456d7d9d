# R1-Zero on Moonlight-16B-A3B (MLA, 64 experts, 6 of them a token) and MATH.
#     python data/math/prepare.py --dataset=math
#     python grpo.py config/grpo_moonlight.py --plan=8x80             # what it needs
#     torchrun --nproc_per_node=8 grpo.py config/grpo_moonlight.py
# The trainer takes the experts that the sampler chose: on MoE models bf16 flips some of them
# between the two.
out_dir = 'out/grpo-moonlight'
init_from = 'moonshotai/Moonlight-16B-A3B'
data = ['data/math/math.jsonl']
eval_data = ['data/math/math500.jsonl']
chat_template = 'r1_zero'   # asks for the <think> and <answer> that the rewards look for
prefill = ' <think>'
stop = ['</answer>']       # a base model goes on with the next question
rewards = {'accuracy': 1.0, 'format': 0.2}
dtype = 'bfloat16'
activation_checkpointing = True
replay_routes = True
steps = 200
prompts = 128
group = 8
updates = 4
max_new_tokens = 3072
micro_tokens = 8192
slots = 128
learning_rate = 1e-6
clip_low, clip_high = 0.2, 0.28
tis = 2.0
eval_every = 20
save_every = 20
