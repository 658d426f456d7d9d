# GRPO as first published (DeepSeekMath, 2402.03300).
#     python grpo.py config/r1/zero.py config/grpo_grpo.py --out_dir=out/grpo
objective = 'clip'
clip_low = clip_high = 0.2
advantage_norm = 'group'
loss_norm = 'sequence'
kl = 'k3'
kl_coef = 0.04
