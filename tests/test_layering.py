"""The layer rule: a module imports only from groups to its right, its own folder excepted."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import reidctl

ROOT = Path(reidctl.__file__).parent
GROUPS = [
    {"__main__"},
    {"cli"},
    {"stages"},
    {"training", "captioning", "explain", "evaluation", "report", "convert"},
    {"embedding", "frozen"},
    {"methods", "data", "synthped"},
    {"backbones", "layers", "retrieval", "runs", "datasets", "device", "sampling"},
    {"pixels"},
    {"prompt_losses", "part_losses"},
    {
        "losses",
        "metrics",
        "phrases",
        "tables",
        "config",
        "console",
        "batch",
        "parts",
        "parallel",
        "masks",
        "loading",
        "augment",
        "sides",
    },
    {"schemas", "naming"},
    {"errors"},
]
LEVEL = {name: level for level, group in enumerate(GROUPS) for name in group}
# What everything may use although it stands on the same level as some of its users.
SERVICES = {"config", "console", "errors", "tables", "batch", "parts"}
FILES = sorted(ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The top-level parts of reidctl that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "reidctl":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("reidctl.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_imports_only_from_groups_to_its_right(path):
    own = package_of(path)
    if own == "__init__":
        assert not imported(path)
        return
    for other in imported(path) - {own}:
        right = LEVEL[other] > LEVEL[own] or (other in SERVICES and LEVEL[other] >= LEVEL[own])
        assert right, f"{path.relative_to(ROOT)} imports reidctl.{other}"


def test_every_top_level_module_has_a_group():
    assert {package_of(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_init_files_hold_a_docstring_and_no_reexports(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr)
    rest = body[1:]
    assert all(isinstance(node, ast.Assign) and node.targets[0].id == "__version__" for node in rest)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_imports(path):
    if path.name != "__main__.py":
        name = "reidctl." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        import_module(name.removesuffix(".__init__"))
