.PHONY: help demo test kernels lint man bench lock clean
.DEFAULT_GOAL := help

python := .venv/bin/python

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 10

demo:  ## build an image, mount it, damage an object, see what happens
	@.ci/setup run
	@integration/demo.sh

test: lint  ## lint, unit tests, then the integration tests that are not slow
	@.ci/setup test
	$(python) -m pytest
	$(python) -m pytest integration -m "not slow"

kernels:  ## test with Linux 5.10, 6.1, 6.12 and the newest, in emulated guests, as root: half an hour
	@.ci/setup kernels
	$(python) -m pytest integration/vm -m slow -o faulthandler_timeout=0

include := import sysconfig; print("-I" + sysconfig.get_path("include"))

lint:  ## ruff, mypy, and the warnings of the C compiler
	@.ci/setup run
	$(python) -m ruff check
	$(python) -m ruff format --check
	gcc -fsyntax-only -O3 -Wall -Wextra -Werror -Wno-psabi $$($(python) -c '$(include)') cfsfuse/verity/_lanes.c
	$(python) -m mypy

man:  ## write docs/man from the argument parser
	@.ci/setup run
	$(python) -m cfsfuse.cli.man docs/man

bench:  ## measure speed; ARGS="--help" tells what
	@.ci/setup run
	.venv/bin/cfsfuse bench $(ARGS)

lock_python := build/lock/bin/python
lock_command := $(lock_python) -m uv pip compile --quiet --upgrade --generate-hashes --universal --python-version 3.11 \
    --custom-compile-command "make lock"

lock:  ## pin the newest versions of all requirements, with their hashes
	@.ci/setup run
	$(python) -m venv build/lock
	$(lock_python) -m pip --quiet install uv
	$(lock_command) --group dev pyproject.toml --output-file requirements/dev.txt
	$(lock_command) --group build --constraints requirements/dev.txt --output-file requirements/build.txt

clean:  ## remove what the other targets made, .venv too
	rm -rf cfsfuse/verity/*.so .venv build .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find cfsfuse tests integration -name __pycache__ -prune -exec rm -rf {} +
