"""What import-linter cannot say: a part of a package outside."""

import ast
from pathlib import Path

import kvplane_runtime.ring

FOLDER = Path(kvplane_runtime.ring.__file__).parent


def imported(module: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_one_module_talks_torch_distributed() -> None:
    assert [module.name for module in FOLDER.glob("*.py") if "torch.distributed" in imported(module)] == [
        "communicator.py"
    ]
