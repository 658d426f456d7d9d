# What the chains share: the Makefile's own of r1, and config/smol/chain.mk.
BIN := .venv/bin
PY := $(BIN)/python
THREADS ?= 2
export OMP_NUM_THREADS := $(THREADS)
export RUN
SEED ?= 1

# $(call timed,command): run it, and note target, start and end in seconds.txt for the report, after
# Ctrl-C too. An older report no longer holds, but for a control.
timed = @mkdir -p $(RUN); \
  $(if $(findstring /control_,$@),,rm -f $(RUN)/report.json;) \
  echo '$(1)'; \
  trap : INT; start=$$(date +%s); $(1); code=$$?; \
  echo "$@ $$start $$(date +%s)" >> $(RUN)/seconds.txt; \
  exit $$code
# $(call evaluate,config,stage,more): samples of a stage, or its evaluation; CHAIN is the folder
# of the configs
evaluate = $(call timed,$(PY) evaluate.py config/$(CHAIN)/$(1).py \
  --threads=$(THREADS) --checkpoint=$(RUN)/$(2) $(3))
