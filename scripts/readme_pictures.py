"""Draws the pictures of the README and of docs/files.md again: each with the very command that stands with it.

python scripts/readme_pictures.py
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from PIL import Image, PngImagePlugin

from minisd.cli import main

ROOT = Path(__file__).parents[1]
CELL = re.compile(r"!\[[^]]*\]\((weights/samples/[^)]+)\)<br>`minisd ([^`]+)`")


def cells() -> list[tuple[Path, list[str]]]:
    """(picture, arguments of the command under it) for each cell of the README's grid."""
    return [(ROOT / path, shlex.split(command)) for path, command in CELL.findall((ROOT / "README.md").read_text())]


def without_place(path: Path) -> None:
    """Its recipe names files of the checkout, wherever that is."""
    picture, told = Image.open(path), PngImagePlugin.PngInfo()
    for name, text in picture.info.items():
        told.add_itxt(str(name), str(text).replace(f"{ROOT}/", ""))
    picture.save(path, pnginfo=told)


def merged() -> None:
    """The picture of two checkpoints and what lies halfway between them, which takes two commands."""
    (first, second) = re.findall(r"^minisd (.*half\.safetensors.*)$", (ROOT / "docs" / "files.md").read_text(), re.MULTILINE)
    main(shlex.split(first))
    main([*shlex.split(second), "-o", "weights/samples/merge.png"])
    without_place(ROOT / "weights/samples/merge.png")
    Path("half.safetensors").unlink()


if __name__ == "__main__":
    os.chdir(ROOT)  # the commands name files of the checkout
    for path, arguments in cells():
        path.parent.mkdir(parents=True, exist_ok=True)
        main([*arguments, "-o", str(path)])
        without_place(path)
    merged()
