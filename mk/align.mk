# align: filter, SFT, preference pairs, DPO, evaluation; the same for magpie, factbook and files.

# Training data is ALIGN_DATA: magpie (examples that MODEL writes itself), factbook, or a file. SFT uses SAMPLES of the
# filtered examples. DPO uses PAIRS pairs of the model's own responses (with magpie, to prompts of SOURCE).
# Number of examples that Magpie writes (default: 1.5 times SAMPLES).
MAGPIE_SAMPLES ?=
PAIRS ?= 100
HELD_OUT_PAIRS ?= 100
MAGPIE_FLAGS ?=
FILTER_FLAGS ?=
PREFERENCES_FLAGS ?=
DPO_FLAGS ?=
GENERAL_FLAGS ?=

ifneq ($(filter pareto recipes clara estimate,$(align)),)
$(error ALIGN_DATA=$(ALIGN_DATA): reports/$(MODEL_NAME)-$(align) is the report of another pipeline; rename the file)
endif
ifneq ($(words $(align)),1)
$(error ALIGN_DATA=$(ALIGN_DATA): expected magpie, factbook or a file)
endif
written := $(if $(call differs,$(ALIGN_DATA),magpie),,magpie)
family := $(MODEL_NAME)-$(align)
align_raw := $(ROOT)/data/$(if $(written),$(family),$(align))/raw
filtered := $(ROOT)/data/$(family)/filtered
preferences := $(ROOT)/data/$(family)/preferences
ifneq ($(and $(filter $(align_raw),$(data)),$(call differs,$(ALIGN_DATA),$(SOURCE))),)
$(error ALIGN_DATA=$(ALIGN_DATA) and SOURCE=$(SOURCE) would both be $(data); give SOURCE another name with DATA_NAME=name)
endif
# The held-out examples on which base, SFT and DPO are evaluated. Examples that MODEL wrote have no reference answers.
align_test := $(if $(written),$(data),$(align_raw))
aligned := $(patsubst %,$(reports)/eval-$(family)-%,base sft dpo)
general := $(reports)/general-$(MODEL_NAME)-base $(reports)/general-$(family)-sft $(reports)/general-$(family)-dpo
artifacts += $(align_raw) $(filtered) $(preferences) $(patsubst %,$(ROOT)/models/$(family)-%,sft dpo) $(aligned) $(general) \
	$(reports)/$(family)
# Computed when a recipe runs. A value that is not a number is passed on to the script, which rejects it.
half_more = $(shell expr $(call quoted,$(SAMPLES)) \* 3 / 2 2> /dev/null || printf %s $(call quoted,$(SAMPLES)))
raw = $(or $(MAGPIE_SAMPLES),$(half_more))

rows_of_magpie = $(or $(MAGPIE_SAMPLES),as SAMPLES $(SAMPLES))
values_magpie := MAGPIE_SAMPLES rows_of_magpie SEED PROFILE MAGPIE_FLAGS
values_align_data := ALIGN_DATA SEED DATA_FLAGS
values_filter_data := DATA_NAME SEED FILTER_FLAGS
values_generate_preferences := DATA_NAME PAIRS HELD_OUT_PAIRS SEED PROFILE PREFERENCES_FLAGS
values_dpo := PAIRS SEED PROFILE DPO_FLAGS
values_evaluate_general := SEED PROFILE GENERAL_FLAGS

.PHONY: align align-smoke preferences
align: $(reports)/$(family)/metadata.json ## filter ALIGN_DATA, then SFT, preference pairs, DPO, evaluation: reports/<model>-<data>/
preferences: $(preferences)/metadata.json ## sample PAIRS preference pairs from the fine-tuned model's own responses
align-smoke: ## run `make align` at a tenth of its size, in .align-smoke/, as a test
	+$(MAKE) align ROOT=.align-smoke MIRROR_TO= MIRROR_FROM= SAMPLES=20 PAIRS=10 HELD_OUT_PAIRS=5 EVAL_SAMPLES=10 \
		GENERAL_FLAGS="--samples 20 --prompts 2"

ifneq ($(align_raw),$(data))
$(align_raw)/metadata.json: $(call needs,$(align_raw:$(ROOT)/%=%),configs/assets.yaml $(if $(written),$(call code,generate_data) \
		$(base)/metadata.json $(stamps)/magpie/$(family),$(code_of_rows) \
		$(stamps)/align_data/$(align)) | $(venv),$(uses),,)
	$(run) scripts/generate_data.py --seed $(SEED) --output $(@D) $(if $(written),--source magpie --model $(base) \
		--samples $(raw) $(profile) --run-dir $(runs)/magpie-$(MODEL_NAME) $(MAGPIE_FLAGS),--source \
		$(call quoted,$(ALIGN_DATA)) $(DATA_FLAGS))
endif

# Examples from a file may have short answers; examples that the model wrote should not.
$(filtered)/metadata.json: $(align_raw)/metadata.json $(align_test)/metadata.json $(call stage,filter_data,$(family))
	$(run) scripts/filter_data.py --data $(align_raw) $(if $(written),--evaluation $(align_test),--min-response-words 1) \
		--seed $(SEED) $(FILTER_FLAGS) --output $(@D)

$(ROOT)/models/$(family)-sft/metadata.json: $(call needs,models/$(family)-sft,$(base)/metadata.json \
		$(filtered)/metadata.json $(call stage,sft,$(family)-sft),$(uses),,)
	$(run) scripts/sft.py --model $(base) --data $(filtered) --samples $(SAMPLES) --epochs $(EPOCHS) --seed $(SEED) \
		$(profile) $(SFT_FLAGS) --run-dir $(runs)/sft-$(family) --output $(@D)

# Pairs need reference answers. Examples that the model wrote have none, so the prompts then come from SOURCE.
prompts := $(if $(written),$(data),$(filtered))
# A model trained on its own examples gives long answers: with a limit of 48 tokens, half of them did not end.
answering := $(if $(written),--max-new-tokens 128)
$(preferences)/metadata.json: $(ROOT)/models/$(family)-sft/metadata.json $(prompts)/metadata.json \
		$(call stage,generate_preferences,$(family))
	$(run) scripts/generate_preferences.py --models $(<D) --data $(prompts) --samples $(PAIRS) \
		--validation-samples $(HELD_OUT_PAIRS) --seed $(SEED) $(profile) $(answering) $(PREFERENCES_FLAGS) \
		--run-dir $(runs)/preferences-$(family) --output $(@D)

$(ROOT)/models/$(family)-dpo/metadata.json: $(call needs,models/$(family)-dpo,$(ROOT)/models/$(family)-sft/metadata.json \
		$(preferences)/metadata.json $(base)/metadata.json $(call stage,dpo,$(family)-dpo),$(uses),,)
	$(run) scripts/dpo.py --model $(base) --adapter $(ROOT)/models/$(family)-sft --data $(preferences) --samples $(PAIRS) --seed $(SEED) \
		$(profile) $(DPO_FLAGS) --run-dir $(runs)/dpo-$(family) --output $(@D)

$(reports)/eval-$(family)-base/metadata.json: $(base)/metadata.json
$(reports)/eval-$(family)-sft/metadata.json: $(ROOT)/models/$(family)-sft/metadata.json
$(reports)/eval-$(family)-dpo/metadata.json: $(ROOT)/models/$(family)-dpo/metadata.json
$(aligned:%=%/metadata.json): $(reports)/eval-$(family)-%/metadata.json: $(align_test)/metadata.json \
		$(call stage,evaluate,$(family)-%)
	$(run) scripts/evaluate.py --model $(if $(filter base,$*),$(base),$(ROOT)/models/$(family)-$*) --data $(align_test) \
		--samples $(EVAL_SAMPLES) --seed $(SEED) $(profile) $(EVALUATE_FLAGS) --run-dir $(runs)/$(notdir $(@D)) \
		--output $(@D)

$(general:%=%/metadata.json): $(reports)/general-%/metadata.json: $(ROOT)/models/%/metadata.json \
		$(call stage,evaluate_general,%)
	$(run) scripts/evaluate_general.py --model $(<D) --seed $(SEED) $(profile) $(GENERAL_FLAGS) \
		--run-dir $(runs)/$(notdir $(@D)) --output $(@D)

$(reports)/$(family)/metadata.json: $(aligned:%=%/metadata.json) $(general:%=%/metadata.json) \
		$(call stage,report,$(family))
	$(run) scripts/report.py --evaluations $(aligned) --general $(general) $(call estimate_of,$(family)) --output $(@D)
