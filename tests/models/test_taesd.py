"""The tiny autoencoders against diffusers' AutoencoderTiny with the same random weights, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import manifest, relative_error
from safetensors.torch import save_file

from minisd.errors import CheckpointError, UsageError
from minisd.files.checkpoint import open_checkpoint
from minisd.files.model import load_tiny
from minisd.models.shapes import Shapes
from minisd.models.taesd import TinyAutoencoder, prefix_of
from minisd.workbench.blueprint import random_weights

CPU, FLOAT = torch.device("cpu"), torch.float32
MANIFEST = manifest("taesd")  # "encoder:7.weight": before the colon, the file
HALF = {
    half: {key.removeprefix(f"{half}:"): shape for key, shape in MANIFEST.items() if key.startswith(f"{half}:")}
    for half in ("encoder", "decoder")
}


def write(path: Path, shapes: dict[str, tuple[int, ...]], change: dict[str, torch.Tensor] | None = None) -> Path:
    save_file(random_weights(shapes, seed=3) | (change or {}), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The published layout: one file per half."""
    folder = tmp_path_factory.mktemp("taesd")
    return [open_checkpoint(write(folder / f"taesd_{half}.safetensors", shapes)) for half, shapes in HALF.items()]


@pytest.fixture(scope="module")
def tiny_vae(files):
    return load_tiny(files, 4, CPU, FLOAT)


@pytest.fixture(scope="module")
def reference(tiny_vae):
    """diffusers counts the layers of the decoder from 0, without the clamp."""
    from diffusers import AutoencoderTiny

    weights = {}
    for key, value in tiny_vae.state_dict().items():
        half, layers, number, rest = key.split(".", 3)
        weights[f"{half}.{layers}.{int(number) - (half == 'decoder')}.{rest}"] = value
    theirs = AutoencoderTiny()
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()


def test_module_has_the_keys_of_the_files(tiny_vae):
    found = {key.replace(".layers.", ":", 1): tuple(value.shape) for key, value in tiny_vae.state_dict().items()}
    assert len(MANIFEST) == 134
    assert found == MANIFEST
    assert (tiny_vae.latent_channels, tiny_vae.downscale, tiny_vae.unit_variance) == (4, 8, True)


@torch.no_grad()
def test_decode(tiny_vae, reference):
    latents = 2 * torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    found = tiny_vae.decode(latents)
    assert found.shape == (2, 3, 64, 96)
    assert relative_error(found, reference.decode(latents).sample) <= 1e-5


@torch.no_grad()
def test_encode(tiny_vae, reference):
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = tiny_vae.encode(image)
    assert mean.shape == logvar.shape == (2, 4, 8, 12)
    assert relative_error(mean, reference.encode(image).latents) <= 1e-5
    assert (logvar / 2).exp().max() < 1e-6  # a draw is the mean


@torch.no_grad()
def test_file_of_diffusers(reference, tmp_path):
    """Both halves in one file, the decoder's layers counted without the clamp."""
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(dict(reference.state_dict()), path)
    vae = load_tiny([open_checkpoint(path)], 4, CPU, FLOAT)
    assert vae.state_dict().keys() == reference.state_dict().keys()
    latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    assert relative_error(vae.decode(latents), reference.decode(latents).sample) <= 1e-5


@torch.no_grad()
def test_blocks_that_change_their_width():
    """taesd.py allows them, with a skip of their own; so does the file's shape, whatever the widths."""
    wide = {key: shape for key, shape in HALF["encoder"].items() if int(key.split(".")[0]) <= 1}
    wide |= {"1.conv.4.weight": (32, 64, 3, 3), "1.conv.4.bias": (32,), "1.skip.weight": (32, 64, 1, 1)}
    wide |= {"2.weight": (4, 32, 3, 3), "2.bias": (4,)}
    shapes = Shapes({f"encoder.layers.{key}": shape for key, shape in wide.items()})
    vae = TinyAutoencoder(shapes)
    assert {key: tuple(value.shape) for key, value in vae.state_dict().items()} == shapes
    assert vae.downscale == 1
    assert vae.encode(torch.zeros(1, 3, 8, 8))[0].shape == (1, 4, 8, 8)


def test_half_a_file_does_half_the_work(files):
    encoder, decoder = (load_tiny([file], 4, CPU, FLOAT) for file in files)
    assert decoder.decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)
    assert encoder.encode(torch.zeros(1, 3, 16, 16))[0].shape == (1, 4, 2, 2)
    with pytest.raises(UsageError, match=r"expected a decoder, found the encoder half.*give both"):
        encoder.decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(UsageError, match=r"expected an encoder, found the decoder half.*give both"):
        decoder.encode(torch.zeros(1, 3, 16, 16))


def test_recognition():
    assert prefix_of(HALF["encoder"]) == "encoder.layers."
    assert prefix_of(HALF["decoder"]) == "decoder.layers."
    assert prefix_of({f"decoder.layers.{key}": 0 for key in HALF["decoder"]}) == ""
    for other in ([], ["0.weight", "text_model.x"], ["first_stage_model.decoder.conv_in.weight"], ["3.pool.0.weight"]):
        assert prefix_of(dict.fromkeys(other)) is None


@pytest.mark.parametrize(
    ("half", "change", "message"),
    [
        ("encoder", {"14.weight": (16, 64, 3, 3), "14.bias": (16,)}, "latents of 16 channels, this checkpoint has 4"),
        ("decoder", {"9.conv.2.weight": None}, "a key is missing"),
        ("decoder", {"9.conv.2.bias": (63,)}, "its shapes fit no network"),
        ("decoder", {"12.weight": (64, 32, 3, 3)}, "its shapes fit no network"),
        ("decoder", {"12.weight": (64,)}, "its shapes fit no network"),
        ("decoder", {"8.conv.1.weight": (64,)}, "expected the numbered layers of a TAESD"),
        ("decoder", {"900000000.weight": (64, 64, 3, 3)}, "expected the numbered layers of a TAESD"),
    ],
)
def test_refusals(tmp_path, half, change, message):
    shapes = {key: shape for key, shape in (HALF[half] | change).items() if shape is not None}
    path = write(tmp_path / "odd.safetensors", shapes)
    with pytest.raises(CheckpointError, match=message) as error:
        load_tiny([open_checkpoint(path)], 4, CPU, FLOAT)
    assert str(path) in str(error.value)


def test_the_same_half_twice(files):
    with pytest.raises(CheckpointError, match="the same half"):
        load_tiny([files[1], files[1]], 4, CPU, FLOAT)
