# SPDX-License-Identifier: Apache-2.0
# On a fresh Debian 12 with git and make, as root: "make lab" and "make test" do their own set-up.

.PHONY: help setup lab test unit kernel fuzz fmt lint type clean
.DEFAULT_GOAL := help

bin := .venv/bin

help: ## show this
	@sed -n 's/^\([a-z]*\): [^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## install missing Debian packages, make .venv
	@scripts/setup

lab: setup ## three hosts on this machine, a container network over them, who reaches whom, how fast
	@$(bin)/loden lab run --throughput

test: setup ## every test that this machine can run
	@scripts/test

unit: setup ## the tests that need no kernel: quick, linters and types included
	@$(bin)/python -m pytest -m "not kernel"

kernel: setup ## the tests that need a kernel, in namespaces of their own
	@scripts/test -m kernel

fuzz: setup ## fuzz the packet engine's parsers, FUZZ_S seconds each [300]
	@scripts/fuzz $(or $(FUZZ_S),300)

fmt: setup ## format the source
	@$(bin)/ruff format .
	@$(bin)/ruff check --fix .

lint: setup ## formatting and lint
	@$(bin)/ruff format --check .
	@$(bin)/ruff check .

type: setup ## types
	@$(bin)/mypy

clean: ## remove what the set-up and the tools made
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build src/loden/_engine.abi3.so
