# HumanEval, 164 functions: python data/code/prepare.py --dataset=humaneval; then give --checkpoint. Programs run in the sandbox.
data = ['data/code/humaneval.jsonl']
n = 8
temperature = 0.6
top_p = 0.95
max_new_tokens = 4096
rewards = {'accuracy': 1.0}
