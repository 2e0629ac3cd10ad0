# The entry points. Each sets up what is missing first; a second call starts at once.
SHELL := /bin/bash
PYTHON = .venv/bin/python
REFERENCE = .venv-reference/bin/python

.PHONY: help setup mpi demo test lint reference mutants mutants-quick faults compare bench gpu clean

help:
	@echo "make demo       synthesize songs, train a bass model on them, separate: demo/index.html"
	@echo "make test       all tests (make lint: style)"
	@echo "make reference  tests against torch's openunmix, live (a second environment, 1 GB)"
	@echo "make mutants    put faults into copies of the project: do the tests notice them? (16 minutes; mutants-quick: 3)"
	@echo "make faults     kill commands, fill disks, damage files, craft media, fuzz all that reads (two hours)"
	@echo "make compare    train, separate and score with both, and with extensions, into docs/comparison.md (80 minutes)"
	@echo "make bench      speed and memory against torch and native NNabla, into docs/performance.md and data.md (45 minutes)"
	@echo "make gpu        check and measure everything on a GPU, into docs/gpu.md (10 minutes; CONTEXT=cpu rehearses it)"
	@echo "make setup      only the environment, in .venv"

setup: .venv/installed
	@command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing ffmpeg"; apt-get update -qq >/dev/null && apt-get install -y -qq ffmpeg >/dev/null; \
	  else echo "ffmpeg and ffprobe are missing: install ffmpeg (sudo apt-get install ffmpeg)"; exit 1; fi; }

# For the tests of several processes, which are skipped without it.
mpi:
	@command -v mpirun >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing Open MPI"; apt-get update -qq >/dev/null && apt-get install -y -qq openmpi-bin >/dev/null; \
	  else echo "mpirun is missing, its tests are skipped (sudo apt-get install openmpi-bin)"; fi; }

# NNabla has wheels for Python 3.8 to 3.10, NumPy 1.26 for 3.9 and later.
.venv/installed: $(wildcard requirements*.txt)
	@if [ ! -x $(PYTHON) ]; then \
	  for python in python3.10 python3.9 python python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 9), (3, 10)))' 2>/dev/null; then \
	      $$python -m venv .venv && break; fi; done; \
	  [ -x $(PYTHON) ] || ! command -v uv >/dev/null || uv venv --quiet --seed --python 3.10 .venv; \
	  [ -x $(PYTHON) ] || { echo "Python 3.10 (or 3.9) is needed, from the system, pyenv or uv"; exit 1; }; fi
	@echo "Installing packages into .venv"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

test: setup mpi
	$(PYTHON) -m pytest -q

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

demo: setup demo/songs
	$(PYTHON) train.py --context cpu --target bass --root demo/songs --is-wav --output demo/model \
	  --hidden-size 128 --seq-dur 3 --batch-size 8 --samples-per-track 40 --epochs 12
	$(PYTHON) demo.py --songs demo/songs --model demo/model --outdir demo

demo/songs:
	$(PYTHON) synthesize.py $@

# torch needs an environment of its own; the two exchange .npz files. It is made outside this folder's
# .python-version, and torchaudio, which openunmix only uses for files, is replaced by tests/reference/torchaudio.py.
.venv-reference/installed: tests/reference/requirements.txt
	@cd / && for python in python3.11 python3.12 python3.10 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    $$python -m venv $(CURDIR)/.venv-reference && break; fi; done; \
	  [ -x $(CURDIR)/$(REFERENCE) ] || { echo "Python 3.11 is needed for torch"; exit 1; }
	@echo "Installing torch and openunmix into .venv-reference"
	@$(REFERENCE) -m pip install --quiet --disable-pip-version-check -r $<
	@$(REFERENCE) -m pip install --quiet --disable-pip-version-check --no-deps openunmix==1.3.0
	@touch $@

reference: setup .venv-reference/installed
	rm -rf build/reference
	$(PYTHON) synthesize.py build/reference/songs --train 3 --valid 1 --test 0 --duration 8 --quiet
	$(REFERENCE) tests/reference/make_cases.py build/reference/cases --root build/reference/songs
	$(REFERENCE) tests/reference/make_stems.py build/reference/cases --live
	$(REFERENCE) tests/reference/make_recipe.py build/reference/cases --live
	OPENUNMIX_REFERENCE=build/reference/cases OPENUNMIX_PYTHON=$(REFERENCE) $(PYTHON) -m pytest -q -s \
	  tests/test_reference.py tests/test_separate.py tests/test_recipe.py

mutants: setup
	$(PYTHON) tests/mutants.py

mutants-quick: setup
	$(PYTHON) tests/mutants.py --quick

# Each says in its last line what it counted; the next one runs whatever came of it.
faults: setup
	@status=0; for run in kill.py "disk.py --full" damage.py media.py "fuzz.py --inputs 1000000"; do \
	  echo "$$run"; $(PYTHON) tests/faults/$$run || status=1; done; exit $$status

compare: setup .venv-reference/installed
	$(PYTHON) benchmarks/compare.py
	$(PYTHON) benchmarks/extensions.py

bench: setup .venv-reference/installed
	$(PYTHON) benchmarks/bench.py
	$(PYTHON) benchmarks/reading.py

# In an environment that has NNabla's extension: see README.md.
CONTEXT = cudnn
gpu: setup
	$(PYTHON) benchmarks/gpu.py --context $(CONTEXT)

clean:
	rm -rf .venv .venv-reference build demo
