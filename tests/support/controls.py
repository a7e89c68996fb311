"""Small ControlNets and T2I-Adapters with random weights, and the same weights in diffusers."""

from __future__ import annotations

from typing import Any

import torch
from families import Small, options_of

from minisd.models.control.union import OWN as UNION
from minisd.models.shapes import Shapes
from minisd.models.unet import UNet, timestep_embedding
from minisd.workbench import blueprint


def control_shapes(unet: Shapes) -> Shapes:
    """A ControlNet for a UNet with these shapes."""
    return blueprint.controlnet(unet)


def their_control(weights: dict[str, torch.Tensor], small: Small, **options: Any):
    """diffusers' ControlNetModel, by its own conversion of names (single_file_utils.py), which leaves SDXL's label_emb out."""
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    with torch.device("meta"):
        model = ControlNetModel(**options_of(small), **options)
    named = convert_controlnet_checkpoint(dict(weights), dict(model.config))
    for ours, theirs in (("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")):
        named |= {f"{theirs}.{end}": weights[f"{ours}.{end}"] for end in ("weight", "bias") if f"{ours}.{end}" in weights}
    hint = "controlnet_cond_embedding."  # of which their conversion knows eight layers alone
    last = f"{hint}blocks.{2 * len(model.config.conditioning_embedding_out_channels) - 2}."
    model.load_state_dict({name.replace(last, f"{hint}conv_out."): value for name, value in named.items()}, assign=True)
    return model.eval()


def union_shapes(unet: Shapes, kinds: int = 8) -> Shapes:
    """A ControlNet Union for a UNet with these shapes, with so many kinds of pictures."""
    shapes = control_shapes(unet)
    width, emb = shapes["input_blocks.0.0.weight"][0], shapes["time_embed.2.weight"][0]
    shapes |= {"task_embedding": (kinds, width)}
    shapes |= blueprint.layer("control_add_embedding.linear_1", emb, 256 * kinds)
    shapes |= blueprint.layer("control_add_embedding.linear_2", emb, emb) | blueprint.layer("spatial_ch_projs", width, width)
    block = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    block |= blueprint.layer("attn.out_proj", width, width) | blueprint.layer("ln_1", width) | blueprint.layer("ln_2", width)
    block |= blueprint.layer("mlp.c_fc", 4 * width, width) | blueprint.layer("mlp.c_proj", width, 4 * width)
    return Shapes(shapes | blueprint.under("transformer_layes.0", block))


def lllite_shapes(unet: Shapes, seen: int = 32, rank: int = 16) -> Shapes:
    """A ControlNet-LLLite for SDXL's UNet, as sd-scripts makes one: before attn1's q, k, v and attn2's q, down to the middle."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in unet.items():
        module = key.removesuffix(".weight")
        if key.startswith("output_blocks") or not module.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")):
            continue
        name = f"lllite_unet_{module.replace('.', '_')}"
        deep = module.startswith("middle") or int(module.split(".")[1]) > 5
        first = [(seen // 2, 3, 4, 4)]
        rest = [(seen // 2, seen // 2, 4, 4), (seen, seen // 2, 2, 2)] if deep else [(seen, seen // 2, 4, 4)]
        for i, kernel in enumerate(first + rest):
            shapes |= blueprint.layer(f"{name}.conditioning1.{2 * i}", *kernel)
        shapes |= blueprint.layer(f"{name}.down.0", rank, shape[1]) | blueprint.layer(f"{name}.mid.0", rank, rank + seen)
        shapes |= blueprint.layer(f"{name}.up.0", shape[1], rank)
    return Shapes(shapes)


def their_union(weights: dict[str, torch.Tensor], small: Small):
    """diffusers' ControlNetUnionModel, with the names of a ControlNet for what it has in common with one."""
    from diffusers import ControlNetUnionModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    kinds, width = weights["task_embedding"].shape
    sizes = {"num_control_type": kinds, "num_trans_channel": width, "num_proj_channel": width}
    with torch.device("meta"):
        model = ControlNetUnionModel(**options_of(small), **sizes, conditioning_embedding_out_channels=(16, 32, 96, 256))
    named = convert_controlnet_checkpoint(dict(weights), dict(model.config))
    for ours, theirs in (("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")):
        named |= {f"{theirs}.{end}": weights[f"{ours}.{end}"] for end in ("weight", "bias")}
    named |= {key: value for key, value in weights.items() if key.split(".")[0] in UNION}
    model.load_state_dict(named, assign=True)
    return model.eval()


def their_unet(weights: dict[str, torch.Tensor], small: Small):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        up = [f"{cross}UpBlock2D" for cross in reversed(small.crossed)]
        model = UNet2DConditionModel(sample_size=8, up_block_types=up, **options_of(small))
    named = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    model.load_state_dict(convert_ldm_unet_checkpoint(named, dict(model.config)), assign=True)
    return model.eval()


def network(make, weights: dict[str, torch.Tensor], **options: Any):
    """Our network with these weights."""
    made = make(Shapes({key: tuple(value.shape) for key, value in weights.items()}), **options)
    made.load_state_dict(weights, strict=True, assign=True)
    return made.eval()


def our_unet(weights: dict[str, torch.Tensor]) -> UNet:
    return network(UNet, weights)


def vector(small: Small, batch: int) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """What the network is told beside the text: as our UNet takes it, and as diffusers does."""
    if not small.vector:
        return None, {}
    numbers = torch.tensor([[512.0, 384, 0, 8, 512, 384]]).repeat(batch, 1)[:, : small.numbers]
    pooled = torch.randn(batch, small.vector - 256 * small.numbers, generator=torch.Generator().manual_seed(9))
    y = torch.cat([pooled, timestep_embedding(numbers.flatten(), 256).view(batch, -1)], dim=1)
    return y, {"text_embeds": pooled, "time_ids": numbers}


def their_adapter(kind: str, channels: int, widths: tuple[int, ...]):
    from diffusers import T2IAdapter as Theirs

    torch.manual_seed(5)
    blocks, patch = (4 if kind == "light_adapter" else 2), (16 if kind.endswith("xl") else 8)
    return Theirs(channels, list(widths), num_res_blocks=blocks, downscale_factor=patch, adapter_type=kind).eval()


def raw_names(weights: dict[str, torch.Tensor], light: bool) -> dict[str, torch.Tensor]:
    """TencentARC's names for diffusers'."""

    def raw(key: str) -> str:
        parts = key.split(".")[1:]
        if parts[0] != "body":
            return ".".join(parts)
        level = int(parts[1])
        if parts[2] == "resnets":
            inner = f"body.{level}.body.{parts[3]}" if light else f"body.{2 * level + int(parts[3])}"
            return ".".join([inner, *parts[4:]])
        return ".".join([f"body.{level if light else 2 * level}", *parts[2:]])

    return {raw(key): value for key, value in weights.items()}
