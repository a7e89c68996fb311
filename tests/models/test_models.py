"""Same weights, same numbers: every network against diffusers and transformers, in float32 at reduced width."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from minisd.models.ops import attention

LIMIT = 1e-5


def last(pipe, ids):
    encoder = pipe.text_encoders[0]
    return encoder.final_norm(encoder.hidden_states(ids)[-1])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (20, 12)])  # 20 and 12 are odd after two halvings
@torch.no_grad()
def test_unet(reduced, oracle, size):
    x, context = noise(2, 4, *size), noise(2, 77, 64, seed=1)
    t = torch.tensor([981.0, 1.0])
    found = reduced.unet(x, t, context)
    assert found.shape == x.shape
    assert relative_error(found, oracle.unet(x, t, context).sample) <= LIMIT


@torch.no_grad()
def test_unet_takes_fractional_timesteps(reduced, oracle):
    x, context, t = noise(1, 4, 8, 8), noise(1, 77, 64), torch.tensor([551.3684])
    found = reduced.unet(x, t, context)
    assert relative_error(found, oracle.unet(x, t, context).sample) <= LIMIT
    assert relative_error(found, reduced.unet(x, t.round(), context)) > 1e-4


@torch.no_grad()
def test_text_encoder(reduced, oracle):
    ids = torch.randint(0, 49408, (3, 77), generator=torch.Generator().manual_seed(0))
    assert relative_error(last(reduced, ids), oracle.text(ids).last_hidden_state) <= LIMIT


@torch.no_grad()
def test_vae_decode(reduced, oracle):
    latents = noise(1, 4, 8, 12)
    found = reduced.vae.decode(latents)
    assert found.shape == (1, 3, 64, 96)
    assert relative_error(found, oracle.vae.decode(latents).sample) <= LIMIT


@torch.no_grad()
def test_vae_encode(reduced, oracle):
    image = noise(2, 3, 64, 96).clamp(-1, 1)
    mean, logvar = reduced.vae.encode(image)
    wanted = oracle.vae.encode(image).latent_dist
    assert mean.shape == (2, 4, 8, 12)
    assert relative_error(mean, wanted.mean) <= LIMIT
    assert relative_error(logvar, wanted.logvar) <= LIMIT


@torch.no_grad()
def test_prompt_to_context(reduced, oracle, tmp_path):
    prompts = ["a photograph of an astronaut riding a horse", ""]
    pipe = oracle.pipeline("euler", "linspace", tmp_path)
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    found = reduced.encode_prompt(prompts)
    assert found.pooled is None
    assert relative_error(found.context, oracle.text(ids).last_hidden_state) <= LIMIT


@pytest.mark.parametrize(("heads", "channels", "length"), [(8, 320, 1024), (1, 512, 1500)])
def test_bfloat16_attention_on_a_cpu(heads, channels, length):
    """By rows against float64; the rounding of the scores may cost a factor of 4 against PyTorch's own."""
    q, k, v = (noise(2, length, channels, seed=i).bfloat16() for i in range(3))
    wanted = attention(q.double(), k.double(), v.double(), heads)
    found = relative_error(attention(q, k, v, heads), wanted)
    split = (x.view(2, length, heads, -1).transpose(1, 2) for x in (q, k, v))
    fused = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(2, length, channels)
    assert found <= 4 * relative_error(fused, wanted)
