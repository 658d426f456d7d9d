# DAPO (2503.14476): clip-higher, token-level loss, dynamic sampling, soft overlong punishment over the last fifth of max_new_tokens,
# no KL. Its ablation's "overlong filtering" is mask_truncated = True, instead of the punishment.
#     python grpo.py config/r1/zero.py config/grpo_dapo.py --out_dir=out/dapo
objective = 'clip'
clip_low, clip_high = 0.2, 0.28
advantage_norm = 'group'
loss_norm = 'token'
dynamic_sampling = 3
rewards = {'accuracy': 1.0, 'overlong': 1.0}
kl_coef = 0.0
