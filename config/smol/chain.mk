# The stages of `make smol` (see the Makefile): each target is a file that its command writes last.
# What it waits for stands after a |, so that only whether a file is there counts.
RUN ?= out/smol
export MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
# bfloat16 where it is multiplied several times as fast as float32: on AMX, and on a GPU
FAST := $(shell grep -o -m1 amx_bf16 /proc/cpuinfo 2>/dev/null || nvidia-smi -L 2>/dev/null)
DTYPE ?= $(if $(FAST),bfloat16,float32)
export CHAIN := smol
include config/stage.mk

# $(call train,script,configs)
train = $(call timed,$(PY) $(1).py $(patsubst %,config/smol/%.py,$(2)) \
  --seed=$(SEED) --threads=$(THREADS) --dtype=$(DTYPE))
TEST = --dtype=$(DTYPE) --out=$(@:.json=.jsonl) --summary=$@

STAGES := before cold rl reject final
CONTROLS := control_zero control_sft
.PHONY: smol controls model stages
.DELETE_ON_ERROR:

# RL takes all cores. Beside SFT, which uses half of them, samples are drawn, since a sampler with
# one core does as much as half a sampler with two.
HALF = $$(( $(THREADS) > 1 ? $(THREADS) / 2 : 1 ))
AGAIN = +@$(MAKE) --no-print-directory -f config/smol/chain.mk
TWO = $(AGAIN) -j2 THREADS=$(HALF)
smol: model
	$(TWO) $(RUN)/before/eval.json $(RUN)/cold/config.json
	$(AGAIN) $(RUN)/rl/config.json
	$(TWO) $(RUN)/reject/config.json $(RUN)/cold/eval.json $(RUN)/rl/eval.json
	$(AGAIN) $(RUN)/final/config.json
	$(TWO) stages
	$(AGAIN) $(RUN)/report.json
stages: $(STAGES:%=$(RUN)/%/eval.json)
controls: model
	$(AGAIN) $(RUN)/control_zero/config.json
	$(TWO) $(RUN)/control_zero/eval.json $(RUN)/control_sft/eval.json
	$(PY) tools/report_smol.py --run=$(RUN)

# 1. the model: all stages of a run take the same
model:
	@mkdir -p $(RUN); test -f $(RUN)/model.txt || echo '$(MODEL)' > $(RUN)/model.txt
	@test '$(MODEL)' = "$$(cat $(RUN)/model.txt)" || { echo "$(RUN) was begun with \
	MODEL=$$(cat $(RUN)/model.txt), not $(MODEL): choose another RUN="; exit 1; }
# 2. the data: split by text
$(RUN)/data/test.jsonl: | model
	$(call timed,$(PY) data/words/prepare.py --out_dir=$(RUN)/data --seed=$(SEED) $(WORDS))
# 3. the evaluation before
$(RUN)/before/eval.json: | $(RUN)/data/test.jsonl
	@mkdir -p $(RUN)/before
	$(call timed,$(PY) evaluate.py config/smol/eval.py config/smol/before.py --threads=$(THREADS) \
	  --checkpoint=$(MODEL) $(TEST))
# 4. cold start: SFT on a thousand short traces
$(RUN)/cold/config.json: | $(RUN)/data/test.jsonl
	$(call train,sft,cold)
# 5. RL with accuracy and format
$(RUN)/rl/config.json: | $(RUN)/cold/config.json
	$(call train,grpo,rl)
# 6. rejection sampling over all training problems, and SFT of the released model on what it kept
$(RUN)/rl/samples.jsonl: | $(RUN)/rl/config.json
	$(call evaluate,samples,rl,--dtype=$(DTYPE) --out=$@)
$(RUN)/reject/config.json: | $(RUN)/rl/samples.jsonl
	$(call train,sft,cold reject)
# 7. RL again
$(RUN)/final/config.json: | $(RUN)/reject/config.json
	$(call train,grpo,rl final)
# 8. controls: RL straight from the released model; as many SFT steps instead of RL
$(RUN)/control_zero/config.json: | $(RUN)/data/test.jsonl
	$(call train,grpo,rl control_zero)
$(RUN)/control_zero/eval.json: | $(RUN)/control_zero/config.json
	$(call evaluate,eval,control_zero,config/smol/eval_zero.py $(TEST))
$(RUN)/control_sft/config.json: | $(RUN)/cold/config.json
	$(call train,sft,cold control_sft)
# 9. evaluation on the held-out problems, and the report
$(RUN)/%/eval.json: | $(RUN)/%/config.json
	$(call evaluate,eval,$*,$(TEST))
$(RUN)/report.json: | $(STAGES:%=$(RUN)/%/eval.json)
	$(PY) tools/report_smol.py --run=$(RUN)
