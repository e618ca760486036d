# The values that a name was last built with. After `make all SOURCE=rows.jsonl SAMPLES=500`, `make report` is about that
# model, and `make all` continues with its values. A stage that succeeds leaves its values in .make/made.

name_of_model = $(lastword $(subst /, ,$1))
name_of_data = $(firstword $(subst ., ,$(lastword $(subst /, ,$1))))

# A given MODEL or SOURCE replaces the remembered one and determines the name under which values are remembered.
ifdef MODEL
TAG ?= $(call name_of_model,$(MODEL))
endif
ifdef SOURCE
DATA ?= $(call name_of_data,$(SOURCE))
endif
ALIGN_DATA ?= magpie
VARIANT ?= lora-int4
GOAL ?= all
TAG ?= smollm2-135m

align := $(call name_of_data,$(ALIGN_DATA))
asked := $(MAKECMDGOALS:estimate=$(GOAL)) $(if $(filter export-%,$(MAKECMDGOALS)),$(if $(filter $(align)-%,$(VARIANT)),align))
made_for_align := sft/$(TAG)-$(align)-sft generate_preferences/$(TAG)-$(align) dpo/$(TAG)-$(align)-dpo \
	filter_data/$(TAG)-$(align) evaluate/$(TAG)-$(align)-base forgetting/$(TAG)-$(align)-sft magpie/$(TAG)-$(align)
made_for_clara := train_stage1/$(TAG)-clara-stage1 train_stage2/$(TAG)-clara-stage2 train_stage3/$(TAG)-clara \
	evaluate_clara/$(TAG)-clara
made_for_all := sft/$(TAG)-lora quantize/$(TAG)-int4 evaluate/$(TAG)-base
remembered := $(wildcard $(patsubst %,$(ROOT)/.make/made/%,fetch_base/$(TAG)-base $(if $(filter align preferences,$(asked)), \
	$(made_for_align),$(if $(filter clara,$(asked)),$(made_for_clara),$(made_for_all)))))
-include $(remembered)
ifdef DATA
-include $(ROOT)/.make/made/generate_data/$(DATA)
endif
