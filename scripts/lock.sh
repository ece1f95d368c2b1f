#!/usr/bin/env bash
# Renews the lock files. They are in requirements form, with hashes and without download addresses: see
# docs/decisions/0002-lock-files.md.
set -euo pipefail
cd "$(dirname "$0")/.."
cache="${KVPLANE_CACHE:-$HOME/.cache/kvplane}"
export UV_CACHE_DIR="$cache/uv-cache"
compile() {
    "$cache/uv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header "$@"
}
# Development and tests run the ring engine, so torch: without the GPU half, see docs/decisions/0007-cpu-engine-without-cuda.md.
compile pyproject.toml requirements/torch-cpu.in --override requirements/engine-cpu.overrides \
    --extra operator --extra sidecar --extra ring --group dev --output-file requirements/dev.lock
compile pyproject.toml --extra operator --extra sidecar --output-file requirements/control.lock
compile requirements/build.in --output-file requirements/build.lock
compile requirements/engine-cpu.in --override requirements/engine-cpu.overrides --output-file requirements/engine-cpu.lock
