"""Kernels on against kernels off: whole networks, in Triton's interpreter (on a GPU natively)."""

from __future__ import annotations

import pytest
import torch
from families import SMALL
from helpers import assert_close

import minisd
from minisd import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return minisd.load(SMALL["sdxl"].write(tmp_path_factory.mktemp("ops") / "sdxl.safetensors"), DEVICE, "float32")


@pytest.fixture
def calls(monkeypatch):
    """Which kernels ran, and how often."""
    import minisd.kernels

    counts = dict.fromkeys(("group_norm", "layer_norm", "geglu", "attention"), 0)

    def counted(name, kernel):
        def run(*arguments, **options):
            counts[name] += 1
            return kernel(*arguments, **options)

        return run

    for name in counts:
        monkeypatch.setattr(minisd.kernels, name, counted(name, getattr(minisd.kernels, name)))
    return counts


@torch.no_grad()
def test_unet(pipe, calls):
    x, context, y, t = noise(2, 4, 6, 8), noise(2, 77, 128), noise(2, 1600), torch.tensor([981.0, 3.0], device=DEVICE)
    with ops.kernels("torch"):
        wanted = pipe.unet(x, t, context, y)
    assert set(calls.values()) == {0}
    with ops.kernels("triton"):
        assert_close(pipe.unet(x, t, context, y), wanted, 1e-5)
    assert min(calls.values()) > 0


@torch.no_grad()
def test_text_and_vae(pipe, calls):
    with ops.kernels("torch"):
        text, pixels = pipe.encode_prompt(["a cat"]), pipe.vae.decode(noise(1, 4, 4, 4))
    with ops.kernels("triton"):
        assert_close(pipe.encode_prompt(["a cat"]).context, text.context, 1e-5)
        assert_close(pipe.vae.decode(noise(1, 4, 4, 4)), pixels, 1e-5)
    assert calls["layer_norm"] > 0
    assert calls["group_norm"] > 0
    assert calls["attention"] > 0


def test_the_switch(pipe, monkeypatch):
    x = noise(1, 32, 2, 2)
    with (
        pytest.raises(minisd.UsageError, match="MINISD_KERNELS: expected one of auto, triton, torch, found 'cuda'"),
        ops.kernels("cuda"),
    ):
        pass
    monkeypatch.setenv("MINISD_KERNELS", "fast")
    with pytest.raises(minisd.UsageError, match="found 'fast'"):
        minisd.load(device="cpu")
    monkeypatch.setenv("MINISD_KERNELS", "triton")
    with torch.no_grad():
        assert ops.by_triton(x)
        with ops.kernels("torch"):
            assert not ops.by_triton(x)
    assert not ops.by_triton(x)  # gradients are wanted: the kernels have none
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE == "cpu":
        with torch.no_grad(), pytest.raises(minisd.UsageError, match="triton needs a GPU"):
            ops.by_triton(x)
        monkeypatch.setenv("MINISD_KERNELS", "auto")
        with torch.no_grad():
            assert not ops.by_triton(x)
