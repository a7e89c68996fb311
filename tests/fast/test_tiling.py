"""Bands against the whole: the same numbers, in a quarter of the memory, whatever the size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from live_bytes import peak_bytes

from minisd.errors import OutOfMemoryError
from minisd.fast import tiling
from minisd.fast.tiling import decode_tiled, encode_tiled
from minisd.models.vae import AutoencoderKL
from minisd.system.device import cpu_computes_bfloat16
from minisd.workbench import blueprint


def autoencoder(widths: tuple[int, ...], blocks: tuple[int, int] = (2, 3)) -> AutoencoderKL:
    shapes = blueprint.vae(widths, widths, blocks)
    vae = AutoencoderKL(shapes)
    vae.load_state_dict(blueprint.random_weights(shapes))
    return vae.requires_grad_(False).eval()


def scene(channels: int, height: int, width: int) -> torch.Tensor:
    """(1, C, H, W) with large and small things in it and an upper part unlike the lower: no band has the whole's statistics."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, channels, height, width)
    for size, strength in ((16, 1.0), (4, 0.6), (1, 0.2)):
        noise = torch.randn(1, channels, -(-height // size), -(-width // size), generator=generator)
        x += strength * F.interpolate(noise, (height, width), mode="bicubic")
    x[:, :, : height // 3] += 1.5
    return x / x.std()


def psnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """dB, for pictures in [-1, 1]."""
    error = found.float().clamp(-1, 1) - wanted.float().clamp(-1, 1)
    return float(10 * torch.log10(4 / error.square().mean()))


@pytest.fixture(scope="module")
def narrow() -> AutoencoderKL:
    """The published architecture, narrower."""
    return autoencoder((32, 64, 64, 64))


@pytest.mark.parametrize("size", [(8, 8), (24, 4), (33, 6)])  # in latent pixels; a band has 6 rows of them
@torch.no_grad()
def test_decode(narrow, size):
    latents = scene(4, *size)
    assert relative_error(decode_tiled(narrow, latents), narrow.decode(latents)) <= 1e-5


@pytest.mark.parametrize("size", [(64, 64), (136, 40), (328, 32)])
@torch.no_grad()
def test_encode(narrow, size):
    image = scene(3, *size)
    for found, wanted in zip(encode_tiled(narrow, image), narrow.encode(image), strict=True):
        assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("widths", [(32,), (32, 64), (32, 32, 64), (32, 32, 32, 32, 64)])
@torch.no_grad()
def test_any_depth(widths):
    vae = autoencoder(widths, (1, 2))
    latents = scene(4, 160 // vae.downscale, 16 // vae.downscale)
    image = vae.decode(latents)
    assert relative_error(decode_tiled(vae, latents), image) <= 1e-5
    assert relative_error(encode_tiled(vae, image)[0], vae.encode(image)[0]) <= 1e-5


@torch.no_grad()
def test_every_picture_of_a_batch_has_its_own_statistics(narrow):
    latents = torch.cat([scene(4, 16, 4), 3 * scene(4, 16, 4).flip(2)])
    assert relative_error(decode_tiled(narrow, latents), narrow.decode(latents)) <= 1e-5


@torch.no_grad()
def test_bfloat16(narrow):
    """No further from float32 than the whole decode in bfloat16 is."""
    latents = scene(4, 24, 8)
    exact = narrow.decode(latents)
    vae, latents = autoencoder((32, 64, 64, 64)).bfloat16(), latents.bfloat16()
    whole, bands = vae.decode(latents), decode_tiled(vae, latents)
    assert bands.dtype == torch.bfloat16
    assert relative_error(bands, exact) <= 1.1 * relative_error(whole, exact)
    assert psnr(bands, whole) >= 45


@torch.no_grad()
def test_memory(monkeypatch):
    """The published shapes at 1024x1024 pixels, on the meta device: nothing is computed, everything is counted."""
    # There, unlike on a CPU or GPU, PyTorch's attention would keep all of its scores.
    monkeypatch.setattr("minisd.models.vae.attention", lambda q, k, v, heads: torch.empty_like(q))
    widths = (128, 256, 512, 512)
    with torch.device("meta"):
        vae = AutoencoderKL(blueprint.vae(widths, widths, (2, 3)))
        latents, image = torch.empty(1, 4, 128, 128), torch.empty(1, 3, 1024, 1024)
    whole = peak_bytes(lambda: vae.decode(latents))
    assert whole == pytest.approx(tiling.decode_bytes(vae, latents), rel=0.01)
    assert peak_bytes(lambda: decode_tiled(vae, latents)) <= whole / 4
    assert peak_bytes(lambda: encode_tiled(vae, image)) <= peak_bytes(lambda: vae.encode(image)) / 4


@pytest.mark.slow
@torch.no_grad()
def test_published_shapes_at_1024():
    """In bfloat16, the less precise, where it is no matter of hours; `scripts/bench.py tiles` measures float32 as well."""
    dtype = torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    vae, latents = autoencoder((128, 256, 512, 512)).to(dtype), scene(4, 128, 128).to(dtype)
    results: list[torch.Tensor] = []
    whole = peak_bytes(lambda: results.append(vae.decode(latents)))
    bands = peak_bytes(lambda: results.append(decode_tiled(vae, latents)))
    assert psnr(results[1], results[0]) >= 45
    assert bands <= whole / 4


@torch.no_grad()
def test_bands_when_memory_is_short(narrow, monkeypatch):
    latents = scene(4, 16, 4)
    needed = tiling.decode_bytes(narrow, latents)
    wanted = narrow.decode(latents)
    monkeypatch.setattr(tiling, "decode_tiled", lambda vae, latents: "bands")
    monkeypatch.setattr(tiling, "free_memory", lambda device, enough: 2 * needed - 1)
    assert tiling.decode(narrow, latents) == "bands"
    for free in (2 * needed, None):
        monkeypatch.setattr(tiling, "free_memory", lambda device, enough, free=free: free)
        assert torch.equal(tiling.decode(narrow, latents), wanted)


def test_many_pictures_are_decoded_a_few_at_a_time(narrow, monkeypatch):
    """As many as make a million pixels, or one."""
    monkeypatch.setattr(tiling, "DECODED", 2 * (8 * narrow.downscale) ** 2)
    latents, seen = torch.randn(5, 4, 8, 8), []

    def whole(x):
        seen.append(len(x))
        return narrow.decode(x)

    found = tiling.decode(narrow, latents, whole)
    assert seen == [2, 2, 1]
    torch.testing.assert_close(found, narrow.decode(latents))


def test_free_memory_of_this_machine():
    free = tiling.free_memory(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50


@torch.no_grad()
def test_bands_after_running_out_of_memory(narrow, monkeypatch):
    def fail(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    latents = scene(4, 16, 4)
    wanted = narrow.decode(latents)
    monkeypatch.setattr(narrow, "decode", fail)
    with pytest.warns(UserWarning, match="in bands"):
        found = tiling.decode(narrow, latents)
    assert relative_error(found, wanted) <= 1e-5
    monkeypatch.setattr(tiling, "decode_tiled", lambda vae, latents: fail(latents))
    with pytest.warns(UserWarning, match="in bands"), pytest.raises(OutOfMemoryError, match="Tried to allocate 1 GiB"):
        tiling.decode(narrow, latents)


@torch.no_grad()
def test_large_pictures_on_a_cpu_go_in_bands_without_being_asked(narrow, monkeypatch):
    latents = scene(4, 16, 8)
    image = narrow.decode(latents)
    monkeypatch.setattr(narrow, "decode", lambda _: pytest.fail("decoded whole"))
    mean = narrow.encode(image)[0]
    monkeypatch.setattr(narrow, "encode", lambda _: pytest.fail("encoded whole"))
    monkeypatch.setattr(tiling, "CPU_LIMIT", 0)
    assert relative_error(tiling.decode(narrow, latents), image) <= 1e-5
    assert relative_error(tiling.encode(narrow, image)[0], mean) <= 1e-5
