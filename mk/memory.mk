# The values that a name was last built with. After `make all SOURCE=rows.jsonl SAMPLES=500`, `make report` is about that
# model, and `make all` continues with its values. A stage that succeeds leaves its values in .make/made.

name_of_model = $(call tidy,$(call last_part,$1))
name_of_data = $(call tidy,$(firstword $(subst ., ,$(call last_part,$1))))

# A given MODEL or SOURCE replaces the remembered one and determines the name under which values are remembered.
ifdef MODEL
MODEL_NAME ?= $(call name_of_model,$(MODEL))
endif
ifdef SOURCE
DATA_NAME ?= $(call name_of_data,$(SOURCE))
endif
ALIGN_DATA ?= magpie
VARIANT ?= lora-int4
METHOD ?=
PIPELINE ?= all
# The pipeline whose checklist `make doctor` runs: BEFORE=all or AFTER=all.
BEFORE ?=
AFTER ?=
MODEL_NAME ?= smollm2-135m

align := $(call name_of_data,$(ALIGN_DATA))
asked := $(MAKECMDGOALS:estimate=$(PIPELINE)) $(BEFORE) $(AFTER) \
	$(if $(filter export-%,$(MAKECMDGOALS)),$(if $(filter $(align)-%,$(VARIANT)),align))
made_for_align := sft/$(MODEL_NAME)-$(align)-sft generate_preferences/$(MODEL_NAME)-$(align) \
	dpo/$(MODEL_NAME)-$(align)-dpo filter_data/$(MODEL_NAME)-$(align) evaluate/$(MODEL_NAME)-$(align)-base \
	evaluate_general/$(MODEL_NAME)-$(align)-sft magpie/$(MODEL_NAME)-$(align) align_data/$(align)
made_for_clara := train_stage1/$(MODEL_NAME)-clara-stage1 train_stage2/$(MODEL_NAME)-clara-stage2 \
	train_stage3/$(MODEL_NAME)-clara evaluate_clara/$(MODEL_NAME)-clara
made_for_all := sft/$(MODEL_NAME)-lora quantize/$(MODEL_NAME)-int4 evaluate/$(MODEL_NAME)-base
# The first file that contains a value counts: align and clara have values of their own, and otherwise those of `make all`.
made_for_goals := $(if $(filter quantize,$(asked)),$(METHOD:%=setting/$(MODEL_NAME)-lora-%)) \
	$(if $(filter align preferences,$(asked)),$(made_for_align)) $(if $(filter clara,$(asked)),$(made_for_clara))
made_for_goals := $(if $(filter all base data lora lora-merged int4 lora-int4 evaluate report,$(asked)), \
	$(made_for_all) $(made_for_goals),$(made_for_goals) $(made_for_all))
remembered := $(wildcard $(patsubst %,$(ROOT)/.make/made/%,fetch_base/$(MODEL_NAME)-base $(made_for_goals)))
-include $(remembered)
made_for_data := $(if $(filter undefined,$(origin DATA_NAME)),factbook,$(DATA_NAME))
made_for_data := generate_data/$(made_for_data) $(if $(filter clara,$(asked)),generate_clara_data/$(made_for_data))
-include $(patsubst %,$(ROOT)/.make/made/%,$(made_for_data))
