# Everything a contributor needs. `make test` and `make demo` install what they need themselves.

VENV := .venv
PYTHON := $(VENV)/bin/python
CYCLES := 1000
SABOTEURS := 20
DAMAGED := 200
STORMS := 10
TIMINGS := 12
ROUNDS := 7
CHANGES := 100
SEED :=
SYSTEMS := L,agent,nobus,S,P,Y,U
WHAT := cycles
KERNEL ?= 6.1
export KERNEL
AWAIT_UDEV ?= no
export AWAIT_UDEV
BED := PYTHONPATH=tests $(PYTHON) -m vm

.PHONY: help setup lint man check fuzz test smoke coverage demo soak swaps throughput bench vm-shell wheel deb clean

help:
	@echo "make demo       the main job, narrated, in a virtual machine"
	@echo "make test       all tests: unit, life, and the suite in the virtual machine"
	@echo "make smoke      a few tests in the virtual machine: KERNEL=6.12 for another kernel of Debian's"
	@echo "make check      what needs no virtual machine: ruff, mypy, floors, unit, life, install, fuzz and D-Bus tests"
	@echo "make fuzz       20,000 inputs, each time others, to everything that reads what others wrote"
	@echo "make coverage   how much of agent/ the tests reach; fails below 90 %"
	@echo "make soak       media plugged and pulled with faults at random: CYCLES=1000 DAMAGED=200 STORMS=10 SABOTEURS=20"
	@echo "make swaps      cards changed quickly under a mounted filesystem: CHANGES=100; half an hour"
	@echo "make throughput dm-crypt with tagged and with trusted keys, in one run; four minutes: ROUNDS=7"
	@echo "make bench      plug to mounted, plug to gone, beside other ways to do it: SYSTEMS=L,agent CYCLES=12"
	@echo "                WHAT=cycles,storm,scaling,start,idle measures the rest as well: twenty minutes"
	@echo "make man        writes docs/man, docs/dbus.md, config/completions and config/*.schema.json anew"
	@echo "make vm-shell   a shell in the virtual machine"
	@echo "make install    into DESTDIR= with PREFIX=/usr; make uninstall takes it away"
	@echo "make deb        a Debian package in build/; ARCH=arm64 for another architecture"
	@echo "make wheel      a wheel in build/, for pip"

# After a change of the command line or of config/agent.toml.
man: $(VENV)/.installed
	$(PYTHON) docs/generate_man.py
	$(PYTHON) docs/generate_completions.py
	$(PYTHON) docs/generate_schema.py
	$(PYTHON) docs/generate_dbus.py

setup: $(VENV)/.installed
	@tests/vm/setup

$(VENV)/.installed: pyproject.toml
	@python3 -c 'import ensurepip' 2>/dev/null || tests/vm/setup
	@echo "Installing Python packages into $(VENV)"
	@python3 -m venv $(VENV)
	@$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check agent tests tools docs
	$(VENV)/bin/ruff format --check agent tests tools docs
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy docs/generate_man.py docs/generate_completions.py docs/generate_schema.py
	$(VENV)/bin/lint-imports

check: lint
	@tests/vm/setup tools
	$(PYTHON) -m pytest -q -n 2 tests/unit tests/life tests/install tests/fuzz tests/bus

# A quarter of an hour or more. What is found stays in .hypothesis and is tried first the next time.
fuzz: $(VENV)/.installed
	HYPOTHESIS_PROFILE=many $(PYTHON) -m pytest -q tests/fuzz

# KERNEL=6.12 takes another series of Debian's than 6.1; with AWAIT_UDEV=yes all agents in it wait for
# udev, which by default they do not.
test: setup
	tests/run-all

# The main job and the kernel's interfaces, on another kernel than the one that `test` takes.
smoke: setup
	tests/run-all -m smoke

coverage: setup
	tests/measure-coverage

demo: setup
	@$(BED) demo

soak: setup
	tests/run-all -m soak
	@$(BED) soak -- --cycles $(CYCLES) --damaged $(DAMAGED) --storms $(STORMS) --timings $(TIMINGS) $(SEED:%=--seed %)
	@$(BED) growth $(CYCLES)
	@$(BED) saboteur -- --seeds $(SABOTEURS) --steps 100 $(SEED:%=--seed %)

swaps: setup
	@$(BED) swaps -- --changes $(CHANGES) $(SEED:%=--seed %)

# Only ratios mean anything there; tools/measure takes the figures on a board.
throughput: setup
	@$(BED) throughput -- --rounds $(ROUNDS)

# Absolute times are those of an emulated processor; docs/performance.md says what can be compared.
bench: CYCLES := 12
bench: STORMS := 3
bench: setup
	@$(BED) bench -- --what $(WHAT) --systems $(SYSTEMS) --cycles $(CYCLES) --storms $(STORMS) \
	    $(if $(BEFORE),--before $(abspath $(BEFORE)))

vm-shell: setup
	@$(BED) shell

# As the package is made from them, its parts are listed once.
include config/install.mk

deb: $(VENV)/.installed
	@PYTHON=$(PYTHON) config/debian/make-deb build $(ARCH)
	@ls build/caam-hotplug_*.deb

wheel: $(VENV)/.installed
	@rm -rf build/lib build/bdist.*
	@$(PYTHON) -m pip wheel -q --disable-pip-version-check --no-deps -w build .
	@ls build/caam_hotplug-*.whl

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
