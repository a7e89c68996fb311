"""The networks of a file as OpenVINO's users have them on disk: converted once, in half precision, and compiled into its cache.

Beside them lies what the loop wants to know: the levels of its steps, their timesteps, and the scale of the latents.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...diffusion.levels import levels
from ...diffusion.samplers import SAMPLERS
from ...diffusion.schedule import scaled_linear
from ...errors import UsageError
from ...files.checkpoint import open_checkpoint
from ...files.model import load_model
from ...models.family import Family
from ..lab.runtimes import Called
from .with_openvino import compiled


def networks(model: Any, family: Family, width: int, height: int) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """(name, network in float32, what it is called with): the text encoder, the VAE's decoder, the UNet with guidance."""
    (encoder,), (tower,) = model.text_encoders, family.towers
    encoder.float()
    ids = torch.ones(2, 77, dtype=torch.long)
    x = torch.randn(2, model.unet.in_channels, height // model.vae.downscale, width // model.vae.downscale)

    def encode(encoder: Any, ids: Tensor) -> Tensor:
        return encoder.final_norm(encoder.hidden_states(ids)[-1 - tower.skip])

    context = encode(encoder, ids)
    yield "text", Called(encoder, encode), (ids,)
    yield "vae", Called(model.vae.float(), lambda vae, x: vae.decode(x)), (x[:1],)
    yield "unet", Called(model.unet.float(), lambda unet, *given: unet(*given)), (x, torch.ones(2), context)


@torch.no_grad()
def main(job: dict[str, Any]) -> None:
    import openvino

    model, found = load_model(open_checkpoint(Path(job["path"])), torch.device("cpu"), torch.float16)
    if len(found.family.towers) > 1 or found.training.prediction != "epsilon":
        raise UsageError("OpenVINO: expected a checkpoint of SD 1.x or 2.x that predicts the noise")
    folder, schedule = Path(job["folder"]), scaled_linear()
    for name, network, given in networks(model, found.family, job["width"], job["height"]):
        shapes = [openvino.PartialShape(list(x.shape)) for x in given]
        converted = openvino.convert_model(network.eval(), example_input=given, input=shapes)
        openvino.save_model(converted, folder / f"{name}.xml", compress_to_fp16=True)
        del converted
        network.to("meta")  # its memory is wanted by the compiler
        compiled(openvino.Core(), job, name)
    sigmas = levels(schedule, "linspace", job["steps"], SAMPLERS["euler"].wish).sigmas
    facts = {"sigmas": sigmas.tolist(), "timesteps": schedule.timestep(sigmas[:-1]).tolist(), "scale": found.latent_scale}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
