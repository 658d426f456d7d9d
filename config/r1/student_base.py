# The student: a dense GQA model (Qwen2 style) of a third of the base's parameters, pretrained
# on the same corpus.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/student_base'
tokenizer = f'{_run}/data/tokenizer'
data = [f'{_run}/data/corpus.jsonl']
loss_on = 'all'
model = dict(
    model_type='qwen2', hidden_size=96, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=3, head_dim=32, intermediate_size=256, max_position_embeddings=256,
    tie_word_embeddings=True,
)
row_len = 136
batch_rows = micro_rows = 28
steps = 800
learning_rate = 3e-3
muon_learning_rate = 0.025
schedule = 'linear'
min_lr = 0.02
save_every = 100
