# What CI runs, one target each; `make all` is everything that needs neither a GPU nor minutes for one test.
# PYTEST_ARGS are passed on: make test PYTEST_ARGS="-n0 -x".

PACKAGES = inference guides ppl_models
PYTEST_ARGS =

.PHONY: all lint format format-check types spelling audit test test-slow docs bench gpu faults

all: lint format-check types test

lint:
	ruff check .

format:
	ruff format .
	ruff check --fix .

format-check:
	ruff format --check .

types:
	mypy

spelling:
	git ls-files -z | xargs -0 codespell

audit:
	python .ci/audit.py

test:
	pytest $(PYTEST_ARGS)

test-slow:
	pytest -m slow $(PYTEST_ARGS)

docs:
	pytest --doctest-glob=README.md README.md $(PACKAGES) $(PYTEST_ARGS)

bench:
	python -m benchmarks.svi_step --threads 1

gpu:
	pytest -m gpu $(PYTEST_ARGS)

faults:
	pytest -n0 -m "slow or not slow" tests/faults $(PYTEST_ARGS)
