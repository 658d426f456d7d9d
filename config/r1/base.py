# The base model: about 1M parameters of MLA + MoE + MTP, from nothing, on the Countdown corpus;
# loss on every token.
import os
_run = os.environ.get('RUN', 'out/r1')

out_dir = f'{_run}/base'
tokenizer = f'{_run}/data/tokenizer'
data = [f'{_run}/data/corpus.jsonl']
loss_on = 'all'
model = dict(
    model_type='deepseek_v3', hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=256,
    q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    intermediate_size=256, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
    n_shared_experts=1, moe_intermediate_size=64, num_nextn_predict_layers=1,
)
row_len = 136
batch_rows = micro_rows = 28
steps = 1200
learning_rate = 3e-3
muon_learning_rate = 0.02
schedule = 'linear'
min_lr = 0.02
save_every = 100
