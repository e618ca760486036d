# The values that a name was last built with. After `make all SOURCE=rows.jsonl SAMPLES=500`, `make report` is about that
# model, and `make all` continues with its values. A stage that succeeds leaves its values in .make/made.

name_of_model = $(lastword $(subst /, ,$1))
name_of_data = $(firstword $(subst ., ,$(lastword $(subst /, ,$1))))

# A given MODEL or SOURCE replaces the remembered one and determines the name under which values are remembered.
ifdef MODEL
MODEL_NAME ?= $(call name_of_model,$(MODEL))
endif
ifdef SOURCE
DATA_NAME ?= $(call name_of_data,$(SOURCE))
endif
ALIGN_DATA ?= magpie
VARIANT ?= lora-int4
PIPELINE ?= all
MODEL_NAME ?= smollm2-135m

align := $(call name_of_data,$(ALIGN_DATA))
asked := $(MAKECMDGOALS:estimate=$(PIPELINE)) \
	$(if $(filter export-%,$(MAKECMDGOALS)),$(if $(filter $(align)-%,$(VARIANT)),align))
made_for_align := sft/$(MODEL_NAME)-$(align)-sft generate_preferences/$(MODEL_NAME)-$(align) \
	dpo/$(MODEL_NAME)-$(align)-dpo filter_data/$(MODEL_NAME)-$(align) evaluate/$(MODEL_NAME)-$(align)-base \
		evaluate_general/$(MODEL_NAME)-$(align)-sft magpie/$(MODEL_NAME)-$(align)
made_for_clara := train_stage1/$(MODEL_NAME)-clara-stage1 train_stage2/$(MODEL_NAME)-clara-stage2 \
	train_stage3/$(MODEL_NAME)-clara evaluate_clara/$(MODEL_NAME)-clara
made_for_all := sft/$(MODEL_NAME)-lora quantize/$(MODEL_NAME)-int4 evaluate/$(MODEL_NAME)-base
remembered := $(wildcard $(patsubst %,$(ROOT)/.make/made/%,fetch_base/$(MODEL_NAME)-base $(if $(filter align preferences,$(asked)), \
	$(made_for_align),$(if $(filter clara,$(asked)),$(made_for_clara),$(made_for_all)))))
-include $(remembered)
ifdef DATA_NAME
-include $(ROOT)/.make/made/generate_data/$(DATA_NAME)
endif
