# `make demo` and `make test` set up all they need. PYTHON may name another interpreter (3.11 or later).
PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv

.PHONY: demo test test-slow test-gpu bench-gpu bench-gpu-export check lint types bundle speed parity evaluate clean

demo: $(DEMO)/.installed
	$(DEMO)/bin/saferedir demo --out demo-output

# Two processes of one thread each: most of the time goes into tracing graphs, which has one thread.
PYTEST := OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest -n 2

test: $(DEV)/.installed
	$(PYTEST) --dist worksteal --cov --cov-report=term --cov-fail-under=85

# What is long and changes seldom; CI runs it. Its fixtures are long as well, so that a file stays with one process.
test-slow: $(DEV)/.installed
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m 'slow and not gpu'

# On a machine with an NVIDIA GPU: every backend that can be had there.
test-gpu: .venv-gpu/.installed
	.venv-gpu/bin/python -m pytest -m gpu tests/test_gpu.py tests/test_gpu_training.py tests/test_gpu_benchmark.py -v

# What safety costs a step on a card, in five minutes, once the step graphs are there.
bench-gpu: .venv-gpu/.installed
	.venv-gpu/bin/python -m benchmarks.gpu

# Makes the step graphs that are not there yet, which takes minutes: on any machine, for runs/gpu_graphs to be copied.
bench-gpu-export: $(DEV)/.installed
	$(DEV)/bin/python -m benchmarks.gpu.graphs

check: lint types test

lint: $(DEV)/.installed
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .

types: $(DEV)/.installed
	$(DEV)/bin/mypy

# The embedded bundle, from the shipped model and safety module.
bundle: $(DEV)/.installed
	$(DEV)/bin/saferedir export saferedir_torch/shipped/emoji-diffusion --safety saferedir_torch/shipped/safety \
		--out engines/emoji_diffusion

speed parity: $(DEV)/.installed
	$(DEV)/bin/python -m benchmarks.$@

# Every table that is measured from shipped weights, and the report. Hours; goes on where it was.
evaluate: $(DEV)/.installed
	$(DEV)/bin/python -m benchmarks.evaluate everything

# The runtime alone: no torch.
$(DEMO)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet -c constraints.txt '.[cpu,cli]'
	touch $@

# Strict editable: mypy sees the packages, changes take effect at once; run `make -B .venv/.installed` after adding a module.
$(DEV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]' --config-settings editable_mode=strict
	touch $@

# ONNX Runtime for CUDA takes the place of that for the CPU.
.venv-gpu/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]' --config-settings editable_mode=strict
	.venv-gpu/bin/python -m pip uninstall --quiet --yes onnxruntime
	.venv-gpu/bin/python -m pip install --quiet 'onnxruntime-gpu[cuda,cudnn]'
	touch $@

clean:
	rm -rf .venv-gpu $(DEMO) $(DEV) build dist demo-output *.egg-info
