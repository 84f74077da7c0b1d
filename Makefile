PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
PYTEST_ARGS ?=
WORKERS ?= 2
SEEDS ?= 200

.PHONY: help demo test check protos simulate chaos soak bench image swarm clean

# help: this list
help:
	@sed -n 's/^# \([a-z]*: .*\)/\1/p' Makefile

# demo: eight daemons and their trainers learn real digits together; exits 0 only if all agree and the accuracy holds
demo: $(INSTALLED)
	$(PYTHON) clients/python/examples/demo_digits/run.py

# test: everything CI runs, two files at a time (WORKERS=0: one); add PYTEST_ARGS="-k name" to narrow, "--cov" for coverage
test: check
	$(PYTHON) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# check: style, types, the house's import rules, fresh stubs, proto lint
check: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	$(PYTHON) protos/generate.py --check
	.venv/bin/buf lint protos

# protos: write the stubs of the daemon and of the Python client anew
protos: $(INSTALLED)
	$(PYTHON) protos/generate.py

# simulate: SEEDS=200 swarms on paper in which everything goes wrong, then how many rounds 16 and 64 peers need
simulate: $(INSTALLED)
	$(PYTHON) -m moshpitd simulate --workload mixed --seeds $(SEEDS)
	set -e; for row in "16 4x4 0" "16 4x4 0.01" "64 8x8 0" "64 8x8 0.001" "64 8x8 0.005" "64 8x8 0.01" \
			"64 4x4x4 0" "64 4x4x4 0.001" "64 4x4x4 0.005" "64 4x4x4 0.01"; do \
		set -- $$row; echo "$$1 peers on $$2, $$3 absent"; \
		$(PYTHON) -m moshpitd simulate --peers $$1 --grid $$2 --absent $$3 --seeds 10; \
	done

# chaos: real daemons behind fault proxies, killed and paused, judged by their receipts; SEED=1 MINUTES=2
chaos: $(INSTALLED)
	$(PYTHON) -m tests.end_to_end.chaos --seed $(or $(SEED),1) --minutes $(or $(MINUTES),2)

# soak: a kill or a pause every 5 s for an hour, the daemons' memory, descriptors, threads and tasks; SEED=1 MINUTES=60
soak: $(INSTALLED)
	$(PYTHON) -m tests.end_to_end.chaos.soak --seed $(or $(SEED),1) --minutes $(or $(MINUTES),60)

# bench: measure, side by side with others where they can be installed
bench: $(INSTALLED)
	$(PYTHON) -m tests.benchmarks

# image: build the container image
image:
	docker/build-image.sh

# swarm: four daemons in containers, each with its trainer; checks the result and takes them down
swarm: image
	docker/run-swarm.sh

# clean: remove what the other targets made
clean:
	rm -rf .venv .bench build docker/wheels dist *.egg-info clients/python/build clients/python/*.egg-info demo_digits.png htmlcov \
		.coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.cfg pyproject.toml clients/python/pyproject.toml
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -e ".[dev,demo]" -e clients/python
	touch $@
