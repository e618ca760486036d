# export: a variant with the figures of its report; what is missing is built and evaluated first.

# VARIANT is lora-int4 by default. TO is a directory elsewhere, a file, or user/name on the Hub.
TO ?=
EXPORT_FLAGS ?=

exports := export-zip export-folder export-hub export-gguf export-ollama
exportable := $(variants) lora-merged $(recipes) $(METHOD:%=lora-%) $(align)-sft $(align)-dpo
ifneq ($(filter $(exports),$(MAKECMDGOALS)),)
ifeq ($(filter $(exportable),$(VARIANT)),)
$(error VARIANT=$(VARIANT): expected one of $(exportable); for another quantisation setting, also give METHOD=<setting>)
endif
endif

.PHONY: $(exports)
export-zip: ## export VARIANT as a zip file: exports/, or TO=file.zip
export-folder: ## copy VARIANT to TO=/mnt/drive/name
export-hub: ## upload VARIANT to a private Hub repository TO=user/name
export-gguf: ## export VARIANT as a GGUF for llama.cpp: exports/, or TO=directory
export-ollama: ## export VARIANT as a GGUF with a Modelfile for Ollama: exports/, or TO=directory

# llama.cpp and Ollama need the adapter merged into its base.
exported = $(ROOT)/models/$(MODEL_NAME)-$(if $(filter export-gguf export-ollama,$1),$(VARIANT:lora=lora-merged),$(VARIANT))
export_to = $(or $(TO),$(ROOT)/exports/$(notdir $(call exported,$@))$(if $(filter %zip,$@),.zip,$(if $(filter %folder,$@),,-$(@:export-%=%))))
was_aligned = $(filter $(align)-%,$(VARIANT))
export-gguf export-ollama: $(call exported,export-gguf)/metadata.json
export_report = $(reports)/$(if $(was_aligned),$(family),$(MODEL_NAME))
$(exports): $(ROOT)/models/$(MODEL_NAME)-$(VARIANT)/metadata.json $(export_report)/metadata.json | $(venv)
	@$(if $(TO)$(filter-out export-folder export-hub,$@),:,echo "make $@ VARIANT=$(VARIANT): TO is missing; give TO=directory, or TO=user/name for the Hub" >&2; exit 2)
	$(alone) scripts/export.py --format $(@:export-%=%) --model $(call exported,$@) --report $(export_report) \
		--data $(if $(was_aligned),$(align_test),$(data)) --seed $(SEED) $(if $(TO),,--replace) \
		$(if $(filter export-hub,$@),--record $(ROOT)/exports/$(MODEL_NAME)-$(VARIANT).hub.json) $(EXPORT_FLAGS) \
		--to $(call quoted,$(export_to))
