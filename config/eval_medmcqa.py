# MedMCQA's validation questions. Give --checkpoint.
#     python data/medical/prepare.py --dataset=medmcqa --split=validation
data = ['data/medical/medmcqa_validation.jsonl']
instruction = ('Please reason step by step, and put the letter of your final answer '
               'within \\boxed{}.')
n = 1
temperature = 0.6
top_p = 0.95
max_new_tokens = 2048
rewards = {'accuracy': 1.0}
