"""OctoAI's dialect, by its own unmodified client and by hand: what comes back is what Python draws."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import LIT, PROMPT, b64, library, picture, png, same, serving, until

import minisd
from minisd.library.places import tiny_checkpoint
from minisd.library.styles import named, styled

QUICK = {"prompt": PROMPT, "steps": 3, "sampler": "K_EULER", "cfg_scale": 4, "seed": 7, "image_encoding": "png"}


def drawn(server, engine="sd", **fields):
    answer = server.post(f"/generate/{engine}", QUICK | fields)
    assert answer.status == 200, answer.body
    return [picture(each["image_b64"]) for each in answer.json["images"]]


def python(pipe, prompt=PROMPT, **options):
    return pipe(prompt, **{"steps": 3, "guidance_scale": 4, "seed": 7} | options).images


def client_of(server, key="none"):
    octoai = pytest.importorskip("octoai")
    from octoai.client import OctoAI
    from octoai.environment import OctoAIEnvironment

    assert octoai
    place = OctoAIEnvironment(default=server.url, image_gen=server.url, text_gen=server.url)
    return OctoAI(api_key=key, environment=place)


def test_the_client_draws_what_python_draws(server, xl):
    client = client_of(server)
    found = client.image_gen.generate_sdxl(
        prompt=PROMPT, negative_prompt="grey", width=64, height=64, steps=2, cfg_scale=7.5, num_images=2, seed=[7, 11],
        sampler="K_EULER", image_encoding="png",
    )  # fmt: skip
    expected = xl(PROMPT, negative_prompt="grey", width=64, height=64, steps=2, guidance_scale=7.5, num_images=2, seed=[7, 11])
    assert [each.seed for each in found.images] == [7, 11]
    assert not any(each.removed_for_safety for each in found.images)
    assert found.prediction_time_ms > 0
    assert all(same(picture(each.image_b64), own) for each, own in zip(found.images, expected.images, strict=True))


def test_the_client_calls_the_path_of_sd_at_once_and_later(server, tiny):
    client = client_of(server)
    (expected,) = python(tiny)
    found = client.infer(f"{server.url}/generate/sd", QUICK)
    assert same(picture(found["images"][0]["image_b64"]), expected)
    future = client.infer_async(f"{server.url}/generate/sd", QUICK)
    until(lambda: client.is_future_ready(future))
    assert client.get_future_result(future)["images"][0]["image_b64"] == found["images"][0]["image_b64"]


def test_the_client_hears_errors_in_its_own_shapes(server):
    from octoai.core.api_error import ApiError
    from octoai.image_gen.errors.unprocessable_entity_error import UnprocessableEntityError

    client = client_of(server)
    with pytest.raises(UnprocessableEntityError) as unfit:
        client.image_gen.generate_sdxl(prompt="x", width=65, height=64, steps=1)
    (detail,) = unfit.value.body.detail
    assert detail.loc == ["body", "width"]
    assert "multiple of 8" in detail.msg
    with pytest.raises(UnprocessableEntityError) as wrong:
        client.image_gen.generate_sdxl(prompt="x", checkpoint="octoai:tiny")
    assert wrong.value.body.detail[0].loc == ["body", "checkpoint"]
    assert "Stable Diffusion 1.x" in wrong.value.body.detail[0].msg
    with pytest.raises(ApiError) as missing:
        client.image_gen.generate_sd3(prompt="x")
    assert missing.value.status_code == 404
    assert "sdxl" in missing.value.body["message"]


def test_curl_as_the_service_had_it(server):
    """Its page's command, host and key replaced."""
    body = '{"prompt": "a red circle", "num_images": 1, "sampler": "DDIM", "use_refiner": false, "steps": 2, "width": 64, '
    body += '"height": 64}'
    command = ["curl", "-sS", "-X", "POST", f"{server.url}/generate/sdxl", "-H", "Authorization: Bearer KEY"]
    run = subprocess.run(
        [*command, "-H", "Content-Type: application/json", "-d", body], capture_output=True, text=True, check=True
    )
    assert '"image_b64":"/9j/' in run.stdout  # a JPEG, as nobody asked for another


FIELDS = [
    ({"num_images": 2}, {"num_images": 2}),
    (
        {"negative_prompt": "grey", "clip_skip": 2, "sampler": "DPM_PLUS_PLUS_2M_KARRAS"},
        {"negative_prompt": "grey", "clip_skip": 2, "sampler": "dpmpp_2m", "spacing": "karras"},
    ),
    ({"checkpoint": "octoai:tiny-lit.safetensors"}, {"model": LIT}),
    ({"loras": {"clay": 0.7}}, {"loras": [("clay.safetensors", 0.7)]}),
    ({"vae": "lit-vae"}, {"vae": "lit-vae.safetensors"}),
    ({"width": 96, "height": 64, "sampler": "DDIM"}, {"width": 96, "height": 64, "sampler": "ddim"}),
    ({"prompt": f"{PROMPT}, sparkle"}, {"prompt": f"{PROMPT}, sparkle", "embedding": "sparkle"}),
    ({"prompt": f"{PROMPT} zzz", "textual_inversions": {"sparkle": "zzz"}}, {"prompt": f"{PROMPT} zzz", "embedding": "zzz"}),
]


@pytest.mark.parametrize(
    ("fields", "options"), [pytest.param(*each, marks=pytest.mark.slow if i % 3 else ()) for i, each in enumerate(FIELDS)]
)
def test_fields_mean_what_options_mean(server, models, tiny, fields, options):
    pipe = tiny
    if "model" in options or "vae" in options or "embedding" in options:
        vae = models / options["vae"] if "vae" in options else None
        pipe = minisd.load(options.pop("model", None), device="cpu", vae=vae)
    if word := options.pop("embedding", None):
        pipe.add_embedding(models / "embeddings" / "sparkle.safetensors", word)
    options = {name: value for name, value in options.items() if name != "vae"}
    if "loras" in options:
        options["loras"] = [(models / name, strength) for name, strength in options["loras"]]
    found, expected = drawn(server, **fields), python(pipe, **options)
    assert len(found) == len(expected)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_a_word_of_one_request_is_none_of_the_next(server, tiny):
    own = {"prompt": f"{PROMPT} zzz", "textual_inversions": {"sparkle": "zzz"}}
    (with_it,), (without,) = drawn(server, **own), drawn(server, prompt=f"{PROMPT} zzz")
    assert not same(with_it, without)
    assert same(without, python(tiny, f"{PROMPT} zzz")[0])


def test_pictures_of_a_request_are_those_of_options(server, tiny, photo, door):
    fields = {"init_image": b64(photo), "strength": 0.7}
    assert same(drawn(server, **fields)[0], python(tiny, init_image=photo, strength=0.7)[0])
    fields = {"init_image": f"data:image/png;base64,{b64(photo)}", "mask_image": b64(door), "strength": 1.0}
    (found,) = drawn(server, **fields)
    assert same(found, python(tiny, init_image=photo, mask=door, strength=1.0)[0])
    assert same(found.crop((32, 0, 64, 64)), photo.crop((32, 0, 64, 64)))


@pytest.mark.slow
def test_only_the_part_around_the_mask_is_painted_and_the_rest_stays(server, photo):
    large = photo.resize((256, 128))
    mask = door_at((200, 40, 230, 70), large.size)
    fields = {"init_image": b64(large), "mask_image": b64(mask), "inpaint_full_res": True, "width": 64, "height": 64}
    (found,) = drawn(server, **fields, strength=1.0)
    assert found.size == large.size
    white = mask.getbbox()
    assert same(found.crop((0, 0, white[0], 128)), large.crop((0, 0, white[0], 128)))
    assert not same(found.crop(white), large.crop(white))


def door_at(box, size):
    from PIL import Image

    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def test_controlnet(server, small, models, photo):
    control = minisd.Control(models / "control_canny.safetensors", photo, 0.8, 0.0, 0.6)
    fields = {
        "checkpoint": "small",
        "controlnet": "octoai:control_canny",
        "controlnet_image": b64(photo),
        "controlnet_conditioning_scale": 0.8,
    }
    fields |= {"controlnet_early_stop": 0.6, "controlnet_preprocess": False}
    (found,) = drawn(server, "controlnet-sd15", **fields)
    assert same(found, python(small, controls=[control])[0])
    assert not same(found, python(small)[0])
    pytest.importorskip("cv2")
    edges = minisd.Control(models / "control_canny.safetensors", photo, 0.8, 0.0, 0.6, "canny")
    (found,) = drawn(server, "controlnet-sd15", **fields | {"controlnet_preprocess": True})
    assert same(found, python(small, controls=[edges])[0])


@pytest.mark.slow
def test_styles(server, tiny):
    style = named("Craft Clay")
    prompt, negative = styled(style, PROMPT, "grey")
    (found,) = drawn(server, style_preset="Craft Clay", negative_prompt="grey")
    assert same(found, python(tiny, prompt, negative_prompt=negative)[0])
    assert same(drawn(server, style_preset="base")[0], python(tiny)[0])


@pytest.mark.slow
def test_a_picture_can_be_made_again_and_says_nothing_of_folders(server, models, tmp_path, monkeypatch):
    from minisd.cli import main

    answer = server.post("/generate/sd", QUICK | {"loras": {"clay": 0.7}, "checkpoint": "tiny-lit"}).json
    (tmp_path / "served.png").write_bytes(png(image := picture(answer["images"][0]["image_b64"])))
    assert image.info["parameters"].startswith(f"{PROMPT} <lora:clay:0.7>")
    assert str(models) not in image.info["minisd"]
    assert "/" not in re.sub(r'"(Size|version|torch)[^,]*', "", image.info["minisd"])
    import base64

    (tmp_path / "served.png").write_bytes(base64.b64decode(answer["images"][0]["image_b64"]))
    monkeypatch.setenv("MINISD_MODELS", str(models))
    monkeypatch.chdir(tmp_path)
    assert main(["again", "served.png", "--device", "cpu"]) == 0
    assert same(picture((tmp_path / "served-again.png").read_bytes()), image)


@pytest.mark.parametrize(
    ("engine", "fields", "field"),
    [
        ("sd", {"checkpoint": "nothing"}, "checkpoint"),
        ("sdxl", {"checkpoint": "tiny"}, "checkpoint"),
        ("sd", {"loras": {"nothing": 1}}, "loras"),
        ("sd", {"vae": "tiny"}, "vae"),
        ("sd", {"style_preset": "craft clays"}, "style_preset"),
        ("sd", {"use_refiner": True}, "use_refiner"),
        ("sdxl", {"use_refiner": True}, "use_refiner"),
        ("sd", {"outpainting": True}, "outpainting"),
        ("sd", {"transfer_images": {"x": ["y"]}}, "transfer_images"),
        ("sd", {"mask_image": "x"}, "mask_image"),
        ("sd", {"init_image": "x"}, "init_image"),
        ("sd", {"sampler": "NONE"}, "sampler"),
        ("sd", {"seed": [1, 2, 3], "num_images": 2}, "seed"),
        ("sd", {"clip_skip": 12}, "clip_skip"),
        ("sd", {"cfg_scale": 51}, "cfg_scale"),
        ("sd", {"what": 1}, "what"),
        ("sd", {"controlnet": "control_canny"}, "controlnet"),
        ("controlnet-sd15", {"controlnet": "control_canny"}, "controlnet_image"),
        ("sd", {"prompt": "<lora:clay:1> x"}, "prompt"),
        ("sd", {"prompt": "embedding:nothing"}, "prompt"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(server, engine, fields, field):
    answer = server.post(f"/generate/{engine}", QUICK | fields)
    assert answer.status == 422
    assert answer.json["detail"][0]["loc"][:2] == ["body", field]


@pytest.mark.slow
def test_a_refiner_of_the_server_finishes(models, tmp_path, xl):
    """With --refiner it does so unless a request says no, as the service had it."""
    with serving(tmp_path / "here", "--refiner", "small-xl", "-m", "small-xl", models=models) as running:
        fields = QUICK | {"high_noise_frac": 0.5, "steps": 4}
        found = picture(running.post("/generate/sdxl", fields).json["images"][0]["image_b64"])
        alone = picture(running.post("/generate/sdxl", fields | {"use_refiner": False}).json["images"][0]["image_b64"])
        assert running.post("/generate/sd", QUICK).status == 422  # -m: no other model may be drawn with
    expected = python(xl, steps=4, refiner=xl, high_noise_frac=0.5)[0]
    assert same(found, expected)
    assert same(alone, python(xl, steps=4)[0])


@pytest.mark.slow  # the client asks every ten seconds whether it is done
def test_assets_from_upload_to_deletion(tmp_path):
    octoai = pytest.importorskip("octoai")
    from octoai.asset_library import Data_Checkpoint

    assert octoai
    models = library(tmp_path / "models")
    source = tmp_path / "mine.safetensors"
    source.write_bytes(LIT.read_bytes())
    with serving(tmp_path / "here", models=models) as running:
        assets = client_of(running).asset_library
        listed = assets.list(asset_type="checkpoint", limit=10)
        assert {each.name for each in listed.data} >= {"tiny", "small-xl", "control_canny"}
        assert assets.get("minisd/tiny").asset.status == "ready"
        data = Data_Checkpoint(engine="image/stable-diffusion-v1-5", file_format="safetensors", data_type="fp16")
        made = assets.create_from_file(
            file=str(source), data=data, name="mine", description="ours", transfer_api_type="presigned-url"
        )
        found = assets.get(made.id).asset
        assert (found.status, found.name) == ("ready", "mine")
        assert (models / "mine.safetensors").read_bytes() == LIT.read_bytes()
        assert len(drawn(running, checkpoint="mine")) == 1
        with pytest.raises(Exception, match="403"):
            assets.delete(assets.get("clay").asset.id)
        assert assets.delete(made.id).id == made.id
        assert not (models / "mine.safetensors").exists()
        assert running.get(f"/v1/assets/{made.id}").status == 404


@pytest.mark.slow
def test_an_upload_that_is_none_is_rejected_and_never_run(tmp_path):
    import pickles

    models = library(tmp_path / "models")
    bad = {"data": {"asset_type": "checkpoint", "engine": "image/stable-diffusion-v1-5"}, "asset_type": "checkpoint"}
    torch.save({"state_dict": load_file(tiny_checkpoint())}, tmp_path / "sdxl-in-name.ckpt")
    save_file({"x": torch.zeros(1)}, tmp_path / "nothing.safetensors")
    assert pickles
    with serving(tmp_path / "here", models=models) as running:
        for i, content in enumerate(
            (b"", b"PK\3\4 no", b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.", (tmp_path / "nothing.safetensors").read_bytes())
        ):
            made = running.post("/v1/assets", bad | {"name": f"bad{i}"}).json
            put = "/" + made["transfer_api"]["put_url"].split("/", 3)[3]
            assert running.ask("PUT", put, content, Content_Type="application/octet-stream").status == 200
            done = running.post(f"/v1/assets/{made['asset']['id']}/complete-upload", {}).json
            assert done["error"]
            asset = running.get(f"/v1/assets/{made['asset']['id']}").json["asset"]
            assert asset["status"] == "rejected"
            assert str(tmp_path) not in str(asset)
        assert not (tmp_path / "here" / "canary").exists()
        for fields in (
            {"name": "../x"},
            {"name": "/etc/x"},
            {"name": "tiny"},
            {"name": "x", "url": "http://x"},
            {"name": "x", "hf_repo": "y"},
        ):
            assert running.post("/v1/assets", bad | fields).status in (409, 422), fields
    with serving(tmp_path / "there", "--no-uploads", models=models) as running:
        assert running.post("/v1/assets", bad | {"name": "x"}).status == 403
