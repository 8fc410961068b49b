# make install [PYTHON=python3.12] [TORCH_INDEX=URL]
# TORCH_INDEX is an additional package index, for example the one with PyTorch's CPU builds: on Linux the default index
# serves the CUDA build of torch (several GB), which also runs on a machine without a GPU.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= 2

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INDEX = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
FBGEMM_VERSION := 1.8.0

.PHONY: help install dev test lint format demo clean

help:
	@echo "make install   virtual environment $(VENV) with the pins for this machine, CPU or CUDA"
	@echo "make demo      after the install: data, training, TEST line, ten recommendations"
	@echo "make test      all tests (installs what they need)"
	@echo "make lint      ruff and mypy (installs them)"
	@echo "make format    rewrite the code as ruff formats it"
	@echo "make clean     remove caches; data, runs and $(VENV) stay"

install: $(VENV)/.installed

dev: $(VENV)/.dev

$(VENV)/.installed: requirements.txt requirements-torchrec.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON): got Python %d.%d, expected 3.10 or newer; try make install PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(INDEX) -r requirements.txt
	@fbgemm=fbgemm-gpu-cpu; other=fbgemm-gpu; \
	if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		fbgemm=fbgemm-gpu; other=fbgemm-gpu-cpu; \
	fi; \
	$(PIP) uninstall --quiet --yes $$other 2>/dev/null; \
	if ! { $(PIP) install $(INDEX) --no-deps -r requirements-torchrec.txt $$fbgemm==$(FBGEMM_VERSION) \
		&& $(RUN) -W ignore -c 'import torchrec'; }; then \
		$(PIP) uninstall --quiet --yes torchrec $$fbgemm 2>/dev/null; \
		echo "torchrec $$fbgemm: not installed, see above; only sharded tables on several devices need them"; \
	fi
	touch $@

$(VENV)/.dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) install -r requirements-dev.txt
	touch $@

# One thread a worker: threads of several workers on the same cores only wait for each other.
test: dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal --durations=20

lint: dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

demo: install
	$(RUN) -m generative_recommenders.serving.demo

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
