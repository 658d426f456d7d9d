"""
What only people run, one script each; nothing imports them. bench.py: speed beside other code.
aot.py and kernel_bench.py: the kernels, compiled without a GPU and timed on one. report.py and
report_smol.py: the reports of `make r1` and `make smol`, which share what they can. metrics.py:
curves of a run. budget.py: accuracy against tokens spent. These four need the [plot] extra.
gguf.py: a checkpoint for llama.cpp; needs the [gguf] extra.
"""
