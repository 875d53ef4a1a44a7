# The targets set up what they need in .venv; a change of pyproject.toml or constraints.txt sets it
# up again. pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) are honoured.

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo up down test test-slow test-nodes test-core docs screenshots fuzz mutants peers sbom audit lint format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(READY) ## Run the whole line once: sample pictures, search, registry, fleet, inspection
	@$(BIN)/python -m apt_ray.devtools.demo run

up: $(READY) ## The same, and leave the servers up; prints their addresses
	@$(BIN)/python -m apt_ray.devtools.demo up

down: $(READY) ## Stop the servers of `make up`
	@$(BIN)/python -m apt_ray.devtools.demo down

# Two workers share the cores with the servers that they start: threads that wait must sleep. The
# order of files is that of tests/conftest.py.
test: $(READY) ## Run the tests (PYTEST_ARGS="-k name" and the like)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
		--no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(READY) ## Run the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-nodes: $(READY) ## Run the tests on clusters of three nodes, of which one is lost
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
		-m slow -k nodes tests/serving/test_nodes.py tests/tuning/test_search.py $(PYTEST_ARGS)

test-core: $(READY) ## Install the wheel alone in an environment of its own, and use it
	$(BIN)/python -m pytest -m slow tests/test_wheel.py $(PYTEST_ARGS)

docs: $(READY) ## Run every code block of the documents, servers included, as a reader would
	$(BIN)/python -m pytest -m slow -s tests/test_docs.py $(PYTEST_ARGS)

screenshots: $(READY) ## Draw the console's pages in docs/console, in Chromium
	$(BIN)/python -m tests.serving.console.screenshots docs/console

fuzz: $(READY) ## Read 120,000 damaged images, masks and forms (FUZZ_ARGS="--inputs 1000")
	$(BIN)/python -m benchmarks.fuzz $(FUZZ_ARGS)

# The tool stands apart, in .mutants; what it mutates and what it found, in mutants.
mutants: $(READY) ## Change the code and see which tests notice (MUTANTS_ARGS="apt_ray.prompts.losses*")
	@test -x .mutants/bin/mutmut || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt --target .mutants 'mutmut==3.8.1'
	OMP_NUM_THREADS=1 PYTHONPATH=.mutants $(BIN)/python .mutants/bin/mutmut run $(MUTANTS_ARGS)
	@PYTHONPATH=.mutants $(BIN)/python .mutants/bin/mutmut results | sed '/: not checked/d'

# anomalib brings much that apt-ray does not need: it has an environment of its own, .peers.
peers: .peers/.ready ## Measure APT beside anomalib's models (PEERS_ARGS="--data DIR")
	.peers/bin/python -m benchmarks.peers $(PEERS_ARGS)

sbom: $(READY) .sbom/.ready ## Write sbom.cdx.json, the bill of materials (SBOM_PYTHON=/path of another environment's python)
	.sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON \
		--output-file sbom.cdx.json $(or $(SBOM_PYTHON),$(BIN)/python)
	$(BIN)/python -m apt_ray.devtools.bill_of_materials sbom.cdx.json

# Asks a service for what is known of each version; fails where that cannot be asked.
audit: .audit/.ready ## Look for known vulnerabilities in the versions of constraints.txt
	.audit/bin/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip -r constraints.txt

lint: $(READY) ## Check style, types and the rules of who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format the code and mend what can be mended by itself
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## Stop the servers and remove the environments, the demo's files and all caches
	@if [ -f .demo/state.json ]; then $(BIN)/python -m apt_ray.devtools.demo down; fi
	rm -rf .venv .demo .mutants mutants .peers .sbom .audit sbom.cdx.json build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): INSTALLED := '.[dev]'
.peers/.ready: INSTALLED := . 'anomalib==2.7.0'
.sbom/.ready .audit/.ready: EDITABLE :=
.sbom/.ready: INSTALLED := 'cyclonedx-bom==7.5.0'
.audit/.ready: INSTALLED := 'pip-audit==2.10.1'
$(READY) .peers/.ready: EDITABLE := -e

$(READY) .peers/.ready .sbom/.ready .audit/.ready: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { \
		echo "apt-ray needs Python 3.10 to 3.13; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) $(INSTALLED)
	@touch $@
