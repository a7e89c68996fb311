"""The structure that the docs promise: rooms that stand on one another, one way only; small networks; real line counts."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minisd"
# A room, or a file beside the rooms, imports from those of earlier levels only; within a room the files do likewise.
LEVELS = [
    ["errors"],
    ["options"],
    ["system"],
    ["models", "diffusion"],
    ["text", "pictures"],
    ["files"],
    ["fast", "library"],
    ["codec", "request", "result"],
    ["walks"],
    ["pipeline"],
    ["workbench"],
    ["bench"],
    ["cli"],
    ["__main__"],
]
LARGEST_ROOM = 12  # files, __init__.py included


def name_of(path: Path) -> str:
    """The dotted name of a module below minisd."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def imports(name: str) -> set[str]:
    """The minisd modules that a file imports at its top."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            source = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                inner = ".".join([*source, alias.name])
                found.add(inner if inner in MODULES else ".".join(source))
    return found - {""}


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_room_has_a_level():
    assert sorted({room(name) for name in MODULES}) == sorted(name for names in LEVELS for name in names)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name):
    level = {each: i for i, names in enumerate(LEVELS) for each in names}
    for other in imports(name):
        assert room(other) == room(name) or level[room(other)] < level[room(name)], f"{name} imports {other}"


def test_within_a_room_imports_run_one_way():
    seen: dict[str, bool] = {}

    def visit(name: str) -> None:
        assert seen.get(name) is not False, f"{name} imports itself by way of others"
        if name not in seen:
            seen[name] = False
            for other in imports(name):
                if MODULES[other].name != "__init__.py":
                    visit(other)
            seen[name] = True

    for name in MODULES:
        visit(name)


def test_rooms_are_small_and_say_what_is_in_them():
    for folder in {path.parent for path in MODULES.values()} - {PACKAGE}:
        assert len(list(folder.glob("*.py"))) <= LARGEST_ROOM, folder
        assert len(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "") > 40, folder


def code_lines(path: Path) -> int:
    """Lines with code on them: no blank lines, comments or docstrings."""
    text = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_the_three_networks_are_small():
    sizes = {name: code_lines(PACKAGE / "models" / f"{name}.py") for name in ("unet", "clip", "vae")}
    assert sum(sizes.values()) <= 550, sizes


def test_readme_line_counts_are_real():
    rows = re.findall(r"^\| \[`([\w/]+\.py)`\]\([^)]*\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    assert {path: int(count) for path, count in rows} == {path: len((ROOT / path).read_text().splitlines()) for path, _ in rows}


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_kernels_are_found_from_the_checkout_itself():
    """`python -m minisd.cli` in the checkout takes its minisd/, installed or not."""
    code = "import minisd.kernels, minisd.weights; print(minisd.__file__, minisd.kernels.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.split() == [str(ROOT / "minisd" / "__init__.py"), str(ROOT / "kernels" / "__init__.py")]
