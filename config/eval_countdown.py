# Countdown, the toy of `make r1`: problems of number sets that no training file has. Give
# --checkpoint; RUN=out/x in the environment for another run's.
import os
data = [os.environ.get('RUN', 'out/r1') + '/data/test.jsonl']
n = 8
temperature = 1.0
max_new_tokens = 160
slots = 1024
