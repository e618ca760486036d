# CLaRa: documents as vectors, trained in three stages. Stage 1 uses SAMPLES passages with all their questions, stage 2 a
# quarter as many questions, each with several documents, and stage 3 learns retrieval from SAMPLES questions.

CLARA_DATA_FLAGS ?=
STAGE1_FLAGS ?=
STAGE2_FLAGS ?=
STAGE3_FLAGS ?=
EVALUATE_CLARA_FLAGS ?=
# Results of a longer run, shown beside those of this run.
CLARA_AGAINST ?= $(wildcard docs/results/clara/comparison.json)

clara := $(ROOT)/models/$(MODEL_NAME)-clara
clara_data := $(ROOT)/data/$(DATA_NAME)/clara
artifacts += $(clara_data) $(clara)-stage1 $(clara)-stage2 $(clara) $(reports)/$(MODEL_NAME)-clara
# Computed when a recipe runs, rounded up. A value that is not a number is passed on to the script, which rejects it.
quarter = $(shell expr \( $(call quoted,$(SAMPLES)) + 3 \) / 4 2> /dev/null || printf %s $(call quoted,$(SAMPLES)))

values_generate_clara_data := SEED CLARA_DATA_FLAGS
values_train_stage1 := DATA_NAME SAMPLES SEED PROFILE STAGE1_FLAGS
values_train_stage2 := DATA_NAME SAMPLES SEED PROFILE STAGE2_FLAGS
values_train_stage3 := DATA_NAME SAMPLES SEED PROFILE STAGE3_FLAGS
values_evaluate_clara := DATA_NAME EVAL_SAMPLES SEED PROFILE CLARA_AGAINST EVALUATE_CLARA_FLAGS

.PHONY: clara
clara: $(reports)/$(MODEL_NAME)-clara/metadata.json ## CLaRa: train document compression in three stages and evaluate it: reports/<model>-clara/

$(clara_data)/metadata.json: $(call needs,$(clara_data:$(ROOT)/%=%),$(data)/metadata.json $(call code,generate_data) \
		$(stamps)/generate_clara_data/$(DATA_NAME) | $(venv),$(uses),,)
	$(run) scripts/generate_data.py --source clara --data $(data) --seed $(SEED) $(CLARA_DATA_FLAGS) --output $(@D)

$(clara)-stage1/metadata.json: $(base)/metadata.json $(clara_data)/metadata.json \
		$(call stage,train_stage1,$(MODEL_NAME)-clara-stage1)
	$(run) scripts/train_stage1.py --model $(base) --data $(clara_data) --samples $(SAMPLES) --seed $(SEED) \
		$(profile) $(STAGE1_FLAGS) --run-dir $(runs)/clara-$(MODEL_NAME)-stage1 --output $(@D)

$(clara)-stage2/metadata.json: $(clara)-stage1/metadata.json $(call stage,train_stage2,$(MODEL_NAME)-clara-stage2)
	$(run) scripts/train_stage2.py --model $(clara)-stage1 --base $(base) --data $(clara_data) --samples $(quarter) \
		--seed $(SEED) $(profile) $(STAGE2_FLAGS) --run-dir $(runs)/clara-$(MODEL_NAME)-stage2 --output $(@D)

$(clara)/metadata.json: $(clara)-stage2/metadata.json $(call stage,train_stage3,$(MODEL_NAME)-clara)
	$(run) scripts/train_stage3.py --model $(clara)-stage2 --base $(base) --data $(clara_data) --samples $(SAMPLES) \
		--seed $(SEED) $(profile) $(STAGE3_FLAGS) --run-dir $(runs)/clara-$(MODEL_NAME) --output $(@D)

$(reports)/$(MODEL_NAME)-clara/metadata.json: $(clara)/metadata.json $(lora)/metadata.json \
		$(call stage,evaluate_clara,$(MODEL_NAME)-clara)
	$(run) scripts/evaluate_clara.py --models $(clara) --text-model $(lora) --base $(base) --data $(clara_data) \
		--samples $(EVAL_SAMPLES) --seed $(SEED) $(if $(CLARA_AGAINST),--against $(call quoted,$(CLARA_AGAINST))) $(call estimate_of,$(MODEL_NAME)-clara) \
		$(profile) $(EVALUATE_CLARA_FLAGS) --run-dir $(runs)/eval-$(MODEL_NAME)-clara --output $(@D)
