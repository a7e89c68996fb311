"""The page in a browser, Debian's chromium, against a server of its own process: what a user does, and whether everybody can."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from serving import PROMPT, Server, png, serving, until

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_core_python")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
expect = playwright.expect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="takes chromium: apt-get install chromium"),
]
DROP = """async ([text, name, kind, place]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: kind }));
  const tell = (event, target) => target.dispatchEvent(new DragEvent(event, { dataTransfer: transfer, bubbles: true, cancelable: true }));
  tell("dragenter", document.body);
  tell("drop", document.querySelector(`[data-drop=${place}]`));
}"""  # noqa: E501
# Notes every preview that is shown, and every place of the bar: a drawing here takes less than a second.
WATCH = """() => {
  window.seen = { previews: new Set(), bar: new Set() };
  new MutationObserver(() => {
    const making = document.querySelector(".making");
    if (making) seen.previews.add(making.src);
    seen.bar.add(document.getElementById("bar").value);
  }).observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, server: Server):
    """Opens the page; at the end nothing may stand in the console, and nobody else may have been asked."""
    contexts, wrong, asked = [], [], []

    def opened(**how):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | how))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        page.wait_for_selector("body[data-ready]")
        page.evaluate(WATCH)
        return page

    opened.wrong = wrong
    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
    assert asked
    assert [url for url in asked if not url.startswith((f"{server.url}/", f"blob:{server.url}/"))] == []


def draw(page, prompt: str = PROMPT, seed: str = "1") -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", seed)
    page.keyboard.press("Control+Enter")
    finished(page)


def finished(page) -> None:
    expect(page.locator("#status")).to_contain_text("Done", timeout=60_000)
    expect(page.locator("#draw")).to_be_visible()


def facts(page) -> dict[str, str]:
    names, values = (page.locator(f"#recipe {each}").all_inner_texts() for each in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def shown(page) -> bytes:
    """The PNG that can be saved."""
    assert page.locator("#canvas img").count() == 1
    with page.expect_download() as download:
        page.get_by_text("Save", exact=True).click()
    return Path(download.value.path()).read_bytes()


def drop(page, data: bytes, place: str, name: str = "x.png", kind: str = "image/png") -> None:
    page.evaluate(DROP, [base64.b64encode(data).decode(), name, kind, place])


def same_pixels(data: bytes, image: Image.Image) -> bool:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_draws_with_previews_and_a_bar_and_the_picture_is_that_of_the_command_line(open_page, tiny):
    page = open_page()
    draw(page)
    previews, bar = page.evaluate("[seen.previews.size, [...seen.bar]]")
    assert previews >= 1
    assert len(bar) >= 3  # as many as are seen, on a machine that is quick
    assert max(bar) == 1
    assert same_pixels(shown(page), tiny(PROMPT, seed=1).images[0])
    assert (facts(page)["Seed"], facts(page)["Checkpoint"]) == ("1", "tiny")


def test_switches_and_compares_checkpoints_by_the_same_seed(open_page):
    page = open_page()
    draw(page, seed="")
    seed = facts(page)["Seed"]
    page.select_option("#other", "tiny-lit")
    page.click("text=Same seed, other checkpoint")
    finished(page)
    expect(page.locator("#canvas h3")).to_have_text(["tiny", "tiny-lit"])
    page.locator("#canvas .picture").nth(1).click()
    assert (facts(page)["Seed"], facts(page)["Checkpoint"]) == (seed, "tiny-lit")
    page.click("#compare-part summary")
    for name, on in {"small": False, "small-xl": True, "tiny": True, "tiny-lit": True}.items():
        page.locator(f"#compare-models input[value='{name}']").set_checked(on)
    page.fill("#steps", "3")
    page.click("#compare")
    expect(page.locator("#canvas .picture")).to_have_count(3, timeout=60_000)
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#canvas h3")).to_have_text(["small-xl", "tiny", "tiny-lit"])
    sources = page.locator("#canvas img").evaluate_all("all => all.map((each) => each.alt)")
    assert len({re.search(r"seed (\d+)", text)[1] for text in sources}) == 1
    expect(page.locator("#gallery li")).to_have_count(3)
    page.locator("#gallery button").last.click()
    assert facts(page)["Seed"] == seed


def test_makes_a_dropped_picture_again(open_page, tiny):
    page = open_page()
    page.select_option("#sampler", "euler_ancestral")
    page.locator("#loras-part summary").click()
    page.locator("[data-lora=clay]").fill("0.5")
    draw(page, seed="9007199254740993")  # one more than a number of JavaScript's can say
    first = shown(page)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    drop(page, first, "recipe")
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    expect(page.locator("#seed")).to_have_value("9007199254740993")
    expect(page.locator("#sampler")).to_have_value("euler_ancestral")
    expect(page.locator("[data-lora=clay]")).to_have_value("0.5")
    page.click("#draw")
    finished(page)
    assert same_pixels(shown(page), Image.open(io.BytesIO(first)))


def test_starts_from_a_dropped_picture_and_paints_within_a_mask(open_page, photo):
    page = open_page()
    drop(page, png(photo), "start")
    expect(page.locator("#mask")).to_be_visible()
    page.locator("#mask").evaluate("(mask) => mask.scrollIntoView({ block: 'center' })")
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2)
    page.mouse.up()
    with page.expect_request("**/minisd/draw") as sent:
        draw(page, "a green square")
    fields = sent.value.post_data_json
    mask = Image.open(io.BytesIO(base64.b64decode(fields["mask"]))).convert("L")
    assert mask.size == photo.size
    assert (mask.getpixel((32, 32)), mask.getpixel((2, 2))) == (255, 0)
    assert base64.b64decode(fields["init_image"]) == png(photo)
    kept = Image.open(io.BytesIO(shown(page))).convert("RGB")
    assert kept.getpixel((2, 2))[2] > 180  # blue, where nothing was painted


def test_cancels_and_shows_errors(open_page, server):
    page = open_page()
    page.fill("#steps", "60")
    page.fill("#width", "512")
    page.fill("#height", "512")
    page.fill("#prompt", PROMPT)
    page.click("#draw")
    expect(page.locator("#step")).to_contain_text("step", timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Cancelled")
    until(lambda: any(line["door"] == "page" and line["how"] == "cancelled" for line in server.lines("job")))
    page.fill("#width", "60000")
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text("width")
    drop(page, png(Image.new("RGB", (8, 8))), "recipe")
    expect(page.locator("#error")).to_contain_text("how it was made")
    failed = [text for text in open_page.wrong if "status of 422" in text]
    assert open_page.wrong == failed  # Chromium's own lines of the two
    open_page.wrong.clear()


def test_asks_once_for_the_key_and_keeps_it_in_this_tab(browser, tmp_path):
    with serving(tmp_path / "here", MINISD_API_KEY="correct-horse-battery") as running:
        page = browser.new_page()
        page.goto(running.url)
        for key in ("wrong-horse-battery", "correct-horse-battery"):
            page.fill("#key-value", key)
            page.get_by_role("button", name="Go on").click()
            expect(page.locator("#key-wrong")).to_have_text("That is not this server’s key.")
        draw(page)
        page.reload()
        draw(page)
        expect(page.locator("#key")).to_be_hidden()
        assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everybody_can_use_it(open_page, photo, scheme, width):
    """axe-core finds nothing serious, with all that there is on the page; nothing runs out of the window."""
    page = open_page(viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text()
    page.evaluate(script)
    assert serious(page) == []
    draw(page)
    page.click("text=Same seed, other checkpoint")
    finished(page)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    drop(page, png(photo), "start")
    expect(page.locator("#mask")).to_be_visible()
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def serious(page) -> list[str]:
    found = page.evaluate("axe.run()")["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")]
