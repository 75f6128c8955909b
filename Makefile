# Two commands do everything on a machine with Python 3.11, make and git: `make demo` and `make test`.
PYTHON ?= python3.11
SEED ?= 0
VENV := .venv
PY := $(VENV)/bin/python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test style quality clean

# The exact pin comes first and alone: a resolver that meets an open torch range elsewhere may pull CUDA builds.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The miniature is made, trained, evaluated and queried; then the README's first Python block runs on its checkpoint.
demo: $(VENV)/.installed
	$(PY) -m benchmarks.demo --seed $(SEED)
	awk '/^```python$$/ {inside = 1; next} /^```$$/ {if (inside) exit} inside' README.md | $(PY) -

test: $(VENV)/.installed
	$(PY) -m pytest -n 2 --dist loadfile

style: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) runs
