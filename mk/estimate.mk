# estimate: what a pipeline will take. A machine is not as fast today as it was yesterday: it is made again each time.

# The pipeline to estimate.
GOAL ?= all
ESTIMATE_FLAGS ?=

ifneq ($(filter estimate,$(MAKECMDGOALS)),)
ifeq ($(filter all align clara,$(GOAL)),)
$(error GOAL=$(GOAL): expected all, align or clara)
endif
endif

estimated := $(or $(if $(filter align,$(GOAL)),$(family)),$(if $(filter clara,$(GOAL)),$(TAG)-clara),$(TAG))
estimate_data := $(if $(filter align,$(GOAL)),$(align_test),$(data))
estimate_rows := $(if $(filter clara,$(GOAL)),$(clara_data))

.PHONY: estimate
# What make itself gives the steps of align and clara goes before the user's flags.
estimate: $(patsubst %,%/metadata.json,$(base) $(estimate_data) $(estimate_rows)) | $(venv) ## estimate time, disk and cost of GOAL=all, align or clara
	$(alone) scripts/estimate.py --goal $(GOAL) --model $(base) --data $(estimate_data) --method $(INT4) --samples $(SAMPLES) \
		--epochs $(EPOCHS) --eval-samples $(EVAL_SAMPLES) --align-data $(or $(written),rows) --raw $(raw) --pairs $(PAIRS) \
		--held-out-pairs $(HELD_OUT_PAIRS) --seed $(SEED) $(profile) $(estimate_rows:%=--clara-data %) $(ESTIMATE_FLAGS) \
		--sft-flags=$(call quoted,$(SFT_FLAGS)) --quantize-flags=$(call quoted,$(QUANTIZE_FLAGS)) \
		--evaluate-flags=$(call quoted,$(EVALUATE_FLAGS)) --magpie-flags=$(call quoted,$(MAGPIE_FLAGS)) \
		--filter-flags=$(call quoted,$(if $(written),,--least-response-words 1) $(FILTER_FLAGS)) \
		--preferences-flags=$(call quoted,$(answering) $(PREFERENCES_FLAGS)) --dpo-flags=$(call quoted,$(DPO_FLAGS)) \
		--forgetting-flags=$(call quoted,$(FORGETTING_FLAGS)) --stage1-flags=$(call quoted,$(STAGE1_FLAGS)) \
		--stage2-flags=$(call quoted,--samples $(quarter) $(STAGE2_FLAGS)) \
		--stage3-flags=$(call quoted,--samples $(SAMPLES) $(STAGE3_FLAGS)) \
		--evaluate-clara-flags=$(call quoted,$(EVALUATE_CLARA_FLAGS)) --output $(reports)/$(estimated)-estimate
