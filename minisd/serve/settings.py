"""What a server is told when it starts, and the limits that it holds every request to."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UsageError
from .errors import RefusedError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    body: int = 20 << 20  # bytes
    bodies: int = 256 << 20  # of all requests that are being read
    body_seconds: float = 30.0  # in which a body must have come
    sent_pixels: int = 16_000_000  # of a picture that is sent
    pixels: int = 2048 * 2048  # of one that is drawn
    steps: int = 200
    images: int = 16
    work: int = 1_000_000_000  # pixels x steps x images
    prompt: int = 10_000  # characters
    upload: int = 20 << 30  # bytes of a model file


@dataclass(frozen=True)
class Settings:
    """models: names of the library, the first of which draws where a request names none; without any, all may be asked for.

    memory: bytes that models may take on a device; None: by what is free.  hosts: names of this machine that clients may use.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    key: str | None = None
    hosts: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    refiner: str | None = None
    devices: tuple[str | None, ...] = (None,)
    dtype: str | None = None
    memory: int | None = None
    queue: int = 8
    grace: float = 30.0  # seconds in which pictures in the making may be finished when the server ends
    prompt_loras: bool = False  # <lora:NAME:1> in prompts
    uploads: bool = True
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)
    fp8: bool = False  # UNets keep their weights in float8, and LoRAs are refused

    @property
    def public(self) -> bool:
        """Whether other machines can reach it."""
        return not is_loopback(self.host)

    def check(self) -> None:
        """Raises UsageError where it would be open to strangers."""
        if self.public and not self.key:
            raise UsageError(
                f"host: {self.host} can be reached from other machines; expected a key for it, in MINISD_API_KEY or --api-key"
            )
        if self.key is not None and (len(self.key) < 8 or not self.key.isascii() or not self.key.isprintable()):
            raise UsageError("api_key: expected 8 or more printable ASCII characters")

    def knows(self, host: str) -> bool:
        """Whether a request may call this server by such a name: against pages whose own name leads here (DNS rebinding).

        A page of a stranger has a name, so numbers do no harm where others may come at all.
        """
        name = host.casefold().strip()
        if not name.endswith("]") and name.rpartition(":")[2].isdecimal():
            name = name.rpartition(":")[0]
        allowed = {*LOOPBACK, self.host.casefold(), *(each.casefold() for each in self.hosts)}
        return name in allowed or (self.public and is_address(name.strip("[]")))


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return host.casefold() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def key_of(given: str | None) -> str | None:
    """As given, else of the environment's MINISD_API_KEY."""
    return given or os.environ.get("MINISD_API_KEY") or None


def check_limits(limits: Limits, options: Mapping[str, object]) -> None:
    """Raises RefusedError where a drawing is more than a request may ask for, before it gets into the queue."""
    for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
        text = options.get(name)
        if isinstance(text, str) and len(text) > limits.prompt:
            raise RefusedError(422, f"{name}: expected at most {limits.prompt:,} characters, found {len(text):,}", name)
    width, height = (options.get(side) for side in ("width", "height"))
    pixels = width * height if isinstance(width, int) and isinstance(height, int) else 0
    steps, images = options.get("steps"), options.get("num_images")
    asked = {"width": (pixels, limits.pixels, "pixels"), "steps": (steps, limits.steps, "steps")}
    asked["num_images"] = (images, limits.images, "pictures")
    for name, (found, most, what) in asked.items():
        if isinstance(found, int) and found > most:
            raise RefusedError(422, f"{name}: expected at most {most:,} {what}, found {found:,}", name)
    work = (pixels or 1024 * 1024) * (steps if isinstance(steps, int) else 20) * (images if isinstance(images, int) else 1)
    if work > limits.work:
        raise RefusedError(422, f"steps: expected at most {limits.work:,} pixels x steps x pictures, found {work:,}", "steps")
