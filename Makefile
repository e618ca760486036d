# Quartet: four measured variants of a small language model. `make help` lists the targets; the rules are in mk/.
#
# A target is the metadata.json of an artifact, which its script writes last. The values that an artifact depends on
# (SAMPLES, SEED …) are in a file of their own, a stamp, which is rewritten only when a value changes.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

# --- values: give them on the command line, make all SAMPLES=300; those of one pipeline are in its file in mk/ ----------

include mk/values.mk

# Where everything is written; the smoke run has a root of its own.
ROOT ?= .
stamps := $(ROOT)/.make/values
# A value that is not given is the one that this name's artifacts were last built with: see mk/memory.mk.
include mk/memory.mk

MODEL ?= smollm2-135m
REVISION ?= main
SOURCE ?= factbook
SAMPLES ?= 200
EPOCHS ?= 1
EVAL_SAMPLES ?= 100
SEED ?= 42
QUANT ?= auto
PROFILE ?= auto
# For preemptible machines: a directory (a mounted drive) that gets a copy of each finished artifact, and one from which
# artifacts are copied instead of being built.
MIRROR_TO ?=
MIRROR_FROM ?=
# The name of a model or of a data set: the last part of its path or Hub id, without an extension.
MODEL_NAME ?= $(call name_of_model,$(MODEL))
DATA_NAME ?= $(call name_of_data,$(SOURCE))
# With PYTHON=python3, an interpreter that already has the packages, nothing is installed into .venv.
PYTHON ?= .venv/bin/python
# The build of torch in .venv: cpu, cuda (for NVIDIA GPUs), or auto, which is cpu where there is no NVIDIA device. Another
# value installs anew; without one, the build that is installed stays.
TORCH ?= $(or $(file < .venv/torch),auto)
# V=1 shows each stage's full command.
V ?=
export V

# --- places ------------------------------------------------------------------------------------------------------------

venv := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/core)
base := $(ROOT)/models/$(MODEL_NAME)-base
lora := $(ROOT)/models/$(MODEL_NAME)-lora
merged := $(ROOT)/models/$(MODEL_NAME)-lora-merged
int4 := $(ROOT)/models/$(MODEL_NAME)-int4
lora_int4 := $(ROOT)/models/$(MODEL_NAME)-lora-int4
data := $(ROOT)/data/$(DATA_NAME)/raw
reports := $(ROOT)/reports
runs := $(ROOT)/runs

# --- helpers -----------------------------------------------------------------------------------------------------------

profile := --profile $(PROFILE)

# How a stage is run: one at a time, with a line before and after it, and with its artifact mirrored on request.
alone = @exec python3 mk/stage.py $(ROOT)/.make $(call quoted,$(MAKECMDGOALS)) $(call quoted,$(filter $(profile_file) $(stamps:./%=%)/%,$^)) $(PYTHON)
mirror = scripts/mirror.py --root $(ROOT) $(if $(MIRROR_TO),--to $(call quoted,$(MIRROR_TO)))
taking = $(if $(MIRROR_FROM),--from $(call quoted,$(MIRROR_FROM)))
run = $(alone) $(if $(MIRROR_TO)$(MIRROR_FROM),$(mirror) --output $(@D) $(taking) --)

# What a stage depends on besides its inputs: its script, the modules that it imports, its defaults and its values. The
# imports are read from the scripts, and read again when one of them changes.
imports := .make/imports.mk
$(imports): $(wildcard scripts/*.py scripts/lib/*/*.py)
	@mkdir -p $(@D) && python3 scripts/lib/core/imports.py > $@.$$$$ && mv $@.$$$$ $@ # two makes may run this at once
include $(imports)
# A change in a profile makes stale only what uses it. `auto` is the profile cpu without an NVIDIA driver. With one it is a
# copy of the profile that this GPU gets, which is rewritten only if its content changes.
gpu := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg)
profile_file = $(if $(filter auto,$(PROFILE)),$(if $(gpu),.make/profile.yaml,configs/profiles/cpu.yaml),$(wildcard configs/profiles/$(PROFILE).yaml))
.make/profile.yaml: .make/profile.checked ;
.make/profile.checked: $(wildcard configs/profiles/*.yaml) scripts/lib/core/hardware.py | $(venv)
	@mkdir -p $(@D) && name=$$(PYTHONPATH=scripts $(PYTHON) -c 'from lib.core import hardware; print(hardware.recognise_profile()[0])') && \
		{ cmp -s configs/profiles/$$name.yaml .make/profile.yaml || cp configs/profiles/$$name.yaml .make/profile.yaml; } && touch $@
code = scripts/$1.py $(imports_$1) $(wildcard configs/$1.yaml) $(profile_file)
stage = $(call code,$1) $(stamps)/$1/$2 | $(venv)
# Inputs of an artifact ($2), and the models that it is derived from ($4). An artifact that exists, and that all goals only
# use ($3), needs the latter alone, if they exist, and $5: no goal retrains a model in passing, and none uses what an older
# one gave.
goals := $(or $(MAKECMDGOALS),help)
uses := help evaluate report quantize pareto export-% bench-memory estimate verify doctor
needs = $(if $(and $(wildcard $(ROOT)/$1/metadata.json),$(if $(filter-out $3,$(goals)),,used)),$(eval left_alone += $1)$(wildcard $4) $5,$4 $2)
left_alone :=
# Artifacts, as models/x-base, of which an input has other content now. Times do not tell: a file may replace a newer one.
changed := $(shell python3 -SE scripts/lib/core/inputs.py $(call quoted,$(ROOT)) $(if $(findstring n,$(filter-out --%,$(firstword -$(MAKEFLAGS)))),,--remember))

# --- targets -----------------------------------------------------------------------------------------------------------

.PHONY: help FORCE
help: ## show this list
	@echo "Quartet: make all SAMPLES=200 builds and evaluates four variants of a small language model."
	@sed -n 's/^\([a-zA-Z0-9_-][a-zA-Z0-9_-]*\):.*## \(.*\)/\1|\2/p' $(filter-out %/imports.mk,$(MAKEFILE_LIST)) | \
		while IFS='|' read -r goal text; do printf '  %-14s %s\n' "$$goal" "$$text"; done
	@echo Values: $(call quoted,$(foreach name,MODEL SOURCE SAMPLES EPOCHS EVAL_SAMPLES SEED QUANT,$(name)=$($(name))))
	@echo "All variables, explained in Makefile and mk/*.mk: $(variables)"

include mk/variants.mk mk/settings.mk mk/align.mk mk/clara.mk mk/export.mk mk/estimate.mk mk/checks.mk

$(patsubst %,$(ROOT)/%/metadata.json,$(filter-out $(left_alone),$(changed))): FORCE

# An artifact is replaced whole or not at all. Make must not delete its metadata.json when it is interrupted or when what
# comes after the artifact fails: without it, the directory would count as somebody else's, and block the next run.
.PRECIOUS: $(artifacts:%=%/metadata.json)

ifneq ($(filter-out auto cpu cuda,$(TORCH)),)
$(error TORCH=$(TORCH): expected auto, cpu or cuda)
endif
$(if $(call differs,$(TORCH),$(file < .venv/torch)),$(eval .venv/core: FORCE))
.venv/core: requirements.txt $(wildcard requirements/*.lock)
	@python3 mk/install.py --torch $(call quoted,$(TORCH)) && touch $@

.venv/%: requirements/%.txt .venv/core
	@python3 mk/install.py --extra $* && touch $@

# A stamp is rewritten if its content differs from its stage's values. They are compared here without writing, so that
# `make -n` and other goals do not change the values of the last run. values_<stage> lists names of variables.
stamp = $(foreach name,$(values_$1),$(call quoted,$(name) ?= $(call escaped,$($(name)))))
escaped = $(subst #,$$(hash),$(subst \,$$(backslash),$(subst $$,$$$$,$1)))
stamped = $(foreach name,$(values_$1),$(name) ?= $(call escaped,$($(name))))
stage_of = $(notdir $(patsubst %/,%,$(dir $1)))
$(foreach s,$(wildcard $(stamps)/*/*),$(if $(call differs,$(subst $(newline), ,$(file <$s)),$(call stamped,$(call stage_of,$s))),$(eval $s: FORCE)))
$(stamps)/%:
	@mkdir -p $(@D) && printf '%s\n' $(call stamp,$(call stage_of,$@)) > $@
FORCE:

# Remembered values that were not given; mk/stage.py prints them.
remembered_names := $(filter-out rows_of_magpie,$(sort $(foreach file,$(remembered),$(values_$(call stage_of,$(file))))))
export REMEMBERED := $(strip $(foreach name,$(remembered_names),$(if $(filter file,$(origin $(name))),$(if $($(name)),$(name)=$($(name))))))
