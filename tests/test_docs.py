"""What the pages show runs as it is pasted: every ```python and ```sh block, page by page, in a folder of stand-in files."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import api_page
import pytest
import torch
from families import SMALL
from helpers import manifest
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import minisd
from minisd import inside
from minisd.cli import main
from minisd.cli.main import COMMANDS
from minisd.library.places import tiny_checkpoint
from minisd.workbench.blueprint import random_weights

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = {  # lines of sh blocks, by how they begin, and why
    "python3 -m venv": "makes an environment and downloads; .ci/run runs both of these",
    "minisd serve": "serves until it is ended; tests/serve runs it",
}
SIZE = {"modelspec.resolution": "64x64"}  # what the stand-ins draw at where nobody says


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def small(family: str, path: Path) -> None:
    """A small checkpoint of a family with random weights, as a .ckpt where it is called so."""
    weights = random_weights(SMALL[family].shapes(), 2, torch.float16)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path, SIZE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call by a name, as small as it may be."""
    folder = tmp_path_factory.mktemp("files")
    lit = tiny_checkpoint().with_name("tiny-lit.safetensors")
    for path in ("v1-5-pruned-emaonly.safetensors", "a.safetensors"):
        (folder / path).symlink_to(tiny_checkpoint())
    for path in ("b.safetensors", "better-vae.safetensors", "download.safetensors"):
        (folder / path).symlink_to(lit)
    torch.save({"state_dict": load_file(lit)}, folder / "old.ckpt")
    for path, family in {
        "dream.safetensors": "sd1",
        "v2-1_768.safetensors": "sd2",
        "sd_xl_base.safetensors": "sdxl",
        "sd_xl_turbo.safetensors": "sdxl",
        "sd_xl_refiner.safetensors": "sdxl-refiner",
        "sd-v1-5-inpainting.ckpt": "sd1-inpaint",
        "instruct-pix2pix.ckpt": "sd1-edit",
    }.items():
        small(family, folder / path)
    inside = "first_stage_model."
    vae = {key: value for key, value in load_file(folder / "sd_xl_base.safetensors").items() if key.startswith(inside)}
    save_file({key.removeprefix(inside): value for key, value in vae.items()}, folder / "sdxl_vae.safetensors")
    for half in ("encoder", "decoder"):
        shapes = {key.removeprefix(f"{half}:"): shape for key, shape in manifest("taesd").items() if key.startswith(half)}
        save_file(random_weights(shapes, 3), folder / f"taesd_{half}.safetensors")
    (folder / "prompts.jsonl").write_text('{"id": 1, "prompt": "a red star"}\n{"id": 2, "prompt": "a blue ring", "seed": 7}\n')
    photo = Image.new("RGB", (64, 64), "blue")
    ImageDraw.Draw(photo).ellipse((20, 20, 44, 44), "red")
    photo.save(folder / "photo.jpg")
    door = Image.new("L", (64, 64))
    ImageDraw.Draw(door).rectangle((0, 0, 31, 63), 255)
    door.save(folder / "door.png")
    return folder


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `NAME=VALUE … minisd …` here; raises for any other line that is not in NOT_RUN."""
    words = shlex.split(line, comments=True)
    if not words or any(line.startswith(start) for start in NOT_RUN):
        return
    with monkeypatch.context() as patch:
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            patch.setenv(*words.pop(0).split("=", 1))
        assert words[0] == "minisd", f"{line!r}: write it as ```text, or say in NOT_RUN why it does not run"
        try:
            status = main(words[1:])
        except SystemExit as end:  # argparse, after --help
            status = end.code
    assert status in (0, None), line


# The README's take half a minute.
RUN = [pytest.param(page, marks=pytest.mark.slow) if page.name == "README.md" else page for page in PAGES]


@pytest.mark.parametrize("page", RUN, ids=name)
def test_blocks_run(page, files, tmp_path, monkeypatch):
    """From the first to the last, in one namespace and one folder, as somebody would who follows the page."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("MINISD_MODELS", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    given: dict[str, object] = {}
    for kind, text in FENCE.findall(page.read_text()):
        assert kind in ("python", "sh", "text"), f"{page}: ```{kind}"
        if kind == "python":
            exec(compile(text, name(page), "exec", dont_inherit=True), given)
        if kind == "sh":
            for line in text.splitlines():
                command(line, monkeypatch)


@pytest.mark.quick
def test_the_reference_is_that_of_the_docstrings():
    """Which `python scripts/api_page.py` writes; a public name without a docstring is an error there."""
    assert api_page.PAGE.read_text() == api_page.page(), "run python scripts/api_page.py"
    headings = set(re.findall(r"^### `(.*)`$", api_page.PAGE.read_text(), re.MULTILINE))
    assert {f"minisd.{name}" for name in minisd.__all__} <= headings
    assert {f"minisd.inside.{name}" for name in inside.__all__ if name not in minisd.__all__} <= headings


def test_the_reference_wants_a_docstring():
    with pytest.raises(ValueError, match="Bare: expected a docstring"):
        api_page.prose("Bare", dataclass(type("Bare", (), {})))


def heading(text: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\(([^)#:\s]*)(#([\w-]+))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in [heading(text) for text in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)], anchor


def test_every_option_of_drawing_has_a_row(capsys):
    main(["--help"])
    known = set(re.findall(r"^ +(?:-\w .*)?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    rows = re.findall(r"^\| (`-.*?) \|", (ROOT / "docs" / "drawing.md").read_text(), re.MULTILINE)
    told = set(re.findall(r"--[a-z-]+", " ".join(rows)))
    assert len(known) > 25
    assert known <= told, sorted(known - told)


def test_no_option_is_made_up(capsys):
    main(["--help"])
    for argv in (*COMMANDS, "models add"):
        with pytest.raises(SystemExit):
            main([*argv.split(), "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for page in PAGES:
        for written in re.findall(r"`[^`\n]*`|^minisd .*$", page.read_text(), re.MULTILINE):
            if "pytest" not in written and "pip" not in written and "scripts/" not in written:
                text = written.split("#")[0]
                assert set(re.findall(r"(?<=[ `])--[a-z-]+", text)) <= known, (name(page), written)


def test_readme_shows_by_hand_as_it_stands():
    code = (ROOT / "minisd" / "by_hand.py").read_text().partition("from __future__ import annotations\n\n")[2]
    assert f"```python\n{code}```\n" in PAGES[0].read_text()


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 200


def test_stream_takes_a_request(tiny):
    steps = list(tiny.stream(minisd.Request("a red circle", steps=2, width=32, height=32)))
    assert [step.index for step in steps] == [0, 1]


def test_unet_figure_shows_what_runs():
    from figures import sd15_blocks

    blocks = sd15_blocks()
    assert [block.name for block in blocks] == [
        *(f"input_blocks.{i}" for i in range(12)), "middle_block", *(f"output_blocks.{i}" for i in range(12))
    ]  # fmt: skip
    taken = [block.made[0] for block in blocks[:12]]
    made = [block.made[0] for block in blocks[12:-1]]
    assert [block.given[0] for block in blocks[13:]] == [a + b for a, b in zip(made, reversed(taken), strict=True)]
    figures = {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert figures == {
        "clay.png",
        "unet.png",
        "schedules.png",
        "denoising.png",
        "samplers.png",
        "serve-light.png",
        "serve-phone.png",
    }
