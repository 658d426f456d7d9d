# DeepSeek-R1's protocol (arXiv 2501.12948): pass@1 as the mean of k samples at temperature 0.6 and
# top-p 0.95, cons@k by their vote, no greedy answers. Give it after a task's file:
#     python evaluate.py config/eval_aime24.py config/eval_deepseek.py --checkpoint=... --out=...
n = 64
greedy = False
temperature = 0.6
top_p = 0.95
max_new_tokens = 32768
