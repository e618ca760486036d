# Quantisation settings: quantise with one, compare all by size and divergence, and evaluate recipes for LoRA-INT4.

# A setting is a method of quantize.py with optional suffixes: -nearest (llama.cpp's own round-to-nearest), -distilled
# (scales tuned against the source model on SAMPLES examples), or -<quantisation of the embedding>. llama.cpp's own Q4_0
# of a model with a tied embedding is gguf-q4_0-nearest-q8_0.
METHOD ?=
PARETO ?= gguf-q8_0 gguf-q5_0 gguf-q5_0-nearest gguf-q4_1 gguf-q4_0-nearest gguf-q4_0 gguf-iq4_nl-nearest gguf-iq4_nl \
	gguf-iq4_nl-q5_0 nf4
WAYS ?= gguf-iq4_nl-q5_0 gguf-q5_0 gguf-q4_0-nearest-q8_0

pareto := $(patsubst %,$(ROOT)/models/$(TAG)-pareto-%,$(sort $(PARETO)))
distilled := gguf-iq4_nl-distilled
chosen := $(patsubst %,$(ROOT)/models/$(TAG)-lora-%,$(sort $(METHOD) $(distilled) $(WAYS)))
int4_lora := $(ROOT)/models/$(TAG)-int4-lora
ways := $(distilled:%=lora-%) int4-lora $(WAYS:%=lora-%)
compared := $(patsubst %,$(reports)/eval-$(TAG)-%,$(variants) $(ways))
certificate := $(reports)/certificate-$(TAG)-int4-lora

values_setting := DATA SAMPLES SEED PROFILE QUANTIZE_FLAGS
values_pareto := PARETO
values_certify := DATA SEED PROFILE
values_ways := WAYS
values_methods := METHOD PARETO WAYS

# Settings are checked before anything is trained. An empty METHOD is an error that lists the methods.
check_methods = @PYTHONPATH=scripts $(PYTHON) -c 'import quantize; quantize.check_methods()'
known := $(ROOT)/.make/known-methods
$(known): $(stamps)/methods/all | $(venv)
	$(check_methods) $(call quoted,$(METHOD) $(PARETO) $(WAYS)) && touch $@

.PHONY: quantize pareto ways
quantize: $(if $(METHOD),$(known) $(METHOD:%=$(ROOT)/models/$(TAG)-lora-%/metadata.json)) | $(venv) ## quantise the merged model with METHOD=…: models/<tag>-lora-<method>
	$(if $(METHOD),@:,$(check_methods) '')
pareto: $(known) $(reports)/$(TAG)-pareto/metadata.json ## compare size and divergence of the PARETO settings: reports/<tag>-pareto/
ways: $(known) $(reports)/$(TAG)-ways/metadata.json ## compare three recipes for LoRA-INT4, and those in WAYS: reports/<tag>-ways/

setting = $(patsubst $(TAG)-lora-%,%,$(patsubst $(TAG)-pareto-%,%,$(notdir $(@D))))
$(patsubst %,%/metadata.json,$(pareto) $(chosen)): $(merged)/metadata.json $(base)/metadata.json $(data)/metadata.json \
		$(call code,quantize) $(stamps)/setting/$(TAG) | $(venv)
	$(run) scripts/quantize.py --model $(merged) --base $(base) --data $(data) --seed $(SEED) $(profile) $(QUANTIZE_FLAGS) \
		--method $(setting) $(if $(findstring -distilled,$(setting)),--distil-samples $(SAMPLES)) \
		$(if $(filter $(TAG)-pareto-%,$(notdir $(@D))),--accept-divergence) --output $(@D)

$(reports)/$(TAG)-pareto/metadata.json: $(pareto:%=%/metadata.json) $(call stage,pareto,$(TAG))
	$(run) scripts/pareto.py --models $(pareto) --output $(@D)

# The same training on the 4-bit base. The adapter is not merged.
$(int4_lora)/metadata.json: $(int4)/metadata.json $(data)/metadata.json $(call stage,sft,$(TAG)-int4-lora)
	$(run) scripts/sft.py --model $(int4) --data $(data) --samples $(SAMPLES) --epochs $(EPOCHS) --seed $(SEED) \
		$(profile) $(SFT_FLAGS) --run $(runs)/sft-$(TAG)-int4 --output $(@D)

# The variants of mk/variants.mk and the recipes are evaluated in the same way.
$(compared:%=%/metadata.json): $(reports)/eval-$(TAG)-%/metadata.json: $(ROOT)/models/$(TAG)-%/metadata.json $(data)/metadata.json \
		$(call stage,evaluate,$(TAG)-%)
	$(run) scripts/evaluate.py --model $(<D) --data $(data) --samples $(EVAL_SAMPLES) --seed $(SEED) \
		$(profile) $(EVALUATE_FLAGS) --run $(runs)/eval-$(TAG)-$* --output $(@D)

# quantize.py checks the divergence of its own output. For an adapter on a quantised base, certify.py measures it.
$(certificate)/metadata.json: $(int4_lora)/metadata.json $(lora)/metadata.json $(base)/metadata.json \
		$(data)/metadata.json $(call stage,certify,$(TAG))
	$(run) scripts/certify.py --reference $(lora) --model $(int4_lora) --base $(base) --data $(data) --seed $(SEED) \
		$(profile) --output $(@D)

$(reports)/$(TAG)-ways/metadata.json: $(compared:%=%/metadata.json) $(certificate)/metadata.json \
		$(call code,report) $(stamps)/ways/$(TAG) | $(venv)
	$(run) scripts/report.py --evaluations $(compared) --certificates $(certificate) --tag $(TAG) --output $(@D)
