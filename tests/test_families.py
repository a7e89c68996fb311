"""Same weights, same numbers, for every family and every mode: against diffusers and transformers, at reduced width."""

from __future__ import annotations

import pytest
import torch
from families import SMALL, Parts, tokenizers
from helpers import relative_error

import minisd

PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse", "blurry"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name -> (our pipeline, the same weights in diffusers), each made once."""
    made: dict[str, tuple[minisd.Pipeline, Parts]] = {}

    def get(name: str) -> tuple[minisd.Pipeline, Parts]:
        if name not in made:
            path = SMALL[name].write(tmp_path_factory.mktemp(name) / f"{name}.safetensors")
            made[name] = minisd.load(path, device="cpu", dtype="float32"), Parts(path, SMALL[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner", "sdxl-inpaint", "sd1-edit"])
@torch.no_grad()
def test_unet(opened, name):
    pipe, parts = opened(name)
    small = SMALL[name]
    x, context, t = noise(2, 4 + small.extra_channels, 12, 16), noise(2, 77, small.context), torch.tensor([981.0, 3.0])
    if small.vector:
        pooled, numbers = noise(2, 64), torch.tensor([[1024.0, 768.0, 0.0, 16.0, 1024.0, 512.0][: small.numbers]] * 2)
        from minisd.denoiser import Conditioning
        from minisd.prompt import with_sizes

        y = with_sizes(Conditioning(context, pooled), numbers[0].tolist()).vector
        wanted = parts.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": numbers}).sample
    else:
        y, wanted = None, parts.unet(x, t, context).sample
    assert relative_error(pipe.unet(x, t, context, y), wanted) <= 1e-5


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-refiner"])
@torch.no_grad()
def test_text(opened, name, tmp_path):
    pipe, parts = opened(name)
    prompts = [PROMPT, ""]
    contexts, pooled = [], None
    for tokenizer, text in zip(tokenizers(SMALL[name], tmp_path), parts.texts, strict=True):
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        out = text(ids, output_hidden_states=True)
        contexts.append(out.last_hidden_state if name == "sd2" else out.hidden_states[-2])
        pooled = getattr(out, "text_embeds", None)
    found = pipe.encode_prompt(prompts)
    assert relative_error(found.context, torch.cat(contexts, dim=-1)) <= 1e-5
    assert (found.pooled is None) == (name == "sd2")
    if found.pooled is not None:
        assert relative_error(found.pooled, pooled) <= 1e-5
