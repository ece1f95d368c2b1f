"""The layout that newcomers rely on: import contracts, source folders, names, the first pages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = ("operator", "runtime")
SAY_NOTHING = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
SCREEN_LINES = 60


def tracked() -> list[Path]:
    """Files of the repository; a source distribution has no git, and everything in it is tracked."""
    if not (REPOSITORY / ".git").exists():
        return [path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*") if path.is_file()]
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines()]


def test_import_contracts() -> None:
    """[tool.importlinter] in pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("folder", SOURCE)
def test_source_folders_are_no_packages(folder: str) -> None:
    """``import operator`` must stay the standard library's."""
    assert not (REPOSITORY / folder / "__init__.py").exists()


def test_module_names_say_what_is_inside() -> None:
    assert [
        path for path in tracked() if path.suffix == ".py" and SAY_NOTHING & set(re.split(r"[_/.]", str(path)))
    ] == []


def test_every_module_says_why_it_exists() -> None:
    modules = [
        path for path in tracked() if path.suffix == ".py" and path.parts[0] in (*SOURCE, "e2e", "bench", "images")
    ]
    silent = [
        p
        for p in modules
        if (REPOSITORY / p).read_text().strip() and not (REPOSITORY / p).read_text().startswith('"""')
    ]
    assert modules
    assert silent == []


def test_readme_is_at_most_two_screens() -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 2 * SCREEN_LINES


def test_contributing_names_each_folder() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    folders = {path.parts[0] for path in tracked() if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    assert sorted(folder for folder in folders if f"{folder}/" not in text) == []
