# Quartet: four measured variants of a small language model. `make help` lists the targets; the rules are in mk/.
#
# A target is the metadata.json of an artifact, which its script writes last. What an artifact depends on besides files
# (SAMPLES, SEED …) is in a file of its own, rewritten only when it changes.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

# --- values: give them on the command line, make all SAMPLES=300; those of one pipeline are in its file in mk/ ----------

# Where everything is written; the smoke run has a root of its own.
ROOT ?= .
stamps := $(ROOT)/.make/values
# What is not given is as it was when the artifacts of this name were made: see mk/memory.mk.
include mk/memory.mk

MODEL ?= smollm2-135m
REVISION ?= main
SOURCE ?= factbook
SAMPLES ?= 200
EPOCHS ?= 1
EVAL_SAMPLES ?= 100
SEED ?= 42
INT4 ?= auto
PROFILE ?= auto
# For preemptible machines: a directory, such as a mounted drive, that gets a copy of each finished artifact, and one from
# which artifacts are taken instead of being made.
EXPORT_TO ?=
IMPORT_FROM ?=
# The name of a model or of a data set: the last part of its path or Hub id, without an extension.
TAG ?= $(call name_of_model,$(MODEL))
DATA ?= $(call name_of_data,$(SOURCE))
# An interpreter that is set up already, PYTHON=python3, spares the installation into .venv.
PYTHON ?= .venv/bin/python
# V=1 shows each stage's whole command.
V ?=
export V

# --- places ------------------------------------------------------------------------------------------------------------

venv := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/core)
base := $(ROOT)/models/$(TAG)-base
lora := $(ROOT)/models/$(TAG)-lora
merged := $(ROOT)/models/$(TAG)-lora-merged
int4 := $(ROOT)/models/$(TAG)-int4
lora_int4 := $(ROOT)/models/$(TAG)-lora-int4
data := $(ROOT)/data/$(DATA)/raw
reports := $(ROOT)/reports
runs := $(ROOT)/runs

# --- helpers -----------------------------------------------------------------------------------------------------------

quoted = '$(subst ','\'',$1)'
profile := --profile $(PROFILE)

# How a stage is run: one at a time, with a line before and after it; with artifacts mirrored where that is asked for.
alone = @exec python3 mk/stage.py $(ROOT)/.make $(call quoted,$(MAKECMDGOALS)) $(call quoted,$(filter $(stamps:./%=%)/%,$^)) $(PYTHON)
mirror = scripts/carry.py --root $(ROOT) $(if $(EXPORT_TO),--keep $(call quoted,$(EXPORT_TO)))
taking = $(if $(IMPORT_FROM),--take $(call quoted,$(IMPORT_FROM)))
run = $(alone) $(if $(EXPORT_TO)$(IMPORT_FROM),$(mirror) --output $(@D) $(taking) --)

# What a stage is made of besides its inputs: its script and all that it imports, its defaults, its values. Which modules
# a script imports is read from the scripts, and again when one of them changes.
imports := .make/imports.mk
$(imports): $(wildcard scripts/*.py scripts/lib/*/*.py)
	@mkdir -p $(@D) && python3 scripts/lib/core/imports.py > $@.$$$$ && mv $@.$$$$ $@ # two makes may do so at once
include $(imports)
# Without an NVIDIA driver `auto` is the profile cpu, so that no profile of a GPU makes anything stale.
gpu := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg)
profiles = $(wildcard configs/profiles/$(PROFILE:auto=$(if $(gpu),*,cpu)).yaml)
code = scripts/$1.py $(imports_$1) $(wildcard configs/$1.yaml) $(profiles)
stage = $(call code,$1) $(stamps)/$1/$2 | $(venv)
# Inputs of an artifact; none where it is there and the goals only use it, so that no goal trains over a model in passing.
goals := $(or $(MAKECMDGOALS),help)
uses := help evaluate report quantize pareto ways export-% memory estimate verify doctor
from = $(if $(and $(wildcard $(ROOT)/$1/metadata.json),$(if $(filter-out $(uses) $3,$(goals)),,used)),,$2)

# --- targets -----------------------------------------------------------------------------------------------------------

.PHONY: help FORCE
help: ## show this list
	@echo "Quartet: make all SAMPLES=200 makes and measures four variants of a small language model."
	@sed -n 's/^\([a-zA-Z0-9_-][a-zA-Z0-9_-]*\):.*## \(.*\)/\1|\2/p' $(filter-out %/imports.mk,$(MAKEFILE_LIST)) | \
		while IFS='|' read -r goal text; do printf '  %-14s %s\n' "$$goal" "$$text"; done
	@echo "Values: MODEL=$(MODEL) SOURCE=$(SOURCE) SAMPLES=$(SAMPLES) EPOCHS=$(EPOCHS) EVAL_SAMPLES=$(EVAL_SAMPLES) SEED=$(SEED) INT4=$(INT4)"

include mk/variants.mk mk/settings.mk mk/align.mk mk/clara.mk mk/export.mk mk/estimate.mk mk/checks.mk

.venv/%: requirements/%.txt .venv/core
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/$*.txt
	touch $@

.venv/core: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# A stamp whose content is not its stage's values any more is made again; reading them here writes nothing, so that
# `make -n` and other goals leave the values of the last run alone. A stage's values_<stage> are names of variables.
stamp = $(foreach name,$(values_$1),$(call quoted,$(name) ?= $(call escaped,$($(name)))))
escaped = $(subst #,\#,$(subst $$,$$$$,$1))
define newline


endef
stamped = $(foreach name,$(values_$1),$(name) ?= $(call escaped,$($(name))))
differs = $(subst x$1,,x$2)$(subst x$2,,x$1)
stage_of = $(notdir $(patsubst %/,%,$(dir $1)))
$(foreach s,$(wildcard $(stamps)/*/*),$(if $(call differs,$(subst $(newline), ,$(file <$s)),$(call stamped,$(call stage_of,$s))),$(eval $s: FORCE)))
$(stamps)/%:
	@mkdir -p $(@D) && printf '%s\n' $(call stamp,$(call stage_of,$@)) > $@
FORCE:

# What is remembered and not given, for mk/stage.py to say.
known := $(sort $(foreach file,$(remembered),$(values_$(call stage_of,$(file)))))
export REMEMBERED := $(strip $(foreach name,$(known),$(if $(filter file,$(origin $(name))),$(if $($(name)),$(name)=$($(name))))))
