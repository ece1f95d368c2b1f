from pathlib import Path

import pytest

from e2e.cluster.cgroups import Cgroups, processes_below


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    for name in ("memory", "cpu,cpuacct", "systemd", "unified"):
        (tmp_path / name).mkdir()
    (tmp_path / "cpu").symlink_to("cpu,cpuacct")
    return tmp_path


def test_with_v1_there_is_a_hierarchy_per_mount_and_links_do_not_count(hybrid: Path) -> None:
    cgroups = Cgroups("x", hybrid)
    assert not cgroups.unified
    assert [folder.name for folder in cgroups.hierarchies()] == ["cpu,cpuacct", "memory", "systemd", "unified"]
    assert cgroups.tracking() == hybrid / "systemd" / "x"


def test_without_systemds_hierarchy_another_tracks(hybrid: Path) -> None:
    (hybrid / "systemd").rmdir()
    assert Cgroups("x", hybrid).tracking() == hybrid / "memory" / "x"


def test_with_v2_there_is_one_hierarchy(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    cgroups = Cgroups("x", tmp_path)
    assert cgroups.unified
    assert cgroups.hierarchies() == (tmp_path,)
    assert cgroups.daemons("node-1") == tmp_path / "x" / "node-1" / "daemons"


def test_processes_are_found_at_any_depth(tmp_path: Path) -> None:
    deep = tmp_path / "x" / "node-1" / "kubepods" / "pod1"
    deep.mkdir(parents=True)
    (tmp_path / "x" / "cgroup.procs").write_text("1\n")
    (deep / "cgroup.procs").write_text("2\n3\n")
    assert sorted(processes_below(tmp_path / "x")) == [1, 2, 3]
    assert processes_below(tmp_path / "gone") == []
