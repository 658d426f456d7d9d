# make r1     the whole recipe on the toy, into out/r1, on 2 CPU cores. Run again after an
#             interruption: finished stages are skipped, whatever the dates of their files,
#             unfinished ones go on from their last checkpoint. To have a stage anew remove its
#             folder, and those of the stages that start from it.
#             make r1 RUN=out/r1-2 SEED=2 for another run beside it.
# make smol   the recipe on a released model, into out/smol, the same way: RUN=, SEED=, THREADS=,
#             MODEL= a hub id or a folder, DTYPE=float32 or bfloat16 (the default where it is fast).
# make test   the test suite
PYTHON ?= python3
RUN ?= out/r1
CHAIN := r1
include config/stage.mk

.PHONY: setup lint test test-slow kernels bench bench-gpu plot plot-budget
.PHONY: r1 teacher students stages controls smol smol-controls
.DELETE_ON_ERROR:

setup: .venv/stamp   ## the virtual environment .venv, with what running needs

.venv/stamp: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt -e '.[plot]'
	touch $@

.venv/tests: .venv/stamp tests/requirements.txt   ## and what testing needs
	$(BIN)/pip install -r tests/requirements.txt -e '.[test,dev]'
	touch $@

.venv/smol: .venv/stamp   ## and what a released model needs
	$(BIN)/pip install -r config/smol/requirements.txt -e '.[tokenizers]'
	touch $@

test: .venv/tests   ## everything but the slow tests
	$(PY) -m pytest -q -m "not slow" --durations=10

lint: .venv/tests   ## widths, unused names and the like, over every Python file
	$(BIN)/ruff check .

# in bf16 and float32 for sm_80, 86, 89, 90, 100 and 120; no GPU needed, minutes, Linux
kernels: .venv/tests   ## compiles every Triton kernel and prints what came out
	$(PY) tools/aot.py

test-slow: .venv/tests   ## full-length runs and kill loops
	$(PY) -m pytest -q -m slow --durations=10

# make bench WHAT="train --rounds=7" for one comparison
bench: setup   ## speed beside other code, in ratios
	$(BIN)/pip install -q -e '.[test,bench,tokenizers]'
	$(PY) tools/bench.py $(WHAT)

bench-gpu: setup   ## everything that is measured on a GPU, in nine minutes
	$(PY) tools/bench.py gpu

plot: setup   ## curves of a run: make plot RUN=out/r1/zero
	$(PY) tools/metrics.py --run=$(RUN)

# make plot-budget RUN=out/r1
plot-budget: setup   ## accuracy against tokens spent, before and after RL
	$(PY) tools/budget.py --run=$(RUN)

# ---- the recipe: each target is a file that its command writes last. What it waits for stands
# after a |, so that only whether a file is there counts: a copy of $(RUN) has new dates in any
# order

# The base fills all cores. After it two things run at a time, on half of them each, since sampling
# rows this small cannot use more: the teacher's chain beside the students, then the evaluations.
HALF = $$(( $(THREADS) > 1 ? $(THREADS) / 2 : 1 ))
r1: setup
	@$(MAKE) --no-print-directory $(RUN)/base/config.json
	@$(MAKE) --no-print-directory -j2 THREADS=$(HALF) teacher students
	@$(MAKE) --no-print-directory -j2 THREADS=$(HALF) stages
	@$(MAKE) --no-print-directory $(RUN)/report.json

teacher:
	@$(MAKE) --no-print-directory $(RUN)/final/samples.jsonl
students:
	@$(MAKE) --no-print-directory $(RUN)/base/eval.json $(RUN)/base/eval_search.json \
	  $(RUN)/student_base/eval.json $(RUN)/student_rl/eval.json $(RUN)/student_sft/eval.json

$(RUN)/data/test.jsonl:
	$(call timed,$(PY) data/countdown/prepare.py --out_dir=$(RUN)/data --seed=$(SEED) $(CORPUS))

# 1. base: pretraining from nothing
$(RUN)/base/config.json: | $(RUN)/data/test.jsonl
	$(call timed,$(PY) sft.py config/r1/base.py --seed=$(SEED) --threads=$(THREADS))
# 2. R1-Zero: RL from the base
$(RUN)/zero/config.json: | $(RUN)/base/config.json
	$(call timed,$(PY) grpo.py config/r1/zero.py --seed=$(SEED) --threads=$(THREADS))
# 3. cold start: R1-Zero's clean samples, SFT of the base
$(RUN)/zero/samples.jsonl: | $(RUN)/zero/config.json
	$(call evaluate,samples,zero,--out=$@ --keep_rows=1000)
$(RUN)/cold/config.json: | $(RUN)/zero/samples.jsonl
	$(call timed,$(PY) sft.py config/r1/cold.py --seed=$(SEED) --threads=$(THREADS))
# 4. RL from the cold start, with a language reward
$(RUN)/rl/config.json: | $(RUN)/cold/config.json
	$(call timed,$(PY) grpo.py config/r1/rl.py --seed=$(SEED) --threads=$(THREADS))
# 5. rejection sampling and the second task, SFT of the base
$(RUN)/rl/samples.jsonl: | $(RUN)/rl/config.json
	$(call evaluate,teacher,rl,--out=$@)
$(RUN)/reject/config.json: | $(RUN)/rl/samples.jsonl
	$(call timed,$(PY) sft.py config/r1/reject.py --seed=$(SEED) --threads=$(THREADS))
# 6. a reward model of sorted and badly sorted answers, and the last RL, over both tasks: countdown
# is checked, sorting is judged by it
$(RUN)/reward/samples.jsonl: | $(RUN)/reject/config.json
	$(call evaluate,pairs,reject,--out=$@)
FROM_SAMPLES = --samples=$(RUN)/reward/samples.jsonl --tokenizer=$(RUN)/reject \
  --held_out=256 --per_prompt=4
$(RUN)/reward/pairs.jsonl: | $(RUN)/reward/samples.jsonl
	$(call timed,$(PY) data/pairs.py $(FROM_SAMPLES) --seed=$(SEED) --out=$@)
$(RUN)/reward/config.json: | $(RUN)/reward/pairs.jsonl
	$(call timed,$(PY) preference.py config/r1/reward.py --seed=$(SEED) --threads=$(THREADS))
$(RUN)/final/config.json: | $(RUN)/reject/config.json $(RUN)/reward/config.json
	$(call timed,$(PY) grpo.py config/r1/final.py --seed=$(SEED) --threads=$(THREADS))
# 7. distillation into a dense student; its controls: SFT without a teacher, RL on the student
$(RUN)/student_base/config.json: | $(RUN)/data/test.jsonl
	$(call timed,$(PY) sft.py config/r1/student_base.py --seed=$(SEED) --threads=$(THREADS))
$(RUN)/final/samples.jsonl: | $(RUN)/final/config.json
	$(call evaluate,teacher,final,--out=$@)
$(RUN)/distill/config.json: | $(RUN)/final/samples.jsonl $(RUN)/student_base/config.json
	$(call timed,$(PY) sft.py config/r1/distill.py --seed=$(SEED) --threads=$(THREADS))
$(RUN)/student_sft/config.json: | $(RUN)/student_base/config.json
	$(call timed,$(PY) sft.py config/r1/student_sft.py --seed=$(SEED) --threads=$(THREADS))
$(RUN)/student_rl/config.json: | $(RUN)/student_base/config.json
	$(call timed,$(PY) grpo.py config/r1/student_rl.py --seed=$(SEED) --threads=$(THREADS))
# 8. evaluation on the held-out problems, and the report
$(RUN)/%/eval.json: | $(RUN)/%/config.json
	$(call evaluate,eval,$*,--out=$(RUN)/$*/eval.jsonl --summary=$@)
$(RUN)/base/eval_search.json: | $(RUN)/base/config.json
	$(call evaluate,eval,base,--prefill="<think> search" --n=2 \
	  --data=$(RUN)/data/test.jsonl --summary=$@)
$(RUN)/%/eval_sort.json: | $(RUN)/%/config.json
	$(call evaluate,eval_sort,$*,--summary=$@)

STAGES := base zero cold rl reject final student_base distill student_sft student_rl
REPORTED := $(RUN)/distill/config.json $(RUN)/student_rl/config.json \
  $(RUN)/student_sft/config.json $(STAGES:%=$(RUN)/%/eval.json) $(RUN)/base/eval_search.json \
  $(RUN)/reject/eval_sort.json $(RUN)/final/eval_sort.json
stages: $(REPORTED)
$(RUN)/report.json: | $(REPORTED)
	$(PY) tools/report.py --run=$(RUN)

# ---- controls of RESULTS.md: as many SFT steps instead of RL; RL on a random reward; a base whose
# corpus holds no full search
controls: $(RUN)/control_sft/eval.json $(RUN)/control_random/eval.json \
  $(RUN)/nosearch/zero/eval.json $(RUN)/nosearch/base/eval.json
$(RUN)/control_sft/config.json: | $(RUN)/base/config.json
	$(call timed,$(PY) sft.py config/r1/control_sft.py --seed=$(SEED) --threads=$(THREADS))
$(RUN)/control_random/config.json: | $(RUN)/base/config.json
	$(call timed,$(PY) grpo.py config/r1/control_random.py --seed=$(SEED) --threads=$(THREADS))
$(RUN)/nosearch/%/eval.json:
	@$(MAKE) --no-print-directory RUN=$(RUN)/nosearch CORPUS="--search=0 --guess=0.94" $@

# ---- the recipe on a released model: its stages are in config/smol/chain.mk
smol smol-controls: RUN := $(if $(filter file,$(origin RUN)),out/smol,$(RUN))
smol smol-controls: .venv/smol
	@$(MAKE) --no-print-directory -f config/smol/chain.mk RUN=$(RUN) $(@:smol-%=%)
