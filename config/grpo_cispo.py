# CISPO (MiniMax-M1, 2506.13585): every token keeps its gradient, weighed by its ratio, which is
# bounded above only. The paper gives no number for the bound; 4 is ours. Needs updates > 1 to
# differ from REINFORCE.
#     python grpo.py config/r1/zero.py config/grpo_cispo.py --updates=4 --out_dir=out/cispo
objective = 'cispo'
clip_low, clip_high = 1.0, 3.0
advantage_norm = 'group'
loss_norm = 'token'
kl_coef = 0.0
