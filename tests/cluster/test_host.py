"""What belongs to the whole host: kernel settings, locks, requirements, progress on the terminal."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.cluster import requirements, sysctls
from e2e.cluster.errors import RequirementError
from e2e.cluster.locks import exclusive
from e2e.cluster.progress import Progress

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = Progress(quiet=True)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    proc = tmp_path / "proc"
    for name in sysctls.NAMES:
        (proc / name).parent.mkdir(parents=True, exist_ok=True)
        (proc / name).write_text("0\n")
    return proc


def everybody(name: str) -> bool:
    return True


def nobody(name: str) -> bool:
    return False


def test_settings_come_back_when_the_last_cluster_goes(tmp_path: Path, proc: Path) -> None:
    run, panic = tmp_path / "run", proc / "kernel/panic"
    with sysctls.machine_lock(run):
        sysctls.save("one", folder=run, proc=proc)
    panic.write_text("10\n")
    with sysctls.machine_lock(run):
        sysctls.save("two", folder=run, proc=proc)
        sysctls.restore("one", alive=everybody, folder=run, proc=proc)
    assert panic.read_text() == "10\n"
    with sysctls.machine_lock(run):
        sysctls.restore("two", alive=everybody, folder=run, proc=proc)
    assert panic.read_text() == "0\n"
    assert list(tmp_path.iterdir()) == [proc]


def test_a_cluster_that_vanished_does_not_hold_the_settings(tmp_path: Path, proc: Path) -> None:
    run, panic = tmp_path / "run", proc / "kernel/panic"
    with sysctls.machine_lock(run):
        sysctls.save("vanished", folder=run, proc=proc)
        panic.write_text("10\n")
        sysctls.save("one", folder=run, proc=proc)
        sysctls.restore("one", alive=nobody, folder=run, proc=proc)
    assert panic.read_text() == "0\n"
    assert not run.exists()


def test_settings_of_a_cluster_that_never_was_stay(tmp_path: Path, proc: Path) -> None:
    with sysctls.machine_lock(tmp_path / "run"):
        sysctls.restore("ghost", alive=everybody, folder=tmp_path / "run", proc=proc)
    assert not (tmp_path / "run").exists()


def test_a_setting_that_the_kernel_lacks_is_left_out(tmp_path: Path, proc: Path) -> None:
    (proc / "kernel/keys/root_maxkeys").unlink()
    run = tmp_path / "run"
    with sysctls.machine_lock(run):
        sysctls.save("one", folder=run, proc=proc)
        sysctls.restore("one", alive=everybody, folder=run, proc=proc)
    assert not (proc / "kernel/keys/root_maxkeys").exists()


COUNT = """
import sys
from pathlib import Path
from e2e.cluster.locks import exclusive
counter = Path(sys.argv[1])
for _ in range(200):
    with exclusive(counter.with_suffix(".lock")):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_a_lock_lets_one_in_at_a_time_and_leaves_nothing(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(counter)]
    running = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert counter.read_text() == "600"
    assert list(tmp_path.iterdir()) == [counter]


def test_a_lock_is_given_back_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock"):
        raise ZeroDivisionError
    with exclusive(tmp_path / "lock"):
        pass


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "missing_packages", list)
    monkeypatch.setattr(requirements, "CHECKS", (lambda: "One is missing.", lambda: None, lambda: "Two is missing."))
    with pytest.raises(RequirementError, match=r"cannot run the cluster:\n  - One is missing.\n  - Two is missing."):
        requirements.check(QUIET)


def test_without_root_the_other_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RequirementError, match=r"Root is needed.*user 1000.*KVPLANE_CLUSTER=kind"):
        requirements.check(QUIET)


def test_a_small_disk_is_told_with_the_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPLANE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requirements, "DISK_COLD", 2**60)
    with pytest.raises(RequirementError, match=r"GiB free; 1073741824 GiB are needed.*KVPLANE_CACHE"):
        requirements.check(QUIET)


def test_missing_programs_are_named_as_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "PACKAGES", {"no-such-program": "such-package", "sh": "dash"})
    monkeypatch.setattr(requirements, "LIBRARIES", {Path("/no/such/file"): "other-package"})
    assert requirements.missing_packages() == ["other-package", "such-package"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steps_are_told_with_their_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream=stream, clock=clock)
    with progress.step("build") as step:
        clock.now += 2.5
        step.detail = "3 packages"
    assert stream.getvalue() == "    2.5 s  build: 3 packages\n"
    assert progress.seconds() == 2.5


def test_a_failed_step_says_so() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream, clock=Clock())
    with pytest.raises(ZeroDivisionError), progress.step("build"):
        raise ZeroDivisionError
    assert stream.getvalue() == "    0.0 s  build  FAILED\n"


def test_a_long_step_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2e.cluster.progress.REPEAT_SECONDS", 0.01)
    stream = io.StringIO()
    with Progress(stream=stream).step("build") as step:
        step.detail = "linking"
        while "build: linking …" not in stream.getvalue():
            pass
