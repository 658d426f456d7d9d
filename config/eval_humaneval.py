# HumanEval, 164 functions; programs run in the sandbox. Give --checkpoint.
#     python data/code/prepare.py --dataset=humaneval
data = ['data/code/humaneval.jsonl']
instruction = 'Give the whole program in one block that begins with ```python and ends with ```.'
n = 8
temperature = 0.6
top_p = 0.95
max_new_tokens = 4096
rewards = {'accuracy': 1.0}
