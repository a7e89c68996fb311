"""What the programs that write checkpoints add, rename and leave out, beside what the published files have.

One table: each row has a pattern of names, what becomes of such a tensor, why, and which writer does so.  Names are made right
when a file is opened, in its list of tensors alone, so that drawing, merging, converting and comparing all see the same names.
Nothing here imports torch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, shown
from ..models.family import UNET, VAE, Family
from .entry import Entry

CONV_IN = f"{UNET}.input_blocks.0.0.weight"  # each checkpoint has this tensor: what stands before its name is a wrapper
WRAPPERS = ("model.", "module.", "state_dict.", f"{UNET}.")  # the likeliest first, where a file has several

# Single tensors by which a file says how it was trained (ComfyUI supported_models.py, SDXL.model_type).
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_min", "edm_vpred.sigma_max")

TEXT = r"(cond_stage_model|conditioner\.embedders\.\d)"
DDPM = "CompVis, Stability AI: ldm/models/diffusion/ddpm.py, register_schedule"
TRANSFORMERS = (
    "transformers before 4.31, where it was saved with the model; diffusers' convert_diffusers_to_original_*.py of that "
    "time (sd-scripts#1945); ComfyUI before b2f03164 (July 2023)"
)
LATE_ATTENTION = (
    "diffusers' convert_diffusers_to_original_stable_diffusion.py after attention was renamed and before the script had "
    "vae_extra_conversion_map (2023)"
)


@dataclass(frozen=True)
class Row:
    """What a writer does to the tensors whose whole name matches."""

    pattern: str
    does: str  # "unneeded", "renamed", "turned" (renamed, and a matrix transposed) or "left out"
    what: str  # of an unneeded one, what it is; of a renamed one, its usual name as re.sub takes it; else what to do
    writer: str  # and the versions it holds for


TABLE = [
    # What nobody needs.  Of numbers that nobody reads it does not matter whether they are finite.
    Row(r"(alphas_cumprod(_prev)?|betas|log_one_minus_alphas_cumprod|lvlb_weights|logvar)", "unneeded", "schedule buffer", DDPM),
    Row(r"posterior_(variance|log_variance_clipped|mean_coef[12])", "unneeded", "schedule buffer", DDPM),
    Row(
        r"sqrt_(alphas_cumprod|one_minus_alphas_cumprod|recip_alphas_cumprod|recipm1_alphas_cumprod)",
        "unneeded",
        "schedule buffer",
        DDPM,
    ),
    Row(r"denoiser\.sigmas", "unneeded", "schedule buffer", "Stability AI: sgm/modules/diffusionmodules/denoiser.py"),
    Row(r"model_ema\..*", "unneeded", "moving average of the weights", "CompVis: ldm/modules/ema.py, LitEma, with its counters"),
    Row(
        rf"{TEXT}\.(model\.)?(transformer\.)?(text_model\.)?embeddings\.position_ids",
        "unneeded",
        "the numbers 0 to 76",
        TRANSFORMERS,
    ),
    Row(
        rf"{TEXT}\.(model\.)?(transformer\.)?logit_scale",
        "unneeded",
        "number of CLIP's own training",
        "OpenAI, open_clip: CLIP.logit_scale; sd-scripts writes 1, convert_text_encoder_state_dict_to_sd_v2",
    ),
    Row(
        rf"{TEXT}\.(transformer\.)?(text_model\.)?text_projection(\.weight)?",
        "unneeded",
        "projection for CLIP's own training",
        "ComfyUI of August 2023 to February 2024, an identity matrix (ec96f6d0 to 1cb3f6a8; ComfyUI#2898, #2923)",
    ),
    Row(
        rf"{TEXT}\.model\.(transformer\.)?text_projection\.weight",
        "unneeded",
        "text_projection a second time, transposed",
        "ComfyUI of February 2024 (37a86e46)",
    ),
    Row(
        rf"{TEXT}\.transformer\.(vision_model|visual_projection)\..*",
        "unneeded",
        "CLIP's image encoder",
        "transformers: CLIPModel",
    ),
    Row(rf"{TEXT}\.model\.(attn_mask|visual\..*)", "unneeded", "CLIP's image encoder", "open_clip: CLIP"),
    Row(r"first_stage_model\.(loss\..*|model_ema\..*)", "unneeded", "of the autoencoder's training", "CompVis: AutoencoderKL"),
    Row(r"embedding_manager\..*", "unneeded", "textual inversion training", "rinongal/textual_inversion: ddpm.py"),
    *(
        Row(re.escape(marker), "unneeded", "marker of how the model was trained", "ComfyUI: ModelSamplingDiscrete, -EDM")
        for marker in MARKERS
    ),
    # Other names.  Such a tensor gets its usual one where the file has none of that name.
    Row(r"((?:.*\.)?)_orig_mod\.(.*)", "renamed", r"\1\2", "torch.compile: OptimizedModule (pytorch#101107)"),
    Row(r"module\.(.*)", "renamed", r"\1", "torch.nn.DataParallel, DistributedDataParallel, not unwrapped before saving"),
    Row(
        r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.((?:embeddings|encoder|final_layer_norm)\..*)",
        "renamed",
        r"\1.transformer.text_model.\2",
        "NovelAI and merges with it",
    ),
    Row(
        rf"({TEXT}\.model)\.(transformer\.)?text_projection\.weight",
        "turned",
        r"\1.text_projection",
        "diffusers' convert_diffusers_to_original_sdxl.py until 2024, Playground v2 (sd-scripts#1945)",
    ),
    Row(
        r"((?:first_stage_model\.)?(?:en|de)coder\.mid\.attn_1)\.to_([qkv])\.(weight|bias)",
        "renamed",
        r"\1.\2.\3",
        LATE_ATTENTION,
    ),
    Row(
        r"((?:first_stage_model\.)?(?:en|de)coder\.mid\.attn_1)\.to_out\.0\.(weight|bias)",
        "renamed",
        r"\1.proj_out.\2",
        LATE_ATTENTION,
    ),
    # What is left out, and has no value that would do: an identity matrix, which ComfyUI takes here, draws something else.
    Row(
        r"conditioner\.embedders\.\d\.model\.text_projection",
        "left out",
        "take the text encoders of another checkpoint: minisd convert FILE --text OTHER -o NAME.safetensors",
        "merges of SDXL (ComfyUI-SUPIR#81)",
    ),
]

# The names of the networks' own tensors, for those who ask without building them: a test holds them against the modules.
BLOCK = r"(norm[12]|conv[12]|nin_shortcut)"
NETWORKS = [
    rf"{UNET}\.(time_embed|label_emb\.0|out)\.\d",
    rf"{UNET}\.((in|out)put_blocks\.\d+|middle_block)\.\d"
    r"(\.(op|conv|norm|proj_(in|out)|skip_connection|(in|out|emb)_layers\.\d"
    r"|transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))))?",
    rf"{VAE}\.(post_)?quant_conv",
    rf"{VAE}\.(en|de)coder\.(conv_in|conv_out|norm_out|mid\.block_[12]\.{BLOCK}|mid\.attn_1\.(norm|q|k|v|proj_out)"
    rf"|(down|up)\.\d+\.(block\.\d+\.{BLOCK}|(down|up)sample\.conv))",
    rf"{TEXT}\.transformer\.text_model\.(embeddings\.(token|position)_embedding|final_layer_norm"
    r"|encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12]|self_attn\.([qkv]|out)_proj))",
    rf"{TEXT}\.model\.(token_embedding|ln_final|transformer\.resblocks\.\d+\.(ln_[12]|attn\.out_proj|mlp\.c_(fc|proj)))",
]
SINGLE = rf"{TEXT}\.model\.(positional_embedding|text_projection|transformer\.resblocks\.\d+\.attn\.in_proj_(weight|bias))"

_ASKED_FOR = re.compile(rf"({'|'.join(NETWORKS)})\.(weight|bias)|{SINGLE}")
_UNNEEDED = re.compile("|".join(f"(?:{row.pattern})" for row in TABLE if row.does == "unneeded"))
_RENAMED = re.compile("|".join(f"(?:{row.pattern})" for row in TABLE if row.does in ("renamed", "turned")))


def is_unneeded(key: str) -> bool:
    return _UNNEEDED.fullmatch(key) is not None


def is_bookkeeping(key: str) -> bool:
    """What nobody needs, apart from the averages of weights, which --ema draws with: numbers that may be anything."""
    return is_unneeded(key) and not re.match(r"model_ema\.(?!(decay|num_updates)$)", key)


def is_asked_for(key: str) -> bool:
    """Whether a name is one that a network's tensors have; which of them it has, its modules say (model.py)."""
    return _ASKED_FOR.fullmatch(key) is not None


def why_unneeded(key: str) -> str:
    """What an unneeded tensor is, in words."""
    return next(row.what for row in TABLE if row.does == "unneeded" and re.fullmatch(row.pattern, key))


def usual_names(entries: Mapping[str, Entry]) -> dict[str, tuple[str, Entry]]:
    """The tensors of a file by their usual names: (the name in the file, the entry), in alphabetical order.

    A tensor keeps its name where the usual one is taken.
    """
    wrapper = wrapper_of(entries)
    found: dict[str, tuple[str, Entry]] = {}
    for key, entry in entries.items():
        inside = key.removeprefix(wrapper)
        name, turned = usual_name(inside) if _RENAMED.fullmatch(inside) else (inside, False)
        if name != key and (name in entries or name in found or not name):
            name, turned = key, False
        found[name] = (key, transposed(entry) if turned else entry)
    return dict(sorted(found.items()))


def usual_name(key: str) -> tuple[str, bool]:
    """(the usual name of a tensor, whether its matrix is to be transposed)."""
    turned = False
    for _ in range(4):  # wrappers stand in one another; a name of a thousand of them is nobody's
        row = next((row for row in TABLE if row.does in ("renamed", "turned") and re.fullmatch(row.pattern, key)), None)
        if row is None:
            break
        key, turned = re.sub(row.pattern, row.what, key), row.does == "turned"
    return key, turned


def wrapper_of(keys: Iterable[str]) -> str:
    """The name below which a whole checkpoint stands, or its UNet: "model." of a {"model": …}, "module.", a doubled prefix
    (stable-diffusion.cpp#434); nothing where there is none."""
    keys = set(keys)
    found = {key.removesuffix(CONV_IN) for key in keys if key.endswith(f".{CONV_IN}")}
    if CONV_IN in keys or not found:
        return ""
    return next((name for name in WRAPPERS if name in found), min(found))


def transposed(entry: Entry) -> Entry:
    """The same numbers with the axes in the other order."""
    if len(entry.shape) != 2:
        return entry
    return replace(entry, shape=entry.shape[::-1], stride=(entry.stride or (entry.shape[1], 1))[::-1])


def may_be_left_out(key: str) -> Row | None:
    """The row of a tensor that the modules can be built without."""
    return next((row for row in TABLE if row.does == "left out" and re.fullmatch(row.pattern, key)), None)


def left_out(entries: Iterable[str], family: Family) -> dict[str, Row]:
    """What is missing for drawing, though the modules can be built without it."""
    keys = {f"{tower.name}.text_projection" for tower in family.towers if tower.pooled} - set(entries)
    return {key: row for key in sorted(keys) if (row := may_be_left_out(key))}


def check_nothing_left_out(path: Path, entries: Iterable[str], family: Family) -> None:
    """Raises CheckpointError if something is left out."""
    for key, row in left_out(entries, family).items():
        raise CheckpointError(path, f"is missing, without which {family.title} has no vector of the whole text", row.what, key)


def torn(unknown: Iterable[str], found: Iterable[str]) -> bool:
    """Whether tensors that no module asks for are what is left of one: a network's bias without the weight.

    The modules are built as the file has it, so that without a weight the whole layer is left out, and its bias unknown.
    """
    return any(is_asked_for(key) and key.removesuffix("bias") + "weight" not in found for key in unknown if key.endswith(".bias"))


def tell_extra(path: Path, keys: Iterable[str]) -> None:
    """Warns of tensors that no module asks for: the first ten by name, and how many they are."""
    names = sorted(keys)
    tensors = f"{len(names):,} tensors are" if len(names) > 1 else "1 tensor is"
    them = "them" if len(names) > 1 else "it"
    listed = shown(", ".join(names[:10]), 800) + (", …" if len(names) > 10 else "")
    warnings.warn(f"{path}: {tensors} not used, since no part of the model asks for {them}: {listed}", stacklevel=2)
