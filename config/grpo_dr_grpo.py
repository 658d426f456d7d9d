# Dr.GRPO (2503.20783): neither the group's deviation nor the completion's length divides
# anything, no KL.
#     python grpo.py config/r1/zero.py config/grpo_dr_grpo.py --out_dir=out/dr_grpo
objective = 'clip'
clip_low = clip_high = 0.2
advantage_norm = 'none'
loss_norm = 'constant'
kl_coef = 0.0
