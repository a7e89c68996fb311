"""A `minisd serve` of its own process, a library for it, and a client of a few lines."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controls import control_shapes
from families import SMALL
from PIL import Image
from safetensors.torch import load_file, save_file

from minisd.library.places import tiny_checkpoint
from minisd.models.family import UNET, VAE
from minisd.models.shapes import below
from minisd.workbench.blueprint import random_weights
from minisd.workbench.loras.extracting import extract

PROMPT = "a red circle on a blue background"
LIT = tiny_checkpoint().with_name("tiny-lit.safetensors")


def library(folder: Path) -> Path:
    """Models for the tiny checkpoint, and one of SDXL with random weights: a folder for MINISD_MODELS."""
    folder.mkdir(parents=True)
    for name, family in (("small-xl", "sdxl"), ("small", "sd1")):  # the tiny one's latents are too large for a ControlNet
        save_file(random_weights(SMALL[family].shapes(), 2), folder / f"{name}.safetensors", {"modelspec.resolution": "64x64"})
    extract(tiny_checkpoint(), LIT, folder / "clay.safetensors", 4, None, torch.float32, "kohya")
    weights = load_file(LIT)
    save_file({k.removeprefix(f"{VAE}."): v for k, v in weights.items() if k.startswith(VAE)}, folder / "lit-vae.safetensors")
    shapes = control_shapes(below(SMALL["sd1"].shapes(), UNET))
    save_file({k: v * 0.3 for k, v in random_weights(shapes, 5).items()}, folder / "control_canny.safetensors")
    (folder / "embeddings").mkdir()
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    save_file({"emb_params": rows}, folder / "embeddings" / "sparkle.safetensors")
    (folder / "evil.safetensors").symlink_to("/etc/passwd")
    return folder


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self, method: str, path: str, body: bytes | dict[str, Any] | list[Any] | None = None, timeout: float = 60, **headers: str
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        given = kind | self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, sent, {name: value for name, value in given.items() if value})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """What the log says of an event."""
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def figure(self, name: str) -> float:
        """Of /metrics, all its labels together."""
        lines = self.get("/metrics").body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    @property
    def rss(self) -> int:
        """Bytes of main memory."""
        return self.memory("VmRSS")

    @property
    def vsz(self) -> int:
        """Bytes of address space."""
        return self.memory("VmSize")

    def memory(self, name: str) -> int:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024


def environment(models: Path | None, folder: Path, **more: str) -> dict[str, str]:
    found = os.environ | {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "MINISD_MODELS": str(models or "")} | more
    return {name: value for name, value in found.items() if value and name not in ("HF_HOME", "MINISD_STYLES")}


@contextmanager
def serving(folder: Path, *options: str, models: Path | None = None, end: int = signal.SIGTERM, **more: str) -> Iterator[Server]:
    """A server on a free port; it is ended by a signal, and must end by it."""
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    command = [sys.executable, "-m", "minisd", "serve", "--port", "0", "--device", "cpu", *options]
    with log.open("w") as err:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, text=True, cwd=folder, env=environment(models, folder, **more)
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), log.read_text()
        yield Server(process, url, log)
        process.send_signal(end)
        assert process.wait(30) == 128 + end, log.read_text()
    finally:
        process.kill()
        process.wait()


def until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def picture(data: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def same(found: Image.Image, expected: Image.Image) -> bool:
    return found.size == expected.size and np.array_equal(np.asarray(found.convert("RGB")), np.asarray(expected.convert("RGB")))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def b64(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()
