"""Same weights, same numbers, for every family and every mode: against diffusers and transformers, at reduced width."""

from __future__ import annotations

import pytest
import torch
from families import EULER, SMALL, Parts, pipeline, tokenizers
from helpers import assert_close

import minisd
from minisd.diffusion.denoiser import Conditioning
from minisd.text.conditioner import with_sizes

PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse", "blurry"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name -> (our pipeline, the same weights in diffusers), each made once."""
    made: dict[str, tuple[minisd.Pipeline, Parts]] = {}

    def get(name: str) -> tuple[minisd.Pipeline, Parts]:
        if name not in made:
            path = SMALL[name].write(tmp_path_factory.mktemp(name) / f"{name}.safetensors")
            made[name] = minisd.load(path, device="cpu", dtype="float32"), Parts(path, SMALL[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner", "sdxl-inpaint", "sd1-edit"])
@torch.no_grad()
def test_unet(opened, name):
    pipe, parts = opened(name)
    small = SMALL[name]
    x, context, t = noise(2, 4 + small.extra_channels, 12, 16), noise(2, 77, small.context), torch.tensor([981.0, 3.0])
    if small.vector:
        pooled, numbers = noise(2, 64), torch.tensor([[1024.0, 768.0, 0.0, 16.0, 1024.0, 512.0][: small.numbers]] * 2)
        y = with_sizes(Conditioning(context, pooled), numbers[0].tolist()).vector
        wanted = parts.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": numbers}).sample
    else:
        y, wanted = None, parts.unet(x, t, context).sample
    assert_close(pipe.unet(x, t, context, y), wanted, 1e-5)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-refiner"])
@torch.no_grad()
def test_text(opened, name, tmp_path):
    pipe, parts = opened(name)
    prompts = [PROMPT, ""]
    contexts, pooled = [], None
    for tokenizer, text in zip(tokenizers(SMALL[name], tmp_path), parts.texts, strict=True):
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        out = text(ids, output_hidden_states=True)
        contexts.append(out.last_hidden_state if name == "sd2" else out.hidden_states[-2])
        pooled = getattr(out, "text_embeds", None)
    found = pipe.encode_prompt(prompts)
    assert_close(found.context, torch.cat(contexts, dim=-1), 1e-5)
    assert (found.pooled is None) == (name == "sd2")
    if found.pooled is not None:
        assert_close(found.pooled, pooled, 1e-5)


def draw(pipe: minisd.Pipeline, reference, steps: int = 10, prompt: str = PROMPT, side: int = 8, theirs=None, **common):
    """Our latents and diffusers', from the same noise."""
    x = noise(1, 4, side, side, seed=5)
    common = {"guidance_scale": 5.0, "negative_prompt": NEGATIVE} | common
    ours = common.pop("ours", {})
    found = pipe(prompt, steps=steps, latents=x, width=8 * side, height=8 * side, **common, **ours).latents
    start = reference(
        prompt,
        num_inference_steps=steps,
        latents=x,
        width=8 * side,
        height=8 * side,
        output_type="latent",
        **common,
        **(theirs or {}),
    )
    return found, start.images


def euler(**more):
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**(EULER | more))


def edm(**more):
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler(sigma_min=0.002, **more)


DRAWING = {
    "sd2": ("StableDiffusionPipeline", lambda: euler(), {}),
    "sdxl": ("StableDiffusionXLPipeline", lambda: euler(), {}),
    "sdxl-v": (
        "StableDiffusionXLPipeline",
        lambda: euler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        {"guidance_rescale": 0.7},
    ),
    "playground": ("StableDiffusionXLPipeline", lambda: edm(sigma_max=80.0, sigma_data=0.5), {}),
    "cosxl": (
        "StableDiffusionXLPipeline",
        lambda: edm(sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"),
        {},
    ),
}


@pytest.mark.parametrize("name", DRAWING)
def test_text_to_image(opened, name, tmp_path):
    pipe, parts = opened(name)
    kind, scheduler, common = DRAWING[name]
    found, wanted = draw(pipe, pipeline(kind, parts, SMALL[name], tmp_path, scheduler()), **common)
    assert_close(found, wanted, 1e-3)


def test_v_prediction_of_sd2_with_ddim(tmp_path):
    from diffusers import DDIMScheduler

    path = SMALL["sd2"].write(tmp_path / "sd2.safetensors")
    pipe = minisd.load(path, device="cpu", dtype="float32", prediction="v")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    reference = pipeline("StableDiffusionPipeline", Parts(path, SMALL["sd2"]), SMALL["sd2"], tmp_path, scheduler)
    found, wanted = draw(pipe, reference, ours={"sampler": "ddim"})
    assert_close(found, wanted, 1e-3)


def test_karras_levels_equal_those_of_diffusers(opened, tmp_path):
    pipe, parts = opened("sd1")
    reference = pipeline("StableDiffusionPipeline", parts, SMALL["sd1"], tmp_path, euler(use_karras_sigmas=True))
    found, wanted = draw(pipe, reference, ours={"spacing": "karras"})
    assert_close(found, wanted, 1e-3)


@pytest.mark.parametrize(("name", "skip"), [("sd1", 1), ("sd1", 2), ("sd2", 2), ("sdxl", 1), ("sdxl", 3)])
@torch.no_grad()
def test_clip_skip(opened, name, skip, tmp_path):
    """The output of an earlier layer, normed where the family norms it (diffusers counts from 0, and only positive prompts)."""
    pipe, parts = opened(name)
    contexts = []
    for tokenizer, text in zip(tokenizers(SMALL[name], tmp_path), parts.texts, strict=True):
        ids = tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
        dropped = 1 if name == "sd2" else 0  # the reference of SD 2.x lacks the last layer
        state = text(ids, output_hidden_states=True).hidden_states[-skip + dropped]
        contexts.append(getattr(text, "text_model", text).final_layer_norm(state) if name != "sdxl" else state)
    found = pipe.encode_prompt([PROMPT], clip_skip=skip).context
    assert_close(found, torch.cat(contexts, dim=-1), 1e-5)


def test_sdxl_without_a_negative_prompt_and_with_other_sizes(opened, tmp_path):
    """diffusers zeroes the negative conditioning if no negative prompt is given; an empty one it encodes."""
    pipe, parts = opened("sdxl")
    reference = pipeline("StableDiffusionXLPipeline", parts, SMALL["sdxl"], tmp_path, euler())
    x = noise(1, 4, 8, 8, seed=5)
    common = {"latents": x, "width": 64, "height": 64, "guidance_scale": 5.0}
    sizes = {"original_size": (640, 480), "target_size": (768, 512), "crop": (8, 24)}
    told = {"original_size": (480, 640), "target_size": (512, 768), "crops_coords_top_left": (24, 8)}
    found = pipe(PROMPT, steps=3, **common, **sizes).latents
    wanted = reference(PROMPT, num_inference_steps=3, output_type="latent", **common, **told).images
    assert_close(found, wanted, 1e-4)
    found = pipe(PROMPT, steps=3, zero_negative=False, **common, **sizes).latents
    wanted = reference(PROMPT, num_inference_steps=3, output_type="latent", negative_prompt="", **common, **told).images
    assert_close(found, wanted, 1e-4)


@pytest.fixture
def pictures(monkeypatch):
    """An init image and a mask; diffusers is made to take the mean of the VAE's latents, as we do."""
    import numpy as np
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as image
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_inpaint as inpaint_xl
    from PIL import Image

    for module in (image, inpaint, inpaint_xl):
        monkeypatch.setattr(module, "retrieve_latents", lambda output, *_, **__: output.latent_dist.mode())
    smooth = torch.nn.functional.interpolate(noise(1, 3, 6, 6, seed=9), (64, 64), mode="bicubic")[0].clamp(-1, 1)
    init = Image.fromarray(((smooth + 1) * 127.5).byte().permute(1, 2, 0).numpy())
    spot = np.zeros((64, 64), dtype=np.uint8)
    spot[16:48, 8:40] = 255
    return init, Image.fromarray(spot)


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_image_to_image(opened, sampler, pictures, tmp_path):
    from diffusers import DDIMScheduler

    pipe, parts = opened("sd1")
    ddim = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = euler() if sampler == "euler" else DDIMScheduler(beta_start=0.00085, beta_end=0.012, **ddim)
    reference = pipeline("StableDiffusionImg2ImgPipeline", parts, SMALL["sd1"], tmp_path, scheduler)
    common = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0, "strength": 0.6}
    found = pipe(PROMPT, steps=10, seed=5, init_image=pictures[0], sampler=sampler, **common)
    generator = torch.Generator().manual_seed(5)
    wanted = reference(
        PROMPT, image=pictures[0], num_inference_steps=10, generator=generator, output_type="latent", **common
    ).images
    assert_close(found.latents, wanted, 1e-3)
    assert found.metadata[0]["strength"] == 0.6


@pytest.mark.parametrize(("name", "strength"), [("sd1", 0.7), ("sd1-inpaint", 1.0), ("sd1-inpaint", 0.7), ("sdxl-inpaint", 1.0)])
def test_inpainting(opened, name, strength, pictures, tmp_path):
    """With an ordinary model by keeping what is known, with an inpainting model by its five extra channels."""
    import numpy as np

    pipe, parts = opened(name)
    kind = "StableDiffusionXLInpaintPipeline" if name.startswith("sdxl") else "StableDiffusionInpaintPipeline"
    reference = pipeline(kind, parts, SMALL[name], tmp_path, euler())
    init, mask = pictures
    common = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0, "strength": strength}
    found = pipe(PROMPT, steps=10, seed=5, init_image=init, mask=mask, **common)
    generator = torch.Generator().manual_seed(5)
    wanted = reference(
        PROMPT, image=init, mask_image=mask, num_inference_steps=10, generator=generator, output_type="latent",
        width=64, height=64, **common,
    ).images  # fmt: skip
    assert_close(found.latents, wanted, 1e-3)
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(found.images[0])[kept], np.asarray(init)[kept])


def test_instruct_pix2pix(opened, pictures, tmp_path):
    pipe, parts = opened("sd1-edit")
    reference = pipeline("StableDiffusionInstructPix2PixPipeline", parts, SMALL["sd1-edit"], tmp_path, euler())
    found, wanted = draw(
        pipe, reference, image_guidance_scale=1.7, ours={"init_image": pictures[0]}, theirs={"image": pictures[0]}
    )  # fmt: skip
    assert_close(found, wanted, 1e-3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sd1", {"mask": "x.png"}, "mask: expected an init_image to go with it, found none"),
        ("sd1", {"strength": 0.5}, "strength: expected an init_image"),
        ("sd1", {"init_image": True, "strength": 0.01}, "strength: 0.01 of 20 steps is less than one"),
        ("sd1", {"init_image": True, "strength": 1.5}, "strength: expected a number from 0 to 1"),
        ("sd1", {"init_image": "none.png"}, "init_image none.png: does not exist"),
        ("sd1", {"init_image": __file__}, "is no PNG, JPEG, WEBP picture"),
        ("sd1", {"init_image": 3}, "init_image: expected a PIL image, an array, a tensor or a path, found int"),
        ("sd1", {"clip_skip": 9}, "clip_skip: expected a whole number from 1 to 3, found 9"),
        ("sd1", {"zero_negative": True}, "zero_negative: only SDXL was trained so"),
        ("sd1", {"stepz": 3}, "stepz: unknown; did you mean steps"),
        ("sd1-inpaint", {}, "init_image: this checkpoint is trained to inpaint; it needs a picture and a mask, found none"),
        ("sd1-inpaint", {"init_image": True}, "mask: this checkpoint is trained to inpaint; it needs a mask"),
        ("sd1-edit", {}, "init_image: this checkpoint is trained to edit; it needs a picture, found none"),
        ("sd1-edit", {"init_image": True, "strength": 0.5}, "strength: this checkpoint edits by image_guidance_scale"),
        ("playground", {"spacing": "leading"}, "spacing: expected one of karras, exponential, .*, found 'leading'"),
        ("sdxl", {"original_size": (1, 2, 3)}, "original_size: expected two whole numbers"),
        ("sdxl", {"refiner": "sd1"}, "refiner: expected a model with the latents and noise levels of Stable Diffusion XL"),
    ],
)
def test_what_does_not_fit_a_model_is_named(opened, pictures, name, arguments, message):
    pipe, _ = opened(name)
    arguments = {key: pictures[0] if value is True and key == "init_image" else value for key, value in arguments.items()}
    if "refiner" in arguments:
        arguments["refiner"] = opened(arguments["refiner"])[0]
    with pytest.raises(minisd.UsageError, match=message):
        pipe(PROMPT, **arguments)


def test_vae_of_another_file(opened, tmp_path):
    """A VAE alone, or that of another checkpoint; with other latents it is refused."""
    from safetensors.torch import load_file, save_file

    pipe, _ = opened("sd2")
    weights = load_file(SMALL["sd1"].write(tmp_path / "other.safetensors"))
    weights = {key: value * 1.01 for key, value in weights.items()}
    alone = {key.removeprefix("first_stage_model."): value for key, value in weights.items() if "first_stage" in key}
    save_file(weights, tmp_path / "other.safetensors")
    save_file(alone | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, tmp_path / "vae.safetensors")
    drawn = []
    for vae in (None, "other", "vae"):
        path = tmp_path / f"{vae}.safetensors" if vae else None
        result = minisd.load(pipe.checkpoint.path, device="cpu", dtype="float32", vae=path)(
            "a star", seed=1, steps=1, width=64, height=64
        )
        drawn.append(result.images[0].tobytes())
        assert result.metadata[0].get("vae") == vae
    assert drawn[0] != drawn[1] == drawn[2]
    save_file({key: value for key, value in weights.items() if "model.diffusion" in key}, tmp_path / "unet.safetensors")
    with pytest.raises(minisd.CheckpointError, match="expected a VAE, found a UNet alone"):
        minisd.load(pipe.checkpoint.path, device="cpu", vae=tmp_path / "unet.safetensors")


def test_tiny_autoencoder_in_place_of_the_vae(opened, tmp_path):
    from helpers import manifest
    from safetensors.torch import save_file

    from minisd.workbench.blueprint import random_weights

    pipe, _ = opened("sd2")
    halves = random_weights(manifest("taesd"))
    files = []
    for half in ("encoder", "decoder"):
        files.append(tmp_path / f"taesd_{half}.safetensors")
        save_file({key.removeprefix(f"{half}:"): value for key, value in halves.items() if key.startswith(half)}, files[-1])
    tiny = minisd.load(pipe.checkpoint.path, device="cpu", dtype="float32", vae=files)
    result = tiny("a star", seed=1, steps=2, width=64, height=64)
    assert result.images[0].size == (64, 64)
    assert tiny.preview(result.latents)[0].tobytes() == result.images[0].tobytes()
    decoder = minisd.load(pipe.checkpoint.path, device="cpu", dtype="float32", vae=files[1])
    assert decoder("a star", seed=1, steps=2, width=64, height=64).images[0].tobytes() == result.images[0].tobytes()
    with pytest.raises(minisd.UsageError, match="expected an encoder, found the decoder half"):
        decoder("a star", seed=1, steps=2, init_image=result.images[0])


def test_base_and_refiner_share_one_noise_schedule(opened, tmp_path):
    (base, parts), (refiner, refining) = opened("sdxl"), opened("sdxl-refiner")
    first = pipeline("StableDiffusionXLPipeline", parts, SMALL["sdxl"], tmp_path, euler())
    second = pipeline(
        "StableDiffusionXLImg2ImgPipeline", refining, SMALL["sdxl-refiner"], tmp_path, euler(), requires_aesthetics_score=True
    )
    x = noise(1, 4, 8, 8, seed=5)
    common = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}
    found = base(PROMPT, steps=10, latents=x, width=64, height=64, refiner=refiner, high_noise_frac=0.7, **common)
    shared = {"num_inference_steps": 10, "output_type": "latent", **common}
    half = first(PROMPT, latents=x, width=64, height=64, denoising_end=0.7, **shared).images
    wanted = second(PROMPT, image=half, denoising_start=0.7, **shared).images
    assert_close(found.latents, wanted, 1e-3)
    assert found.metadata[0]["refiner"] == "sdxl-refiner"


@pytest.mark.slow
@pytest.mark.xdist_group("full width")  # one at a time: up to 11 GB
@torch.no_grad()
def test_full_width_sdxl_unet():
    """The published architecture at its real size, float32: 2.57 G parameters, which both implementations share."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from minisd.models.family import UNET
    from minisd.models.shapes import below
    from minisd.models.unet import UNet
    from minisd.workbench import blueprint

    shapes = below(blueprint.sdxl(), UNET)
    weights = blueprint.random_weights(shapes)
    with torch.device("meta"):
        ours = UNet(shapes)
        theirs = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    ours.load_state_dict(weights, assign=True)
    named = {f"{UNET}.{key}": value for key, value in weights.items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(named, dict(theirs.config)), assign=True)
    x, t, context, pooled = noise(1, 4, 32, 32), torch.tensor([601.0]), noise(1, 77, 2048), noise(1, 1280)
    sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
    y = with_sizes(Conditioning(context, pooled), sizes[0].tolist()).vector
    wanted = theirs(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    assert_close(ours(x, t, context, y), wanted, 1e-5)
