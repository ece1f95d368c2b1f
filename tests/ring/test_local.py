"""``kvplane-ring local``: what each rank is told, and that nothing is left behind, however the parent ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2e.cluster.ports import free_ports
from kvplane_runtime.ring.__main__ import parse, serve
from kvplane_runtime.ring.local import Trial, environment
from kvplane_runtime.ring.settings import from_environment
from tests.ring.processes import ROOT
from tests.ring.tiny import SERVED, build


def test_ranks_are_told_what_a_pod_would_be() -> None:
    given = {"KVPLANE_RING_SHORT_TOKENS": "0", "KVPLANE_RING_ORDINAL": "3", "KVPLANE_RING_MODEL": "/models/other"}
    trial = Trial(ranks=4, model=Path("/models/m"), port=8100, settings=given)
    told = [environment(trial, rank, ports=(1, 2, 11, 12, 13), base={"PATH": "/bin"}, cores=8) for rank in range(4)]
    found = [from_environment(each, hostname="laptop") for each in told]
    assert [each.ordinal for each in found] == [0, 1, 2, 3]
    assert {(each.world_size, each.leader, each.address, each.threads) for each in found} == {
        (4, "127.0.0.1", "127.0.0.1", 2)
    }
    assert {(each.port, each.control_port, each.store_port, each.short_tokens) for each in found} == {(8100, 1, 2, 0)}
    assert [each.worker_port for each in found[1:]] == [11, 12, 13]
    assert {each.model for each in found} == {Path("/models/m")}, "the command line has the last word"
    assert {each.kv_percent for each in found} == {15}, "they share one memory"
    assert {each.parent for each in found} == {os.getpid()}
    assert told[0]["PATH"] == "/bin"


@pytest.mark.parametrize(("visible", "gpus"), [(None, ["0", "1", "2"]), ("4,6", ["4", "6", ""])])
def test_each_rank_gets_a_gpu_of_its_own(visible: str | None, gpus: list[str]) -> None:
    trial = Trial(ranks=3, model=Path("/models/m"), port=8100, settings={"KVPLANE_RING_DEVICE": "cuda"})
    base = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    told = [environment(trial, rank, ports=(1, 2, 11, 12), base=base, cores=8) for rank in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in told] == gpus
    found = [from_environment(each, hostname="laptop") for each in told]
    assert {(each.device, each.kv_percent) for each in found} == {("cuda", 60)}, "each has its own memory"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["local", "--ranks", "0", "--model", "."], "--ranks is 0; a ring has at least one."),
        (["local", "--model", "/nowhere"], "--model is /nowhere, and there is no /nowhere/config.json"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(arguments)
    assert raised.value.code == 2
    assert sentence in capsys.readouterr().err


def test_serve_without_settings_says_which_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve({}) == 2
    assert "WORLD_SIZE is not set" in capsys.readouterr().err


def children(pid: int) -> set[int]:
    return {
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    }


def gone(pids: set[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return not any(map(alive, pids))


def begun(model: Path, ranks: int) -> "subprocess.Popen[str]":
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "kvplane_runtime.ring", "local", "--ranks", str(ranks), "--port", str(port)]
    return subprocess.Popen(
        [*command, "--model", str(model)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("operator", "runtime"))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(parent: int) -> list[str]:
    """Processes that were told to end with that one."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"KVPLANE_RING_PARENT={parent}\0" in file.read_text(errors="replace"):
                found.append(file.parent.name)
        except OSError:  # it has ended, or is not ours
            continue
    return found


def test_an_end_while_ranks_are_started_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with begun(tmp_path, 4) as started:
        end = time.monotonic() + 60
        while not children(started.pid):
            assert time.monotonic() < end
            time.sleep(0.001)
        started.terminate()
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 0, said
    assert ranks_of(started.pid) == []


@pytest.mark.parametrize(("number", "size"), [(signal.SIGKILL, 2), (signal.SIGTERM, 1)])
def test_a_whole_ring_in_one_command_that_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals, size: int
) -> None:
    build(SERVED[0]).save_pretrained(tmp_path / "tiny")
    started = begun(tmp_path / "tiny", size)
    ranks: set[int] = set()
    said: list[str] = []
    assert started.stdout is not None
    try:
        for line in started.stdout:
            said.append(line)
            ranks |= children(started.pid) if not ranks else set()
            if "is formed (rank:pid" in line:
                break
        assert any("curl http://127.0.0.1" in line for line in [*said, started.stdout.readline()]), said
        assert len(ranks) == size
        if number == signal.SIGKILL:  # a rank that stands still must end too
            os.kill(max(ranks), signal.SIGSTOP)
    finally:
        started.send_signal(number)
        started.stdout.close()
        started.wait(timeout=60)
    end = time.monotonic() + 30
    while not gone(ranks):
        assert time.monotonic() < end, ranks
        time.sleep(0.05)
