# Evaluation of a stage on the three tests: number sets never seen (the figure), sets seen with
# targets that were not, numbers beyond the training range. Give --checkpoint, --summary and --out.
import os
_run = os.environ.get('RUN', 'out/r1')

data = [f'{_run}/data/{name}.jsonl' for name in ('test', 'test_seen', 'test_beyond')]
n = 8
greedy = True
temperature = 1.0
max_new_tokens = 126
seed = 1234
slots = 1024
