"""The structure that the README promises: imports go downward, line counts are real, the models stay small."""

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
LEVELS = [
    ["errors", "shapes", "ops", "pickled", "cache", "places", "arithmetic", "cli_options"],
    ["layers", "atomic", "tokenizer", "schedule", "samplers", "torch_file", "device", "picture", "preview"],
    ["clip", "unet", "vae", "denoiser", "checkpoint"],
    ["tensors", "family"],
    ["upload", "request", "prompt", "blueprint", "taesd", "tiling", "fused", "blocks", "diffusers_names", "graphs"],
    ["runtime"],
    ["recipe", "model", "codec", "saving"],
    ["tree"],
    ["inspection"],
    ["guidance", "converting", "differing", "library", "diffusers_configs"],
    ["merging", "importing", "diffusers_folder"],
    ["image"],
    ["result"],
    ["pipeline"],
    ["comparing"],
    ["cli_files", "cli_models"],
    ["cli"],
]


def modules() -> dict[str, Path]:
    return {path.stem: path for path in sorted((ROOT / "minisd").glob("*.py")) if path.stem != "__init__"}


def imports(path: Path) -> set[str]:
    """The minisd modules that a file imports at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found & set(modules())


def test_every_module_has_a_level():
    assert sorted(modules()) == sorted(name for names in LEVELS for name in names)


@pytest.mark.parametrize("name", modules())
def test_imports_go_downward(name):
    level = {module: i for i, names in enumerate(LEVELS) for module in names}
    for other in imports(modules()[name]):
        assert level[other] < level[name] or (other == "errors"), f"{name} imports {other}"


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
    sizes = {name: code_lines(ROOT / "minisd" / f"{name}.py") for name in ("unet", "clip", "vae")}
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
