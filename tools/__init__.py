"""
What only people run, one script each; nothing imports them. bench.py: speed beside other code.
aot.py and kernel_bench.py: the kernels, compiled without a GPU and timed on one. report.py: the
report of `make r1`. metrics.py: curves of a run. budget.py: accuracy against tokens spent. These
three need the [plot] extra. gguf.py: a checkpoint for llama.cpp; needs the [gguf] extra.
"""
