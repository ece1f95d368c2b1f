import re
from pathlib import Path

import pytest

from e2e.cluster.__main__ import main, parser


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLANE_CACHE", str(tmp_path))


@pytest.mark.parametrize("command", [["kubeconfig"], ["status"]])
def test_a_cluster_that_is_not_up_is_one_sentence(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--name", "mine", *command]) == 1
    assert capsys.readouterr().err == (
        "error: The cluster mine is not up: run `python -m e2e.cluster --name mine up`.\n"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["exec", "node-9", "--", "ls"], "no machine 'node-9' in kvplane; there are cp, node-1, node-2, node-3"),
        (["stop-kubelet", "cp"], "no node 'cp' in kvplane; there are node-1"),
        (["stop-kubelet", "node-1"], "The cluster kvplane is not up"),
        (["power-off", "cp"], "no node 'cp'"),
        (["--name", "Bad", "down"], "name is 'Bad'"),
        (["build", "docker"], "no component 'docker'"),
    ],
)
def test_mistakes_are_answered_with_what_is_right(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 1
    assert message in capsys.readouterr().err


def test_the_help_shows_every_command_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    for command in ("build", "up", "down", "status", "load", "kubeconfig", "exec", "cut", "heal", "kill-pod-process"):
        assert re.search(rf"^    {command}\s+\w+", shown, re.MULTILINE)
