.PHONY: help quality style test test-slow docs

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

quality:  ## Check format, lint and the structure of the model files
	ruff check .
	ruff format --check .
	mlinter modeling_retro

style:  ## Fix format and lint
	ruff check --fix .
	ruff format .

test:  ## Run the tests
	python -m pytest -n 2 --dist loadfile tests

test-slow:  ## Run the tests that download models or take minutes
	python -m pytest tests -m slow

docs:  ## Write the pages and pictures that are made from docstrings, tests and tables
	python docs/api_page.py > docs/api.md
	python docs/security_page.py > docs/security.md
	python docs/pictures.py
