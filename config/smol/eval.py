# Evaluation of a stage on two tests: word problems of the training's kind, whose texts are in no
# training file (the figure), and SVAMP, whose problems were varied to fool models.
# Give --checkpoint, --summary and --out.
import os
_run = os.environ.get('RUN', 'out/smol')

data = [f'{_run}/data/{name}.jsonl' for name in ('test', 'svamp')]
limit = 320
n = 8
greedy = True
temperature = 1.0
max_new_tokens = 96
seed = 1234
slots = 128
rewards = {'accuracy': 1.0, 'format': 1.0}
