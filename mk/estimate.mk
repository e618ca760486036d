# estimate: time, disk and cost of a pipeline. A machine's speed changes, so each run makes a new estimate.

# PIPELINE is the pipeline to estimate.
ESTIMATE_FLAGS ?=

ifneq ($(filter estimate,$(MAKECMDGOALS)),)
ifeq ($(filter all align clara,$(PIPELINE)),)
$(error PIPELINE=$(PIPELINE): expected all, align or clara)
endif
endif

estimated := $(or $(if $(filter align,$(PIPELINE)),$(family)),$(if $(filter clara,$(PIPELINE)),$(MODEL_NAME)-clara),$(MODEL_NAME))
estimate_data := $(if $(filter align,$(PIPELINE)),$(align_test),$(data))
estimate_rows := $(if $(filter clara,$(PIPELINE)),$(clara_data))

estimation := $(reports)/$(estimated)-estimate
artifacts += $(estimation)

.PHONY: estimate
estimate: $(estimation)/metadata.json ## estimate time, disk and cost of PIPELINE=all, align or clara
# estimate.py reads the stages from `make -n $(PIPELINE)`, which inherits the values of this make.
$(estimation)/metadata.json: $(patsubst %,%/metadata.json,$(base) $(estimate_data) $(estimate_rows)) FORCE | $(venv)
	$(alone) scripts/estimate.py --pipeline $(PIPELINE) $(profile) $(ESTIMATE_FLAGS) --output $(@D)
