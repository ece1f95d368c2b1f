"""The ring's demo, small: it says what each rank held, and leaves neither processes nor files."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def started(tmp_path: Path) -> "subprocess.Popen[str]":
    # What a shell starts in the background ignores SIGINT, and so would these tests' children.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "bench.ring.demo"]
    return subprocess.Popen(
        [*command, "--tokens", "5000", "--ranks", "2", "--answer", "4"],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("operator", "runtime", ".")),
            "TMPDIR": str(tmp_path),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path.with_suffix(".torch")),  # torch makes it when it is imported
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines that name a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder) in file.read_text(errors="replace"):
                found.append((file.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def test_it_shows_each_rank_and_leaves_nothing(tmp_path: Path) -> None:
    with started(tmp_path) as demo:
        out, said = demo.communicate(timeout=240)
    assert demo.returncode == 0, said
    rows = re.findall(r"^\| (\d+) *\| +\d+ \| +(\d+) \| +(\d+) \| +(\d+) \|$", out, re.MULTILINE)
    assert [int(rank) for rank, *_ in rows] == [0, 1], out
    assert {int(room) for _, _, room, _ in rows} == {3003}
    assert sum(int(held) for _, held, _, _ in rows) == 5000 + 4 - 1
    assert "No rank had room for 5000." in out
    assert "The ring is stopped and its model removed." in said
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_leaves_nothing_when_it_is_stopped(number: signal.Signals, tmp_path: Path) -> None:
    with started(tmp_path) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if "KVPLANE_RING_KV_TOKENS=" in line:  # the ring is being started
                break
        demo.send_signal(number)
        demo.communicate(timeout=120)
    assert demo.returncode != 0
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []
