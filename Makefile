# What people type here. `make` lists the commands; each makes the virtual environment it needs, from locked versions, and makes it again
# when its lock changes.

PYTHON = python3
PORT ?=
DEVICE = cpu
ARGS =
DATA =
TORCH_PIP_ARGS ?=

SERVE = .venv$(if $(filter gpu,$(DEVICE)),-gpu)
DEV = .venv-dev
TEST_SERVICE = .venv-test-service
LOCK = .venv-lock

# onnxruntime's builds send usage events to their maker; here they do so only for those who say ORT_DISABLE_TELEMETRY=0.
export ORT_DISABLE_TELEMETRY ?= 1

ifneq ($(filter-out cpu gpu,$(DEVICE)),)
$(error DEVICE is cpu or gpu, not $(DEVICE))
endif

.DEFAULT_GOAL = help
.PHONY: help serve dev test test-service lint bench bench-rivals bench-training bench-endless bench-rates bench-store plan models lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.13       another Python, 3.11 or newer"
	@echo '  ARGS="..."              more for the command: options of `python -m service`, of pytest or of the benchmark'
	@echo '  TORCH_PIP_ARGS="..."    where pip finds torch: on Linux PyPI has the CUDA build (gigabytes); the CPU build is at'
	@echo '                          TORCH_PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu"'
	@echo "  TRAINING_DATA=DIR         environment: the data sets that tests of training read; without it those are skipped"

serve: $(SERVE)/.installed ## run the service on 127.0.0.1:8000 (PORT=8001; DEVICE=gpu for an NVIDIA GPU); Ctrl-C ends it
	@$(SERVE)/bin/python -m service $(if $(filter gpu,$(DEVICE)),--device cuda) $(if $(PORT),--port $(PORT)) $(ARGS)

dev: $(DEV)/.installed ## an environment with everything, to train and to test: .venv-dev/bin/python -m training

test: $(DEV)/.installed ## lint, types and all tests (ARGS="-k name", ARGS="tests/model -x")
	@$(MAKE) --no-print-directory lint; lint=$$?; $(DEV)/bin/python -m pytest $(ARGS) || exit; \
	test $$lint = 0 || { echo "The tests passed, lint did not: see above." >&2; exit $$lint; }

test-service: $(TEST_SERVICE)/.installed ## tests of the serving half, in an environment without torch
	@$(TEST_SERVICE)/bin/python -m pytest $(wildcard tests/service tests/docker tests/bench tests/simulation tests/test_*.py) $(ARGS)

lint: $(DEV)/.installed ## ruff and mypy
	@failed=0; for check in "ruff check" "ruff format --check" mypy; do echo "$$check"; $(DEV)/bin/$$check || failed=1; done; exit $$failed

bench: $(TEST_SERVICE)/.installed ## frames a second and latencies of the service, beside its limits (ARGS=--quick)
	@$(TEST_SERVICE)/bin/python -m tests.bench $(ARGS)

bench-rivals: $(TEST_SERVICE)/.installed ## the same beside Triton, LitServe, MLServer, BentoML; installs them into build/rivals, once
	@$(TEST_SERVICE)/bin/python -m tests.bench.rivals $(ARGS)

bench-store: $(TEST_SERVICE)/.installed ## the service with a Valkey beside it and without, in turns: what keeping sessions costs
	@$(TEST_SERVICE)/bin/python -m tests.bench.store_cost $(ARGS)

bench-training: $(DEV)/.installed ## the recurrent layer beside its matrix product, torch's RNN, GRU and LSTM; minutes (ARGS=--quick)
	@$(DEV)/bin/python -m tests.bench.training $(ARGS)

bench-endless: $(DEV)/.installed ## one session of 1 000 000 frames that never ends: DATA=ui-prmd-kinect-xyz.npz; minutes
	@test -n "$(DATA)" || { echo "say where the data lies: make $@ DATA=.../ui-prmd-kinect-xyz.npz" >&2; exit 2; }
	@$(DEV)/bin/python -m tests.bench.endless --data "$(DATA)" $(ARGS)

bench-rates: $(DEV)/.installed ## the same streams at other frame rates: DATA=ui-prmd-kinect-xyz.npz; minutes
	@test -n "$(DATA)" || { echo "say where the data lies: make $@ DATA=.../ui-prmd-kinect-xyz.npz" >&2; exit 2; }
	@$(DEV)/bin/python -m tests.bench.rates --data "$(DATA)" $(ARGS)

plan: $(TEST_SERVICE)/.installed ## replicas, stores and failover times for many streams, into docker/README.md (ARGS=--measure: the costs anew)
	@$(TEST_SERVICE)/bin/python -m tests.simulation --write $(ARGS)

models: $(DEV)/.installed ## train and export the shipped models again: UI_PRMD=ui-prmd-kinect-xyz.npz FINGER_POINTS=point_history.csv.gz
	@test -n "$(UI_PRMD)" && test -n "$(FINGER_POINTS)" || { echo "say where the data lies: make models UI_PRMD=.../ui-prmd-kinect-xyz.npz FINGER_POINTS=.../point_history.csv.gz"; exit 2; }
	$(call shipped,rehab-exercises,$(UI_PRMD),3)
	$(call shipped,finger-gestures,$(FINGER_POINTS),4)

# Name, data, digits kept in the sample recordings. Runs are kept in build/runs.
define shipped
	rm -rf build/runs/$(1)
	$(DEV)/bin/python -m training train training/configs/$(1).toml --data "$(2)" --out build/runs --set final=true
	$(DEV)/bin/python -m training evaluate build/runs/$(1)/seed-1-final --data "$(2)"
	$(DEV)/bin/python -m training export build/runs/$(1)/seed-1-final --data "$(2)" --to service/models/$(1)/1 --replace
	$(DEV)/bin/python -m training samples training/configs/$(1).toml --data "$(2)" --to service/samples/$(1) --decimals $(3)
endef

lock: $(LOCK)/.installed ## resolve pyproject.toml into requirements-*.txt again (ARGS=--upgrade for newer versions)
	$(COMPILE) --extra cpu --extra redis --extra grpc --extra otel -o requirements-cpu.txt
	$(COMPILE) --extra gpu --extra redis --extra grpc --extra otel -c requirements-cpu.txt -o requirements-gpu.txt
	$(COMPILE) --extra cpu --extra redis --extra grpc --extra otel --extra test -c requirements-cpu.txt -o requirements-test.txt
	printf "%s; python_version < '3'\n" $(TORCH_CUDA) >$(LOCK)/without-cuda.txt
	$(COMPILE) --extra cpu --extra train -c requirements-test.txt -c requirements-torch.txt \
	  --override $(LOCK)/without-cuda.txt --no-emit-package torch -o requirements-train.txt

clean: ## remove what these commands made: environments and caches
	rm -rf .venv .venv-gpu $(DEV) $(TEST_SERVICE) $(LOCK) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find service model training tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. The file .installed says that an installation was finished, and is older than a lock that has changed since.

.venv/.installed: requirements-cpu.txt
	$(call venv,the service (no torch))
	@$(@D)/bin/python -m pip install $(QUIET) -r requirements-cpu.txt
	@touch $@

.venv-gpu/.installed: requirements-gpu.txt
	$(call venv,the service and CUDA (gigabytes))
	@$(@D)/bin/python -m pip install $(QUIET) -r requirements-gpu.txt
	@touch $@

# Torch comes last: with its own requirements there already, an index that holds nothing but torch is enough.
$(DEV)/.installed: requirements-train.txt requirements-test.txt requirements-torch.txt
	$(call venv,training and tests)
	@$(@D)/bin/python -m pip install $(QUIET) -r requirements-train.txt -r requirements-test.txt
	@$(@D)/bin/python -m pip install $(QUIET) -r requirements-torch.txt $(TORCH_PIP_ARGS)
	@touch $@

$(TEST_SERVICE)/.installed: requirements-test.txt
	$(call venv,the service and its tests (no torch))
	@$(@D)/bin/python -m pip install $(QUIET) -r requirements-test.txt
	@touch $@

$(LOCK)/.installed:
	$(call venv,the resolver)
	@$(@D)/bin/python -m pip install $(QUIET) uv
	@touch $@

QUIET = -qq --disable-pip-version-check

define venv
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) -V) is too old: 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing $(1) into $(@D), once ..."
	@$(PYTHON) -m venv $(@D)
endef

# One resolution for all Pythons and platforms.
COMPILE = $(LOCK)/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --quiet --custom-compile-command "make lock" $(ARGS)
# What torch asks for on Linux where it comes with CUDA: torch itself pins these, and its CPU build has none of them. But for triton, in
# the version that goes with torch: its interpreter and compiler test the GPU kernels where no GPU is.
TORCH_CUDA = cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13
