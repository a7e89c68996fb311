"""What a set of keys is, and the few facts about a model that its keys and shapes do not tell.

Everything here is read from names, shapes and metadata; nothing is guessed from a file's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .shapes import Shapes, below

UNET, VAE, CLIP = "model.diffusion_model", "first_stage_model", "cond_stage_model.transformer"


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint that minisd can draw with."""

    name: str
    title: str
    latent_scale: float  # latents times this have unit variance; found by measuring, so no shape tells it
    size: int  # pixels a side that the published models were trained at


SD1 = Family("sd1", "Stable Diffusion 1.x", latent_scale=0.18215, size=512)  # CompVis v1-inference.yaml, scale_factor

# What files carry and nobody needs: (pattern, what it is).  Anything else that no module asks for is an error.
SPARE = [
    (r"(alphas_cumprod(_prev)?|betas|log_one_minus_alphas_cumprod|lvlb_weights|logvar)", "schedule buffer"),
    (r"(posterior_(variance|log_variance_clipped|mean_coef[12]))", "schedule buffer"),
    (r"(sqrt_(alphas_cumprod|one_minus_alphas_cumprod|recip_alphas_cumprod|recipm1_alphas_cumprod))", "schedule buffer"),
    (r"denoiser\.sigmas", "schedule buffer"),
    (r"model_ema\..*", "moving average of the weights"),
    (r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids", "the numbers 0 to 76"),
    (r"cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?)", "projection for CLIP's own training"),
    (r"cond_stage_model\.transformer\.(vision_model|visual_projection)\..*", "CLIP's image encoder"),
    (r"first_stage_model\.loss\..*", "loss of the autoencoder's training"),
    (r"embedding_manager\..*", "textual inversion training"),
]
_SPARE = re.compile("|".join(f"(?:{pattern})" for pattern, _ in SPARE))


def is_spare(key: str) -> bool:
    return _SPARE.fullmatch(key) is not None


# Files that are something else: (a pattern that one of their keys matches, what it is, what to do).  The first match counts.
NOT_YET = "minisd does not draw with this family yet"
NOT_A_UNET = "minisd draws with models of the Stable Diffusion UNet family"
ON_TOP = "it goes on top of a checkpoint, which is what -m names"
OTHERS = [
    (r"lora_(unet|te\d?)_.*|.*\.lora_([AB]|up|down)\b.*", "a LoRA", ON_TOP),
    (r"(control_model|controlnet_cond_embedding|input_hint_block)\..*", "a ControlNet", ON_TOP),
    (r"(model\.diffusion_model\.)?(double|single)_blocks\..*", "a Flux model", NOT_A_UNET),
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "a Stable Diffusion 3 model", NOT_A_UNET),
    (r"conditioner\.embedders\.1\..*", "Stable Diffusion XL", NOT_YET),
    (r"conditioner\.embedders\.0\.model\..*", "a Stable Diffusion XL refiner", NOT_YET),
    (r"cond_stage_model\.model\..*", "Stable Diffusion 2.x", NOT_YET),
    (r"(down|up)_blocks\..*", "a diffusers UNet or ControlNet", "minisd opens the single file that the model was published as"),
    (r"string_to_param.*|emb_params|clip_[lg]", "a textual inversion embedding", ON_TOP),
]


def looks_like(shapes: Shapes) -> tuple[str, str]:
    """What a set of keys that is no SD 1.x checkpoint looks like, and what to do about it."""
    for pattern, title, hint in OTHERS:
        if any(re.match(pattern, key) for key in shapes):
            return title, hint
    channels = shapes.get(f"{UNET}.input_blocks.0.0.weight", (0, 4))[1]
    if channels != 4:
        kind = {8: "an InstructPix2Pix model", 9: "an inpainting model"}.get(channels, "a model")
        return f"{kind} ({channels} input channels)", "minisd draws with 4-channel models only, so far"
    parts = [title for name, title in ((UNET, "a UNet"), (VAE, "a VAE"), (CLIP, "a text encoder")) if below(shapes, name)]
    if not parts and "decoder.conv_in.weight" in shapes:
        parts = ["a VAE"]
    if not parts and any(key.startswith(("text_model.", "transformer.resblocks.")) for key in shapes):
        parts = ["a text encoder"]
    if not parts and "input_blocks.0.0.weight" in shapes:
        parts = ["a UNet"]
    if parts:
        return f"{' and '.join(parts)} alone", "a checkpoint holds a UNet, a VAE and a text encoder in one file"
    return "no model that minisd knows", "minisd opens single-file Stable Diffusion checkpoints"


def recognise(shapes: Shapes) -> Family | None:
    """The family of a whole checkpoint, or None; then `looks_like` says what else it is."""
    whole = all(below(shapes, name) for name in (UNET, VAE, CLIP))
    four_channels = shapes.get(f"{UNET}.input_blocks.0.0.weight", (0, 4))[1] == 4
    return SD1 if whole and four_channels else None


def native_size(family: Family, metadata: Mapping[str, str]) -> tuple[int, int]:
    """(width, height) to draw at where nobody says: what the file's ModelSpec metadata names, else the family's."""
    match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", metadata.get("modelspec.resolution", ""))
    return (int(match[1]), int(match[2])) if match else (family.size, family.size)
