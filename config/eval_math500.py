# MATH-500. Give --checkpoint, and --out to be able to resume.
#     python data/math/prepare.py --dataset=math500
data = ['data/math/math500.jsonl']
instruction = 'Please reason step by step, and put your final answer within \\boxed{}.'
n = 4
temperature = 0.6
top_p = 0.95
max_new_tokens = 8192
rewards = {'accuracy': 1.0}
