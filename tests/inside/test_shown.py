"""The UNet as a drawing from the header alone, and the page of `minisd explain`: looked at in a real browser with -m slow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path

import pytest
from families import SMALL
from helpers import manifest, write_holes

import minisd
from minisd.cli import main
from minisd.inside.shown.lecture import lecture
from minisd.inside.shown.page import page
from minisd.inside.shown.unet_map import blueprint_of, drawn
from minisd.library.places import tiny_checkpoint

PROMPT = "a red circle on a blue background"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


PUBLISHED = [("sd15", 25, 859_520_964), ("sdxl-base", 19, 2_567_463_684), ("sd21-base", 25, 865_910_724)]


@pytest.mark.slow
@pytest.mark.parametrize(("published", "blocks", "parameters"), PUBLISHED)
def test_unet_from_a_header_of_a_published_model(published, blocks, parameters, tmp_path):
    plan = blueprint_of(write_holes(tmp_path / "m.safetensors", manifest(published)))
    assert len(plan.blocks) == blocks
    assert plan.parameters == parameters
    assert 0.9 * plan.flops < sum(block.flops for block in plan.blocks) < plan.flops
    text = drawn(plan)
    svg = xml.dom.minidom.parseString(text)
    shown = " ".join(node.firstChild.data for node in svg.getElementsByTagName("text"))
    assert all(block.name in shown for block in plan.blocks)
    assert f"{plan.parameters / 1e6:,.1f} M parameters" in shown
    middle = next(block for block in plan.blocks if block.name == "middle_block")
    assert " × ".join(map(str, middle.made)) in shown
    assert re.search(r"attention ×10", shown) if published == "sdxl-base" else "attention" in shown


def test_channels_of_skips_add_up():
    plan = blueprint_of(tiny_checkpoint(), (128, 64))
    by_name = {block.name: block for block in plan.blocks}
    down = [block for block in plan.blocks if block.name.startswith("input")]
    up = [block for block in plan.blocks if block.name.startswith("output")]
    assert plan.blocks[0].given == (4, 16, 32)
    before = by_name["middle_block"].made[0]
    for block, twin in zip(up, reversed(down), strict=True):
        assert block.given[0] == before + twin.made[0]
        before = block.made[0]


EACH = [each if each == "sdxl" else pytest.param(each, marks=pytest.mark.slow) for each in SMALL]


@pytest.mark.parametrize("family", EACH)
def test_unets_of_all_families_are_drawn(family, tmp_path):
    path = SMALL[family].write(tmp_path / "a<b>&.safetensors")
    xml.dom.minidom.parseString(drawn(blueprint_of(path, (64, 64)), {"middle_block": 1.0}, "red"))


def test_inspect_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "tiny", "--plot", "unet.svg", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "sd1"
    assert Path("unet.svg").read_text().startswith("<svg")
    assert main(["inspect", "tiny", "--plot", "unet.png"]) == 2
    assert "ends in .svg" in capsys.readouterr().err


class Links(HTMLParser):
    """Whatever a page would ask for, and its images."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.images = 0

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        self.asked += [value for name, value in attributes if name in ("src", "href") and value]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The page of the tiny checkpoint, in a few steps."""
    path = tmp_path_factory.mktemp("page") / "lecture.html"
    assert main(["explain", PROMPT, "-o", str(path), "--seed", "1", "--steps", "3", "--device", "cpu", "--dtype", "float32"]) == 0
    return path


def test_page_has_every_station_with_its_numbers(made):
    text = made.read_text()
    pipe = minisd.load(device="cpu", dtype="float32")
    steps = list(pipe.stream(PROMPT, seed=1, steps=3))
    for number, title in enumerate(
        ("Words become numbers", "What each layer", "How much noise", "Step by step", "The finished latents", "The network",
         "Where the pixels look", "The way back"), 1,
    ):  # fmt: skip
        assert f"<span>{number}</span>{title}" in text
    assert "circle<small>7117</small>" in text
    for step in steps:
        cells = [f"{step.timestep:.1f}", f"{step.sigma:.4g}"]
        assert f"<td>{cells[0]}</td><td>{cells[1]}</td>" in text
        assert f"<td>{float(step.denoised.min()):.2f}</td><td>{float(step.denoised.max()):.2f}</td>" in text
    assert "\n    for sigma, following in pairwise(sigmas):" in text
    assert len(text) < 5_000_000


def test_every_figure_names_its_file_and_line(made):
    root = Path(minisd.__file__).parents[1]
    text = made.read_text()
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures) == 10
    for figure in figures:
        named = re.findall(r"<code>(minisd/[\w/]+\.py):(\d+)</code>", figure)
        assert named, figure[-300:]
        for file, line in named:
            found = (root / file).read_text().splitlines()[int(line) - 1 :]
            assert re.match(r"\s*(def |class |@)", found[0]), (file, line)


def test_page_asks_for_nothing(made):
    links = Links()
    links.feed(made.read_text())
    assert links.images > 40
    assert all(each.startswith("data:") for each in links.asked)
    assert "default-src 'none'" in made.read_text()
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|http-equiv=\"refresh", made.read_text())


def test_a_prompt_is_shown_and_not_run(tiny):
    hostile = "<script>alert(1)</script> & a 'red' \"circle\" </style>"
    text = page(lecture(tiny, minisd.Request(hostile, steps=1, seed=1, width=32, height=32, plain_prompt=True)))
    assert "<script>alert" not in text
    assert text.count("<script") == 2


def test_what_is_not_one_picture_is_refused(tiny):
    with pytest.raises(minisd.UsageError, match="explain: expected a text as prompt, for one picture"):
        lecture(tiny, minisd.Request("a star", num_images=2))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl", "sdxl-refiner", "sdxl-v"])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_a"])
def test_pages_of_other_families_and_samplers(family, sampler, tmp_path):
    pipe = minisd.load(SMALL[family].write(tmp_path / "m.safetensors"), device="cpu", dtype="float32")
    request = minisd.Request(
        "a star", steps=3, seed=1, width=64, height=64, sampler=sampler, guidance_scale=1 if sampler == "heun" else 5
    )
    assert "The way back" in page(lecture(pipe, request))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_page_opens_in_a_browser(tmp_path):
    """Drawn in 20 s of one core, under 5 MB; its script runs without an error, and no request leaves it."""
    path, started = tmp_path / "lecture.html", time.process_time()
    text = page(lecture(minisd.load(device="cpu"), minisd.Request(PROMPT, seed=1)))
    assert time.process_time() - started < 20
    path.write_text(text)
    assert path.stat().st_size < 5_000_000
    log = tmp_path / "net.json"
    browser = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    browser += [f"--user-data-dir={tmp_path}/own", "--enable-logging=stderr", f"--log-net-log={log}"]
    run = subprocess.run([*browser, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    assert ">step 11 of 20</output>" in run.stdout  # which the script has written
    assert '<tr class="now"><td>11</td>' in run.stdout
    assert "CONSOLE" not in run.stderr
    hosts = set(re.findall(r'"url":"https?://([^/"]+)', log.read_text()))
    makers = (
        "google.com",
        "googleapis.com",
        "gvt1.com",
        "gstatic.com",
    )  # where the browser itself looks for dictionaries and the time
    assert not [host for host in hosts if not host.endswith(makers)]
    shot = tmp_path / "page.png"
    subprocess.run(
        [*browser, f"--screenshot={shot}", "--window-size=1100,6200", path.as_uri()], check=True, capture_output=True, timeout=120
    )
    from PIL import Image

    image = Image.open(shot).convert("RGB")
    assert len(image.resize((110, 620)).getcolors(70_000)) > 1000  # pictures and maps are there
