"""Tiny checkpoints of every family as other programs write them: by file, what each makes of the usual weights."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from families import renamed as as_transformers
from torch import Tensor

from minisd.models.family import REFINER, SD1, SD2, SDXL, UNET, VAE
from minisd.workbench import blueprint

Weights = dict[str, Tensor]
Change = Callable[[Weights], Weights]

FAMILIES = {family.name: family for family in (SD1, SD2, SDXL, REFINER)}
WIDTH = 8  # of the text encoders
LAYERS = {"sd1": 2, "sd2": 24, "sdxl": 2, "sdxl-refiner": 2}  # SD 2's are counted
NUMBERS = {"sdxl": 6, "sdxl-refiner": 5}  # that the UNet's vector holds beside the pooled text

IDS = torch.arange(77)[None]
LOW, HIGH = "conditioner.embedders.0", "conditioner.embedders.1.model"
SD1_TEXT, SD2_TEXT = "cond_stage_model.transformer", "cond_stage_model.model"
LATE = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
FORGE_PLACES = {LOW: "text_encoders.clip_l", HIGH: "text_encoders.clip_g", SD2_TEXT: "text_encoders.clip_h"}


def tiny(name: str) -> Weights:
    """Random weights of a family, one block wide everywhere."""
    family, layers = FAMILIES[name], LAYERS[name]
    vector = WIDTH + 256 * NUMBERS[name] if name in NUMBERS else 0
    unet = blueprint.unet(64, (1,), 1, (1,), WIDTH * len(family.towers), linear=family is not SD1, vector=vector)
    texts = [
        blueprint.open_text(WIDTH, layers, WIDTH) if is_open(tower.name) else blueprint.clip_text(WIDTH, layers)
        for tower in family.towers
    ]
    return blueprint.random_weights(blueprint.assemble(family, unet, blueprint.vae((32,) * 4, (32,) * 4, (1, 2)), *texts), 2)


def is_open(tower: str) -> bool:
    return tower.endswith(".model")


def towers(weights: Weights) -> list[str]:
    names = (SD1_TEXT, SD2_TEXT, f"{LOW}.transformer", f"{LOW}.model", HIGH)
    return [name for name in names if any(key.startswith(f"{name}.") for key in weights)]


def plus(more: Weights) -> Change:
    return lambda weights: weights | more


def without(*patterns: str) -> Change:
    some = re.compile("|".join(patterns))
    return lambda weights: {key: value for key, value in weights.items() if not some.fullmatch(key)}


def named(pattern: str, replacement: str) -> Change:
    return lambda weights: {re.sub(pattern, replacement, key): value for key, value in weights.items()}


def attention(names: dict[str, str]) -> Change:
    """The VAE's attention under other names, its weights as matrices."""

    def change(weights: Weights) -> Weights:
        theirs = {}
        for key, value in weights.items():
            own = re.sub(r"attn_1\.(q|k|v|proj_out)\.", lambda match: f"attn_1.{names[match[1]]}.", key)
            theirs[own] = value.flatten(1) if "attn_1." in key and value.dim() == 4 else value
        return theirs

    return change


def with_biases_of_1x1(weights: Weights) -> Weights:
    pattern = re.compile(rf"{VAE}\.\w+\.mid\.attn_1\.(q|k|v|proj_out)\.bias")
    return {key: value[:, None, None] if pattern.fullmatch(key) else value for key, value in weights.items()}


def turned(weights: Weights, theirs: str) -> Weights:
    """bigG's projection under another name, transposed."""
    return {
        key.replace(".text_projection", theirs) if key.endswith(".text_projection") else key: (
            value.T.contiguous() if key.endswith(".text_projection") else value
        )
        for key, value in weights.items()
    }


def litema(prefix: str) -> Change:
    """The UNet's average, which differs from it, as LitEma names it, and its counters."""

    def change(weights: Weights) -> Weights:
        own = {key: value for key, value in weights.items() if key.startswith(f"{UNET}.")}
        names = {key: f"model_ema.{prefix}{key.removeprefix(f'{UNET}.').replace('.', '')}" for key in own}
        counters = {"model_ema.num_updates": torch.tensor(float("inf")), "model_ema.decay": torch.tensor(0.9999)}
        return weights | counters | {names[key]: value + 0.125 for key, value in own.items()}

    return change


def in_transformers_names(weights: Weights, tower: str, layers: int) -> Weights:
    """An open_clip text encoder below tower.transformer, as transformers has it."""
    inside = {key.removeprefix(f"{tower}."): value for key, value in weights.items() if key.startswith(f"{tower}.")}
    rest = {key: value for key, value in weights.items() if not key.startswith(f"{tower}.")}
    theirs = as_transformers(inside, layers)
    return rest | {f"{tower}.transformer.{key}": value.clone() for key, value in theirs.items()}


def forge(weights: Weights) -> Weights:
    """Save Checkpoint of Forge before February 2025: its own modules as they are."""
    for tower in filter(is_open, towers(weights)):
        weights = in_transformers_names(weights, tower, 24 if tower == SD2_TEXT else 2)
    for here, theirs in FORGE_PLACES.items():
        weights = {re.sub(rf"{re.escape(here)}\.", f"{theirs}.", key): value for key, value in weights.items()}
    weights = named(r"cond_stage_model\.transformer\.", "text_encoders.clip_l.transformer.")(weights)
    more = {}
    for key, value in weights.items():
        if key.endswith("token_embedding.weight"):
            more[key.replace(".weight", ".wrapped.weight")] = value.clone()
            more[key.partition(".transformer.")[0] + ".logit_scale"] = torch.tensor(4.6055)
    if "text_encoders.clip_l.logit_scale" in more:
        more["text_encoders.clip_l.transformer.text_projection.weight"] = torch.rand(WIDTH, WIDTH)
    return named(r"first_stage_model\.", "vae.")(weights | more)


def forge_since_2025(weights: Weights) -> Weights:
    """The usual names, but for the wrapped embedding, which its conversion does not know."""
    more = {}
    for tower in towers(weights):
        prefix = f"{tower}.transformer" if is_open(tower) else tower
        key = f"{tower}.token_embedding.weight" if is_open(tower) else f"{tower}.text_model.embeddings.token_embedding.weight"
        more[f"{prefix}.text_model.embeddings.token_embedding.wrapped.weight"] = weights[key].clone()
    return weights | more


def sd2_unconverted(weights: Weights) -> Weights:
    """diffusers' script before 0.11.0: the text encoder of SD 2, of 23 layers, where SD 1 has its own."""
    weights = in_transformers_names(without(rf"{re.escape(SD2_TEXT)}\.text_projection")(weights) | DUMMY, SD2_TEXT, 23)
    weights.pop(f"{SD2_TEXT}.transformer.text_projection.weight")
    return named(rf"{re.escape(SD2_TEXT)}\.transformer\.", f"{SD1_TEXT}.")(weights)


DUMMY = {f"{SD2_TEXT}.text_projection": torch.ones(WIDTH, WIDTH)}  # in_transformers_names asks for one


def sd2_dummies(weights: Weights) -> Weights:
    """sd-scripts of an SD 2 folder: what the folder lacks is made up."""
    last, before = f"{SD2_TEXT}.transformer.resblocks.23.", f"{SD2_TEXT}.transformer.resblocks.22."
    copies = {key: weights[key.replace(last, before)].clone() for key in weights if key.startswith(last)}
    return weights | copies | DUMMY | {f"{SD2_TEXT}.logit_scale": torch.tensor(1)}


def hijacked(weights: Weights) -> Weights:
    """What A1111 has loaded: its text encoders wrapped, and SDXL's a second time."""
    own = named(r"^(cond_stage_model|conditioner\.embedders\.\d)\.", r"\1.wrapped.")(weights)
    own = named(r"token_embedding\.weight", "token_embedding.wrapped.weight")(own)
    again = {key.replace("conditioner.", "cond_stage_model."): value.clone() for key, value in own.items() if HIGH[:-6] in key}
    return own | again | {"denoiser.sigmas": torch.rand(1000)} if again else own


def schedule(weights: Weights) -> Weights:
    names = ["alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "lvlb_weights", "logvar"]
    names += [f"posterior_{name}" for name in ("variance", "log_variance_clipped", "mean_coef1", "mean_coef2")]
    roots = ("alphas_cumprod", "one_minus_alphas_cumprod", "recip_alphas_cumprod", "recipm1_alphas_cumprod")
    names += [f"sqrt_{name}" for name in roots]
    return weights | {name: torch.full((1000,), float("inf")) for name in names}


def low(name: str, value: Tensor) -> dict[str, Change]:
    """Adds a tensor beside CLIP ViT-L, in the families that have it."""
    return {"sd1": plus({f"cond_stage_model.{name}": value}), "sdxl": plus({f"{LOW}.{name}": value})}


def high(name: str, value: Tensor, families: str = "sd2 sdxl sdxl-refiner") -> dict[str, Change]:
    """Adds a tensor to the open_clip text encoder."""
    places = {"sd2": SD2_TEXT, "sdxl": HIGH, "sdxl-refiner": f"{LOW}.model"}
    return {family: plus({f"{places[family]}.{name}": value}) for family in families.split()}


def everywhere(change: Change, families: str = "sd1 sd2 sdxl sdxl-refiner") -> dict[str, Change]:
    return dict.fromkeys(families.split(), change)


BROKEN_IDS = (IDS * 0.97).half()  # after a merge
SECOND = "transformer.text_projection.weight"

WRITTEN: dict[str, dict[str, Change]] = {  # by what is done, and the family
    "schedule": everywhere(schedule, "sd1 sd2"),
    "the sgm denoiser": everywhere(plus({"denoiser.sigmas": torch.rand(1000)}), "sdxl sdxl-refiner"),
    "LitEma": everywhere(litema("diffusion_model"), "sd1 sd2"),
    "d8ahazard's averages": everywhere(litema(""), "sd1 sd2"),
    "positions of CLIP-L": low("transformer.text_model.embeddings.position_ids", IDS),
    "positions after a merge": everywhere(plus({f"{SD1_TEXT}.text_model.embeddings.position_ids": BROKEN_IDS}), "sd1"),
    "positions, ComfyUI": high("transformer.text_model.embeddings.position_ids", IDS),
    "positions, diffusers' SDXL": high("text_model.embeddings.position_ids", IDS, "sdxl"),
    "logit_scale of open_clip": high("logit_scale", torch.tensor(4.6055)),
    "logit_scale as a whole number": high("logit_scale", torch.tensor(1), "sd2"),
    "logit_scale of CLIP-L": low("logit_scale", torch.tensor(4.6055)),
    "an identity matrix": low("text_projection", torch.eye(WIDTH)),
    "CLIP-L's projection": low(SECOND, torch.rand(WIDTH, WIDTH)),
    "a projection twice": everywhere(lambda w: turned(w, f".{SECOND}") | w, "sd2 sdxl sdxl-refiner"),
    "the autoencoder's training": everywhere(
        plus({f"{VAE}.loss.discriminator.main.0.weight": torch.full((2, 2), torch.nan), f"{VAE}.model_ema.decay": torch.ones(())})
    ),
    "textual inversion": everywhere(plus({"embedding_manager.string_to_param_dict.*": torch.rand(1, WIDTH)}), "sd1"),
    "torch.compile": everywhere(named("diffusion_model\\.", "diffusion_model._orig_mod.")),
    "DataParallel": everywhere(named("^", "module.")),
    "both": everywhere(named("^", "module._orig_mod."), "sd1"),
    "a doubled prefix": everywhere(named(rf"^{re.escape(UNET)}\.", f"{UNET}.{UNET}."), "sd1"),
    "a wrapper": everywhere(named("^", "net."), "sd1 sdxl"),
    "NovelAI": everywhere(named(r"\.transformer\.text_model\.", ".transformer."), "sd1 sdxl"),
    "supermerger of A1111": everywhere(hijacked, "sd1 sd2 sdxl"),
    "OneTrainer, June 2023": everywhere(named(r"^cond_stage_model\.", "cond_stage_model.."), "sd1"),
    "sgm's SD 2.1": everywhere(named(r"^cond_stage_model\.", "conditioner.embedders.0."), "sd2"),
    "Forge": everywhere(forge, "sd1 sd2 sdxl"),
    "Forge since February 2025": everywhere(forge_since_2025),
    "diffusers' SD 2 before 0.11": everywhere(sd2_unconverted, "sd2"),
    "a projection, diffusers' SDXL": everywhere(lambda w: turned(w, ".text_projection.weight"), "sdxl sdxl-refiner"),
    "a projection, ComfyUI": everywhere(lambda w: turned(w, f".{SECOND}"), "sd2 sdxl sdxl-refiner"),
    "late names of the VAE": everywhere(attention(LATE)),
    "old names of the VAE": everywhere(attention(OLD), "sdxl"),
    "matrices in the VAE": everywhere(attention({name: name for name in LATE})),
    "biases of 1x1": everywhere(with_biases_of_1x1),
    "SD 2 without what it does not use": everywhere(
        without(r".*\.text_projection", r".*\.resblocks\.23\..*"),
        "sd2",
    ),
    "SD 2 with dummies": everywhere(sd2_dummies, "sd2"),
}
