# People and .ci/run use the same commands. `make` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help check lint format types test slow browser clean-install lower-bounds demo bench soak ci

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

check: lint types test  ## what every change must pass

lint:  ## style and import order of the packages
	ruff check .
	ruff format --check .
	lint-imports

format:  ## rewrite what lint complains about, where that is safe
	ruff check --fix .
	ruff format .

types:  ## strict type check
	mypy

test:  ## the tests, without the slow ones
	pytest -n auto

slow:  ## the long tests: clean installs, training, soaks
	pytest -m slow

browser:  ## the page in a real browser
	pytest -m browser

clean-install:  ## a wheel in an empty environment, without torch
	pytest -m slow tests/docs/test_clean_install.py

lower-bounds:  ## the tests with the oldest dependencies that pyproject.toml allows, in a fresh environment
	.ci/lower-bounds

demo:  ## the bundled photographs, one index, four query encoders, the page
	matvit demo

bench:  ## the measured claims of the README
	python benchmarks/query_cost.py
	python benchmarks/search.py
	python benchmarks/retriever.py
	python benchmarks/open_index.py
	python benchmarks/ingest.py
	python benchmarks/ingest.py --sizes 10000,100000
	python benchmarks/decoders.py

soak:  ## the index's hardest tests in their long forms, on all cores; writes docs/soak.md
	python benchmarks/soak.py

ci:  ## all of it, in a fresh environment
	.ci/run
