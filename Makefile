# make demo    train a small model on the CPU, show its table and picture (a minute after installation)
# make test    run the test suite            make lint    check the style
# make bench   time what the README quotes
# Each creates .venv and installs what is missing, once. PYTHON=python3.12 make demo picks another interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test lint bench clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name another one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python main_numeric.py --recipe fast --no-cuda --semantics-n 4 --modality-n 2 --theta-value 10 --beta-value 2 \
		--train-steps 600 --final-batch-size 512 --log-steps 200 --num-eval-batches 2 --mlp-eval --seed 0 --model-id demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/numeric_step.py
	$(BIN)/python benchmarks/numeric_eval.py --krr
