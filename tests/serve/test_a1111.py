"""A1111's dialect, by webuiapi as it stands and by hand."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
from PIL import ImageChops, ImageFilter
from serving import PROMPT, b64, picture, same, until

import minisd
from minisd.library.styles import named, styled

webuiapi = pytest.importorskip("webuiapi")
QUICK = {"prompt": PROMPT, "steps": 3, "sampler_name": "Euler", "cfg_scale": 4, "seed": 7}


@pytest.fixture(scope="module")
def client(server):
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")


def python(pipe, prompt=PROMPT, **options):
    return pipe(prompt, **{"steps": 3, "guidance_scale": 4, "seed": 7} | options).images


def test_txt2img(client, tiny):
    found = client.txt2img(**QUICK, negative_prompt="grey", width=64, height=64, n_iter=2, batch_size=2)
    expected = python(tiny, negative_prompt="grey", num_images=4)
    assert all(same(*pair) for pair in zip(found.images, expected, strict=True))
    assert found.info["all_seeds"] == [7, 8, 9, 10]
    assert found.info["infotexts"][0].startswith(f"{PROMPT}\nNegative prompt: grey\nSteps: 3, Sampler: Euler, CFG scale: 4")
    assert found.parameters["prompt"] == PROMPT
    assert set(found.info["ignored"]) >= {"hr_scale", "do_not_save_grid"}


def test_img2img(client, tiny, photo):
    found = client.img2img(**QUICK, images=[photo], denoising_strength=0.7, width=64, height=64)
    assert same(found.image, python(tiny, init_image=photo, strength=0.7)[0])


def test_inpainting_as_the_client_asks_for_it_by_itself(client, photo, door):
    """The part around the mask, soft edges, and first the colours from around it."""
    found = client.img2img(**QUICK, images=[photo], mask_image=door, denoising_strength=1.0, width=64, height=64)
    kept = (45, 0, 64, 64)  # beyond the reach of the soft edge
    assert same(found.image.crop(kept), photo.crop(kept))
    assert ImageChops.difference(found.image, photo).crop((0, 0, 32, 64)).getbbox()


@pytest.mark.slow
def test_inpainting_without_more_is_the_mask_of_python(client, tiny, photo, door):
    plain = {"inpaint_full_res": False, "mask_blur": 0, "inpainting_fill": 1, "denoising_strength": 0.8}
    found = client.img2img(**QUICK, **plain, images=[photo], mask_image=door, width=64, height=64)
    assert same(found.image, python(tiny, init_image=photo, mask=door, strength=0.8)[0])
    inverted = client.img2img(**QUICK, **plain, inpainting_mask_invert=1, images=[photo], mask_image=door, width=64, height=64)
    assert same(inverted.image.crop((0, 0, 32, 64)), photo.crop((0, 0, 32, 64)))
    assert ImageChops.difference(inverted.image, photo).crop((32, 0, 64, 64)).getbbox()


@pytest.mark.slow
def test_a_soft_edge_mixes_both_pictures(client, photo, door):
    plain = {"inpaint_full_res": False, "inpainting_fill": 1, "denoising_strength": 1.0}
    found = client.img2img(**QUICK, **plain, mask_blur=4, images=[photo], mask_image=door, width=64, height=64).image
    soft = door.filter(ImageFilter.GaussianBlur(4))
    for x in (0, 31, 32, 63):
        assert (soft.getpixel((x, 5)) == 0) == (x == 63)
    assert same(found.crop((48, 0, 64, 64)), photo.crop((48, 0, 64, 64)))


def test_a_controlnet_unit(client, small, models, photo):
    client.util_set_model("small")
    try:
        unit = webuiapi.ControlNetUnit(
            image=photo, model="control_canny [abcdef01]", module="canny", weight=0.8, guidance_end=0.6
        )
        # The client puts the unit into its own default of alwayson_scripts, and sends it ever after.
        found = client.txt2img(**QUICK, width=64, height=64, controlnet_units=[unit], alwayson_scripts={})
        control = minisd.Control(models / "control_canny.safetensors", photo, 0.8, 0.0, 0.6, "canny")
        assert same(found.image, python(small, controls=[control])[0])
        assert "small" in client.util_get_current_model()
        unit.control_mode = "ControlNet is more important"
        found = client.txt2img(**QUICK, width=64, height=64, controlnet_units=[unit], alwayson_scripts={})
        assert same(found.image, python(small, controls=[replace(control, guess=True)])[0])
        assert "Control Mode: ControlNet is more important" in found.info["infotexts"][0]
    finally:
        client.set_options({"sd_model_checkpoint": "tiny"})  # util_set_model takes what looks most like it: not always this
    assert client.controlnet_model_list() == ["control_canny", "tiny-outline"]


@pytest.mark.slow
def test_samplers_schedulers_eta_and_variations(client, tiny):
    found = client.txt2img(**QUICK | {"sampler_name": "DPM++ 2M"}, scheduler="Karras", width=64, height=64)
    assert same(found.image, python(tiny, sampler="dpmpp_2m", spacing="karras")[0])
    found = client.txt2img(**QUICK | {"sampler_name": "Euler a"}, scheduler="automatic", width=64, height=64)
    assert same(found.image, python(tiny, sampler="euler_ancestral", eta=1.0)[0])
    found = client.txt2img(**QUICK, subseed=9, subseed_strength=0.3, width=64, height=64)
    assert same(found.image, python(tiny, subseed=9, subseed_strength=0.3)[0])
    override = {"CLIP_stop_at_last_layers": 2, "randn_source": "NV", "sd_vae": "lit-vae", "samples_format": "png"}
    found = client.txt2img(**QUICK, override_settings=override, width=64, height=64)
    assert found.info["ignored"].count("override_settings.samples_format") == 1
    assert found.info["sd_vae_name"] == "lit-vae"
    assert "Clip skip: 2" in found.info["infotexts"][0]
    assert "RNG: NV" in found.info["infotexts"][0]


@pytest.mark.slow
def test_styles(client, tiny):
    prompt, negative = styled(named("origami"), PROMPT)
    found = client.txt2img(**QUICK, styles=["origami"], width=64, height=64)
    assert same(found.image, python(tiny, prompt, negative_prompt=negative)[0])
    assert "origami" in {each["name"] for each in client.get_prompt_styles()}


def test_what_there_is(client):
    assert {"tiny", "tiny-lit", "small-xl"} <= set(client.util_get_model_names()) | {
        each["model_name"] for each in client.get_sd_models()
    }
    assert {"Euler", "DPM++ 2M", "DDIM"} <= {each["name"] for each in client.get_samplers()}
    assert {"Automatic", "Karras"} <= {each["label"] for each in client.get_schedulers()}
    assert [each["name"] for each in client.get_loras()] == ["clay", "tiny-clay"]
    assert list(client.get_embeddings()["loaded"]) == ["sparkle"]
    assert [each["model_name"] for each in client.get_sd_vae()] == ["lit-vae"]
    assert client.get_memory()["ram"]["total"] > 0
    client.refresh_checkpoints()


def test_options_are_set_for_all_that_comes_or_not_at_all(server, client):
    assert client.get_options()["sd_model_checkpoint"].startswith("tiny.safetensors")
    client.set_options({"CLIP_stop_at_last_layers": 2})
    assert client.get_options()["CLIP_stop_at_last_layers"] == 2
    assert "Clip skip: 2" in client.txt2img(**QUICK, width=64, height=64).info["infotexts"][0]
    client.set_options({"CLIP_stop_at_last_layers": 1})
    for wrong in ({"sd_model_checkpoint": "nothing"}, {"what": 1}, {"sd_vae": 3}, {"sd_vae": "nothing"}):
        assert server.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 3} | wrong).status == 422
    assert client.get_options()["CLIP_stop_at_last_layers"] == 1


def test_a_picture_says_how_it_was_made(client, photo):
    drawn = client.txt2img(**QUICK, width=64, height=64)
    said = client.png_info(picture(drawn.json["images"][0]))
    assert said.info.startswith(PROMPT)
    assert client.png_info(photo).info == ""


def test_progress_previews_and_interrupt(server, client):
    idle = client.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
    answers: list[object] = []
    body = QUICK | {"steps": 190, "width": 128, "height": 128}
    asking = threading.Thread(target=lambda: answers.append(server.post("/sdapi/v1/txt2img", body)))
    asking.start()
    until(lambda: client.get_progress()["current_image"])
    found = client.get_progress()
    assert 0 < found["progress"] < 1
    assert found["state"]["sampling_steps"] == 190
    assert picture(found["current_image"] or client.get_progress()["current_image"]).size[0] > 8
    client.interrupt()
    asking.join(20)
    (answer,) = answers
    assert answer.status == 200  # as there, with what there is
    assert answer.json["images"] == []
    until(lambda: client.get_progress()["state"]["job_count"] == 0)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"enable_hr": True}, 422), ({"tiling": True}, 422), ({"restore_faces": True}, 422), ({"script_name": "x/y/z plot"}, 422),
        ({"styles": ["nothing"]}, 422), ({"alwayson_scripts": {"adetailer": {"args": [1]}}}, 422),
        ({"sampler_name": "Nothing"}, 404),
        ({"scheduler": "nothing"}, 422), ({"override_settings": {"sd_model_checkpoint": "nothing"}}, 422), ({"steps": "x"}, 422),
        ({"alwayson_scripts": {"controlnet": {"args": [{"model": "None"}]}}}, 422),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "control_canny", "module": "openpose", "image": "x"}]}}}, 422),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(server, fields, status):
    answer = server.post("/sdapi/v1/txt2img", QUICK | fields)
    assert answer.status == status, answer.body
    assert json.dumps(answer.json)


@pytest.mark.slow
def test_idle_values_are_none(server, tiny):
    fields = {
        "eta": 1.0,
        "denoising_strength": 0.7,
        "enable_hr": False,
        "hr_scale": 2,
        "tiling": False,
        "s_churn": 0,
        "s_noise": 1,
    }
    answer = server.post("/sdapi/v1/txt2img", QUICK | fields | {"unknown": [1]})
    assert same(picture(answer.json["images"][0]), python(tiny)[0])
    assert "unknown" in answer.json["ignored"]


@pytest.mark.slow
def test_a_picture_is_cut_or_stretched(server, tiny, photo):
    wide = photo.resize((128, 64))
    fields = {"init_images": [b64(wide)], "denoising_strength": 0.5, "width": 64, "height": 64}
    stretched = server.post("/sdapi/v1/img2img", QUICK | fields).json["images"][0]
    assert same(picture(stretched), python(tiny, init_image=wide, strength=0.5, width=64, height=64)[0])
    cut = server.post("/sdapi/v1/img2img", QUICK | fields | {"resize_mode": 1}).json["images"][0]
    assert same(picture(cut), python(tiny, init_image=wide.crop((32, 0, 96, 64)), strength=0.5)[0])
    assert server.post("/sdapi/v1/img2img", QUICK | fields | {"resize_mode": 2}).status == 422
