# One verb per command. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(KVPLANE_CACHE),$(HOME)/.cache/kvplane)
PYTHON := .venv/bin/python

.PHONY: help setup demo demo-down test unit integration e2e lint verify generate lock images dashboards-preview clean clean-cache bench-operator bench-admission

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 20

setup: ## Python packages into .venv (the other commands do it by themselves)
	@scripts/bootstrap.sh

demo: setup ## nothing -> a cluster -> a served token; leaves the cluster up (MODEL=hf://ORG/NAME for a real model)
	@$(PYTHON) -m e2e.demo up

demo-down: setup ## remove what the demo left up
	@$(PYTHON) -m e2e.demo down

test: setup lint verify ## everything: lint, drift, unit, integration and end-to-end tests (root)
	@$(PYTHON) -m e2e.prepare
	@$(PYTHON) -m pytest tests e2e/tests/test_cluster.py -n 3 --dist loadfile --no-loadscope-reorder --durations=25
	@$(PYTHON) -m pytest e2e/tests --ignore e2e/tests/test_cluster.py --durations=25
	@$(PYTHON) -m pytest e2e/rings --durations=25

unit: setup ## unit and integration tests (real API server, no nodes, no root)
	@$(PYTHON) -m e2e.cluster build kubernetes etcd helm prometheus
	@$(PYTHON) -m pytest tests -n 3 --dist loadfile --no-loadscope-reorder

e2e: setup ## end-to-end tests: the cluster itself, kvplane on it with the real vLLM, then rings that lose ranks (root)
	@$(PYTHON) -m e2e.prepare
	@$(PYTHON) -m pytest e2e/tests
	@$(PYTHON) -m pytest e2e/rings

lint: setup ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy operator/kvplane_api operator/kvplane_operator runtime/kvplane_runtime charts e2e images bench

generate: setup ## write what is generated from code: CRD, chart copy, references
	@PYTHONPATH=. $(PYTHON) scripts/generate.py

verify: setup ## fail if generated files differ from their sources
	@PYTHONPATH=. $(PYTHON) scripts/generate.py --check

lock: setup ## renew requirements/*.lock
	@scripts/lock.sh

dashboards-preview: setup ## draw the dashboards into dist/dashboards (needs Node.js and Chromium; PROMETHEUS=URL for real figures)
	@$(PYTHON) -m charts.preview $(if $(PROMETHEUS),--prometheus $(PROMETHEUS))

images: setup ## build the images; PUSH=REGISTRY/REPOSITORY pushes them for your own cluster, TAG=... names a version
	@$(PYTHON) -m images.build control engine-cpu ring-cpu demo-model $(if $(TAG),--tag $(TAG)) $(if $(PUSH),--push $(PUSH))

bench-operator: setup ## reconcile latency, bursts, idle cost, beside LeaderWorkerSet's controller
	@$(PYTHON) -m bench.operator

.PHONY: bench-operator-autoscaled
bench-operator-autoscaled: setup ## 1,000 autoscaled services on a real API server: time to a decision, CPU, memory, requests (12 minutes; QUICK=1: 50, to see that it works)
	@$(PYTHON) -m bench.operator.autoscaled $(if $(QUICK),--quick)

.PHONY: demo-ring
demo-ring: setup ## 100,000 tokens over a ring of four processes on this machine, with their progress and memory (no root, no cluster)
	@$(PYTHON) -m bench.ring.demo

.PHONY: test-gpu
test-gpu: ## the ring engine's GPU path; PYTHON=… has torch for CUDA and these packages, .venv has not (ONE=1: one GPU, no NCCL)
	@$(PYTHON) -m pytest tests/ring -m "gpu$(if $(ONE), and not several_gpus)" --durations=10

.PHONY: bench-engine
bench-engine: setup ## the simulated engine beside the real vLLM: step times, preemptions, KV usage under the same load
	@$(PYTHON) -m bench.engine

.PHONY: bench-proxy
bench-proxy: setup ## latency and CPU that the sidecar adds, beside its proxy alone and Go's httputil.ReverseProxy (18 minutes)
	@$(PYTHON) -m bench.proxy

.PHONY: bench-thrash
bench-thrash: setup ## precision, recall and delay of the thrash detector, on a model of vLLM's cache (simulated time)
	@$(PYTHON) -m bench.thrash

bench-admission: setup ## admission beside the peers' on the real vLLM and on recorded traffic, 3 hours (QUICK=1: 12 minutes; goes on where it ended)
	@$(PYTHON) -m bench.admission $(if $(QUICK),--quick) $(if $(FRESH),--fresh)

.PHONY: bench-autoscaling
bench-autoscaling: setup ## our autoscaler beside the peers' laws on recorded traffic, in virtual time, hours of CPU (QUICK=1: minutes)
	@$(PYTHON) -m bench.autoscaling $(if $(QUICK),--quick)

.PHONY: bench-autoscaling-spot
bench-autoscaling-spot: setup ## one service of the real vLLM from one replica to two under a step of load, and back, on a real cluster (root; 10 minutes)
	@$(PYTHON) -m bench.autoscaling.spot

.PHONY: bench-ring
bench-ring: setup ## the ring engine: exactness, memory, prefill, decode, first tokens, a lost rank, beside the same model unsharded and vLLM (QUICK=1: small; goes on where it ended)
	@$(PYTHON) -m bench.ring $(if $(QUICK),--quick) $(if $(FRESH),--fresh)

.PHONY: bench-ring-recovery
bench-ring-recovery: setup ## a rank of a ring on a real cluster killed, beside LeaderWorkerSet with the same engine (root; QUICK=1: one of each)
	@$(PYTHON) -m bench.ring_recovery $(if $(QUICK),--quick)

clean: ## remove clusters, build output and .venv; keep the cache
	@if [[ -x $(PYTHON) ]]; then $(PYTHON) -m e2e.demo down; $(PYTHON) -m e2e.cluster --name e2e down; $(PYTHON) -m e2e.cluster --name rings down; $(PYTHON) -m e2e.cluster --name ringbench down; $(PYTHON) -m e2e.cluster --name spot down; fi
	@rm -rf .venv dist bench/results .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-cache: clean ## remove the cache too
	@rm -rf $(CACHE)
