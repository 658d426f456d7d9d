# MBPP's 500 test problems, all three asserts shown. Give --checkpoint.
#     python data/code/prepare.py --dataset=mbpp --split=test --shown=3
data = ['data/code/mbpp_test.jsonl']
instruction = 'Give the whole program in one block that begins with ```python and ends with ```.'
n = 4
temperature = 0.6
top_p = 0.95
max_new_tokens = 4096
rewards = {'accuracy': 1.0}
