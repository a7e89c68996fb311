"""The page without a browser: its files, their policy, and the questions that it asks."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from serving import PROMPT, b64, picture, same, serving

import minisd
from minisd.serve.page.routes import FILES, POLICY

ROOT = Path(__file__).parents[2]
QUICK = {"prompt": PROMPT, "steps": 2, "seed": "7"}


def events(answer):
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    pairs = [part.split("\n") for part in answer.body.decode().strip().split("\n\n")]
    return [(event.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for event, data in pairs]


def test_page_and_its_files_come_from_here_alone(server):
    for path in ("/", *(f"/minisd/page/{name}" for name in FILES)):
        answer = server.get(path)
        assert answer.status == 200, path
        assert answer.headers["content-security-policy"] == POLICY
        text = answer.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not any(mark in text for mark in ("http:", "https:", "<style", " style=", "onclick=", "eval(")), path
    assert "unsafe" not in POLICY
    for path in ("/minisd/page/routes.py", "/minisd/page/../routes.py", "/minisd/page/%2e%2e%2fguard.py", "/minisd/page/"):
        assert server.get(path).status == 404


def test_all_of_the_page_is_in_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["minisd.serve.page"]
    folder = ROOT / "minisd" / "serve" / "page"
    packed = {path.name for pattern in data for path in folder.glob(pattern)}
    assert packed == {"index.html", *FILES}
    assert len([path for path in folder.iterdir() if path.is_file()]) <= 12


def test_a_drawing_is_told_step_by_step_and_its_recipe_found_again(server, tiny):
    found = events(server.post("/minisd/draw", QUICK | {"style": "origami", "more": {"clip_skip": 2}}))
    assert [name for name, _ in found] == ["queued", "step", "step", "picture", "done"]
    steps = [fields for name, fields in found if name == "step"]
    assert [(fields["step"], fields["steps"]) for fields in steps] == [(1, 2), (2, 2)]
    assert picture(steps[0]["preview"]).size[0] > 0
    drawn = found[3][1]
    assert same(picture(drawn["png"]), tiny(PROMPT, steps=2, seed=7, style="origami", clip_skip=2).images[0])
    again = server.post("/minisd/recipe", {"image": drawn["png"]}).json
    assert again["program"] == "minisd"
    assert again["notes"] == []
    fields = again["fields"]
    assert (fields["model"], fields["seed"], fields["more"]) == ("tiny", "7", {"clip_skip": 2})
    assert picture(events(server.post("/minisd/draw", fields))[3][1]["png"]).tobytes() == picture(drawn["png"]).tobytes()


def test_choices_have_names_and_no_folders(server, models):
    answer = server.get("/minisd/choices")
    assert {each["name"] for each in answer.json["models"]} == {"tiny", "tiny-lit", "small", "small-xl"}
    assert [each["name"] for each in answer.json["loras"]] == ["clay", "tiny-clay"]
    assert answer.json["model"] == "tiny"
    assert str(models).encode() not in answer.body


def test_the_recipe_of_a_file_names_no_folder(server, tiny, models, tmp_path):
    """Of a picture that the command line drew with files of this machine, and of one that another program did."""
    drawn = minisd.load(models / "small.safetensors", device="cpu")(
        PROMPT, steps=2, seed=1, init_image=Image.new("RGB", (64, 64))
    )
    drawn.images[0].save(tmp_path / "x.png", pnginfo=chunk("minisd", json.dumps(drawn.metadata[0])))
    answer = server.post("/minisd/recipe", {"image": b64_of(tmp_path / "x.png")})
    assert answer.json["fields"]["model"] == "small"
    assert "another picture" in answer.json["notes"][0]
    assert str(models.parent).encode() not in answer.body
    text = "a fox\nNegative prompt: fog\n"
    text += "Steps: 9, Sampler: Euler a, CFG scale: 4.5, Seed: 5, Size: 64x72, Model: elsewhere, Clip skip: 2"
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png", pnginfo=chunk("parameters", text))
    other = server.post("/minisd/recipe", {"image": b64_of(tmp_path / "y.png")}).json
    fields = other["fields"]
    assert (fields["prompt"], fields["negative_prompt"], fields["steps"], fields["guidance_scale"]) == ("a fox", "fog", 9, 4.5)
    assert (fields["width"], fields["height"], fields["seed"], fields["sampler"]) == (64, 72, "5", "euler_ancestral")
    assert fields["model"] is None
    assert fields["more"] == {"like": "a1111", "clip_skip": 2}
    assert "elsewhere" in other["notes"][0]


def chunk(name, text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(name, text)
    return info


def b64_of(path):
    import base64

    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"steps": 999}, "steps"),
        ({"model": "../tiny"}, "model"),
        ({"loras": {"/etc/passwd": 1.0}}, "loras"),
        ({"style": "no such"}, "style"),
        ({"more": {"refiner": "x"}}, "more"),
        ({"init_image": "x"}, "init_image"),
        ({"sampler": "no such"}, "sampler"),
        ({"width": 65}, "width"),
        ({"path": "/tmp/x"}, "path"),
    ],
)
def test_errors_name_the_field(server, fields, word):
    answer = server.post("/minisd/draw", QUICK | fields)
    if answer.status == 200:  # what only the model can tell
        assert events(answer)[-1][0] == "error"
        assert word in events(answer)[-1][1]["message"]
        return
    assert answer.status == 422
    assert word in json.dumps(answer.json["detail"])


def test_a_picture_without_a_recipe_says_so(server):
    answer = server.post("/minisd/recipe", {"image": b64(Image.new("RGB", (8, 8)))})
    assert answer.status == 422
    assert "how it was made" in answer.json["detail"][0]["msg"]


@pytest.mark.slow
def test_the_page_needs_no_key_and_what_it_asks_does(tmp_path):
    with serving(tmp_path / "here", MINISD_API_KEY="correct-horse-battery") as running:
        assert running.get("/").status == 200
        assert running.get("/minisd/page/page.js").status == 200
        assert running.get("/minisd/choices").status == 401
        assert running.post("/minisd/draw", QUICK).status == 401
        assert running.get("/minisd/choices", Authorization="Bearer correct-horse-battery").status == 200
