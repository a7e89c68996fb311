"""The small files of a diffusers folder: which pipeline it is, the shape of every network, the noise schedule, the tokenizers.

All of it follows from keys and shapes, and from what family.py knows.  Reference: the configs of the published folders.
"""

from __future__ import annotations

import json
from math import prod
from typing import Any

from ...errors import CheckpointError
from ...files.checkpoint import Checkpoint
from ...files.writers import is_unneeded
from ...models.family import REFINER, SDXL, UNET, VAE, Recognition
from ...models.naming import Level, Place, count, is_open, places, raw_levels, unused_layers
from ...models.shapes import Shapes, below
from ...text.tokenizer import END, END_ID, LENGTH, START, START_ID, bpe, merges_text
from .. import blueprint

VERSION = {"_diffusers_version": "0.35.0"}
PIPELINES = {
    ("sd", "draw"): "StableDiffusionPipeline",
    ("sd", "inpaint"): "StableDiffusionInpaintPipeline",
    ("sd", "edit"): "StableDiffusionInstructPix2PixPipeline",
    ("xl", "draw"): "StableDiffusionXLPipeline",
    ("xl", "inpaint"): "StableDiffusionXLInpaintPipeline",
    ("xl", "edit"): "StableDiffusionXLInstructPix2PixPipeline",
}
SCHEDULE: dict[str, object] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}


def small_files(checkpoint: Checkpoint, found: Recognition) -> dict[str, str]:
    """The texts of a folder by their paths: which pipeline it is, configs, scheduler, tokenizers."""
    family = found.family
    kind = "xl" if family.vector else "sd"
    pipeline = "StableDiffusionXLImg2ImgPipeline" if family is REFINER else PIPELINES[kind, found.task]
    index: dict[str, Any] = {"_class_name": pipeline, **VERSION}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    schedule = scheduler(found)
    index["scheduler"] = ["diffusers", schedule["_class_name"]]
    configs = {"scheduler/scheduler_config.json": schedule}
    configs["unet/config.json"] = unet_config(checkpoint, found)
    configs["vae/config.json"] = vae_config(checkpoint, found)
    texts: dict[str, str] = {}
    for place in places(family)[2:]:
        assert place.tower is not None
        suffix = place.folder.removeprefix("text_encoder")
        configs[f"{place.folder}/config.json"] = text_config(checkpoint, place)
        texts |= tokenizer(f"tokenizer{suffix}", "!" if is_open(place.tower) else END)
        index[place.folder] = ["transformers", "CLIPTextModelWithProjection" if place.tower.pooled else "CLIPTextModel"]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    absent = ["text_encoder", "tokenizer"] if family is REFINER else [] if family is SDXL else ["safety_checker"]
    index |= {
        each: [None, None] for each in [*absent, "image_encoder", "feature_extractor"] if (kind, each) != ("sd", "image_encoder")
    }
    index |= {"force_zeros_for_empty_prompt": family.zero_negative} if kind == "xl" else {"requires_safety_checker": False}
    if family is REFINER:
        index["requires_aesthetics_score"] = True
    configs["model_index.json"] = index
    return texts | {path: json.dumps(content, indent=2) + "\n" for path, content in configs.items()}


def scheduler(found: Recognition) -> dict[str, Any]:
    training = found.training
    prediction = {"prediction_type": "v_prediction" if training.prediction == "v" else "epsilon"}
    if training.sigmas:
        low, high = training.sigmas
        kind = {"sigma_schedule": "exponential"} if training.prediction == "v" else {}
        return (
            {"_class_name": "EDMEulerScheduler", "sigma_min": low, "sigma_max": high, "sigma_data": training.sigma_data}
            | prediction
            | kind
        )
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if training.zero_terminal else {}
    return {"_class_name": "EulerDiscreteScheduler"} | SCHEDULE | prediction | zero


def unet_config(checkpoint: Checkpoint, found: Recognition) -> dict[str, Any]:
    """What `UNet2DConditionModel` must be told to have these shapes.  Raises CheckpointError where it cannot have them."""
    shapes = below(checkpoint.shapes, UNET)
    down, up = raw_levels(shapes, "input_blocks", "op"), raw_levels(shapes, "output_blocks", "conv")
    depths = depths_by_level(shapes, down, up)
    here = [(level.resnets + 1, level.attention) for level in reversed(down)]
    mirrored = here == [(level.resnets, level.attention) for level in up] and len({level.resnets for level in down}) == 1
    if not mirrored or depths is None or "middle_block.2.in_layers.0.weight" not in shapes:
        raise CheckpointError(checkpoint.path, "has a UNet that diffusers' plain config cannot describe", "it is a distilled one")
    channels = widths(shapes, down)
    old = len(next(shape for key, shape in shapes.items() if key.endswith(".1.proj_in.weight"))) == 4
    crossed = ["CrossAttn" * level.attention for level in down]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        **VERSION,
        "sample_size": found.size[0] // 8,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": down[0].resnets,
        "down_block_types": [f"{cross}DownBlock2D" for cross in crossed],
        "up_block_types": [f"{cross}UpBlock2D" for cross in reversed(crossed)],
        "transformer_layers_per_block": depths,
        "cross_attention_dim": next(shape for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight"))[1],
        "attention_head_dim": 8 if old else [max(1, width // 64) for width in channels],
        "use_linear_projection": not old,
    }
    if "label_emb.0.0.weight" in shapes:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
    return config


def depths_by_level(shapes: Shapes, down: list[Level], up: list[Level]) -> list[int] | None:
    """Transformer blocks of each level; None where they differ in a level, or on the way up.  The last serves the middle, too."""

    def depth(block: str) -> int:
        return count(shapes, f"{block}.1.transformer_blocks.")

    middle, i, ways = depth("middle_block"), 1, []
    for level in down:
        ways.append({depth(f"input_blocks.{i + j}") for j in range(level.resnets)})
        i += level.resnets + level.resampled
    i = 0
    for level, found in zip(up, reversed(ways), strict=False):
        found |= {depth(f"output_blocks.{i + j}") for j in range(level.resnets)}
        i += level.resnets
    if any(len(found) != 1 for found in ways) or (down[-1].attention and ways[-1] != {middle}) or middle == 0:
        return None
    return [*(max(1, *found) for found in ways[:-1]), middle]


def widths(shapes: Shapes, down: list[Level]) -> list[int]:
    i, found = 1, []
    for level in down:
        found.append(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0])
        i += level.resnets + level.resampled
    return found


def vae_config(checkpoint: Checkpoint, found: Recognition) -> dict[str, Any]:
    """What `AutoencoderKL` must be told to have these shapes.  Raises CheckpointError where it cannot have them."""
    shapes, training = below(checkpoint.shapes, VAE), found.training
    levels, blocks = count(shapes, "encoder.down."), count(shapes, "encoder.down.0.block.")
    channels = [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)]
    described = blueprint.vae(channels, channels, (blocks, blocks + 1), shapes["post_quant_conv.weight"][1])
    for key in sorted({*described, *(key for key in shapes if not is_unneeded(f"{VAE}.{key}"))}):
        if prod(described.get(key, ())) != prod(shapes.get(key, ())) or (key in described) != (key in shapes):
            raise CheckpointError(
                checkpoint.path,
                "has a VAE that diffusers cannot have: its encoder and decoder would have the same widths and depths",
                "give it another first: minisd convert FILE --vae OTHER -o NAME.safetensors",
                f"{VAE}.{key}",
            )
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        **VERSION,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["post_quant_conv.weight"][1],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": blocks,
        "norm_num_groups": 32,
        "sample_size": found.size[0],
        "scaling_factor": found.latent_scale,
        "force_upcast": found.family.vector,
    }
    if training.latent_mean:
        config |= {"latents_mean": list(training.latent_mean), "latents_std": list(training.latent_std)}
    return config


def text_config(checkpoint: Checkpoint, place: Place) -> dict[str, Any]:
    assert place.tower is not None
    shapes = below(checkpoint.shapes, place.tower.name)
    if is_open(place.tower):
        width, layers = shapes["ln_final.weight"][0], count(shapes, "transformer.resblocks.")
        inner, words = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0], shapes["token_embedding.weight"][0]
        layers -= unused_layers(place.tower, layers)
    else:
        inside = below(shapes, "text_model") or shapes
        width, layers = inside["final_layer_norm.weight"][0], count(inside, "encoder.layers.")
        inner, words = inside["encoder.layers.0.mlp.fc1.weight"][0], inside["embeddings.token_embedding.weight"][0]
    return {
        "architectures": ["CLIPTextModelWithProjection" if place.tower.pooled else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": layers,
        "vocab_size": words,
        "max_position_embeddings": LENGTH,
        "hidden_act": "gelu" if is_open(place.tower) else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": shapes["text_projection"][1] if place.tower.pooled else width,
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        "pad_token_id": place.tower.pad,
    }


def tokenizer(folder: str, pad: str) -> dict[str, str]:
    """transformers' files of CLIP's tokenizer; pad: what fills a text up."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "do_lower_case": True,
        "errors": "replace",
    }
    vocabulary = dict(sorted(bpe().get_vocab().items(), key=lambda item: item[1]))
    return {
        f"{folder}/vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        f"{folder}/merges.txt": "#version: 0.2\n" + merges_text(),
        f"{folder}/tokenizer_config.json": json.dumps(config, indent=2),
        f"{folder}/special_tokens_map.json": json.dumps(special, indent=2),
    }
