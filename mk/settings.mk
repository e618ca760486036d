# Quantisation settings: quantise with one, compare all by size and divergence, and evaluate recipes for LoRA-INT4.

# A setting is a method of quantize.py with optional suffixes: -nearest (llama.cpp's own round-to-nearest), -distilled
# (scales tuned against the source model on SAMPLES examples), or -<quantisation of the embedding>. llama.cpp's own Q4_0
# of a model with a tied embedding is gguf-q4_0-nearest-q8_0.
PARETO ?= gguf-q8_0 gguf-q5_0 gguf-q5_0-nearest gguf-q4_1 gguf-q4_0-nearest gguf-q4_0 gguf-iq4_nl-nearest gguf-iq4_nl \
	gguf-iq4_nl-q5_0 nf4
RECIPES ?= gguf-iq4_nl-q5_0 gguf-q5_0 gguf-q4_0-nearest-q8_0

pareto := $(patsubst %,$(ROOT)/models/$(MODEL_NAME)-pareto-%,$(sort $(PARETO)))
distilled := gguf-iq4_nl-distilled
chosen := $(patsubst %,$(ROOT)/models/$(MODEL_NAME)-lora-%,$(sort $(METHOD) $(distilled) $(RECIPES)))
int4_lora := $(ROOT)/models/$(MODEL_NAME)-int4-lora
recipes := $(distilled:%=lora-%) int4-lora $(RECIPES:%=lora-%)
compared := $(patsubst %,$(reports)/eval-$(MODEL_NAME)-%,$(variants) $(recipes))
divergence := $(reports)/divergence-$(MODEL_NAME)-int4-lora
artifacts += $(pareto) $(chosen) $(int4_lora) $(compared) $(divergence) $(patsubst %,$(reports)/$(MODEL_NAME)-%,pareto recipes)

values_setting := DATA_NAME SAMPLES SEED PROFILE QUANTIZE_FLAGS
values_pareto := PARETO
values_measure_divergence := DATA_NAME SEED PROFILE
values_recipes := RECIPES
values_methods := METHOD PARETO RECIPES

# Settings are checked before anything is trained. An empty METHOD is an error that lists the methods.
check_methods = @PYTHONPATH=scripts $(PYTHON) -c 'import quantize; quantize.check_methods()'
known := $(ROOT)/.make/known-methods
$(known): $(stamps)/methods/all | $(venv)
	$(check_methods) $(foreach name,METHOD PARETO RECIPES,$(call quoted,$(name)=$($(name)))) && touch $@

.PHONY: quantize pareto recipes
quantize: $(if $(METHOD),$(known) $(METHOD:%=$(ROOT)/models/$(MODEL_NAME)-lora-%/metadata.json)) | $(venv) ## quantise the merged model with METHOD=…: models/<model>-lora-<method>
	$(if $(METHOD),@:,$(check_methods) METHOD=)
pareto: $(known) $(reports)/$(MODEL_NAME)-pareto/metadata.json ## compare size and divergence of the PARETO settings: reports/<model>-pareto/
recipes: $(known) $(reports)/$(MODEL_NAME)-recipes/metadata.json ## compare three recipes for LoRA-INT4, and those in RECIPES: reports/<model>-recipes/

setting = $(patsubst $(MODEL_NAME)-lora-%,%,$(patsubst $(MODEL_NAME)-pareto-%,%,$(notdir $(@D))))
define needs_of_setting
$(ROOT)/models/$1/metadata.json: $(call needs,models/$1,$(data)/metadata.json $(call code,quantize) $(stamps)/setting/$1 \
		| $(venv),$(filter-out quantize pareto,$(uses)),$(merged)/metadata.json $(base)/metadata.json,)
endef
$(foreach name,$(notdir $(pareto) $(chosen)),$(eval $(call needs_of_setting,$(name))))
$(patsubst %,%/metadata.json,$(pareto) $(chosen)):
	$(run) scripts/quantize.py --model $(merged) --base $(base) --data $(data) --seed $(SEED) $(profile) $(QUANTIZE_FLAGS) \
		--method $(setting) $(if $(findstring -distilled,$(setting)),--distil-samples $(SAMPLES)) \
		$(if $(filter $(MODEL_NAME)-pareto-%,$(notdir $(@D))),--accept-divergence) --output $(@D)

$(reports)/$(MODEL_NAME)-pareto/metadata.json: $(pareto:%=%/metadata.json) $(call stage,pareto,$(MODEL_NAME))
	$(run) scripts/pareto.py --models $(pareto) --output $(@D)

# The same training on the 4-bit base, which no profile quantises once more. The adapter is not merged.
$(int4_lora)/metadata.json: $(call needs,models/$(MODEL_NAME)-int4-lora,$(data)/metadata.json \
		$(call stage,sft,$(MODEL_NAME)-int4-lora),$(uses),$(int4)/metadata.json,)
	$(run) scripts/sft.py --model $(int4) --data $(data) --samples $(SAMPLES) --epochs $(EPOCHS) --seed $(SEED) \
		$(profile) --precision auto $(SFT_FLAGS) --run-dir $(runs)/sft-$(MODEL_NAME)-int4 --output $(@D)

# The variants of mk/variants.mk and the recipes are evaluated in the same way.
$(compared:%=%/metadata.json): $(reports)/eval-$(MODEL_NAME)-%/metadata.json: \
		$(ROOT)/models/$(MODEL_NAME)-%/metadata.json $(data)/metadata.json $(call stage,evaluate,$(MODEL_NAME)-%)
	$(run) scripts/evaluate.py --model $(<D) --data $(data) --samples $(EVAL_SAMPLES) --seed $(SEED) \
		$(profile) $(EVALUATE_FLAGS) --run-dir $(runs)/eval-$(MODEL_NAME)-$* --output $(@D)

# quantize.py checks the divergence of its own output. For an adapter on a quantised base, measure_divergence.py measures it.
$(divergence)/metadata.json: $(int4_lora)/metadata.json $(lora)/metadata.json $(base)/metadata.json \
		$(data)/metadata.json $(call stage,measure_divergence,$(MODEL_NAME))
	$(run) scripts/measure_divergence.py --reference $(lora) --model $(int4_lora) --base $(base) --data $(data) \
		--seed $(SEED) $(profile) --output $(@D)

$(reports)/$(MODEL_NAME)-recipes/metadata.json: $(compared:%=%/metadata.json) $(divergence)/metadata.json \
		$(call code,report) $(stamps)/recipes/$(MODEL_NAME) | $(venv)
	$(run) scripts/report.py --evaluations $(compared) --divergences $(divergence) --model-name $(MODEL_NAME) --output $(@D)
