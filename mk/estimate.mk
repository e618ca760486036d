# estimate: time, disk and cost of a pipeline. A machine's speed changes, so each run makes a new estimate.

# GOAL is the pipeline to estimate.
ESTIMATE_FLAGS ?=

ifneq ($(filter estimate,$(MAKECMDGOALS)),)
ifeq ($(filter all align clara,$(GOAL)),)
$(error GOAL=$(GOAL): expected all, align or clara)
endif
endif

estimated := $(or $(if $(filter align,$(GOAL)),$(family)),$(if $(filter clara,$(GOAL)),$(TAG)-clara),$(TAG))
estimate_data := $(if $(filter align,$(GOAL)),$(align_test),$(data))
estimate_rows := $(if $(filter clara,$(GOAL)),$(clara_data))

estimation := $(reports)/$(estimated)-estimate

.PHONY: estimate
estimate: $(estimation)/metadata.json ## estimate time, disk and cost of GOAL=all, align or clara
# estimate.py reads the stages from `make -n $(GOAL)`, which inherits the values of this make.
$(estimation)/metadata.json: $(patsubst %,%/metadata.json,$(base) $(estimate_data) $(estimate_rows)) FORCE | $(venv)
	$(alone) scripts/estimate.py --goal $(GOAL) $(profile) $(ESTIMATE_FLAGS) --output $(@D)
