# `make demo` sets up everything and runs the main job; `make test` sets up everything and runs all tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# One thread for each process: the demo and the tests run two processes side by side.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

.PHONY: demo test quick lint format bench bench-watching variance study clean

# The stamp is newer than the files that say what to install, so that a second run installs nothing.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pyro,numpyro,research,cluster,watch,stories,test]'
	touch $@

demo: .venv/installed
	$(BIN)/pplgrad compare models/sbn.py --backend pyro --backend numpyro \
	  --estimator score --estimator score+average --estimator score+neural --estimator score+loo \
	  --steps 1000 --seeds 3 --jobs 2 --out results/

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

quick: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python -m benchmarks.steps --libraries pyro --out results/steps-pyro.csv
	$(BIN)/python -m benchmarks.steps --libraries numpyro --lengths 10 --out results/steps-numpyro.csv
	# TraceGraph_ELBO with an optimizer takes many minutes and gigabytes to compile these.
	$(BIN)/python -m benchmarks.steps --libraries numpyro --lengths 50 200 --latents --skip TraceGraph_ELBO \
	  --out results/steps-numpyro-long.csv
	# Without one it still does on 200 sites.
	$(BIN)/python -m benchmarks.steps --libraries numpyro --lengths 10 50 --latents --gradient \
	  --out results/steps-numpyro-gradient.csv

bench-watching: .venv/installed
	$(BIN)/python -m benchmarks.watching

variance: .venv/installed
	$(BIN)/python -m benchmarks.variance
	$(BIN)/python -m benchmarks.training

study: .venv/installed
	$(BIN)/pplgrad compare studies/digits.toml --jobs 2 --out results/study

clean:
	rm -rf .venv results
