# GRPO as DeepSeek-R1 states it (2501.12948v2): give it after the run's own file,
#     python grpo.py config/r1/zero.py config/grpo_deepseek.py --out_dir=out/deepseek
# clip 10 bounds only ratios above 11. The rates, lengths and batch of R1-Zero are in the comments,
# since they belong to a 671B model. reference_every counts updates, of 512 completions either way.
objective = 'clip'
clip_low = clip_high = 10.0
advantage_norm = 'group'
loss_norm = 'sequence'
kl = 'k3'
kl_coef = 0.001
reference_every = 400
# learning_rate = 3e-6; group = 16; temperature = 1.0; max_new_tokens = 32768; prompts = 32
# or as it was done, a rollout of 8192 completions in 16 updates: prompts = 512; updates = 16
