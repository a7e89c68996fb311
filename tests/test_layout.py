"""The structure that the docs promise: rooms that stand on one another, one way only; small networks; real line counts."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from minisd.by_hand import draw
from minisd.library.places import tiny_checkpoint
from minisd.pictures.image import to_pil
from minisd.text.tokenizer import tokenize as ids_of

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
    ["warmup"],
    ["addons"],
    ["plan"],
    ["recipe", "walks"],
    ["pipeline"],
    ["by_hand"],
    ["workbench"],
    ["serve", "batch", "inside"],
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
    for folder in {path.parent for path in MODULES.values()}:
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


EVENING = (
    "models.shapes", "models.ops", "models.layers", "models.family", "models.clip", "models.unet", "models.vae",
    "diffusion.schedule", "diffusion.denoiser", "diffusion.samplers.one_step", "text.tokenizer", "text.conditioner",
    "files.model", "pipeline",
)  # fmt: skip
JOINING = ("files.model", "pipeline")  # these two may use what stands beside the path, too


def test_an_evening_holds_the_path_and_each_file_uses_only_those_before_it():
    assert len(EVENING) <= 14
    lines = {name: len(MODULES[name].read_text().splitlines()) for name in ("by_hand", *EVENING)}
    assert sum(lines.values()) <= 1900, lines
    for i, name in enumerate(EVENING):
        if name not in JOINING:
            assert imports(name) <= {"errors", *EVENING[:i]}, name
    told = re.findall(r"^\| \[`minisd/([\w/]+)\.py`\]", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert told == [name.replace(".", "/") for name in EVENING]


ALONE = """
import json, sys
import torch
from itertools import pairwise
from safetensors.torch import load_file
from house.diffusion.denoiser import ClassifierFree, Conditioning, Denoiser, Network, Timeline
from house.diffusion.levels import AS_THEY_COME, levels
from house.diffusion.samplers.one_step import euler
from house.diffusion.schedule import scaled_linear
from house.models.clip import text_encoder
from house.models.family import SD1, UNET, VAE
from house.models.shapes import Shapes, below
from house.models.unet import UNet
from house.models.vae import AutoencoderKL

file, ids, out = sys.argv[1:]
weights = {key: value.float() for key, value in load_file(file).items()}
shapes = Shapes({key: tuple(value.shape) for key, value in weights.items()})

def network(make, name):
    made = make(below(shapes, name))
    made.load_state_dict({key: weights[f"{name}.{key}"] for key in made.state_dict()})
    return made.eval()

with torch.no_grad():
    encoder, unet, vae = (network(make, name) for make, name in (
        (text_encoder, SD1.towers[0].name), (UNet, UNET), (AutoencoderKL, VAE)))
    context = encoder.final_norm(encoder.hidden_states(torch.tensor(json.loads(ids)))[-1])
    schedule = scaled_linear()
    conditioning = [Timeline(((0, Conditioning(each)),)) for each in context.split(1)]
    denoise = Denoiser(Network(unet, schedule), conditioning, ClassifierFree(7.5))
    way = levels(schedule, "linspace", 20, AS_THEY_COME)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * way.start_scale
    *_, (x, _) = euler(denoise, x, way.sigmas, lambda *_: None)
    torch.save(vae.decode(x / SD1.latent_scale), out)
assert not any(name.split(".")[0] in ("minisd", "diffusers", "transformers") for name in sys.modules)
"""


def test_models_and_diffusion_can_be_copied_out_and_draw(tmp_path, tiny):
    """With errors.py alone, in an empty folder: the picture of by_hand.py."""
    house = tmp_path / "house"
    house.mkdir()
    for room in ("models", "diffusion"):
        shutil.copytree(PACKAGE / room, house / room)
    shutil.copy(PACKAGE / "errors.py", house)
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    prompt = "a red circle on a blue background"
    arguments = [str(tiny_checkpoint()), json.dumps(ids_of(["", prompt])), str(tmp_path / "x.pt")]
    subprocess.run([sys.executable, str(script), *arguments], check=True, cwd=tmp_path)
    assert rounded_alike(to_pil(torch.load(tmp_path / "x.pt")[0]), draw(prompt, guidance=7.5, seed=1))


def test_by_hand_is_the_picture_of_the_pipeline():
    prompt = "a red circle on a blue background"
    whole = minisd.load(device="cpu", dtype="float32")(prompt, seed=1).images[0]
    assert rounded_alike(draw(prompt, seed=1), whole)


def rounded_alike(one: Image.Image, other: Image.Image) -> bool:
    """The same but for where a value lies between two of the 256 levels: sums are taken in another order."""
    apart = np.asarray(one).astype(int) - np.asarray(other)
    return int(abs(apart).max()) <= 1 and np.count_nonzero(apart) <= 3


# Kernels of Triton aside, and what is a user's own interface: (parameters), where they are as many as there are options; and
# `unet`, whose parameters are the numbers that make an architecture.
INTERFACES = {"dpm_adaptive", "merge", "convert", "save", "load", "compare", "linear_step", "group_norm", "reference", "unet"}


def functions(folder: Path):
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(each) for each in node.decorator_list):
                yield f"{path.relative_to(ROOT)} {node.name}", node


def test_functions_are_short_and_take_little():
    """At most 40 lines, without the docstring, and 8 parameters."""
    for name, node in [*functions(PACKAGE), *functions(ROOT / "kernels")]:
        documented = ast.get_docstring(node, clean=False)
        lines = node.end_lineno - node.lineno + 1 - (len(documented.splitlines()) if documented else 0)
        arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        assert lines <= 40, f"{name}: {lines} lines"
        if node.name not in INTERFACES and not any(ast.unparse(each) == "jit" for each in node.decorator_list):
            assert len([each for each in arguments if each not in ("self", "cls")]) <= 8, name


def test_readme_line_counts_are_real():
    rows = re.findall(r"^\| \[`([\w/]+\.py)`\]\([^)]*\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    assert {path: int(count) for path, count in rows} == {path: len((ROOT / path).read_text().splitlines()) for path, _ in rows}


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_kernels_are_found_from_the_checkout_itself():
    """`python -m minisd` in the checkout takes its minisd/, installed or not."""
    code = "import minisd.kernels, minisd.weights; print(minisd.__file__, minisd.kernels.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.split() == [str(ROOT / "minisd" / "__init__.py"), str(ROOT / "kernels" / "__init__.py")]


def test_every_room_is_in_the_package():
    """pip install . brings the folders that pyproject.toml names, and no others."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = set(tomllib.loads(text)["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
    assert named == {".".join(folder.parts) for folder in folders} | {"minisd.kernels", "minisd.weights"}
