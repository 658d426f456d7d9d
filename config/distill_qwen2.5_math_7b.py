# Distillation of R1 into Qwen2.5-Math-7B with Open-R1's settings for OpenR1-Distill-7B:
# Mixture-of-Thoughts, 5 epochs, 4e-5, a batch of 128 traces, warm-up over 3%, cosine to a tenth,
# gradients clipped at 0.2, RoPE base 300,000 for 32,768 tokens.
#     python data/distill/prepare.py
#     python sft.py config/distill_qwen2.5_math_7b.py --plan=8x80     # what it needs
#     torchrun --nproc_per_node=8 sft.py config/distill_qwen2.5_math_7b.py
# Open-R1 pads its 128 traces; here they are packed into rows in which they do not see each
# other, about 32 rows of 32,768 tokens.
out_dir = 'out/distill-qwen2.5-math-7b'
init_from = 'Qwen/Qwen2.5-Math-7B'
model = dict(rope_theta=300000.0, max_position_embeddings=32768)
data = ['data/distill/traces.jsonl']
dtype = 'bfloat16'
activation_checkpointing = True
row_len = 32768
long_rows = 'drop'          # the few traces that are longer
batch_rows = 32
micro_rows = 1
steps = 13640
learning_rate = 4e-5
schedule = 'cosine'
warmup_steps = 410
min_lr = 0.1
beta2 = 0.999
grad_clip = 0.2
log_every = 5
save_every = 500
