from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from PIL import Image, ImageDraw
from serving import Server, library, serving

import minisd


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library(tmp_path_factory.mktemp("library") / "models")


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that leave it as it was."""
    with serving(tmp_path_factory.mktemp("serve") / "here", models=models) as running:
        yield running


@pytest.fixture(scope="session")
def xl(models: Path) -> minisd.Pipeline:
    return minisd.load(models / "small-xl.safetensors", device="cpu")


@pytest.fixture(scope="session")
def small(models: Path) -> minisd.Pipeline:
    return minisd.load(models / "small.safetensors", device="cpu")


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    image = Image.new("RGB", (64, 64), "blue")
    ImageDraw.Draw(image).ellipse((20, 20, 44, 44), "red")
    return image


@pytest.fixture(scope="session")
def door() -> Image.Image:
    """A mask: the left half is white."""
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).rectangle((0, 0, 31, 63), 255)
    return image
