# `make demo` and `make test` set up all they need. PYTHON may name another interpreter (3.11 or later).
PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv

.PHONY: demo test test-slow test-gpu test-page docs release bench-gpu bench-gpu-export check lint types shipped bundle speed parity evaluate clean

demo: $(DEMO)/.installed
	$(DEMO)/bin/saferedir demo --out demo-output

# Two processes of one thread each: most of the time goes into tracing graphs, which has one thread.
PYTEST := OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest -n 2

test: $(DEV)/.installed
	$(PYTEST) --dist worksteal --cov --cov-report=term --cov-fail-under=85

# The page in a browser, and the docs site in build/site; each has packages of its own.
test-page: $(DEV)/.installed
	$(DEV)/bin/python -m pip install --quiet -c constraints.txt -e '.[browser]' --config-settings editable_mode=strict
	SAFEREDIR_SCREENSHOTS=docs/pictures $(DEV)/bin/python -m pytest --no-cov -m slow tests/test_page.py

docs: $(DEV)/.installed
	$(DEV)/bin/python -m pip install --quiet -c constraints.txt -e '.[docs]' --config-settings editable_mode=strict
	NO_MKDOCS_2_WARNING=1 $(DEV)/bin/python -m mkdocs build --strict

# Wheel and sdist in dist/; what a service installs, with hashes, in requirements.txt; its bill of materials in sbom.cdx.json.
UV = $(DEV)/bin/uv --quiet
INSTALLED := build/installed

release: $(DEV)/.installed
	$(DEV)/bin/python -m pip install --quiet -c constraints.txt -e '.[release]' --config-settings editable_mode=strict
	rm -rf dist $(INSTALLED)
	$(DEV)/bin/python -m build --outdir dist
	$(UV) pip compile pyproject.toml --extra cpu --extra serve -c constraints.txt --universal --generate-hashes \
	    --no-annotate --custom-compile-command 'make release' -o requirements.txt
	$(UV) venv $(INSTALLED)
	$(UV) pip sync --python $(INSTALLED) --require-hashes requirements.txt
	$(UV) pip install --python $(INSTALLED) --no-deps dist/*.whl
	$(DEV)/bin/cyclonedx-py environment $(INSTALLED) --pyproject pyproject.toml --output-reproducible -o sbom.cdx.json
	cp requirements.txt sbom.cdx.json dist/
	cd dist && sha256sum * > SHA256SUMS

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

# The shipped safety module, the three of one concept each, a concept added to it, and the embedded bundle, from the shipped base
# model: record, train, calibrate, export. Hours; each part goes on where it was.
MODEL := saferedir_torch/shipped/emoji-diffusion
CONCEPTS := church ink weapons
METHOD = $(DEV)/bin/saferedir

shipped: runs/shipped/made $(CONCEPTS:%=runs/%/made) runs/teddy/made
	cp runs/shipped/safety/* saferedir_torch/shipped/safety/
	for concept in $(CONCEPTS); do mkdir -p benchmarks/modules/$$concept; cp runs/$$concept/safety/* benchmarks/modules/$$concept/; done
	$(DEV)/bin/python -m benchmarks.added_branch runs/teddy/safety
	$(MAKE) bundle

runs/shipped/made: $(DEV)/.installed
	$(METHOD) train --model $(MODEL) --out runs/shipped $(CONCEPTS:%=--concept %)
	$(METHOD) calibrate --model $(MODEL) --safety runs/shipped/safety --recorded runs/benign
	touch $@

$(CONCEPTS:%=runs/%/made): runs/%/made: runs/shipped/made
	$(METHOD) train --model $(MODEL) --out runs/$* --concept $* --runs-from runs/shipped --steps 3000
	$(METHOD) calibrate --model $(MODEL) --safety runs/$*/safety --recorded runs/benign
	touch $@

runs/teddy/made: runs/shipped/made
	$(METHOD) train --model $(MODEL) --out runs/teddy --extend runs/shipped/safety --concept teddy --runs 2400 --steps 2000
	$(METHOD) calibrate --model $(MODEL) --safety runs/teddy/safety --recorded runs/benign-without-teddy
	touch $@

# The embedded bundle, from the shipped model and safety module.
bundle: $(DEV)/.installed
	$(DEV)/bin/saferedir export $(MODEL) --safety saferedir_torch/shipped/safety --out engines/emoji_diffusion

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
