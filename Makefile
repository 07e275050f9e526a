# The same commands for people and for CI (.ci/run).
.PHONY: check lint types imports test slow bench demo ci
check: lint types imports test

lint:
	ruff check .
	ruff format --check .
types:
	mypy
imports:
	lint-imports
test:
	pytest
slow:
	pytest -m slow
bench:
	python benchmarks/query_cost.py
	python benchmarks/search.py
demo:
	matvit demo
ci:
	.ci/run
