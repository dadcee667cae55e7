# `make demo` sets up everything and runs the main job; `make test` sets up everything and runs all tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# One thread for each process: the demo and the tests run two processes side by side.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

FUZZ_SEEDS ?= 0:40
FASHION_STUDIES ?= arms_2021_linear_fashion rodeo_2022_linear_fashion arms_2021_nonlinear_fashion rodeo_2022_nonlinear_fashion

.PHONY: bench-estimators bench-growth demo docs test test-all test-durations test-mutants test-newest test-newest-pyro quick fuzz lint format storchastic bench bench-against bench-full bench-watching bench-marginal bench-memory bench-arithmetic bench-gpu bench-guards bench-passes bench-mixtures bench-weak-scaling variance study data fashion clean package test-extras

# The stamp is newer than the files that say what to install, so that a second run installs nothing.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pyro,numpyro,research,assess,cluster,watch,stories,bench,test,develop,docs]'
	touch $@

demo: .venv/installed
	$(BIN)/pplgrad compare models/sbn.py --backend pyro --backend numpyro \
	  --estimator score --estimator score+average --estimator score+neural --estimator score+loo \
	  --steps 1000 --seeds 3 --jobs 2 --out results/

# The tests of a file run in one process, which keeps what they share: what is traced and compiled above all.
test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Every case, of which `make test` runs those that it has time for.
test-all: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --all-cases

# Every broken estimator, each of which a check must catch: after a change to a check, or to the programs that it uses.
test-mutants: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --all-cases -k "mutant or caught or (fault and not default)"

# What the cases of a test take, by which `make test` chooses among them; on a quiet machine.
test-durations: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --record-durations

# Of each test that takes under a second, two cases.
quick: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --most-cases 2

# Python 3.13 if there is one, on the path or among pyenv's, else the newest there is; and on it the newest hosts that pyproject.toml
# allows: nothing is pinned. Kept quick: the files that together touch every private name of a host, of each test six cases. CI runs it after `make test`.
PYENVS = $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
NEWEST ?= $(shell for p in python3.13 $(wildcard $(PYENVS)/3.13*/bin/python3) python3.12 python3.11 python3; do \
  $$p -m venv --help >/dev/null 2>&1 && echo $$p && break; done)
NEWEST_TESTS = tests/engine $(addprefix tests/numpyro/test_,compat.py state.py scan.py flow.py axes.py steps.py programs.py errors.py)
NEWEST_PYRO_TESTS = $(addprefix tests/pyro/test_,internals.py exact.py structure.py programs.py branches.py compile.py)

# Without torch, whose default build brings several GB of CUDA libraries; `make test-newest-pyro` adds it by hand.
.venv-newest/installed: pyproject.toml
	rm -rf .venv-newest
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[numpyro,test]'
	touch $@

test-newest: .venv-newest/installed
	JAX_PLATFORMS=cpu .venv-newest/bin/python -m pytest -q -n 2 --dist loadfile --most-cases 6 $(NEWEST_TESTS)

test-newest-pyro: .venv-newest/installed
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[pyro]'
	.venv-newest/bin/python -m pytest -q -n 2 --dist loadfile --most-cases 6 $(NEWEST_PYRO_TESTS)

# The wheel and the source archive, looked at by the tools that package indices trust, and quick tests of the wheel alone: the
# checkout is not on the path, and what the tests need beside it is copied.
WHEEL = build/wheel
WHEEL_TESTS = tests/engine tests/lab/test_init.py tests/lab/test_specs.py tests/lab/test_report.py tests/test_surface.py tests/test_typed.py tests/test_package.py

.venv-package/installed: constraints.txt
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine check-wheel-contents
	touch $@

package: .venv/installed .venv-package/installed
	rm -rf dist $(WHEEL)
	.venv-package/bin/python -m build --outdir dist .
	.venv-package/bin/python -m twine check --strict dist/*
	.venv-package/bin/check-wheel-contents dist/*.whl
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(WHEEL)/package dist/*.whl
	cp -r tests models pyproject.toml $(WHEEL)
	cd $(WHEEL) && PYTHONPATH=package $(abspath $(BIN))/python -c "import pplgrad; assert 'wheel/package' in pplgrad.__file__, pplgrad"
	cd $(WHEEL) && PYTHONPATH=package $(abspath $(BIN))/python package/bin/pplgrad --version
	cd $(WHEEL) && PYTHONPATH=package:. $(abspath $(BIN))/python -m pytest -q -n 2 --dist loadfile --most-cases 2 $(WHEEL_TESTS)

# Each library without the other, in an environment of its own, by what a user would type.
test-extras:
	rm -rf build/extras
	for extra in pyro numpyro; do \
	  $(PYTHON) -m venv build/extras/$$extra && \
	  build/extras/$$extra/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ".[$$extra]" && \
	  PYTHONSAFEPATH=1 build/extras/$$extra/bin/python -W ignore tests/extras.py $$extra || exit 1; done

# Random programs against an oracle of their own: `make fuzz FUZZ_SEEDS=1000:1200` tries others.
fuzz: .venv/installed
	JAX_PLATFORMS=cpu $(BIN)/python -m pplgrad.testing.fuzz --seeds $(FUZZ_SEEDS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in docs/_build/html: warnings are errors, and so are links within it that lead nowhere. Its notebooks are run once, and their
# results kept in docs/_build/cells.
docs: .venv/installed
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -E -a -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "written: docs/_build/html/index.html"

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Storchastic changes torch for the whole process, and has an environment of its own; the suite runs without it too.
.venv-storchastic/installed: benchmarks/storchastic.txt
	$(PYTHON) -m venv .venv-storchastic
	.venv-storchastic/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/storchastic.txt
	touch $@

storchastic: .venv-storchastic/installed

bench: .venv/installed
	-$(MAKE) storchastic
	$(BIN)/python -m benchmarks.suite

# Each estimator beside its limit, the other library and the versions by hand: the part of `make bench` that speaks of them.
bench-estimators: .venv/installed
	$(BIN)/python -m benchmarks.suite --suite estimators --out results/bench-estimators

# This checkout's steps beside those of another one: `make bench-against OTHER=../before`.
bench-against: .venv/installed
	$(BIN)/python -m benchmarks.suite --against $(OTHER) --out results/bench-against

bench-full: .venv/installed
	-$(MAKE) storchastic
	$(BIN)/python -m benchmarks.suite --suite full --turns 30 --seconds 3 --out results/bench-full

bench-watching: .venv/installed
	$(BIN)/python -m benchmarks.watching

bench-passes: .venv/installed
	$(BIN)/python -m benchmarks.passes

bench-guards: .venv/installed
	$(BIN)/python -m benchmarks.guards

bench-marginal: .venv/installed
	$(BIN)/python -m benchmarks.marginal

bench-mixtures: .venv/installed
	$(BIN)/python -m benchmarks.mixtures

bench-growth: .venv/installed
	$(BIN)/python -m benchmarks.growth

bench-memory: .venv/installed
	$(BIN)/python -m benchmarks.memory

bench-weak-scaling: .venv/installed
	$(BIN)/python -m benchmarks.weak_scaling

bench-arithmetic: .venv/installed
	$(BIN)/python -m benchmarks.arithmetic

# Where there is an NVIDIA GPU, with CUDA builds of torch and JAX.
bench-gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu

variance: .venv/installed
	$(BIN)/python -m benchmarks.variance
	$(BIN)/python -m benchmarks.training

study: .venv/installed
	$(BIN)/pplgrad compare studies/digits.toml --jobs 2 --out results/study

# The 70,000 images of Fashion-MNIST, as Debian and Ubuntu package them; elsewhere give a copy of your own: --data PATH.
FASHION = /usr/share/datasets/fashion-mnist
data:
	test -d $(FASHION) || (apt-get update -qq && apt-get install -y dataset-fashion-mnist)
	ls -l $(FASHION)/*.gz

# The published comparisons at full size, on Fashion-MNIST: days of one core. Interrupt at any time; the same command goes on, and so it does
# from the runs that stand in studies/fashion/.
fashion: .venv/installed data
	for study in $(FASHION_STUDIES); do \
	  $(BIN)/pplgrad compare studies/$$study.toml --jobs $(or $(JOBS),1) --out studies/fashion/$$study || exit 1; done

clean:
	rm -rf .venv .venv-newest .venv-package .venv-storchastic build dist docs/_build results
