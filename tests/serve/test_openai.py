"""OpenAI's dialect, by its own unmodified client."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from serving import LIT, PROMPT, picture, png, same

import minisd

openai = pytest.importorskip("openai")
MORE = {"seed": 7, "steps": 3, "guidance_scale": 4}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def python(pipe, **options):
    return pipe(PROMPT, **MORE | options).images


def test_generations(client, tiny):
    found = client.images.generate(
        prompt=PROMPT, n=2, size="96x64", response_format="b64_json", extra_body=MORE | {"negative_prompt": "grey"}
    )
    expected = python(tiny, num_images=2, width=96, height=64, negative_prompt="grey")
    assert all(same(picture(each.b64_json), own) for each, own in zip(found.data, expected, strict=True))
    assert found.created > 1e9
    assert (found.output_format, found.size) == ("png", "96x64")


@pytest.mark.slow
def test_another_model_and_format(client):
    lit = minisd.load(LIT, device="cpu")
    found = client.images.generate(prompt=PROMPT, model="tiny-lit", extra_body=MORE)
    assert same(picture(found.data[0].b64_json), python(lit)[0])
    found = client.images.generate(prompt=PROMPT, output_format="webp", output_compression=80, extra_body=MORE)
    assert picture(found.data[0].b64_json).format == "WEBP"


def test_edits_paint_what_is_transparent(client, tiny, photo, door):
    see_through = photo.convert("RGBA")
    see_through.putalpha(door.point(lambda value: 255 - value))
    mask = Image.new("RGBA", photo.size, (9, 9, 9, 255))
    mask.putalpha(door.point(lambda value: 255 - value))
    (expected,) = python(tiny, init_image=photo, mask=door)
    for given in ({"image": named(photo), "mask": named(mask)}, {"image": [named(photo)], "mask": named(mask)}):
        found = client.images.edit(prompt=PROMPT, **given, extra_body=MORE)
        assert same(picture(found.data[0].b64_json), expected)
    found = client.images.edit(prompt=PROMPT, image=named(see_through), extra_body=MORE)
    assert same(picture(found.data[0].b64_json).crop((32, 0, 64, 64)), photo.crop((32, 0, 64, 64)))
    found = client.images.edit(prompt=PROMPT, image=named(photo), extra_body=MORE | {"strength": 0.5})
    assert same(picture(found.data[0].b64_json), python(tiny, init_image=photo, strength=0.5)[0])


def named(image):
    file = io.BytesIO(png(image))
    file.name = "picture.png"
    return file


def test_models(client):
    assert {"tiny", "tiny-lit"} <= {each.id for each in client.models.list()}
    assert client.models.retrieve("tiny").owned_by == "minisd"


@pytest.mark.slow
def test_streaming_shows_the_picture_in_the_making(client, tiny):
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=MORE | {"steps": 30}))
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed"
    assert kinds.count("image_generation.partial_image") in (1, 2)
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    assert same(picture(events[-1].b64_json), python(tiny, steps=30)[0])


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "nothing"}, "NotFoundError", "model"),
        ({"size": "65x64"}, "BadRequestError", "size"),
        ({"size": "large"}, "BadRequestError", "size"),
        ({"n": 17}, "BadRequestError", "n"),
        ({"extra_body": {"what": 1}}, "BadRequestError", None),
        ({"extra_body": {"steps": 201}}, "BadRequestError", "steps"),
        ({"extra_body": {"steps": "x"}}, "BadRequestError", "steps"),
        ({"style": "nothing"}, "BadRequestError", "style"),
        ({"background": "transparent"}, "BadRequestError", "background"),
    ],
)
def test_errors_are_those_of_the_client(client, fields, error, param):
    with pytest.raises(getattr(openai, error)) as found:
        client.images.generate(prompt=PROMPT, **fields)
    assert found.value.param == param
    assert found.value.message


def test_variations_and_masks_that_are_none(client, photo):
    with pytest.raises(openai.NotFoundError):
        client.images.create_variation(image=named(photo))
    with pytest.raises(openai.BadRequestError, match="transparent"):
        client.images.edit(prompt=PROMPT, image=named(photo), mask=named(photo))
