# `make demo` and `make test` need nothing but python3 (3.10 or newer, with venv), make and git: what else they
# need is installed into .venv, at the versions of constraints.txt, on the first call and after either file changes.

PYTHON ?= python3
BIN := .venv/bin

# Two test processes on two cores: more threads than that and torch spends its time waiting for itself.
export OMP_NUM_THREADS := 1
# As variables, not options, because only so they reach the environment in which pip builds this package;
# pip before 25.3 reads the first there, later ones the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow zoo situations methods lint types spelling format docs constraints clean

demo: .venv/.installed
	$(BIN)/neuronsurgery demo

test: lint types spelling
	$(BIN)/python -m pytest -n 2

test-slow: .venv/.installed-ray
	$(BIN)/python -m pytest -n 2 -m slow

# Measures the zoo of models and writes docs/zoo.md.
zoo: .venv/.installed
	$(BIN)/python -m benchmarks.zoo

# Runs the tests of all situations of a training run and writes docs/situations.md.
situations: .venv/.installed
	$(BIN)/python -m benchmarks.situations

# Writes the table of methods into docs/methods.md.
methods: .venv/.installed
	$(BIN)/python -m benchmarks.methods

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.installed
	$(BIN)/mypy

spelling: .venv/.installed
	$(BIN)/codespell

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

# torch and numpy first, alone: a later requirement can then neither choose another build of torch nor leave it
# without numpy, which its CPU build does not ask for.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("python3 is %s, 3.10 or newer is needed: make PYTHON=/path/to/python ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0 numpy
	$(BIN)/pip install -q -e '.[demo,dev,marl,smax,training,zoo]'
	@touch $@

# Ray is large, and only slow tests start it.
.venv/.installed-ray: .venv/.installed
	$(BIN)/pip install -q -e '.[ray]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/pip install -q -e '.[docs]'
	@touch $@

# Keeps every pin that still fits; delete a line first to have that package moved to its newest version.
constraints:
	$(PYTHON) -m venv .venv-lock
	env -u PIP_CONSTRAINT .venv-lock/bin/pip install -q uv
	printf 'hatchling\neditables\n' | .venv-lock/bin/uv pip compile -q pyproject.toml - --universal \
		--python-version 3.10 --all-extras --no-annotate --custom-compile-command 'make constraints' \
		-o constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist results docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
