# Checks of artifacts, machine, memory estimates and code; and cleaning up.

TESTS ?= tests

values_bench_memory := DATA_NAME SEED PROFILE
artifacts += $(reports)/bench-memory-$(MODEL_NAME)

.PHONY: verify doctor bench-memory smoke test test-slow lint clean distclean
verify: | $(venv) ## check that every artifact is intact and up to date
	@$(PYTHON) scripts/verify.py $(ROOT)/models/* $(wildcard $(addprefix $(ROOT)/data/*/,raw filtered preferences clara)) $(reports)/*

doctor: | $(venv) ## diagnose machine and artifacts; BEFORE=all, AFTER=all: the checklist of that pipeline
	@$(PYTHON) scripts/doctor.py $(BEFORE:%=--before %) $(AFTER:%=--after %) --root $(ROOT) --model-name $(MODEL_NAME) \
		--model $(call quoted,$(MODEL)) --data $(if $(AFTER),$(data),$(call quoted,$(SOURCE))) \
		--align-data $(call quoted,$(ALIGN_DATA))

bench-memory: $(reports)/bench-memory-$(MODEL_NAME)/metadata.json ## compare estimated and actual peak memory of each step: reports/bench-memory-<model>/
$(reports)/bench-memory-$(MODEL_NAME)/metadata.json: $(variants:%=$(ROOT)/models/$(MODEL_NAME)-%/metadata.json) \
		$(data)/metadata.json $(wildcard scripts/*.py scripts/lib/*/*.py) $(call stage,bench_memory,$(MODEL_NAME))
	$(run) scripts/bench_memory.py --base $(base) --adapter $(lora) \
		--models $(variants:%=$(ROOT)/models/$(MODEL_NAME)-%) --data $(data) --seed $(SEED) $(profile) --output $(@D)

# The same rules on a tiny random model and 8 examples, to test everything end to end.
tiny := ROOT=.smoke MIRROR_TO= MIRROR_FROM= MODEL=tiny-random SOURCE=tests/data/capitals.jsonl SAMPLES=8 EVAL_SAMPLES=4 \
	SFT_FLAGS="--accumulation-steps 2" EVALUATE_FLAGS="--max-new-tokens 8 --speed-tokens 8" QUANTIZE_FLAGS="--samples 4"
smoke: ## run `make all` on a tiny random model and 8 examples, in .smoke/
	+$(MAKE) all $(tiny)

dev := $(if $(venv),.venv/dev)
lint: $(dev) ## check the code with ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

test: lint ## run lint and the fast tests, installing what they need
	$(PYTHON) -m pytest -n 2 --dist loadfile $(TESTS)

test-slow: $(dev) $(if $(venv),.venv/clients) ## run the slow tests
	$(PYTHON) -m pytest -m slow $(TESTS)

clean: ## delete runs/, reports/, earlier versions, .smoke/ and .align-smoke/; keep models and data
	rm -rf $(runs) $(reports) .smoke .align-smoke $(wildcard $(ROOT)/models/.kept $(ROOT)/data/*/.kept)

distclean: clean ## delete everything that was built or downloaded, .venv and exports/ included; keep files of your own
	python3 mk/clean.py $(ROOT)
	rm -rf $(ROOT)/.make $(if $(filter .,$(ROOT)),.venv)
