"""Cross-attention maps: a pixel's weights sum to 1, the kernel's are the plain ones, the shape's words lie on the shape."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import SMALL
from PIL import Image

import minisd
from minisd import kernels
from minisd.cli import main
from minisd.fast import choice
from minisd.inside import attention
from minisd.inside.maps import END, START, columns_of, labels
from minisd.inside.shown.heat import heat, sheet
from minisd.kernels.attention_columns import SHAPES, make, reference
from minisd.text.tokenizer import tokenize

PROMPT = "a red circle on a blue background"
QUICKLY = {"steps": 2, "seed": 1, "width": 32, "height": 32}
FINEST = "model.diffusion_model.output_blocks.2.1.transformer_blocks.0.attn2"  # of the tiny checkpoint, where shapes are seen
# Least mean IoU over 50 prompts, in the finest layer: of the words that name the shape ("red circle"), and of its noun alone.
# Measured with the checkpoint in the box on 2026-11-27: 0.76 and 0.54 (medians 0.81 and 0.60).
LEAST_PHRASE, LEAST_NOUN = 0.5, 0.5


@pytest.fixture(scope="module")
def pipe() -> minisd.Pipeline:
    return minisd.load(device="cpu", dtype="float32")


def test_words_of_a_pixel_sum_to_one(pipe):
    found = pipe.attention(PROMPT, **QUICKLY)
    assert found.words == (START, "a", "red", "circle", "on", "blue", "background", END)
    assert len(found.maps) == sum(name.endswith("attn2") for name, _ in pipe.unet.named_modules())
    for maps in found.maps.values():
        assert maps.shape[:2] == (2, 8)
        assert (maps.sum(1) - 1).abs().max() < 1e-5
        assert maps.min() >= 0
    with choice.using("torch"):  # the plain way, as maps are taken
        assert torch.equal(found.result.latents, pipe(PROMPT, **QUICKLY).latents)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.model.modules())


def test_maps_are_those_of_the_formula(pipe):
    """All weights, by hooks on queries and keys, for the word "circle", whose token is the third."""
    name = FINEST
    with minisd.tap(pipe, [f"{name}.to_q", f"{name}.to_k"]) as values:
        pipe(PROMPT, **QUICKLY)
    wanted = []
    for q, k in zip(values[f"{name}.to_q"], values[f"{name}.to_k"], strict=True):
        q, k = (x.output[1].unflatten(-1, (8, -1)).transpose(0, 1) for x in (q, k))  # of the prompt
        wanted.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 3].mean(0).view(4, 4))
    found = attention(pipe, PROMPT, **QUICKLY, words=["circle"])
    assert torch.allclose(found.maps[name][:, 0], torch.stack(wanted), atol=1e-6)
    first = found.of("circle", name, 0)
    assert torch.allclose(first, F.interpolate(wanted[0][None, None], (8, 8), mode="bilinear")[0, 0], atol=1e-6)
    assert torch.allclose(found.of("circle", name), (first + found.of("circle", name, 1)) / 2, atol=1e-6)


@pytest.mark.parametrize("family", ["sd2", pytest.param("sdxl", marks=pytest.mark.slow), "sdxl-refiner"])
def test_other_families_and_sizes(family, tmp_path):
    pipe = minisd.load(SMALL[family].write(tmp_path / "m.safetensors"), device="cpu", dtype="float32")
    long = "a star " * 40  # two chunks in the negative prompt, one here
    found = attention(pipe, "a [red:blue:0.5] circle", negative_prompt=long, steps=4, seed=1, width=72, height=40)
    assert found.words == (START, "a", "red", "circle", END, "blue")
    for maps in found.maps.values():
        assert (maps.sum(1) - 1).abs().max() < 1e-5
        assert maps[3, 2].max() == 0  # red is gone by then
        assert maps[0, 5].max() == 0
    assert found.of("circle").shape == (5, 9)


def test_words_are_found_by_their_tokens():
    (ids,) = tokenize(["a red circle, an antidisestablishmentarian red star"])
    said = labels(ids)
    assert len(said) == 77
    assert said[:5] == [START, "a", "red", "circle", ","]
    assert columns_of("red", ids) == {2, said.index("star") - 1}
    assert columns_of("red star", ids) == {said.index("star") - 1, said.index("star")}
    long = columns_of("antidisestablishmentarian", ids)
    assert len(long) > 2
    assert {said[i] for i in long} == {"antidisestablishmentarian"}
    assert columns_of(END, ids) == set(range(said.index("star") + 1, 77))
    assert columns_of("blue", ids) == set()


@contextmanager
def interpreter(monkeypatch):
    from interpreter import repair

    repair(monkeypatch)
    yield


runs_kernels = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] if kernels.checks.INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if kernels.checks.INTERPRETED else "cuda"


class TestKernel:
    pytestmark = runs_kernels

    @pytest.mark.slow
    def test_equals_the_plain_maps(self, pipe, monkeypatch):
        """Of a drawing: what the plain path adds up, to 1e-5, and the same picture."""
        with interpreter(monkeypatch):
            words = ["circle", "red circle", "background"]
            plain = attention(pipe, PROMPT, **QUICKLY, words=words)
            ours = attention(pipe, PROMPT, **QUICKLY, words=words, kernel=True)
        assert plain.maps.keys() == ours.maps.keys()
        assert max(float((plain.maps[layer] - ours.maps[layer]).abs().max()) for layer in plain.maps) < 1e-5
        assert (plain.result.latents - ours.result.latents).abs().max() < 1e-3
        assert not any(module._forward_pre_hooks for module in pipe.model.modules())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("dim", "keys", "count"), [(40, 77, 8), (64, 154, 20), (80, 5, 1), (160, 77, 3)])
    def test_against_the_formula(self, dim, keys, count, dtype, monkeypatch):
        torch.manual_seed(0)
        shape = SHAPES[0].__class__("", 2, 3, 37, keys, dim, count)
        given = make(shape, DEVICE, dtype)
        with interpreter(monkeypatch):
            out, columns = kernels.attention_columns(**given)
        true = {name: x.double() for name, x in given.items()}
        wanted, sums = reference(**true)
        eps = torch.finfo(dtype).eps
        assert out.dtype == dtype
        assert (out.double() - wanted).abs().max() < 8 * eps * wanted.abs().max()
        assert columns.shape == (2, count, 37)
        assert (columns.double() - sums).abs().max() < (1e-5 if dtype == torch.float32 else 2 * eps)
        assert (columns.sum(1) - 1).abs().max() < (1e-5 if dtype == torch.float32 else 2 * eps)

    def test_refuses(self):
        given = make(SHAPES[0].__class__("", 1, 2, 5, 7, 40, 3), DEVICE, torch.float32)
        for change, said in (
            ({"groups": given["groups"][:5]}, r"groups: expected shape \(7, any\)"),
            ({"groups": given["groups"].half()}, "groups: expected torch.float32"),
            ({"groups": torch.zeros(7, 200, device=DEVICE)}, "groups: expected at most 128 groups"),
            ({"v": given["v"][:, :1]}, "v: expected shape"),
            ({"scale": -1.0}, "scale: expected a positive number"),
        ):
            with pytest.raises(ValueError, match=said):
                kernels.attention_columns(**given | change)


SHAPE_WORDS = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple", "pink", "cyan")


def drawn_shape(image: Image.Image) -> np.ndarray:
    """The pixels that are not of the background, which is what the picture's edge has most of."""
    x = np.asarray(image, dtype=float)
    edge = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
    away = np.linalg.norm(x - np.median(edge, axis=0), axis=-1)
    return away > away.max() / 2


def bright(found: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map in two, where the variance between them is largest (Otsu 1979)."""
    x = F.interpolate(found[None, None], size, mode="bicubic")[0, 0].numpy()
    values = np.sort(x.ravel())
    count = np.arange(1, len(values))
    below, total = np.cumsum(values)[:-1], values.sum()
    between = count * (len(values) - count) * (below / count - (total - below) / (len(values) - count)) ** 2
    return x > values[int(between.argmax())]


@pytest.mark.slow
def test_the_words_of_the_shape_lie_on_the_shape(pipe):
    found: dict[str, list[float]] = {"noun": [], "phrase": []}
    for i in range(50):
        noun, colour, ground = SHAPE_WORDS[i % 8], COLOURS[i % 10], COLOURS[(i % 10 + 1 + i // 10) % 10]
        phrase = f"{colour} {noun}"
        maps = attention(pipe, f"a {phrase} on a {ground} background", words=[noun, phrase], seed=i, steps=10)
        image = maps.result.images[0]
        for word, name in ((noun, "noun"), (phrase, "phrase")):
            a, b = bright(maps.of(word, FINEST), image.size[::-1]), drawn_shape(image)
            found[name].append(float((a & b).sum() / (a | b).sum()))
    print({name: (round(float(np.mean(each)), 3), round(float(np.median(each)), 3)) for name, each in found.items()})
    assert np.mean(found["phrase"]) >= LEAST_PHRASE
    assert np.mean(found["noun"]) >= LEAST_NOUN


def test_sheets(pipe):
    found = attention(pipe, PROMPT, **QUICKLY, words=["circle", "background"])
    one, layers, steps = (sheet(found, by) for by in ("word", "layer", "step"))
    assert layers.height > steps.height > one.height
    hot = np.asarray(heat(torch.eye(4), Image.new("RGB", (32, 32), "grey"))).astype(int)
    assert hot[4, 4].sum() > hot[4, -4].sum() + 200  # bright where the map is


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"words": ["star"]}, "words: expected words of the prompt .*circle.*, found 'star'"),
        ({"num_images": 2}, "attention: expected a text as prompt, for one picture"),
        ({"prompt": "a star AND a ring"}, "attention: expected a prompt without AND"),
    ],
)
def test_what_cannot_be_shown_is_told(given, said, pipe):
    with pytest.raises(minisd.UsageError, match=said):
        attention(pipe, **{"prompt": PROMPT} | QUICKLY | given)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["attend", PROMPT, "-o", "maps.png", "--steps", "2", "--size", "32x32", "--seed", "1"]
    assert main([*line, "--words", "circle,background"]) == 0
    assert capsys.readouterr().out == "maps.png\n"
    assert Image.open("maps.png").width > 500
    assert main([*line, "--by", "layer", "--layer", "middle_block.1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["words"][:2] == [START, "a"]
    assert all(abs(sum(shares) - 1) < 1e-4 for shares in facts["shares"].values())
    for more, said in (
        (["--words", "star"], "--words: expected words of the prompt"),
        (["--by", "colour"], "--by: expected word"),
        (["--layer", "out.2"], "--layer: expected one of"),
        (["--words", " ,"], "--words: expected words of the prompt with commas"),
    ):
        assert main([*line, *more]) == 2
        assert said in capsys.readouterr().err
