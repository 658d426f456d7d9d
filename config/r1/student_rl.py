# A control of distillation: RL on the same student, on all problems that the teacher is asked, at a
# rate that decays, with the compute that distillation takes (the teacher's not counted).
import os
_run = os.environ.get('RUN', 'out/r1')
max_flops = 1.97e12    # what config/r1/distill.py takes; the rate decays as it is spent

out_dir = f'{_run}/student_rl'
init_from = f'{_run}/student_base'
data = [f'{_run}/data/rl.jsonl', f'{_run}/data/distill.jsonl']
rewards = {'accuracy': 1.0, 'format': 0.2, 'language': 0.2}
steps = 1000
schedule = 'linear'
min_lr = 0.1
prompts = 32
group = 8
learning_rate = 6e-4
max_new_tokens = 126
eval_data = [f'{_run}/data/test.jsonl']
eval_every = 10
