"""Small checkpoints of every family with random weights, and the same weights in diffusers and transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import clip_tokenizer
from safetensors.torch import load_file, save_file

from minisd.models.family import REFINER, SD1, SD2, SDXL, UNET, VAE, Family, Tower
from minisd.models.shapes import Shapes
from minisd.workbench import blueprint

TEXT = 64  # channels of every text encoder here
LAYERS = 3
VAE_CHANNELS = (32, 64, 64, 64)


@dataclass(frozen=True)
class Small:
    """A family at a fraction of its width; `extra_channels` makes it one for inpainting (5) or editing (4)."""

    family: Family
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int = 1
    numbers: int = 0  # that the UNet's vector holds beside the pooled text
    extra_channels: int = 0
    markers: dict[str, list[float]] = field(default_factory=dict)

    @property
    def context(self) -> int:
        return TEXT * len(self.family.towers)

    @property
    def vector(self) -> int:
        return TEXT + 256 * self.numbers if self.numbers else 0

    @property
    def crossed(self) -> list[str]:
        return ["CrossAttn" if depth else "" for depth in self.depths]

    def unet(self) -> Shapes:
        return blueprint.unet(
            64,
            self.multipliers,
            2,
            self.depths,
            self.context,
            middle=self.middle,
            linear=self.family is not SD1,
            vector=self.vector,
            extra_channels=self.extra_channels,
        )

    def shapes(self) -> Shapes:
        texts = [
            blueprint.open_text(TEXT, LAYERS, TEXT) if "model" in tower.name.split(".") else blueprint.clip_text(TEXT, LAYERS)
            for tower in self.family.towers
        ]
        return blueprint.assemble(self.family, self.unet(), blueprint.vae(VAE_CHANNELS, VAE_CHANNELS, (2, 3)), *texts)

    def write(self, path: Path) -> Path:
        weights = blueprint.random_weights(self.shapes(), 2)
        weights |= {key: torch.tensor(values) for key, values in self.markers.items()}
        save_file(weights, path)
        return path


SMALL = {
    "sd1": Small(SD1, (1, 2), (1, 0)),
    "sd1-inpaint": Small(SD1, (1, 2), (1, 0), extra_channels=5),
    "sd1-edit": Small(SD1, (1, 2), (1, 0), extra_channels=4),
    "sd2": Small(SD2, (1, 2), (1, 0)),
    "sdxl": Small(SDXL, (1, 2, 2), (0, 1, 2), middle=2, numbers=6),
    "sdxl-v": Small(SDXL, (1, 2, 2), (0, 1, 2), middle=2, numbers=6, markers={"v_pred": [], "ztsnr": []}),
    "sdxl-inpaint": Small(SDXL, (1, 2, 2), (0, 1, 2), middle=2, numbers=6, extra_channels=5),
    "sdxl-refiner": Small(REFINER, (1, 2, 2), (0, 1, 0), numbers=5),
    "playground": Small(
        SDXL,
        (1, 2, 2),
        (0, 1, 2),
        middle=2,
        numbers=6,
        markers={"edm_mean": [-1.66, 1.88, -1.38, 2.5], "edm_std": [8.5, 5.9, 6.5, 5.2]},
    ),
    "cosxl": Small(
        SDXL,
        (1, 2, 2),
        (0, 1, 2),
        middle=2,
        numbers=6,
        markers={"edm_vpred.sigma_min": [0.002], "edm_vpred.sigma_max": [120.0]},
    ),
}


def options_of(small: Small) -> dict[str, Any]:
    """What diffusers must be told of a UNet, or of a ControlNet for it, since it does not read shapes."""
    depths = tuple(max(depth, 1) for depth in small.depths)
    vector: dict[str, Any] = {}
    if small.vector:
        vector = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        vector["projection_class_embeddings_input_dim"] = small.vector
    return {
        "block_out_channels": [64 * multiplier for multiplier in small.multipliers],
        "down_block_types": [f"{cross}DownBlock2D" for cross in small.crossed],
        "transformer_layers_per_block": depths if small.depths[-1] == small.middle else small.middle,
        "cross_attention_dim": small.context,
        "attention_head_dim": [8 if small.family is SD1 else multiplier for multiplier in small.multipliers],
        "use_linear_projection": small.family is not SD1,
        **vector,
    }


class Parts:
    """The networks of a small checkpoint in diffusers and transformers, in float32."""

    def __init__(self, path: Path, small: Small) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.loaders import single_file_utils as convert

        weights = load_file(path)
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                sample_size=8,
                in_channels=4 + small.extra_channels,
                up_block_types=[f"{cross}UpBlock2D" for cross in reversed(small.crossed)],
                **options_of(small),
            )
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=VAE_CHANNELS,
                layers_per_block=2,
                latent_channels=4,
                scaling_factor=small.family.latent_scale,
            )
        assert len(small.multipliers) == len(unet.down_blocks)
        own = {key: value for key, value in weights.items() if key.startswith((UNET, VAE))}
        unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(own), dict(unet.config)), assign=True)
        vae.load_state_dict(convert.convert_ldm_vae_checkpoint(dict(own), dict(vae.config)), assign=True)
        self.unet, self.vae = unet.eval(), vae.eval()
        self.texts = [text_model(weights, tower, drop=small.family is SD2) for tower in small.family.towers]


def text_model(weights: dict[str, torch.Tensor], tower: Tower, drop: bool):
    """A text encoder in transformers; with `drop` without its last layer, as diffusers has SD 2.x's."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    own = {key.removeprefix(f"{tower.name}."): value for key, value in weights.items() if key.startswith(f"{tower.name}.")}
    is_open = "positional_embedding" in own
    layers = LAYERS - drop
    config = CLIPTextConfig(
        hidden_size=TEXT,
        intermediate_size=4 * TEXT,
        num_hidden_layers=layers,
        num_attention_heads=1,
        hidden_act="gelu" if is_open else "quick_gelu",
        projection_dim=TEXT,
        eos_token_id=49407,
        pad_token_id=tower.pad,
    )
    model = (CLIPTextModelWithProjection if tower.pooled else CLIPTextModel)(config)
    named = renamed(own, layers) if is_open else own
    if not any(key.startswith("text_model.") for key in model.state_dict()):
        named = {key.removeprefix("text_model."): value for key, value in named.items()}
    if not tower.pooled:
        named.pop("text_projection.weight", None)
    missing = model.load_state_dict(named, strict=False)
    assert not missing.unexpected_keys, missing
    assert all("position_ids" in key for key in missing.missing_keys), missing
    return model.eval()


def renamed(own: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """open_clip's names as transformers': q, k and v apart, the projection transposed."""
    names = {
        "text_model.embeddings.token_embedding.weight": own["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": own["positional_embedding"],
        "text_model.final_layer_norm.weight": own["ln_final.weight"],
        "text_model.final_layer_norm.bias": own["ln_final.bias"],
        "text_projection.weight": own["text_projection"].T.contiguous(),
    }
    for i in range(layers):
        source, target = f"transformer.resblocks.{i}.", f"text_model.encoder.layers.{i}."
        for kind in ("weight", "bias"):
            q, k, v = own[f"{source}attn.in_proj_{kind}"].chunk(3)
            names |= {f"{target}self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", (q, k, v), strict=True)}
            for old, new in {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}.items():
                names[f"{target}{new}.{kind}"] = own[f"{source}{old}.{kind}"]
            for j in (1, 2):
                names[f"{target}layer_norm{j}.{kind}"] = own[f"{source}ln_{j}.{kind}"]
    return names


def tokenizers(small: Small, folder: Path) -> list[Any]:
    made = []
    for tower in small.family.towers:
        tokenizer = clip_tokenizer(folder)
        if tower.pad == 0:
            tokenizer.pad_token = "!"
        made.append(tokenizer)
    return made


EULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}


def pipeline(kind: str, parts: Parts, small: Small, folder: Path, scheduler: Any, **more: Any):
    """A diffusers pipeline of the class `kind` over the parts."""
    import diffusers

    tokens = tokenizers(small, folder)
    if kind.startswith("StableDiffusionXL"):
        refines = len(parts.texts) == 1
        texts = {"text_encoder": None, "tokenizer": None} if refines else {"text_encoder": parts.texts[0], "tokenizer": tokens[0]}
        texts |= {"text_encoder_2": parts.texts[-1], "tokenizer_2": tokens[-1]}
        texts |= {"force_zeros_for_empty_prompt": not refines, "add_watermarker": False}
    else:
        texts = {"text_encoder": parts.texts[0], "tokenizer": tokens[0]}
        texts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, kind)(unet=parts.unet, vae=parts.vae, scheduler=scheduler, **texts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe
