# Two commands are enough: `make demo` restores a JPEG in a real ComfyUI, `make test` runs the tests.
PYTHON ?= python3
IMAGE ?=
RESTORER ?=
JOBS ?= 2
VENV_PYTHON := .venv/bin/python
ifeq ($(OS),Windows_NT)
VENV_PYTHON := .venv/Scripts/python.exe
endif

.PHONY: setup demo test test-slow lint bench clean

setup:  ## make .venv and put a pinned ComfyUI beside it (COMFYUI_DIR=... uses an installed one)
	@$(PYTHON) tools/setup_env.py

demo: setup  ## restore IMAGE=photo.jpg (or a sample) in ComfyUI; writes demo/restored.png and demo/before_after.png
	@$(VENV_PYTHON) tools/demo.py $(if $(IMAGE),--image "$(IMAGE)") $(if $(RESTORER),--restorer "$(RESTORER)")

test: setup  ## all tests but the slow ones, in JOBS processes
	@$(VENV_PYTHON) -m pytest tests -m "not slow" -n $(JOBS) --dist loadfile

test-slow: setup  ## the slow tests
	@$(VENV_PYTHON) -m pytest tests -m slow

lint: setup  ## ruff and pyright
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m pyright

bench: setup  ## all benchmarks; one of them: .venv/bin/python -m benchmarks NAME
	@for name in codec data restorers samplers; do $(VENV_PYTHON) -m benchmarks $$name || exit 1; done

clean:  ## remove what setup and demo made
	rm -rf .venv .comfyui demo
