# DAPO (2503.14476): clip-higher, token-level loss, dynamic sampling of problems that are neither
# always nor never solved, no KL, soft overlong punishment over the last fifth of max_new_tokens.
# There a right answer is 1, a wrong one -1 and the punishment at most 1, half of the difference;
# here a wrong one is 0, so the punishment weighs 0.5. The paper's "overlong filtering" is
# mask_truncated = True instead of it.
#     python grpo.py config/r1/zero.py config/grpo_dapo.py --out_dir=out/dapo
objective = 'clip'
clip_low, clip_high = 0.2, 0.28
advantage_norm = 'group'
loss_norm = 'token'
dynamic_sampling = 3
rewards = {'accuracy': 1.0, 'overlong': 0.5}
kl_coef = 0.0
