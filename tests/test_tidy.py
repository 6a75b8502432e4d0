"""The house rules, as tests: where code may live, what may import what, and what a file may look like."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("runtime", "export", "consumers")
LINES_MAX = 400  # a file that is longer has more than one job
FUNCTION_LINES_MAX = 75
HOMES = {  # who may import a heavy library
    "torch": {"export"},
    "onnxscript": {"export"},
    "safetensors": {"export"},
    "matplotlib": {"export"},
    "kafka": {"consumers"},
    "prometheus_client": {"consumers"},
    "msgspec": {"consumers"},
    "typer": {"consumers"},
    "rich": {"consumers"},
    "pydantic": {"consumers"},
    "pydantic_settings": {"consumers"},
}
ARROWS = {"runtime": {"runtime"}, "export": {"export", "runtime"}, "consumers": {"consumers", "runtime"}}
COMPOSITION_ROOTS = {  # alone may join all three parts
    "consumers/statestep/consumers/cli_backtest.py",
    "consumers/statestep/consumers/cli_convert.py",
    "consumers/statestep/consumers/cli_model.py",
}
RUNTIME_MAY_NOT = {"time", "datetime", "threading", "socket", "random", "os", "logging", "asyncio", "subprocess"}


def tracked() -> list[Path]:
    """Every file that belongs to the repository, or is about to."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    return [path for name in listed.stdout.decode().splitlines() if (path := ROOT / name).is_file()]


def sources() -> list[Path]:
    """The Python files of the three parts."""
    return sorted(path for part in PARTS for path in (ROOT / part / "statestep").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether it does so inside a function."""
    tree = ast.parse(path.read_text())
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in inside


def of_types_only(path: Path) -> set[str]:
    """Modules imported under `if TYPE_CHECKING`, which no run ever imports."""
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    nodes = [node for block in blocks for node in ast.walk(block)]
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_namespace_has_no_owner() -> None:
    """A `statestep/__init__.py` would break editable installs while wheels go on working, so nobody would notice."""
    for part in PARTS:
        assert [p.name for p in (ROOT / part / "statestep").iterdir() if p.name != "__pycache__"] == [part]


def test_every_part_is_typed() -> None:
    """`py.typed` must lie in each part, for the namespace has no owner to hold it."""
    for part in PARTS:
        assert (ROOT / part / "statestep" / part / "py.typed").is_file()


@pytest.mark.parametrize("path", sources(), ids=name)
def test_arrows(path: Path) -> None:
    """export → runtime ← consumers; the command line alone joins them, inside its commands."""
    part = path.relative_to(ROOT).parts[0]
    for module, inside in imports(path):
        if not module.startswith("statestep."):
            continue
        other = module.split(".")[1]
        if name(path) in COMPOSITION_ROOTS and other == "export":
            assert inside or module in of_types_only(path), f"{module} at the top would make every command need export"
        elif module not in of_types_only(path):
            assert other in ARROWS[part], f"{part} may not import {module}"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_libraries_stay_at_home(path: Path) -> None:
    """torch belongs to export, Kafka and Prometheus to consumers; runtime knows ONNX and numpy."""
    part = path.relative_to(ROOT).parts[0]
    for module, _ in imports(path):
        library = module.split(".")[0]
        assert part in HOMES.get(library, {part}), f"{part} may not import {library}"
        if part == "runtime":
            assert library not in RUNTIME_MAY_NOT, f"runtime has no clock, threads or I/O, yet imports {library}"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_a_file_tells_its_one_job(path: Path) -> None:
    """Each file begins with a docstring, is short, and so are its functions."""
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "begin with what the file is for"
    assert text.count("\n") <= LINES_MAX
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.body[0].lineno
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines"


def test_nothing_is_unfinished_or_skipped() -> None:
    """A stub, or a test that does not run, says that something holds when nobody has seen it hold."""
    marks = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "pytest.mark." + "skip", "x" + "fail(")
    for path in tracked():
        if path.suffix == ".py":
            found = [mark for mark in marks if mark in path.read_text()]
            assert not found, f"{name(path)}: {found}"


def test_no_place_of_one_machine_is_named() -> None:
    """Paths of a developer's machine and addresses of package indexes belong to nobody else."""
    pattern = re.compile(rb"(?<![\w./-])/(?:root|home|Users|work|farm)/[a-z]|index-url|<repositor")
    for path in tracked():
        if path != Path(__file__) and (found := pattern.search(path.read_bytes())):
            raise AssertionError(f"{name(path)}: {found.group().decode()}")


def test_links_between_documents_lead_somewhere() -> None:
    """Every relative link in a Markdown file names a file that is there."""
    for path in tracked():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target and not target.startswith("mailto:"):
                assert (path.parent / target).exists(), f"{name(path)} links to {target}"
