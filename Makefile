# Everything a developer or a newcomer runs. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PROFILE ?= release
TARGET  := x86_64-unknown-linux-gnu
BIN     := target/$(TARGET)/$(if $(filter release,$(PROFILE)),release,debug)
T       ?=
N       ?=
export BULKHEAD_BIN := $(CURDIR)/$(BIN)

.PHONY: help setup build demo test lint deny unit native e2e rules chaos bench fuzz guest nested clean

help: ## list the targets
	@grep -hE '^[a-z0-9_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9_-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo '  T=NAME limits e2e and bench to one subject; PROFILE=dev builds without optimisation.'

setup: ## install what building and testing need, with apt
	@tests/setup/install

build: ## build the static binaries
	@cargo build $(if $(filter release,$(PROFILE)),--release) --workspace
	@ls -l $(BIN)/bulkhead $(BIN)/bulkhead-launcher $(BIN)/bulkhead-blk

guest: setup ## make the guest kernel, initrd and Debian root file system
	@tests/guest/make

nested: setup ## make the nested host's kernel and initrd
	@tests/nested-host/prepare

demo: setup build guest nested ## boot Debian from a confined disk process, audit it, verify a checksum
	@tests/demo

test: setup ## every test, in its short form
	@tests/all

lint: ## rustfmt, clippy with warnings as errors
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --quiet -- -D warnings

deny: setup ## licences, sources, duplicates and (where the database can be had) advisories
	@tests/deny

unit: ## unit, property and short fuzz tests
	@tests/unit

native: setup build guest ## device processes under third-party front-ends, no KVM needed
	@tests/native/all

e2e: setup build guest nested ## end-to-end tests in real KVM guests
	@tests/e2e $(T)

rules: setup build guest nested ## every seccomp rule is used by some test, and none is missing; glibc too (half an hour)
	@tests/rules
	@tests/native/dynamic

chaos: setup build guest nested ## kill processes and attack from the guest, N=500 kills, SEED=1, LIMIT=seconds in all
	@tests/chaos

bench: setup build guest nested ## benchmarks beside peers, as tables
	@tests/bench/run $(T)

fuzz: ## long property-based fuzzing of everything that reads hostile bytes (N=cases)
	@PROPTEST_CASES=$${N:-200000} tests/unit

clean: ## remove build output
	@cargo clean
