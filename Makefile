# make demo   create the environment, run the embedded demo
# make test   create the environment, lint, type-check, test, build the wheel
# make lint   ruff and mypy alone

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint clean

demo: .venv/.stamp
	$(BIN)/headwater demo --out demo-out

# A process for each core, of one thread each; the tests of a file share what they set up.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile
	rm -rf dist build/lib
	$(BIN)/python -m build --no-isolation --wheel --outdir dist

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy reads folders, not the mapping of pyproject.toml: show it the package as installed.
	rm -rf build/typed && mkdir -p build/typed/headwater
	ln -s $(CURDIR)/headwater/* $(addprefix $(CURDIR)/,attribution benchmarks index ingest queries) build/typed/headwater/
	MYPYPATH=build/typed $(BIN)/mypy -p headwater

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cpu,dev]'
	touch $@

clean:
	rm -rf .venv build dist demo-out *.egg-info
