# `make` alone lists the targets. The first one that needs .venv creates it.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train sweep serve test faults drill cluster-demo doctor lint types bench fault-bench gpu-check ui clean

# Some images set it. Then each process compiles all that it imports: 17 s of CPU instead of 8 for
# Ray, torch and MLflow.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
READY := .venv/ready
# The first of these that is Python 3.11 or newer; `make PYTHON=... train` says otherwise.
PYTHON = $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)

# Likewise the first that has torch: on a machine with a GPU nothing of ours is installed.
TORCH_PYTHON = $(shell for p in $(BIN)/python python3 python python3.11 python3.12 python3.13; do \
	$$p -c 'import sys, importlib.util as u; sys.exit(sys.version_info < (3, 11) or not u.find_spec("torch"))' \
		2> /dev/null && echo $$p && break; done)

help:  ## list these targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

train: $(READY)  ## train the demo: 8x8 digits, 2 workers; `STEPS=1500`: shorter
	$(BIN)/python jobs/train.py conf/train/digits.yaml $(if $(STEPS),training.steps=$(STEPS))

sweep: $(READY)  ## sweep over noise schedules and T, on the digits; under 10 minutes
	$(BIN)/python jobs/sweep.py conf/sweep/quick.yaml

serve: $(READY)  ## serve the demo's model over HTTP, with a web page; after `make train`
	$(BIN)/python jobs/serve.py runs/digits

test: $(READY)  ## run all tests except the long ones
	$(BIN)/pytest -n 2 --dist loadgroup

faults: $(READY)  ## run the long tests: killed workers, dead servers, full training runs
	$(BIN)/pytest -m slow

cluster-demo: $(READY)  ## train and sweep on 2 Ray nodes of this machine
	$(BIN)/python -m tests.distributed.demo

drill: $(READY)  ## a short run with injected faults, on this machine
	$(BIN)/python jobs/drill.py conf/drill/digits.yaml

doctor: $(READY)  ## check packages, storage, MLflow and Ray
	$(BIN)/python jobs/doctor.py

lint: $(READY)  ## check style and format with ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)  ## check types with mypy --strict
	$(BIN)/mypy

bench: $(READY)  ## measure speed, as ratios within one run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for script in $(filter-out $(patsubst %,benchmarks/%.py,faults results gpu_check bf16_loss large_state latent_results text_results cascade_results emoji_results serving),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script; done

fault-bench: $(READY)  ## measure the cost of faults, against plain Ray Train, s3fs, MLflow; 20 minutes
	$(BIN)/python -m benchmarks.faults

gpu-check:  ## test and measure this machine's GPU in 8 minutes; needs only torch
	@test -n "$(TORCH_PYTHON)" || { echo "no Python 3.11 or newer with torch is on the PATH" >&2; exit 1; }
	$(TORCH_PYTHON) -m benchmarks.gpu_check

ui: $(READY)  ## open the local runs in MLflow
	@echo "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning (Ctrl-C ends it)"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --workers 1 \
		--backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

clean:  ## remove .venv and caches; keeps data/, runs/ and mlflow.db
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache ddpm_ray.egg-info
	find ddpm_ray jobs tests benchmarks -name __pycache__ -prune -exec rm -r {} +

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is not on the PATH; install it" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	# Not compiled: 96 s of CPU for 21,000 files, of which a run imports a fifth. Python compiles
	# those when they are first imported.
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@
