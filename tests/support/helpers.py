"""What several tests share: small checkpoints with random weights, and the same weights in diffusers and transformers."""

from __future__ import annotations

import json
import lzma
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from minisd.files.checkpoint import open_checkpoint
from minisd.files.model import StableDiffusion
from minisd.files.recognition import recognise
from minisd.models.family import SD1
from minisd.models.shapes import Shapes
from minisd.text.tokenizer import bpe, byte_letters, merges_text
from minisd.workbench import blueprint

TESTS = Path(__file__).parents[1]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def assert_close(found: torch.Tensor, wanted: torch.Tensor, limit: float) -> None:
    """Relative L2 error at most `limit`; `pytest -rA` shows it."""
    error = relative_error(found, wanted)
    print(f"relative L2 error {error:.1e}, limit {limit:.0e}")
    assert error <= limit


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published checkpoint, or of a ControlNet."""
    file = "controls" if name.startswith("controlnet") else "manifests"
    text = lzma.decompress((TESTS / "checkpoints" / f"{file}.json.xz").read_bytes())
    return {key: tuple(shape) for key, (_, shape) in json.loads(text)[name].items()}


def built(shapes: dict[str, tuple[int, ...]], family=SD1) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the module that is made of these."""
    with torch.device("meta"):
        model = StableDiffusion(Shapes(shapes), family)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def recognised(folder: Path, shapes: dict[str, tuple[int, ...]], values: dict[str, list[float]] | None = None, **metadata: str):
    """What minisd says of a file with these shapes."""
    return recognise(open_checkpoint(write_holes(folder / "shapes.safetensors", shapes, values, **metadata)))


def write_holes(
    path: Path, shapes: dict[str, tuple[int, ...]], values: dict[str, list[float]] | None = None, **metadata: str
) -> Path:
    """A file of holes with these shapes, which takes no space on the disk."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset, places = 0, {}
    for key, shape in shapes.items():
        places[key] = offset
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset := offset + 4 * prod(shape)]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, numbers in (values or {}).items():
            file.seek(8 + len(text) + places[key])
            file.write(struct.pack(f"<{len(numbers)}f", *numbers))
        file.truncate(8 + len(text) + offset)
    return path


@dataclass(frozen=True)
class Width:
    """An SD 1.x architecture at some width; the numbers that the reference needs in its configuration."""

    channels: int
    context: int
    text_layers: int
    vae_channels: tuple[int, ...]

    def shapes(self) -> blueprint.Shapes:
        return blueprint.assemble(
            SD1,
            blueprint.unet(self.channels, (1, 2, 4, 4), 2, (1, 1, 1, 0), self.context),
            blueprint.vae(self.vae_channels, self.vae_channels, (2, 3)),
            blueprint.clip_text(self.context, self.text_layers),
        )


REDUCED = Width(32, 64, 3, (32, 64, 64, 64))
FULL = Width(320, 768, 12, (128, 256, 512, 512))


def write_checkpoint(path: Path, width: Width = REDUCED, dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
    save_file(blueprint.random_weights(width.shapes(), 1, dtype), path, {"format": "pt"} | metadata)
    return path


class Oracle:
    """The same file in diffusers and transformers, by their own key conversion (diffusers, single_file_utils.py)."""

    def __init__(self, path: Path, width: Width) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.loaders import single_file_utils as convert
        from safetensors.torch import load_file
        from transformers import CLIPTextConfig, CLIPTextModel

        weights = load_file(path)
        levels = [width.channels * m for m in (1, 2, 4, 4)]
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=levels, cross_attention_dim=width.context, attention_head_dim=8, sample_size=64
            )
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=width.vae_channels,
                layers_per_block=2,
                latent_channels=4,
                sample_size=512,
            )
        unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(weights), dict(unet.config)), assign=True)
        vae.load_state_dict(convert.convert_ldm_vae_checkpoint(dict(weights), dict(vae.config)), assign=True)
        prefix = "cond_stage_model.transformer."
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width.context,
                intermediate_size=4 * width.context,
                num_hidden_layers=width.text_layers,
                num_attention_heads=max(1, width.context // 64),
                eos_token_id=49407,
            )
        )
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        names = set(text.state_dict())
        if not any(name.startswith("text_model.") for name in names):  # newer transformers name the parts without it
            own = {key.removeprefix("text_model."): value for key, value in own.items()}
        missing = text.load_state_dict(own, strict=False, assign=True)
        assert not missing.unexpected_keys
        assert all("position_ids" in key for key in missing.missing_keys), missing
        self.unet, self.vae, self.text = unet.eval(), vae.eval(), text.eval()

    def pipeline(self, sampler: str, spacing: str, folder: Path):
        from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

        kind = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[sampler]
        extra = {"clip_sample": False, "set_alpha_to_one": False} if sampler == "ddim" else {}
        scheduler = kind(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing=spacing,
            **extra,
        )
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text,
            tokenizer=clip_tokenizer(folder),
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def clip_tokenizer(folder: Path):
    """transformers' CLIP tokenizer over the vocabulary that follows from the shipped merges."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_letters()
    vocabulary = bpe().get_vocab(with_added_tokens=True)
    assert vocabulary[letters[0]] == 0
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges_text(), encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
