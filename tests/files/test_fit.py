"""Every tensor of a checkpoint, reshaped or left out: refused when its header is opened, with an error that names a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest
from helpers import manifest

import minisd
from minisd.errors import ShapeError
from minisd.files.checkpoint import Checkpoint, open_checkpoint
from minisd.files.model import build
from minisd.files.recognition import recognise
from minisd.library.places import tiny_checkpoint
from minisd.models.family import REFINER, SD1, SD2, SDXL
from minisd.models.fit import check_fit, check_vae
from minisd.models.shapes import Shapes
from minisd.workbench import blueprint

TINY = open_checkpoint(tiny_checkpoint())
SHARES = [
    pytest.param(slice(0, None, 32), id="every 32nd"),
    pytest.param(slice(None), id="all", marks=pytest.mark.slow),
]


def ways(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Other shapes, most of as many numbers: axes swapped, one longer, one more, flattened, none."""
    yield shape[::-1]
    for axis in range(min(len(shape), 2)):
        yield tuple(length + (i == axis) for i, length in enumerate(shape))
    yield (*shape, 1)
    yield (prod(shape),)
    yield (shape[0] * 2, *shape[1:])
    yield (0, *shape[1:])
    yield ()


def refused(checkpoint: Checkpoint) -> minisd.CheckpointError:
    with pytest.raises(minisd.CheckpointError) as caught:
        build(checkpoint, recognise(checkpoint).family)
    return caught.value


@pytest.mark.parametrize("share", SHARES)
def test_a_reshaped_tensor_is_refused_when_it_is_opened(share):
    keys = list(TINY.entries)[share]
    assert len(TINY.entries) == 528
    for i, key in enumerate(keys):
        entry = TINY.entries[key]
        others = sorted({*ways(entry.shape)} - {entry.shape})
        for shape in {others[i % len(others)], others[(i + 3) % len(others)]}:  # two of eight; all of them take minutes
            error = refused(replace(TINY, entries={**TINY.entries, key: replace(entry, shape=shape)}))
            assert error.key == key or key in str(error) or related(error.key or "", key), (key, shape, str(error))


def related(found: str, key: str) -> bool:
    """Whether a tensor that is named is one that the reshaped one has to fit: another of its layer, or of the layer behind it."""
    return found in TINY.entries and found.split(".")[0] == key.split(".")[0]


@pytest.mark.parametrize("share", SHARES)
def test_a_tensor_that_is_missing_is_named(share):
    for key in list(TINY.entries)[share]:
        error = refused(replace(TINY, entries={name: entry for name, entry in TINY.entries.items() if name != key}))
        # A layer without its weight is left out, so that it is the bias which has no place; both have the layer's name.
        assert key.rpartition(".")[0] in str(error), (key, str(error))


PUBLISHED = {
    "sd15": SD1, "sd15-inpainting": SD1, "instruct-pix2pix": SD1, "sd21-base": SD2, "sd21-768": SD2, "sd2-inpainting": SD2,
    "sdxl-base": SDXL, "sdxl-refiner": REFINER,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_fit(name):
    check_fit(Shapes(manifest(name)), PUBLISHED[name])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd15", {"text_model.embeddings.token_embedding.weight": (100, 768)}, "expected 49,408 tokens"),
        ("sd15", {"text_model.embeddings.position_embedding.weight": (154, 768)}, "expected 77 positions"),
        ("sd21-base", {"cond_stage_model.model.positional_embedding": (76, 1024)}, "expected 77 positions"),
        ("sd21-base", {"resblocks.7.attn.in_proj_weight": (1024, 1024)}, "expected 3,072 channels"),
        ("sdxl-base", {"label_emb.0.0.weight": (1280, 2560)}, "expected 2,816 channels"),
        ("sdxl-base", {"embedders.1.model.text_projection": (1280, 1024)}, "expected 2,560 channels"),
        ("sdxl-refiner", {"label_emb.0.0.weight": (1536, 2816)}, "expected 2,560 channels"),
        ("sd15", {"diffusion_model.out.2.weight": (16, 320, 3, 3)}, "expected 4 channels, found 16"),
        ("sd15", {"output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight": (1280, 1024)}, "expected 768 channels"),
    ],
)
def test_parts_that_do_not_fit_are_named(name, change, message):
    shapes = manifest(name)
    ((end, shape),) = change.items()
    (key,) = (key for key in shapes if key.endswith(end) and "model_ema" not in key)
    with pytest.raises(ShapeError, match=message) as caught:
        check_fit(Shapes(shapes | {key: shape}), PUBLISHED[name])
    assert caught.value.key in shapes


def test_a_vae_fits_the_latents_that_it_is_given():
    shapes = Shapes(blueprint.vae((32, 64), (64, 32), (1, 3)))
    check_vae(shapes, 4)
    for latents, key in ((16, "quant_conv.weight"), (3, "quant_conv.weight")):
        with pytest.raises(ShapeError) as caught:
            check_vae(shapes, latents)
        assert caught.value.key == key
    with pytest.raises(ShapeError, match="expected 2 resolutions"):
        check_vae(Shapes({key: shape for key, shape in shapes.items() if ".up.1" not in key}), 4)


FAR = [
    "model.diffusion_model.input_blocks.99999999.0.in_layers.0.weight",
    "first_stage_model.decoder.up.99999999.block.0.norm1.weight",
    "first_stage_model.encoder.down.3.block.99999999.norm1.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.99999999.layer_norm1.weight",
    f"model.diffusion_model.output_blocks.{'9' * 400}.0.weight",
]


@pytest.mark.parametrize("key", FAR)
def test_a_layer_far_behind_the_others_takes_no_room(key):
    """Its number is a stranger's: nothing is made for the hundred million before it."""
    entry = replace(next(iter(TINY.entries.values())), shape=(32,))
    error = refused(replace(TINY, entries={**TINY.entries, key: entry}))
    assert (error.key or "").split(".")[0] == key.split(".")[0]
