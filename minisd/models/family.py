"""What a set of keys is, and the few facts about a model that its keys and shapes do not tell.

Everything here is read from names, shapes, metadata and, for one question, one small tensor; nothing is guessed from a file's
name.  Every conclusion comes with its reason, which `minisd inspect` shows.
"""

from __future__ import annotations

from dataclasses import dataclass

UNET, VAE = "model.diffusion_model", "first_stage_model"
LABELS = f"{UNET}.label_emb.0.0.weight"
START_PAD, OPEN_PAD = 49_407, 0  # what fills a text up to 77 tokens: OpenAI's end token, open_clip's zero


@dataclass(frozen=True)
class Tower:
    """A text encoder of a family, and what the UNet is given of it."""

    name: str  # its place in the file
    title: str
    pad: int
    skip: int  # how many of its last layers are left out
    final_norm: bool  # whether its final norm follows nevertheless
    pooled: bool = False  # whether its vector of the whole text is used, too


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint that minisd can draw with."""

    name: str
    title: str
    towers: tuple[Tower, ...]  # in the order of their channels in the context
    latent_scale: float  # latents times this have unit variance; found by measuring, so no shape tells it
    size: int  # pixels a side that the published models were trained at
    vector: bool = False  # whether the UNet takes a vector (pooled text and sizes) beside the context
    zero_negative: bool = False  # whether an empty negative prompt is all zeros instead of the encoding of no words

    @property
    def clues(self) -> tuple[str, ...]:
        """The names below which a file of this family has weights."""
        return (UNET, *([LABELS] if self.vector else []), VAE, *(tower.name for tower in self.towers))


# v1-inference.yaml: FrozenCLIPEmbedder's last hidden state, normed.  scale_factor stands in each family's yaml.
CLIP = "cond_stage_model.transformer"
SD1 = Family("sd1", "Stable Diffusion 1.x", (Tower(CLIP, "CLIP ViT-L", START_PAD, 0, True),), 0.18215, 512)
# v2-inference.yaml: FrozenOpenCLIPEmbedder, layer penultimate; ln_final follows (encoders/modules.py).
SD2 = Family("sd2", "Stable Diffusion 2.x", (Tower("cond_stage_model.model", "OpenCLIP ViT-H", OPEN_PAD, 1, True),), 0.18215, 512)
# sd_xl_base.yaml: hidden_states[11] of 12 and the penultimate layer, neither normed; an empty negative prompt is zeroed
# (generative-models api.py, force_uc_zero_embeddings; diffusers' force_zeros_for_empty_prompt).
SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    (
        Tower("conditioner.embedders.0.transformer", "CLIP ViT-L", START_PAD, 1, False),
        Tower("conditioner.embedders.1.model", "OpenCLIP ViT-bigG", OPEN_PAD, 1, False, pooled=True),
    ),
    0.13025,
    1024,
    vector=True,
    zero_negative=True,
)
REFINER = Family(
    "sdxl-refiner",
    "Stable Diffusion XL refiner",
    (Tower("conditioner.embedders.0.model", "OpenCLIP ViT-bigG", OPEN_PAD, 1, False, pooled=True),),
    0.13025,
    1024,
    vector=True,
)
FAMILIES = (SD1, SD2, SDXL, REFINER)

# By the input channels of the UNet: the latents alone, or with a picture to edit (InstructPix2Pix, Brooks et al. 2022,
# arXiv 2211.09800), or with a mask and the picture without what is under it (runwayml/stable-diffusion, inpaint_st.py).
TASKS = {4: "draw", 8: "edit", 9: "inpaint"}


@dataclass(frozen=True)
class Training:
    """How the network was trained, which decides what its output means and which noise levels it knows."""

    prediction: str = "epsilon"  # "epsilon", "v" or "edm"
    zero_terminal: bool = False  # whether the schedule ends in pure noise (Lin et al. 2023, arXiv 2305.08891)
    sigmas: tuple[float, float] | None = None  # least and greatest noise level, where they are no table of 1000 steps
    sigma_data: float = 1.0  # standard deviation of the latents as the network assumes it
    latent_mean: tuple[float, ...] = ()  # by channel, where latents are normalised so and not by the family's scale
    latent_std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Recognition:
    """What a checkpoint is, and why."""

    family: Family
    task: str  # one of TASKS
    training: Training
    size: tuple[int, int]  # width and height to draw at where nobody says
    reasons: tuple[str, ...]
    guidance: float = 7.5  # its scale where nobody says

    @property
    def latent_scale(self) -> float:
        return 0.5 if self.training.latent_mean else self.family.latent_scale  # Playground 2.5, which has a mean, has 0.5


def text_skip(tower: Tower, layers: int) -> int:
    """How many of a tower's last layers are left out.  Some merges of SD 2.x dropped the 24th, which nobody needs."""
    return 0 if tower is SD2.towers[0] and layers == 23 else tower.skip
