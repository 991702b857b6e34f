# Each line here could have been typed. `make` alone lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?=
SIDE_BY_SIDE ?= -n 3 --dist loadfile  # the tests of a file stay together

.DEFAULT_GOAL := help
.PHONY: help demo test check torture bench peers clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.run  ## half a year of card payments through the fraud processor, then a crash that changes nothing
	$(BIN)/ledgerstream demo $(if $(DATA),--data $(DATA))

check: $(VENV)/.dev  ## lint, types, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(SIDE_BY_SIDE) -m 'not slow and not torture'

test: $(VENV)/.dev peers  ## lint, types, all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(SIDE_BY_SIDE) -m 'not torture'

torture: $(VENV)/.dev peers  ## the long proofs: random kills, long fuzzing, every scenario
	$(BIN)/pytest $(SIDE_BY_SIDE) -m 'torture or not torture'

bench: $(VENV)/.dev peers build/quix/.done  ## every figure, side by side with its peer; writes build/bench.json
	$(BIN)/python -m bench

peers: build/kafka/.done  ## Apache Kafka's jars into build/, where Java and Maven are present

build/kafka/.done: tests/peers/pom.xml
	@mkdir -p build/kafka
	@if command -v java >/dev/null && command -v mvn >/dev/null; then \
	  mvn -q -B -f tests/peers/pom.xml dependency:copy-dependencies -DoutputDirectory=$(CURDIR)/build/kafka/libs && touch $@; \
	else echo "no Java or Maven here: tests against Apache Kafka will skip and say so"; fi

build/quix/.done: bench/quix-requirements.txt
	$(PYTHON) -m venv build/quix
	build/quix/bin/python -m pip install --quiet --disable-pip-version-check -r bench/quix-requirements.txt
	@touch $@

clean:  ## remove what was built
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache
