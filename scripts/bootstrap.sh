#!/usr/bin/env bash
# From a bare machine to a working .venv: uv in a venv of its own below the cache, then the locked development packages.
# Does nothing, in a fraction of a second, when .venv matches requirements/dev.lock already.
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${KVPLANE_CACHE:-$HOME/.cache/kvplane}"
uv_version=0.13.8
uv="$cache/uv/bin/uv"
export UV_CACHE_DIR="$cache/uv-cache"
stamp=".venv/kvplane-stamp"
wanted="$(cat requirements/dev.lock pyproject.toml scripts/bootstrap.sh | sha256sum | cut -c1-16) $PWD"

if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    exit 0
fi

say() { printf '\033[1m•\033[0m %s\n' "$*" >&2; }

usable_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

if ! python="$(usable_python)"; then
    if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
        say "installing python3 with apt-get"
        apt-get -qq update >&2 && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y python3 python3-venv >&2
    fi
    python="$(usable_python)" || {
        echo "kvplane needs Python 3.11 or newer with its venv module, and none was found. Install it" \
            "(Debian, Ubuntu: apt-get install python3 python3-venv) and run this again." >&2
        exit 1
    }
fi

if [[ ! -x $uv ]] || [[ $("$uv" --version) != "uv $uv_version"* ]]; then
    say "installing uv $uv_version into $cache/uv"
    rm -rf "$cache/uv"
    mkdir -p "$cache"
    "$python" -m venv "$cache/uv"
    "$cache/uv/bin/pip" --quiet --disable-pip-version-check install "uv==$uv_version"
fi

say "installing the development packages into .venv"
"$uv" venv --quiet --clear --python "$python" .venv
"$uv" pip sync --quiet --require-hashes --python .venv/bin/python requirements/dev.lock
if [[ $(uname -sm) == "Linux x86_64" ]]; then # what torch's files insist on, see the decision on the CPU engine
    .venv/bin/python images/engine-cpu/cuda_stubs.py .venv/lib/python3.*/site-packages/torch/lib
fi
"$uv" pip install --quiet --no-deps --python .venv/bin/python --editable .
echo "$wanted" >"$stamp"
