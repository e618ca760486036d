# Build, evaluate and compare the variants base, int4, lora and lora-int4.

# Flags for single stages, for example make all SFT_FLAGS="--lora-r 16"
FETCH_FLAGS ?=
DATA_FLAGS ?=
SFT_FLAGS ?=
QUANTIZE_FLAGS ?=
EVALUATE_FLAGS ?=

ifneq ($(words $(MODEL_NAME)) $(words $(DATA_NAME)) $(words $(ROOT)),1 1 1)
$(error MODEL_NAME=$(MODEL_NAME), DATA_NAME=$(DATA_NAME) and ROOT=$(ROOT) must each be one word)
endif

ifneq ($(findstring /,$(MODEL_NAME)$(DATA_NAME)),)
$(error MODEL_NAME=$(MODEL_NAME) and DATA_NAME=$(DATA_NAME) must not contain /)
endif
ifeq ($(and $(MODEL),$(SOURCE)),)
$(error MODEL=$(MODEL) and SOURCE=$(SOURCE) must not be empty)
endif

variants := base int4 lora lora-int4
evaluations := $(variants:%=$(reports)/eval-$(MODEL_NAME)-%)
artifacts := $(base) $(data) $(lora) $(merged) $(int4) $(lora_int4) $(evaluations) $(reports)/$(MODEL_NAME)

values_fetch_base := MODEL REVISION FETCH_FLAGS
values_generate_data := SOURCE SEED DATA_FLAGS
values_sft := DATA_NAME SAMPLES EPOCHS SEED PROFILE SFT_FLAGS
values_merge_lora := DATA_NAME SEED PROFILE
values_quantize := DATA_NAME QUANT SEED PROFILE QUANTIZE_FLAGS
values_evaluate := DATA_NAME EVAL_SAMPLES SEED PROFILE EVALUATE_FLAGS
values_report := DATA_NAME

.PHONY: all base data lora lora-merged int4 lora-int4 evaluate report
all: report ## build, evaluate and compare base, int4, lora and lora-int4
base: $(base)/metadata.json ## get the base model in 16 bit
data: $(data)/metadata.json ## split the examples into train, validation and test
lora: $(lora)/metadata.json ## train a LoRA adapter on SAMPLES examples
lora-merged: $(merged)/metadata.json ## merge the adapter into the base, as one 16-bit model
int4: $(int4)/metadata.json ## quantise the base to 4 bit
lora-int4: $(lora_int4)/metadata.json ## quantise the merged model to 4 bit
evaluate: $(evaluations:%=%/metadata.json) ## evaluate each variant on EVAL_SAMPLES held-out examples
report: $(reports)/$(MODEL_NAME)/metadata.json ## compare the variants: reports/<model>/index.html and report.md

$(base)/metadata.json: $(call needs,models/$(MODEL_NAME)-base,configs/assets.yaml $(wildcard configs/models/$(MODEL).yaml) \
		$(call stage,fetch_base,$(MODEL_NAME)-base),$(uses),,)
	$(run) scripts/fetch_base.py --model $(call quoted,$(MODEL)) --revision $(REVISION) $(FETCH_FLAGS) --output $(@D)

# Examples of a file or of the Factbook need neither engine nor retrieval; only the flags of these are imported.
code_of_rows = $(filter scripts/generate_data.py scripts/lib/core/% $(code_of_records) configs/%,$(call code,generate_data))
code_of_records := $(addprefix scripts/lib/data/,records.py fields.py factbook.py)
$(data)/metadata.json: $(call needs,data/$(DATA_NAME)/raw,configs/assets.yaml $(code_of_rows) \
		$(stamps)/generate_data/$(DATA_NAME) | $(venv),$(uses),,)
	$(run) scripts/generate_data.py --source $(call quoted,$(SOURCE)) --seed $(SEED) $(DATA_FLAGS) --output $(@D)

# Goals of other pipelines use a variant as it is. $1 is its name, $2 its stage, $3 the models that it is derived from.
variant = $(call needs,models/$(MODEL_NAME)-$1,$(data)/metadata.json $2,$(uses) base data align preferences clara,$3,$4)

$(lora)/metadata.json: $(call variant,lora,$(base)/metadata.json $(call stage,sft,$(MODEL_NAME)-lora),,)
	$(run) scripts/sft.py --model $(base) --data $(data) --samples $(SAMPLES) --epochs $(EPOCHS) --seed $(SEED) \
		$(profile) $(SFT_FLAGS) --run-dir $(runs)/sft-$(MODEL_NAME) --output $(@D)

$(merged)/metadata.json: $(call variant,lora-merged,$(call stage,merge_lora,$(MODEL_NAME)-lora),\
		$(lora)/metadata.json $(base)/metadata.json,)
	$(run) scripts/merge_lora.py --adapter $(lora) --base $(base) --data $(data) --seed $(SEED) \
		$(profile) --output $(@D)

$(int4)/metadata.json: private from := $(base)
$(lora_int4)/metadata.json: private from := $(merged) --base $(base)
$(int4)/metadata.json: $(call variant,int4,$(call stage,quantize,$(MODEL_NAME)-int4),$(base)/metadata.json,)
# The merged model may have been deleted to save space. It is built again if the adapter has changed since.
outdated = $(if $(wildcard $(merged)/metadata.json),,$(shell [ $(lora)/metadata.json -nt $(lora_int4)/metadata.json ] && echo $(merged)/metadata.json))
$(lora_int4)/metadata.json: $(call variant,lora-int4,$(call stage,quantize,$(MODEL_NAME)-lora-int4),\
		$(merged)/metadata.json $(base)/metadata.json,$(outdated))
$(int4)/metadata.json $(lora_int4)/metadata.json:
	$(run) scripts/quantize.py --model $(from) --data $(data) --method $(QUANT) --seed $(SEED) \
		$(profile) $(QUANTIZE_FLAGS) --output $(@D)

# A report compares an estimate, if there is one, with the actual figures. It does not depend on the estimate.
estimate_of = $(patsubst %/metadata.json,--estimate %,$(wildcard $(reports)/$1-estimate/metadata.json))

$(reports)/$(MODEL_NAME)/metadata.json: $(evaluations:%=%/metadata.json) $(call stage,report,$(MODEL_NAME))
	$(run) scripts/report.py --evaluations $(evaluations) $(call estimate_of,$(MODEL_NAME)) --output $(@D)

ifneq ($(MIRROR_TO),)
all align clara: # also copies artifacts that existed before
	$(alone) $(mirror)
endif
