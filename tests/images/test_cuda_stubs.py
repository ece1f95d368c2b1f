"""The stand-ins for NVIDIA's libraries: real shared objects, as the system's own loader sees them."""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.sources import load

stubs = load("engine-cpu/cuda_stubs.py")
SYMBOLS = {"ncclSend": None, "ncclRecv": None, "cublasCreate_v2": "libcublas.so.13"}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libstub.so.2"
    path.write_bytes(stubs.stub_library("libstub.so.2", SYMBOLS))
    return path


def test_the_loader_finds_every_symbol_and_no_other(library: Path) -> None:
    loaded = ctypes.CDLL(str(library))
    for symbol in SYMBOLS:
        assert getattr(loaded, symbol)
    with pytest.raises(AttributeError):
        _ = loaded.ncclBroadcast


def test_a_version_is_found_by_its_name(library: Path) -> None:
    found = ctypes.CDLL(None).dlvsym
    found.restype, found.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
    handle = ctypes.CDLL(str(library))._handle
    assert found(handle, b"cublasCreate_v2", b"libcublas.so.13")
    assert not found(handle, b"cublasCreate_v2", b"libcublas.so.12")


def test_a_call_names_itself_and_traps(library: Path) -> None:
    program = f"import ctypes; ctypes.CDLL({str(library)!r}).ncclRecv()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGILL
    assert (
        done.stderr
        == "ncclRecv was called, but libstub.so.2 is a stub: this image has no CUDA libraries, use the CPU.\n"
    )


def test_a_library_without_functions_loads(tmp_path: Path) -> None:
    path = tmp_path / "libempty.so.1"
    path.write_bytes(stubs.stub_library("libempty.so.1", {}))
    ctypes.CDLL(str(path))


def test_a_shared_object_is_read_with_its_versioned_references() -> None:
    import _ctypes

    read = stubs.read_shared_object(Path(_ctypes.__file__))
    assert "libc.so.6" in read.needed
    assert any(r.library == "libc.so.6" and r.version.startswith("GLIBC_") for r in read.references)
    assert stubs.Reference("PyErr_SetString", None, None) in read.references


def test_what_is_no_shared_object_is_refused_with_its_name(tmp_path: Path) -> None:
    text = tmp_path / "notes.so"
    text.write_text("not a library")
    with pytest.raises(stubs.NotReadableError, match=r"notes\.so is not a 64-bit x86-64 ELF file"):
        stubs.read_shared_object(text)


def test_each_reference_goes_to_its_library() -> None:
    needed = frozenset({"libcusparse.so.12", "libcusparseLt.so.0", "libcudart.so.13", "libc.so.6"})
    references = frozenset(
        {
            stubs.Reference("cusparseCreate", "libcusparse.so.12", "libcusparse.so.12"),
            stubs.Reference("cusparseLtInit", None, None),
            stubs.Reference("cudaGetDeviceCount", "libcudart.so.13", "libcudart.so.13"),
            stubs.Reference("_ZN3c10Ev", None, None),
        }
    )
    assert stubs.stub_symbols([stubs.SharedObject(needed, references)]) == {
        "libcusparse.so.12": {"cusparseCreate": "libcusparse.so.12"},
        "libcusparseLt.so.0": {"cusparseLtInit": None},
    }


@pytest.mark.parametrize(("name", "value"), [("", 0), ("a", 0x61), ("printf", 0x77905A6), ("GLIBC_2.2.5", 0x09691A75)])
def test_the_hash_is_the_abis(name: str, value: int) -> None:
    assert stubs.sysv_hash(name) == value
