# Fresh machine to trained model: make pretrain. Variables: python=, torch=, workers= (of tests).
python ?= python3
torch ?= torch==2.13.0
workers ?= 2

bin := .venv/bin
environment := .venv/.installed
extensions := .cache/extensions.built
# A file's tests stay together: they share what is expensive to make.
pytest := $(bin)/python -m pytest -n $(workers) --dist loadfile --no-loadscope-reorder
corpus := examples/corpus
quickstart := runs/quickstart-data

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help toolchain install pretrain test test-all test-fast test-quickstart mutations lint tensorboard clean

help:
	@echo "make install      create .venv and build what DeepSpeed needs on CPU"
	@echo "make pretrain     train a small model on this machine, then sample from it"
	@echo "make test         all tests;  make test-fast: the tier that takes under two minutes"
	@echo "make test-all     the rest of the fault tests too; takes long"
	@echo "make mutations    plant known bugs in a copy and show that the tests find them"
	@echo "make lint         ruff and mypy"
	@echo "make tensorboard  show the metrics of runs/"
	@echo "make clean        remove caches and build products (keeps runs/ and .venv)"

toolchain:
	@command -v $(python) >/dev/null || \
	  { echo "error: $(python) not found: install Python 3.11 or newer, or name one with make python=PATH" >&2; exit 2; }
	@$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(python) is older than 3.11: name a newer one with make python=PATH" >&2; exit 2; }
	@$(python) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(python) cannot create environments: install python3-venv (apt-get install python3-venv)" >&2; exit 2; }
	@command -v g++ >/dev/null || \
	  { echo "error: g++ not found: install it (apt-get install g++)" >&2; exit 2; }

# torch comes first and alone: another order can pull a second build of it with gigabytes of CUDA libraries.
$(environment): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory toolchain
	@$(bin)/python -m pip --version >/dev/null 2>&1 || $(python) -m venv .venv
	$(bin)/python -m pip install --quiet "$(torch)"
	$(bin)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

$(extensions): $(environment) tools/build_extensions.py parallel/extensions.py $(wildcard inference/cpu_kernels/*.*)
	$(bin)/python tools/build_extensions.py
	@mkdir -p $(@D) && touch $@

install: $(extensions)

$(quickstart)/tokenizer.model: $(corpus)/train.jsonl.xz | $(extensions)
	$(bin)/python tools/train_tokenizer.py --input $< --vocab-size 4096 --output $@

$(quickstart)/shards/.complete: $(quickstart)/tokenizer.model $(corpus)/validation.jsonl.xz
	$(bin)/python tools/prepare_data.py --input $(corpus)/train.jsonl.xz \
	  --validation-input $(corpus)/validation.jsonl.xz --tokenizer $< --output $(@D)
	@touch $@

pretrain: $(extensions) $(quickstart)/shards/.complete
	$(bin)/python tools/pretrain.py configs/quickstart.yaml
	$(bin)/python tools/evaluate_model.py --checkpoint runs/quickstart --json runs/quickstart/evaluation.json
	$(bin)/python tools/generate.py --checkpoint runs/quickstart --prompt "It was a" --max-new-tokens 64 \
	  --temperature 0.8 --top-p 0.95
	@echo "Curves: make tensorboard, then open http://localhost:6006"

test: $(extensions)
	$(pytest)

test-fast: $(extensions)
	$(pytest) -m "not slow and not whole and not quickstart"

test-all: $(extensions)
	$(pytest) -m ""

test-quickstart: $(extensions)
	$(bin)/python -m pytest -m quickstart tests/test_quickstart.py

mutations: $(extensions)
	$(bin)/python -m tests.mutations.run

lint: $(environment)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

tensorboard: $(environment)
	$(bin)/tensorboard --logdir runs

clean:
	rm -rf .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path "./.venv/*" -prune -exec rm -rf {} +
