# Each target makes the environment it needs in .venv, on a machine that has only Python 3.11 to
# 3.13 and make. PYTHON=/path/to/python chooses the interpreter, WORKERS=4 the test processes.

WORKERS ?= 2
PYTEST = .venv/bin/python -m pytest -q -n $(WORKERS) --dist loadfile tests \
  --ignore=tests/vllm --ignore=tests/llamacpp --ignore=tests/remote --ignore=tests/airflow

.PHONY: help install demo fleet chaos test test-all check bench bench-control bench-memory bench-peers bench-quantized clean

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

install: ## the environment, without the tools of tests
	@sh scripts/bootstrap.sh run

demo: ## a batch through the bundled model, from an empty machine to answers
	@sh scripts/bootstrap.sh run
	@.venv/bin/python examples/demo.py

fleet: ## the whole system on this machine, without Docker; PORT=8001 and FRESH=1 are understood
	@sh scripts/bootstrap.sh test
	@exec .venv/bin/python scripts/fleet.py $(if $(PORT),--port $(PORT)) $(if $(FRESH),--fresh)

chaos: ## a quarter of a million lines while everything is killed and paused; SEED=, LINES= are understood
	@sh scripts/bootstrap.sh test
	@exec .venv/bin/python -m scripts.chaos $(if $(SEED),--seed $(SEED)) $(if $(LINES),--lines $(LINES))

test: ## what takes no more than minutes
	@sh scripts/bootstrap.sh test
	@$(PYTEST) -m "not slow"

test-all: ## everything: slow tests, a short chaos run, vLLM on the CPU, llama.cpp, a real vllm serve, Airflow
	@sh scripts/bootstrap.sh test
	@WORKERS=$(WORKERS) .venv/bin/python scripts/test_all.py

check: ## style, types and the direction of imports
	@sh scripts/bootstrap.sh lint
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache

bench: ## what is measured against what it must reach, in half an hour; BENCH_ANYWAY=1 on a busy machine
	@sh scripts/bootstrap.sh test
	@PYTHONPATH=. .venv/bin/python -m tests.benchmarks.suite

bench-control: ## commits and claims per second, CPU per request, how long a killed worker's work waits
	@sh scripts/bootstrap.sh test
	@PYTHONPATH=. .venv/bin/python -m tests.benchmarks.control_plane
	@PYTHONPATH=. .venv/bin/python -m tests.benchmarks.resume

bench-memory: ## the same for memory: a million lines against ten thousand
	@sh scripts/bootstrap.sh test
	@PYTHONPATH=. .venv/bin/python -m tests.benchmarks.suite C10

bench-peers: ## the same files through vllm run-batch and through us, on the CPU
	@sh scripts/bootstrap.sh test
	@sh scripts/vllm_env.sh
	@PYTHONPATH=. .venv/bin/python -m tests.benchmarks.suite P

bench-quantized: ## nf4, fp4 and int8 against bf16, at 1, 8 and 32 sequences
	@sh scripts/bootstrap.sh test
	@PYTHONPATH=. .venv/bin/python -m tests.benchmarks.quantized

clean: ## remove what was built here, the environment included
	rm -rf .venv .venv-vllm .venv-llamacpp .venv-airflow .bootstrap.lock build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
