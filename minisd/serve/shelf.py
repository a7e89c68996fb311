"""The models that a device has in memory: opened when they are asked for; those used longest ago give way to others."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..addons.controls.control import Control
from ..addons.controls.files import load_control
from ..addons.wanted import Lora
from ..files.checkpoint import open_checkpoint
from ..library.embeddings import of_library
from ..library.names import Listed
from ..pipeline import Pipeline, load
from ..request import Request
from ..system.device import to_device, to_dtype
from ..system.memory import free_memory, give_back
from ..workbench.teaching import teach

SHARE = 0.6  # of what is free when the server starts, for models: the rest is for drawing
MOST_LORAS = 8  # files of LoRAs that a model keeps open


@dataclass(frozen=True)
class Drawing:
    """What a request wants drawn, every model an entry of the library.

    options: of `minisd.Request`, pictures opened; loras: with the strengths for the UNet and for the text encoders; embeddings:
    with the word for it, None for its own name; controls: with the other fields of `Control`; finish: what becomes of a picture
    once it is drawn.
    """

    model: Listed
    options: Mapping[str, Any]
    vae: Listed | None = None
    refiner: Listed | None = None
    loras: tuple[tuple[Listed, float, float | None], ...] = ()
    embeddings: tuple[tuple[Listed, str | None], ...] = ()
    controls: tuple[tuple[Listed, Mapping[str, Any]], ...] = ()
    finish: Callable[[Image.Image], Image.Image] | None = None

    @property
    def names(self) -> dict[str, str]:
        """Of all its models, by their paths."""
        addons = [
            *(each for each, *_ in self.loras),
            *(each for each, _ in self.embeddings),
            *(each for each, _ in self.controls),
        ]
        parts = [self.model, self.vae, self.refiner, *addons]
        return {os.path.abspath(each.path): each.name for each in parts if each is not None}


@dataclass
class Kept:
    """A pipeline in memory, or a ControlNet; state: of its file when it was opened."""

    value: Any
    size: int
    state: tuple[int, int]


class Shelf:
    """memory: bytes that all of them may take together; a single one that is larger is opened all the same, alone.

    embedding: the file that a prompt names by embedding:NAME.
    """

    def __init__(
        self, device: str | None, dtype: str | None, memory: int | None, embedding: Callable[[str], Path] = of_library,
        fp8: bool = False,
    ) -> None:  # fmt: skip
        self.embedding, self.fp8 = embedding, fp8
        self.device = to_device(device)
        self.dtype = to_dtype(dtype, self.device)
        self.memory = memory or int((free_memory(self.device) or 4 << 30) * SHARE)
        self.kept: dict[Any, Kept] = {}  # the one used last at the end
        self.opened = 0  # how often a file was opened

    @property
    def used(self) -> int:
        return sum(each.size for each in list(self.kept.values()))

    @contextmanager
    def ready(self, drawing: Drawing) -> Iterator[tuple[Pipeline, Request]]:
        """The pipeline of a drawing, knowing its embeddings as long as it is drawn, and the request for it."""
        base = (drawing.model.path, drawing.vae.path if drawing.vae else None)
        in_use: set[Any] = {base}
        pipe = self.pipeline(*base, in_use)
        pipes = [pipe]
        if drawing.refiner is not None:
            in_use.add((drawing.refiner.path, None))
            pipes.append(self.pipeline(drawing.refiner.path, None, in_use))
        before = [(each, each.conditioner, dict(each.embeddings)) for each in pipes]
        try:
            yield pipe, self.request(drawing, pipes, base, in_use)
        finally:
            for each, conditioner, embeddings in before:
                each.conditioner, each.embeddings = conditioner, embeddings
                forget_loras(each)

    def request(self, drawing: Drawing, pipes: list[Pipeline], base: Any, in_use: set[Any]) -> Request:
        controls = []
        for listed, fields in drawing.controls:
            in_use.add((listed.path, base))
            controls.append(Control(self.control(listed.path, pipes[0], base, in_use), **fields))
        for listed, word in drawing.embeddings:
            for pipe in pipes:
                pipe.add_embedding(listed.path, word or listed.name.rsplit("/", 1)[-1])
        loras = [Lora(listed.path, unet, text) for listed, unet, text in drawing.loras]
        refiner = pipes[1] if len(pipes) > 1 else None
        request = Request(**drawing.options, loras=loras, controls=controls, refiner=refiner)
        teach(pipes, request, self.embedding)
        return request

    def pipeline(self, path: Path, vae: Path | None, in_use: set[Any]) -> Pipeline:
        def opened() -> Pipeline:
            return load(path, device=str(self.device), dtype=self.dtype, vae=vae, fp8=self.fp8)

        return self.get((path, vae), path, opened, in_use)  # type: ignore[no-any-return]

    def control(self, path: Path, pipe: Pipeline, base: Any, in_use: set[Any]) -> Any:
        def opened() -> Any:
            return load_control(path, str(self.device), self.dtype, base=pipe)

        return self.get((path, base), path, opened, in_use)

    def get(self, key: Any, path: Path, make: Callable[[], Any], in_use: set[Any]) -> Any:
        found = self.kept.pop(key, None)
        stat = path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if found is not None and found.state != state:  # another file has taken its place
            found = None
        if found is None:
            self.make_room(self.size_of(path), in_use)
            value = make()
            self.opened += 1
            give_back(self.device)  # what reading the file took besides
            found = Kept(value, bytes_of(value), state)
        self.kept[key] = found
        self.make_room(0, in_use)
        return found.value

    def size_of(self, path: Path) -> int:
        """What a file will take in memory."""
        return sum(entry.numel for entry in open_checkpoint(path).entries.values()) * self.dtype.itemsize

    def make_room(self, size: int, in_use: set[Any]) -> None:
        """Gives up what was used longest ago, until so many bytes more fit; what is in use stays."""
        gone = False
        for key in [key for key in self.kept if key not in in_use]:
            if self.used + size <= self.memory:
                break
            del self.kept[key]
            gone = True
        if gone:
            gc.collect()
            give_back(self.device)


def bytes_of(value: Any) -> int:
    """Of the weights of a pipeline, or of a network."""
    model = value.model if isinstance(value, Pipeline) else value
    weights = {id(each): each for each in model.state_dict(keep_vars=True).values()}
    return sum(each.numel() * each.element_size() for each in weights.values())


def forget_loras(pipe: Pipeline) -> None:
    """Closes files of LoRAs but for those that are on, and some that may be wanted again."""
    on = {id(each.addon) for each in pipe.stack.active}
    for path in list(pipe.stack.opened)[:-MOST_LORAS]:
        if id(pipe.stack.opened[path]) not in on:
            del pipe.stack.opened[path]


def public(recipe: Mapping[str, Any], drawing: Drawing) -> dict[str, Any]:
    """A recipe that says nothing of this machine's folders: models by their names in the library, which `minisd again` finds."""
    names = drawing.names

    def named(path: Any) -> str | None:
        return names.get(os.path.abspath(path), Path(path).stem) if path else None

    found = dict(recipe) | {name: named(recipe[name]) for name in ("model_path", "vae_path", "refiner_path") if recipe.get(name)}
    if "vae_paths" in found:
        found["vae_paths"] = [named(path) for path in found["vae_paths"]]
    if "loras" in found:
        found["loras"] = [each | {"source": named(each["source"])} for each in found["loras"]]
    if "embeddings" in found:
        found["embeddings"] = [each | {"path": named(each["path"])} for each in found["embeddings"]]
    if "controls" in found:
        pairs = zip(found["controls"], drawing.controls, strict=True)
        found["controls"] = [each | {"source": listed.name} for each, (listed, _) in pairs]
    return found
