# GSPO (2507.18071): one ratio a completion, clipped within ten-thousandths. Needs updates > 1
# to differ from GRPO.
#     python grpo.py config/r1/zero.py config/grpo_gspo.py --updates=4 --out_dir=out/gspo
objective = 'clip'
ratio = 'sequence'
clip_low, clip_high = 3e-4, 4e-4
advantage_norm = 'group'
loss_norm = 'sequence'
kl_coef = 0.0
