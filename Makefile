# make demo           two releases of an image, the proxy, and a device that updates through it;
#                     KEEP=1 leaves the proxy running
# make demo-stop      stops it, and removes everything that demos have left
# make test           all tests, in two processes; ARGS="-k word" for some of them, in one
# make check          ruff, mypy, and the prose linter for the documentation
# make bench          figures beside librsync's, over published packages: docs/benchmarks.md;
#                     ARGS="--direct --pair wheels", ARGS=--help
# make bench-device   bytes, commands and modelled seconds of updates: docs/update-time.md;
#                     ARGS="--pair wheels"
# make bench-load     2,000 devices at once, and bytes per second beside nginx: docs/load.md;
#                     ARGS="--devices 500"
# make bench-tenants  seconds of one fleet's updates while another attacks;
#                     ARGS="--updates 5 'all at once'"
# make bench-sizing   simulates large fleets from the measured builds: docs/sizing.md;
#                     ARGS=--measure builds a release with 40 source releases first
# make bench-hostile  processor seconds a MB for hostile layers: docs/security.md;
#                     ARGS="--only zeros"
# make dist           what is released, in dist: source, wheels, a Debian package, an SBOM
# make docs           the documentation as a site, in build/docs
# make reliability    counts the results of faults in real servers: docs/reliability.md;
#                     TIMES=5 runs five times as long as the tests
# make fuzz           the C kernel under sanitizers, TIME=60 seconds a target
# make clean          removes everything that make created

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo demo-stop test check bench bench-device bench-load bench-tenants bench-sizing \
	bench-hostile dist docs reliability fuzz clean test-parts

VENV := .venv
BIN := $(VENV)/bin
# A change in one of these files installs (and compiles) obdelta again.
RECIPE := setup.cfg setup.py pyproject.toml tools/venv obdelta/delta/kernel/compile.py \
	$(wildcard obdelta/delta/kernel/*.[ch] obdelta/delta/kernel/*/*.[ch])

demo: $(VENV)/obdelta.stamp
	@tools/debian-packages tools/debian-packages-demo.txt
	@KEEP=$(KEEP) $(BIN)/python -m bench.demo

demo-stop: $(VENV)/obdelta.stamp
	@$(BIN)/python -m bench.demo stop

test: test-parts
	@$(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist loadscope --no-loadscope-reorder)

check: $(VENV)/check.stamp tools/prose/node_modules/.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	tools/prose/check

bench: $(VENV)/bench.stamp
	@tools/debian-packages tools/debian-packages-bench.txt
	@$(BIN)/python -m bench $(ARGS)

bench-device: $(VENV)/bench.stamp
	@tools/debian-packages tools/debian-packages-bench.txt
	@$(BIN)/python -m bench.device $(ARGS)

bench-load: test-parts
	@tools/debian-packages tools/debian-packages-bench.txt
	@$(BIN)/python -m bench.load $(ARGS)

bench-tenants: test-parts
	@tools/debian-packages tools/debian-packages-bench.txt
	@$(BIN)/python -m bench.tenants $(ARGS)

bench-sizing: test-parts
	@$(BIN)/python -m bench.sizing $(ARGS)

bench-hostile: $(VENV)/bench.stamp
	@$(BIN)/python -m bench.hostile $(ARGS)

docs: $(VENV)/docs.stamp
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

dist: $(VENV)/dist.stamp
	@tools/debian-packages tools/debian-packages-dist.txt
	@tools/dist

reliability: test-parts
	@$(BIN)/python -m tools.reliability $(TIMES)

fuzz:
	@tools/debian-packages tools/debian-packages-test.txt
	@tools/fuzz $(or $(TIME),60)

test-parts: $(VENV)/test.stamp tests/node/node_modules/.stamp .cache/older-rsync/.stamp
	@tools/debian-packages tools/debian-packages-test.txt

$(VENV)/obdelta.stamp: $(RECIPE) tools/debian-packages-build.txt
	@tools/venv $(VENV)
	@touch $@

$(VENV)/test.stamp: $(RECIPE)
	@tools/venv $(VENV) test,docs,dist
	@touch $@ $(VENV)/obdelta.stamp

$(VENV)/check.stamp: $(RECIPE)
	@tools/venv $(VENV) test,docs,dist,check
	@touch $@ $(VENV)/test.stamp $(VENV)/obdelta.stamp

$(VENV)/docs.stamp: $(RECIPE)
	@tools/venv $(VENV) docs
	@touch $@ $(VENV)/obdelta.stamp

$(VENV)/dist.stamp: $(RECIPE)
	@tools/venv $(VENV) dist
	@touch $@ $(VENV)/obdelta.stamp

$(VENV)/bench.stamp: $(RECIPE)
	@tools/venv $(VENV) bench
	@touch $@ $(VENV)/obdelta.stamp

tests/node/node_modules/.stamp: tests/node/package.json tests/node/package-lock.json
	@tools/debian-packages tools/debian-packages-test.txt
	@echo "installing the devices' npm packages for tests"
	@cd tests/node && npm ci --loglevel=error
	@touch $@

tools/prose/node_modules/.stamp: tools/prose/package.json tools/prose/package-lock.json
	@tools/debian-packages tools/debian-packages-check.txt
	@echo "installing the prose linter from npm"
	@cd tools/prose && npm ci --loglevel=error
	@touch $@

.cache/older-rsync/.stamp: tools/older-rsync
	@tools/debian-packages tools/debian-packages-test.txt
	@tools/older-rsync .cache/older-rsync
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .demo .bench .cache
	rm -rf tests/node/node_modules tools/prose/node_modules
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f obdelta/delta/kernel/_kernel_cffi*.so obdelta/delta/kernel/_kernel_cffi.c
	rm -f twisted/plugins/dropin.cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
