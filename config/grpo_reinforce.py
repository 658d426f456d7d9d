# REINFORCE with the mean of the group as its baseline: no ratio, no deviation, no KL.
#     python grpo.py config/r1/zero.py config/grpo_reinforce.py --out_dir=out/reinforce
objective = 'reinforce'
advantage_norm = 'none'
loss_norm = 'token'
kl_coef = 0.0
