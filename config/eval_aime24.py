# AIME 2024, 30 problems. Give --checkpoint, and --out to be able to resume.
#     python data/math/prepare.py --dataset=aime24
data = ['data/math/aime24.jsonl']
instruction = 'Please reason step by step, and put your final answer within \\boxed{}.'
n = 16
greedy = False
temperature = 0.6
top_p = 0.95
max_new_tokens = 16384
rewards = {'accuracy': 1.0}
