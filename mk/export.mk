# export: a variant with the figures of its report, which measures what was not measured yet.

# VARIANT is lora-int4 unless given. TO is a folder elsewhere, a file, or user/name on the Hub.
TO ?=
EXPORT_FLAGS ?=

exports := export-zip export-folder export-hub export-gguf export-ollama
exportable := $(variants) lora-merged $(ways) $(METHOD:%=lora-%) $(align)-sft $(align)-dpo
ifneq ($(filter $(exports),$(MAKECMDGOALS)),)
ifeq ($(filter $(exportable),$(VARIANT)),)
$(error VARIANT=$(VARIANT): expected one of $(exportable); a setting of your own needs METHOD=<setting> beside it)
endif
endif

.PHONY: $(exports)
export-zip: ## VARIANT as a zip, in exports/ or TO=file.zip
export-folder: ## VARIANT copied to TO=/mnt/drive/name
export-hub: ## VARIANT as a private Hub repository TO=user/name
export-gguf: ## VARIANT as a GGUF for llama.cpp, in exports/ or TO=
export-ollama: ## the same with a Modelfile for Ollama

# llama.cpp and Ollama take an adapter merged into its base.
exported = $(ROOT)/models/$(TAG)-$(if $(filter export-gguf export-ollama,$1),$(VARIANT:lora=lora-merged),$(VARIANT))
export_to = $(or $(TO),$(ROOT)/exports/$(notdir $(call exported,$@))$(if $(filter %zip,$@),.zip,$(if $(filter %folder,$@),,-$(@:export-%=%))))
was_aligned = $(filter $(align)-%,$(VARIANT))
export_report = $(reports)/$(if $(was_aligned),$(family),$(TAG))
$(exports): $(ROOT)/models/$(TAG)-$(VARIANT)/metadata.json $(export_report)/metadata.json | $(venv)
	@$(if $(TO)$(filter-out export-folder export-hub,$@),:,echo "make $@ VARIANT=$(VARIANT) wants TO=…: a directory elsewhere, or user/name on the Hub" >&2; exit 2)
	$(alone) scripts/export.py --form $(@:export-%=%) --model $(call exported,$@) --report $(export_report) \
		--data $(if $(was_aligned),$(align_test),$(data)) --seed $(SEED) $(if $(TO),,--replace) \
		$(if $(filter export-hub,$@),--record $(ROOT)/exports/$(TAG)-$(VARIANT).hub.json) $(EXPORT_FLAGS) --to $(call quoted,$(export_to))
