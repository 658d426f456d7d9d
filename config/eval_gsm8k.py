# GSM8K's test problems. Give --checkpoint, and --out to be able to resume.
#     python data/gsm8k/prepare.py
data = ['data/gsm8k/test.jsonl']
instruction = 'Please reason step by step, and put your final answer within \\boxed{}.'
n = 4
temperature = 0.6
top_p = 0.95
max_new_tokens = 2048
rewards = {'accuracy': 1.0}
