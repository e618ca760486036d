# Quartet: four measured variants of a small language model.  `make help` lists the goals.
#
# Targets are the metadata.json of artifacts, which scripts write last; what a stage depends on besides files
# (SAMPLES, SEED …) stands in one stamp a stage, rewritten only when it changes.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

# --- values: give them on the command line, make all SAMPLES=300 ---------------------------------------

MODEL ?= smollm2-135m
REVISION ?= main
SOURCE ?= factbook
SAMPLES ?= 200
EPOCHS ?= 1
EVAL_SAMPLES ?= 100
SEED ?= 42
INT4 ?= auto
PROFILE ?= auto
# Settings that `make pareto` compares, that `make ways` evaluates beside its three ways, and that `make quantize` makes:
# <method>, then -nearest (llama.cpp's own rounding), -distilled (scales that learn from the model, on SAMPLES rows), or
# -<quantisation of the embedding>. llama.cpp's own Q4_0 of a model with a tied embedding is gguf-q4_0-nearest-q8_0.
PARETO ?= gguf-q8_0 gguf-q5_0 gguf-q5_0-nearest gguf-q4_1 gguf-q4_0-nearest gguf-q4_0 gguf-iq4_nl-nearest gguf-iq4_nl \
	gguf-iq4_nl-q5_0 nf4
WAYS ?= gguf-iq4_nl-q5_0 gguf-q5_0 gguf-q4_0-nearest-q8_0
METHOD ?=
# What `make align` learns from: magpie (RAW rows that MODEL writes itself), factbook, or a file. SAMPLES of those that are
# fit for it tune the model; PAIRS pairs of its own responses (with magpie, to prompts of SOURCE) tell it what is preferred.
ALIGN_DATA ?= magpie
RAW ?= $(shell expr $(SAMPLES) \* 3 / 2)
PAIRS ?= 100
HELD_OUT_PAIRS ?= 100
# Which pipeline's checklist `make doctor` goes through: BEFORE=all or AFTER=all.
BEFORE ?=
AFTER ?=
# For machines that may disappear: a directory, a mounted drive for instance, that gets a copy of each artifact as soon as
# it is whole, and one that artifacts are taken from in the place of making them.
EXPORT_TO ?=
IMPORT_FROM ?=
# What `make export-…` takes out of here, and where to: a folder elsewhere, or user/name on the Hub.
VARIANT ?= lora-int4
TO ?=
EXPORT_FLAGS ?=
# Where everything is written; the smoke run has a root of its own.
ROOT ?= .
# The name of a model or of a data set: the last part of its path or Hub id, without an extension.
TAG ?= $(lastword $(subst /, ,$(MODEL)))
DATA ?= $(firstword $(subst ., ,$(lastword $(subst /, ,$(SOURCE)))))
# Flags for single stages, e.g. make all SFT_FLAGS="--lora-r 16"
FETCH_FLAGS ?=
DATA_FLAGS ?=
SFT_FLAGS ?=
QUANTIZE_FLAGS ?=
EVALUATE_FLAGS ?=
MAGPIE_FLAGS ?=
FILTER_FLAGS ?=
PREFERENCES_FLAGS ?=
DPO_FLAGS ?=
FORGETTING_FLAGS ?=
CLARA_DATA_FLAGS ?=
STAGE1_FLAGS ?=
STAGE2_FLAGS ?=
STAGE3_FLAGS ?=
# What a longer run reached, to be shown beside this one.
CLARA_AGAINST ?= $(wildcard docs/results/clara/comparison.json)
EVALUATE_CLARA_FLAGS ?=
ESTIMATE_FLAGS ?=
# The pipeline that `make estimate` forecasts.
GOAL ?= all

# An interpreter that is set up already, PYTHON=python3, spares the installation into .venv.
PYTHON ?= .venv/bin/python
venv := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/core)
TESTS ?= tests

align := $(firstword $(subst ., ,$(lastword $(subst /, ,$(ALIGN_DATA)))))
ifneq ($(words $(TAG)) $(words $(DATA)) $(words $(ROOT)) $(words $(ALIGN_DATA)),1 1 1 1)
$(error TAG=$(TAG), DATA=$(DATA), ROOT=$(ROOT) and ALIGN_DATA=$(ALIGN_DATA) must each be one word: give TAG=name or DATA=name where a path has spaces)
endif

base := $(ROOT)/models/$(TAG)-base
lora := $(ROOT)/models/$(TAG)-lora
merged := $(ROOT)/models/$(TAG)-lora-merged
int4 := $(ROOT)/models/$(TAG)-int4
lora_int4 := $(ROOT)/models/$(TAG)-lora-int4
pareto := $(patsubst %,$(ROOT)/models/$(TAG)-pareto-%,$(sort $(PARETO)))
distilled := gguf-iq4_nl-distilled
ways := $(distilled:%=lora-%) int4-lora $(WAYS:%=lora-%)
chosen := $(patsubst %,$(ROOT)/models/$(TAG)-lora-%,$(sort $(METHOD) $(distilled) $(WAYS)))
int4_lora := $(ROOT)/models/$(TAG)-int4-lora
data := $(ROOT)/data/$(DATA)/raw
reports := $(ROOT)/reports
stamps := $(ROOT)/.make
runs := $(ROOT)/runs

written := $(filter magpie,$(ALIGN_DATA))
family := $(TAG)-$(align)
align_raw := $(ROOT)/data/$(if $(written),$(family),$(align))/raw
filtered := $(ROOT)/data/$(family)/filtered
preferences := $(ROOT)/data/$(family)/preferences
ifeq ($(align_raw) $(filter $(SOURCE),$(ALIGN_DATA)),$(data) )
$(error ALIGN_DATA=$(ALIGN_DATA) and SOURCE=$(SOURCE) would both be $(data): give DATA=name, the name of SOURCE)
endif
# The held-out rows that base, SFT and DPO are measured on.
align_test := $(if $(written),$(data),$(align_raw))

clara := $(ROOT)/models/$(TAG)-clara
clara_data := $(ROOT)/data/$(DATA)/clara

variants := base int4 lora lora-int4
steps := base sft dpo
evaluations := $(variants:%=$(reports)/eval-$(TAG)-%)
compared := $(patsubst %,$(reports)/eval-$(TAG)-%,$(variants) $(ways))
aligned := $(steps:%=$(reports)/eval-$(family)-%)
forgetting := $(reports)/forgetting-$(TAG)-base $(reports)/forgetting-$(family)-sft $(reports)/forgetting-$(family)-dpo
certificate := $(reports)/certificate-$(TAG)-int4-lora
profile := --profile $(PROFILE)

# --- helpers -------------------------------------------------------------------------------------------

# Heavy recipes take turns, so that -j is safe on a small machine and timings are not disturbed.
alone = mkdir -p $(stamps) && flock $(stamps)/lock
run = $(alone) $(PYTHON) $(if $(EXPORT_TO)$(IMPORT_FROM),$(carry) --output $(@D) $(if $(IMPORT_FROM),--take $(call quoted,$(IMPORT_FROM))) --)
carry = scripts/carry.py --root $(ROOT) $(if $(EXPORT_TO),--keep $(call quoted,$(EXPORT_TO)))

# What a stage is made of besides its inputs: its script and all that it imports, its defaults, its values. Which modules
# a script imports is read from the scripts, and again when one of them changes.
imports := .make/imports.mk
$(imports): $(wildcard scripts/*.py scripts/lib/*/*.py)
	@mkdir -p $(@D) && python3 scripts/lib/core/imports.py > $@.tmp && mv $@.tmp $@
include $(imports)
# Without an NVIDIA driver `auto` is the profile cpu, so that no profile of a GPU makes anything stale.
gpu := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg)
profiles = $(wildcard configs/profiles/$(PROFILE:auto=$(if $(gpu),*,cpu)).yaml)
code = scripts/$1.py $(imports_$1) $(wildcard configs/$1.yaml) $(profiles)
# Rows of a file or of the Factbook need no engine: its flags alone are imported.
code_of_rows = $(filter scripts/generate_data.py scripts/lib/core/% scripts/lib/data/% configs/%,$(call code,generate_data))
stage = $(call code,$1) $(stamps)/$1 | $(venv)

values_fetch_base = $(MODEL) $(REVISION) $(FETCH_FLAGS)
values_generate_data = $(SOURCE) $(SEED) $(DATA_FLAGS)
values_sft = $(SAMPLES) $(EPOCHS) $(SEED) $(PROFILE) $(SFT_FLAGS)
values_merge_lora = $(SEED) $(PROFILE)
values_quantize = $(INT4) $(SEED) $(PROFILE) $(QUANTIZE_FLAGS)
values_setting = $(SAMPLES) $(SEED) $(PROFILE) $(QUANTIZE_FLAGS)
values_pareto = $(PARETO)
values_certify = $(SEED) $(PROFILE)
values_evaluate = $(EVAL_SAMPLES) $(SEED) $(PROFILE) $(EVALUATE_FLAGS)
values_magpie = $(RAW) $(SEED) $(PROFILE) $(MAGPIE_FLAGS)
values_align_data = $(ALIGN_DATA) $(SEED) $(DATA_FLAGS)
values_filter_data = $(SEED) $(FILTER_FLAGS)
values_generate_preferences = $(PAIRS) $(HELD_OUT_PAIRS) $(SEED) $(PROFILE) $(PREFERENCES_FLAGS)
values_dpo = $(PAIRS) $(SEED) $(PROFILE) $(DPO_FLAGS)
values_forgetting = $(SEED) $(PROFILE) $(FORGETTING_FLAGS)
values_generate_clara_data = $(SEED) $(CLARA_DATA_FLAGS)
values_train_stage1 = $(SAMPLES) $(SEED) $(PROFILE) $(STAGE1_FLAGS)
values_train_stage2 = $(SAMPLES) $(SEED) $(PROFILE) $(STAGE2_FLAGS)
values_train_stage3 = $(SAMPLES) $(SEED) $(PROFILE) $(STAGE3_FLAGS)
values_evaluate_clara = $(EVAL_SAMPLES) $(SEED) $(PROFILE) $(CLARA_AGAINST) $(EVALUATE_CLARA_FLAGS)
values_report =
values_ways = $(WAYS)
values_bench_memory = $(SEED) $(PROFILE)

# A stamp whose content is not its stage's values any more is made anew; reading them here writes nothing, so that
# `make -n` and other goals leave the values of the last run alone.
stamp = $(strip $1 $(values_$1))
differs = $(subst x$1,,x$2)$(subst x$2,,x$1)
quoted = '$(subst ','\'',$1)'
stages := $(patsubst values_%,%,$(filter values_%,$(.VARIABLES)))
$(foreach s,$(stages),$(if $(call differs,$(file <$(stamps)/$s),$(call stamp,$s)),$(eval $(stamps)/$s: FORCE)))
$(stamps)/%:
	@mkdir -p $(@D) && printf '%s\n' $(call quoted,$(call stamp,$*)) > $@
FORCE:

# --- goals ---------------------------------------------------------------------------------------------

.PHONY: export-zip export-folder export-hub export-gguf export-ollama help all base data lora lora-merged int4 lora-int4 quantize pareto ways memory align align-rehearsal preferences clara evaluate report estimate verify doctor smoke test test-slow lint clean distclean FORCE

help: ## show this list
	@echo "Quartet: make all SAMPLES=200 makes and measures four variants of a small language model."
	@sed -n 's/^\([a-zA-Z0-9_-][a-zA-Z0-9_-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r goal text; do printf '  %-14s %s\n' "$$goal" "$$text"; done
	@echo "Values: MODEL=$(MODEL) SOURCE=$(SOURCE) SAMPLES=$(SAMPLES) EPOCHS=$(EPOCHS) EVAL_SAMPLES=$(EVAL_SAMPLES) SEED=$(SEED) INT4=$(INT4)"

all: report ## base, int4, lora, lora-int4: made, measured, compared
base: $(base)/metadata.json ## the base model, 16 bit
data: $(data)/metadata.json ## the rows, split into train, validation, test
lora: $(lora)/metadata.json ## the LoRA adapter, trained on SAMPLES rows
lora-merged: $(merged)/metadata.json ## adapter and base as one 16-bit model
int4: $(int4)/metadata.json ## the base in 4 bit
lora-int4: $(lora_int4)/metadata.json ## the merged model in 4 bit
quantize: $(METHOD:%=$(ROOT)/models/$(TAG)-lora-%/metadata.json) | $(venv) ## the merged model by METHOD=…, as models/<tag>-lora-<method>
	@$(if $(METHOD),:,PYTHONPATH=scripts $(PYTHON) -c 'from quantize import METHODS; print(*METHODS)' | \
		sed 's/^/make quantize METHOD=… takes one of: /' >&2; exit 2)
pareto: $(reports)/$(TAG)-pareto/metadata.json ## size against divergence of the PARETO settings: reports/<tag>-pareto/
ways: $(reports)/$(TAG)-ways/metadata.json ## three ways to a LoRA-INT4, and WAYS, evaluated: reports/<tag>-ways/
align: $(reports)/$(family)/metadata.json ## ALIGN_DATA filtered, SFT, preferences, DPO, measured: reports/<tag>-<data>/
preferences: $(preferences)/metadata.json ## PAIRS pairs of the fine-tuned model's own responses
clara: $(reports)/$(TAG)-clara/metadata.json ## CLaRa: documents as vectors, trained in three stages, measured: reports/<tag>-clara/
align-rehearsal: ## a tenth of `make align`, in .rehearsal/: does all of it run?
	+$(MAKE) align ROOT=.rehearsal SAMPLES=20 PAIRS=10 HELD_OUT_PAIRS=5 EVAL_SAMPLES=10 FORGETTING_FLAGS="--samples 20 --prompts 2"
memory: $(reports)/memory-$(TAG)/metadata.json ## the memory that each step expects against what it takes: reports/memory-<tag>/
evaluate: $(evaluations:%=%/metadata.json) ## each variant measured on EVAL_SAMPLES held-out rows
report: $(reports)/$(TAG)/metadata.json ## the comparison: reports/<tag>/index.html and report.md
export-zip: ## VARIANT as a zip, in exports/ or TO=file.zip
export-folder: ## VARIANT copied to TO=/mnt/drive/name
export-hub: ## VARIANT as a private Hub repository TO=user/name
export-gguf: ## VARIANT as a GGUF for llama.cpp, in exports/ or TO=
export-ollama: ## the same with a Modelfile for Ollama

ifneq ($(EXPORT_TO),)
all align clara: # what was there before
	$(alone) $(PYTHON) $(carry)
endif

# --- set-up --------------------------------------------------------------------------------------------

.venv/core: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements/dev.txt .venv/core
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	touch $@

# --- stages --------------------------------------------------------------------------------------------

$(base)/metadata.json: configs/assets.yaml $(wildcard configs/models/$(MODEL).yaml) \
		$(call stage,fetch_base)
	$(run) scripts/fetch_base.py --model $(call quoted,$(MODEL)) --revision $(REVISION) $(FETCH_FLAGS) --output $(@D)

$(data)/metadata.json: configs/assets.yaml $(wildcard $(SOURCE)) $(code_of_rows) $(stamps)/generate_data | $(venv)
	$(run) scripts/generate_data.py --source $(call quoted,$(SOURCE)) --seed $(SEED) $(DATA_FLAGS) --output $(@D)

$(lora)/metadata.json: $(base)/metadata.json $(data)/metadata.json $(call stage,sft)
	$(run) scripts/sft.py --model $(base) --data $(data) --samples $(SAMPLES) --epochs $(EPOCHS) --seed $(SEED) \
		$(profile) $(SFT_FLAGS) --run $(runs)/sft-$(TAG) --output $(@D)

# The same training on the 4-bit base, beside which the adapter then stays.
$(int4_lora)/metadata.json: $(int4)/metadata.json $(data)/metadata.json $(call stage,sft)
	$(run) scripts/sft.py --model $(int4) --data $(data) --samples $(SAMPLES) --epochs $(EPOCHS) --seed $(SEED) \
		$(profile) $(SFT_FLAGS) --run $(runs)/sft-$(TAG)-int4 --output $(@D)

$(merged)/metadata.json: $(lora)/metadata.json $(base)/metadata.json $(data)/metadata.json $(call stage,merge_lora)
	$(run) scripts/merge_lora.py --adapter $(lora) --base $(base) --data $(data) --seed $(SEED) \
		$(profile) --output $(@D)

$(int4)/metadata.json: private from := $(base)
$(lora_int4)/metadata.json: private from := $(merged) --base $(base)
$(int4)/metadata.json: $(base)/metadata.json
$(lora_int4)/metadata.json: $(merged)/metadata.json $(base)/metadata.json
$(int4)/metadata.json $(lora_int4)/metadata.json: $(data)/metadata.json $(call stage,quantize)
	$(run) scripts/quantize.py --model $(from) --data $(data) --method $(INT4) --seed $(SEED) \
		$(profile) $(QUANTIZE_FLAGS) --output $(@D)

# What a setting's name means. In the comparison a bad one is to be shown, not refused.
setting = $(patsubst $(TAG)-lora-%,%,$(patsubst $(TAG)-pareto-%,%,$(notdir $(@D))))
method = $(if $(filter gguf-%,$(setting)),gguf-$(word 2,$(subst -, ,$(setting))),$(firstword $(subst -, ,$(setting))))
variations = $(subst -, ,$(patsubst $(method)-%,%,$(filter $(method)-%,$(setting))))
variation = $(if $(filter nearest,$1),--calibration-samples 0,$(if $(filter distilled,$1),--distil-samples $(SAMPLES),--embedding $1))
rounding = --method $(method) $(foreach one,$(variations),$(call variation,$(one))) \
	$(if $(filter $(TAG)-pareto-%,$(notdir $(@D))),--accept-divergence)

$(patsubst %,%/metadata.json,$(pareto) $(chosen)): $(merged)/metadata.json $(base)/metadata.json \
		$(data)/metadata.json $(call code,quantize) $(stamps)/setting | $(venv)
	$(run) scripts/quantize.py --model $(merged) --base $(base) --data $(data) --seed $(SEED) \
		$(profile) $(QUANTIZE_FLAGS) $(rounding) --output $(@D)

$(reports)/$(TAG)-pareto/metadata.json: $(pareto:%=%/metadata.json) $(call stage,pareto)
	$(run) scripts/pareto.py --models $(pareto) --output $(@D)

$(compared:%=%/metadata.json): $(reports)/eval-$(TAG)-%/metadata.json: $(ROOT)/models/$(TAG)-%/metadata.json \
		$(data)/metadata.json $(call stage,evaluate)
	$(run) scripts/evaluate.py --model $(<D) --data $(data) --samples $(EVAL_SAMPLES) --seed $(SEED) \
		$(profile) $(EVALUATE_FLAGS) --run $(runs)/eval-$(TAG)-$* --output $(@D)

$(reports)/$(TAG)/metadata.json: $(evaluations:%=%/metadata.json) $(call stage,report)
	$(run) scripts/report.py --evaluations $(evaluations) $(forecast) --output $(@D)

# --- align: the same for magpie, factbook and files, but that of what MODEL wrote nobody knows the right answers ----

ifneq ($(align_raw),$(data))
$(align_raw)/metadata.json: configs/assets.yaml $(if $(written),$(call code,generate_data) $(base)/metadata.json \
		$(stamps)/magpie,$(code_of_rows) $(wildcard $(ALIGN_DATA)) $(stamps)/align_data) | $(venv)
	$(run) scripts/generate_data.py --seed $(SEED) --output $(@D) $(if $(written),--source magpie --model $(base) \
		--samples $(RAW) $(profile) --run $(runs)/magpie-$(TAG) $(MAGPIE_FLAGS),--source $(call quoted,$(ALIGN_DATA)) $(DATA_FLAGS))
endif

# Rows that somebody brought may have short answers; what the model wrote should not.
$(filtered)/metadata.json: $(align_raw)/metadata.json $(align_test)/metadata.json $(call stage,filter_data)
	$(run) scripts/filter_data.py --data $(align_raw) $(if $(written),--evaluation $(align_test),--least-response-words 1) \
		--seed $(SEED) $(FILTER_FLAGS) --output $(@D)

$(ROOT)/models/$(family)-sft/metadata.json: $(base)/metadata.json $(filtered)/metadata.json $(call stage,sft)
	$(run) scripts/sft.py --model $(base) --data $(filtered) --samples $(SAMPLES) --epochs $(EPOCHS) --seed $(SEED) \
		$(profile) $(SFT_FLAGS) --run $(runs)/sft-$(family) --output $(@D)

# Pairs need accepted answers: what the model wrote itself has none, so that its prompts come from SOURCE.
prompts := $(if $(written),$(data),$(filtered))
# A model of its own rows says more than is asked: within 48 tokens half of its answers did not end.
answering := $(if $(written),--max-new-tokens 128)
$(preferences)/metadata.json: $(ROOT)/models/$(family)-sft/metadata.json $(prompts)/metadata.json $(call stage,generate_preferences)
	$(run) scripts/generate_preferences.py --models $(<D) --data $(prompts) --samples $(PAIRS) \
		--validation-samples $(HELD_OUT_PAIRS) --seed $(SEED) $(profile) $(answering) $(PREFERENCES_FLAGS) \
		--run $(runs)/preferences-$(family) --output $(@D)

$(ROOT)/models/$(family)-dpo/metadata.json: $(ROOT)/models/$(family)-sft/metadata.json $(preferences)/metadata.json \
		$(base)/metadata.json $(call stage,dpo)
	$(run) scripts/dpo.py --model $(base) --adapter $(<D) --data $(preferences) --samples $(PAIRS) --seed $(SEED) \
		$(profile) $(DPO_FLAGS) --run $(runs)/dpo-$(family) --output $(@D)

$(reports)/eval-$(family)-base/metadata.json: $(base)/metadata.json
$(reports)/eval-$(family)-sft/metadata.json: $(ROOT)/models/$(family)-sft/metadata.json
$(reports)/eval-$(family)-dpo/metadata.json: $(ROOT)/models/$(family)-dpo/metadata.json
$(aligned:%=%/metadata.json): $(reports)/eval-$(family)-%/metadata.json: \
		$(align_test)/metadata.json $(call stage,evaluate)
	$(run) scripts/evaluate.py --model $(if $(filter base,$*),$(base),$(ROOT)/models/$(family)-$*) --data $(align_test) \
		--samples $(EVAL_SAMPLES) --seed $(SEED) $(profile) $(EVALUATE_FLAGS) --run $(runs)/$(notdir $(@D)) --output $(@D)

$(forgetting:%=%/metadata.json): $(reports)/forgetting-%/metadata.json: $(ROOT)/models/%/metadata.json $(call stage,forgetting)
	$(run) scripts/forgetting.py --model $(<D) --seed $(SEED) $(profile) $(FORGETTING_FLAGS) \
		--run $(runs)/$(notdir $(@D)) --output $(@D)

$(reports)/$(family)/metadata.json: $(aligned:%=%/metadata.json) $(forgetting:%=%/metadata.json) \
		$(call stage,report)
	$(run) scripts/report.py --evaluations $(aligned) --forgetting $(forgetting) $(align_forecast) --output $(@D)

# --- export: with the figures of the report, which measures what it was not measured on yet ----------------------

# llama.cpp and Ollama take an adapter merged into its base.
exported = $(ROOT)/models/$(TAG)-$(if $(filter export-gguf export-ollama,$1),$(VARIANT:lora=lora-merged),$(VARIANT))
export_to = $(or $(TO),$(ROOT)/exports/$(notdir $(call exported,$@))$(if $(filter %zip,$@),.zip,$(if $(filter %folder,$@),,-$(@:export-%=%))))
was_aligned = $(filter $(align)-%,$(VARIANT))
export_report = $(reports)/$(if $(was_aligned),$(family),$(TAG))
export-zip export-gguf export-ollama export-folder export-hub: $(ROOT)/models/$(TAG)-$(VARIANT)/metadata.json $(export_report)/metadata.json | $(venv)
	@$(if $(TO)$(filter-out export-folder export-hub,$@),:,echo "make $@ VARIANT=$(VARIANT) wants TO=…: a directory elsewhere, or user/name on the Hub" >&2; exit 2)
	$(alone) $(PYTHON) scripts/export.py --form $(@:export-%=%) --model $(call exported,$@) --report $(export_report) \
		--data $(if $(was_aligned),$(align_test),$(data)) --seed $(SEED) $(if $(TO),,--replace) \
		$(if $(filter export-hub,$@),--record $(ROOT)/exports/$(TAG)-$(VARIANT).hub.json) $(EXPORT_FLAGS) --to $(call quoted,$(export_to))

# A forecast is held against what happened where there is one; the report does not depend on it.
forecast = $(patsubst %/metadata.json,--estimate %,$(wildcard $(reports)/$(TAG)-estimate/metadata.json))
align_forecast = $(patsubst %/metadata.json,--estimate %,$(wildcard $(reports)/$(family)-estimate/metadata.json))
clara_forecast = $(patsubst %/metadata.json,--estimate %,$(wildcard $(reports)/$(TAG)-clara-estimate/metadata.json))

# --- clara: stage 1 learns from SAMPLES passages with all their questions, stage 2 from a quarter as many questions, each
# of which has several passages to be read, stage 3 to search from SAMPLES questions -----------------------------------

quarter := $(shell expr \( $(SAMPLES) + 3 \) / 4)

$(clara_data)/metadata.json: $(data)/metadata.json $(call code,generate_data) $(stamps)/generate_clara_data | $(venv)
	$(run) scripts/generate_data.py --source clara --data $(data) --seed $(SEED) $(CLARA_DATA_FLAGS) --output $(@D)

$(clara)-stage1/metadata.json: $(base)/metadata.json $(clara_data)/metadata.json $(call stage,train_stage1)
	$(run) scripts/train_stage1.py --model $(base) --data $(clara_data) --samples $(SAMPLES) --seed $(SEED) \
		$(profile) $(STAGE1_FLAGS) --run $(runs)/clara-$(TAG)-stage1 --output $(@D)

$(clara)-stage2/metadata.json: $(clara)-stage1/metadata.json $(call stage,train_stage2)
	$(run) scripts/train_stage2.py --model $(clara)-stage1 --base $(base) --data $(clara_data) --samples $(quarter) \
		--seed $(SEED) $(profile) $(STAGE2_FLAGS) --run $(runs)/clara-$(TAG)-stage2 --output $(@D)

$(clara)/metadata.json: $(clara)-stage2/metadata.json $(call stage,train_stage3)
	$(run) scripts/train_stage3.py --model $(clara)-stage2 --base $(base) --data $(clara_data) --samples $(SAMPLES) \
		--seed $(SEED) $(profile) $(STAGE3_FLAGS) --run $(runs)/clara-$(TAG) --output $(@D)

$(reports)/$(TAG)-clara/metadata.json: $(clara)/metadata.json $(lora)/metadata.json $(call stage,evaluate_clara)
	$(run) scripts/evaluate_clara.py --models $(clara) --reader $(lora) --base $(base) --data $(clara_data) \
		--samples $(EVAL_SAMPLES) --seed $(SEED) $(CLARA_AGAINST:%=--against %) $(clara_forecast) $(profile) \
		$(EVALUATE_CLARA_FLAGS) --run $(runs)/eval-$(TAG)-clara --output $(@D)

# What was rounded was measured by quantize.py; an adapter that was trained beside a rounded base was not.
$(certificate)/metadata.json: $(int4_lora)/metadata.json $(lora)/metadata.json $(base)/metadata.json \
		$(data)/metadata.json $(call stage,certify)
	$(run) scripts/certify.py --reference $(lora) --model $(int4_lora) --base $(base) --data $(data) --seed $(SEED) \
		$(profile) --output $(@D)

$(reports)/$(TAG)-ways/metadata.json: $(compared:%=%/metadata.json) $(certificate)/metadata.json \
		$(call code,report) $(stamps)/ways | $(venv)
	$(run) scripts/report.py --evaluations $(compared) --certificates $(certificate) --tag $(TAG) --output $(@D)

$(reports)/memory-$(TAG)/metadata.json: $(variants:%=$(ROOT)/models/$(TAG)-%/metadata.json) $(data)/metadata.json \
		$(wildcard scripts/*.py scripts/lib/*/*.py) $(call stage,bench_memory)
	$(run) scripts/bench_memory.py --base $(base) --adapter $(lora) --models $(variants:%=$(ROOT)/models/$(TAG)-%) \
		--data $(data) --seed $(SEED) $(profile) --output $(@D)

# A machine is not as fast today as it was yesterday: the forecast is made anew each time. What make itself gives the
# steps of align and clara goes before the user's flags.
forecast_of = $(reports)/$(or $(if $(filter align,$(GOAL)),$(family)),$(if $(filter clara,$(GOAL)),$(TAG)-clara),$(TAG))-estimate
forecast_data = $(if $(filter align,$(GOAL)),$(align_test),$(data))
forecast_rows = $(if $(filter clara,$(GOAL)),$(clara_data))
estimate: $(patsubst %,%/metadata.json,$(base) $(forecast_data) $(forecast_rows)) | $(venv) ## how long GOAL will take, what it leaves on the disk, what it costs
	$(alone) $(PYTHON) scripts/estimate.py --goal $(GOAL) --model $(base) --data $(forecast_data) --method $(INT4) --samples $(SAMPLES) \
		--epochs $(EPOCHS) --eval-samples $(EVAL_SAMPLES) --align-data $(or $(written),rows) --raw $(RAW) --pairs $(PAIRS) \
		--held-out-pairs $(HELD_OUT_PAIRS) --seed $(SEED) $(profile) $(forecast_rows:%=--clara-data %) $(ESTIMATE_FLAGS) \
		--sft-flags=$(call quoted,$(SFT_FLAGS)) --quantize-flags=$(call quoted,$(QUANTIZE_FLAGS)) \
		--evaluate-flags=$(call quoted,$(EVALUATE_FLAGS)) --magpie-flags=$(call quoted,$(MAGPIE_FLAGS)) \
		--filter-flags=$(call quoted,$(if $(written),,--least-response-words 1) $(FILTER_FLAGS)) \
		--preferences-flags=$(call quoted,$(answering) $(PREFERENCES_FLAGS)) --dpo-flags=$(call quoted,$(DPO_FLAGS)) \
		--forgetting-flags=$(call quoted,$(FORGETTING_FLAGS)) --stage1-flags=$(call quoted,$(STAGE1_FLAGS)) \
		--stage2-flags=$(call quoted,--samples $(quarter) $(STAGE2_FLAGS)) \
		--stage3-flags=$(call quoted,--samples $(SAMPLES) $(STAGE3_FLAGS)) \
		--evaluate-clara-flags=$(call quoted,$(EVALUATE_CLARA_FLAGS)) --output $(forecast_of)

# --- checks --------------------------------------------------------------------------------------------

verify: | $(venv) ## is every artifact whole, and made of the inputs that lie there now?
	@$(PYTHON) scripts/verify.py $(ROOT)/models/* $(wildcard $(addprefix $(ROOT)/data/*/,raw filtered preferences clara)) $(reports)/*

doctor: | $(venv) ## what is wrong with this machine or with what was made? BEFORE=all, AFTER=all: a checklist
	@$(PYTHON) scripts/doctor.py $(BEFORE:%=--before %) $(AFTER:%=--after %) --root $(ROOT) --tag $(TAG) \
		--model $(call quoted,$(MODEL)) --data $(if $(AFTER),$(data),$(call quoted,$(SOURCE))) \
		--align-data $(call quoted,$(ALIGN_DATA))

# The same rules on a tiny random model and 8 rows: does everything run, end to end?
tiny := ROOT=.smoke MODEL=tiny-random SOURCE=tests/data/capitals.jsonl SAMPLES=8 EVAL_SAMPLES=4 \
	EVALUATE_FLAGS="--max-new-tokens 8 --speed-tokens 8" QUANTIZE_FLAGS="--samples 4"
smoke: ## all of it on a tiny random model and 8 rows, in .smoke/
	+$(MAKE) all $(tiny)

dev := $(if $(venv),.venv/dev)

lint: $(dev) ## ruff: check and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

test: lint ## lint and the fast tests, installing what they need
	$(PYTHON) -m pytest -n 2 --dist loadfile $(TESTS)

.venv/clients: requirements/clients.txt .venv/core
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/clients.txt
	touch $@

test-slow: $(dev) $(if $(venv),.venv/clients) ## the slow tests
	$(PYTHON) -m pytest -m slow $(TESTS)

clean: ## remove work in progress, reports, smoke run and rehearsal; keep models and data
	rm -rf $(runs) $(reports) .smoke .rehearsal

distclean: clean ## remove everything that was made or fetched, .venv included
	rm -rf .venv .make $(stamps)
	find models data -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
