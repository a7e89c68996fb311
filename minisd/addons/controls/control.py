"""What a user asks of a ControlNet: which picture, how strong, when, on which side of guidance; and what a recipe says of it."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ...errors import UsageError
from ...files.checkpoint import file_sha256, open_checkpoint
from ...library.names import resolve
from ...models.control import ControlModel, ControlNet, ControlNetUnion, LLLite, T2IAdapter
from ...models.control.union import KINDS, number_of
from ...pictures.init import Picture, fingerprint, open_picture
from ...system.regular import open_regular
from .names import CONTROL_LORA, CONTROLNET, DIFFERENCE, UNION, told
from .preprocess import check

MOST = 100.0  # a strength: beyond it is a slip of the hand
WHERE = ("both", "positive", "negative")
RANGES = ("steps", "noise")
# A1111's hash of old, by which its extension names a ControlNet (webui, modules/sd_models.py, model_hash).
HASHED_FROM, HASHED = 0x100000, 0x10000


@dataclass(frozen=True, eq=False)
class Control:
    """A network that sees a picture, and how much of the drawing follows it.

    source: a file, or as a text its name in the library (see `load_control`; it is read for every call), or what load_control
        made of one, which goes to the pipeline's device and dtype.
    image: the hint as the network was trained with it (edges, depth, a pose, …); scaled to the picture's size by Lanczos' filter,
        transparent parts on black.
    strength: times what the network adds.  start, end: shares of the way, 0 … 1, in which it acts.
    preprocess: what makes the hint of the image, one of preprocess.PREPROCESS.
    kind: of a ControlNet Union, what the hint is: one of models.control.union.KINDS; by default what `preprocess` makes.
    guess: guess mode: the negative prompt is asked without it, and what it adds grows from a tenth in the first block to all of
        it in the middle, so that the hint counts without words.
    where: which side of guidance is asked with it: "both", the prompt ("positive") or the negative prompt ("negative"); by
        default both, and the prompt alone in guess mode or where only means are added ("shuffle").
    range: what start and end count: "steps", step i of N, from 0, is left alone if i / N is less than start or (i + 1) / N more
        than end (diffusers); or "noise", the noise level of each call of the network has to lie between those of the timesteps
        (1 - start) 999 and (1 - end) 999 (ComfyUI).  By default steps, with like="comfyui" noise.
    """

    source: str | os.PathLike[str] | ControlModel
    image: Picture
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str = "none"
    kind: str | None = None
    guess: bool = False
    where: Literal["both", "positive", "negative"] | None = None
    range: Literal["steps", "noise"] | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("strength", -MOST, MOST), ("start", 0, 1), ("end", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"controls: {name}: expected a number from {low:g} to {high:g}, found {repr(value)[:80]}")
        check(self.preprocess)
        for name, known in (("kind", tuple(KINDS)), ("where", WHERE), ("range", RANGES)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value in known):
                raise UsageError(f"controls: {name}: expected one of {', '.join(known)}, found {repr(value)[:80]}")
        if not isinstance(self.guess, bool):
            raise UsageError(f"controls: guess: expected true or false, found {repr(self.guess)[:80]}")
        if self.guess and self.where not in (None, "positive"):
            raise UsageError(f"controls: where: expected positive or nothing in guess mode, found {self.where!r}")
        if self.start >= self.end:
            raise UsageError(f"controls: start: expected less than end, {self.end}, found {self.start}")

    @property
    def path(self) -> str | None:
        """Of the file, absolute; None for a network in memory."""
        return os.path.abspath(self.source) if isinstance(self.source, str | os.PathLike) else None

    def facts(self) -> dict[str, Any]:
        """What a recipe says of it; `as_controls` takes it again."""
        assert isinstance(self.image, Image.Image)  # as_controls has opened it
        file = getattr(self.image, "filename", None)
        image = {"image": os.path.abspath(file) if file else None, "image_sha256": fingerprint(self.image)}
        hashes = {"sha256": file_sha256(Path(self.path)), "hash": old_hash(self.path)} if self.path else {}
        return {"source": self.path, **hashes, **image, **{name: getattr(self, name) for name in KEPT[2:]}}


KEPT = ("source", "image", "strength", "start", "end", "preprocess", "kind", "guess", "where", "range")


def old_hash(path: str) -> str:
    with open_regular(path) as file:
        file.seek(HASHED_FROM)
        return hashlib.sha256(file.read(HASHED)).hexdigest()[:8]


def as_controls(given: object, ranges: Literal["steps", "noise"] = "steps") -> tuple[Control, ...]:
    """Of a list of Controls, or of what a recipe says of them: each with its picture opened, its file known for what it is.

    ranges: what start and end count where a control does not say.  Raises UsageError, CheckpointError.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise UsageError(
            f"controls: expected a list, such as [minisd.Control('canny.safetensors', picture)], found {repr(given)[:80]}"
        )
    return tuple(replace(each, range=each.range or ranges) for each in map(opened, given))


def opened(given: object) -> Control:
    control = from_recipe(given) if isinstance(given, Mapping) else given
    if not isinstance(control, Control):
        raise UsageError(f"controls: expected minisd.Control, found {repr(given)[:80]}")
    control = for_its_network(control)
    image, given_image = open_picture("controls: image", control.image), control.image
    file = given_image if isinstance(given_image, str | os.PathLike) else getattr(given_image, "filename", None)
    image.filename = file and os.fspath(file)  # type: ignore[attr-defined]  # as a picture has that PIL has opened
    return replace(control, image=image)


def for_its_network(control: Control) -> Control:
    """With the file's path, and the kind of picture if its network takes one.  Raises UsageError, CheckpointError."""
    source = control.source
    if isinstance(source, str | os.PathLike):
        path = resolve(source, "controlnet")
        checkpoint = open_checkpoint(path)
        title, names = told(checkpoint)
        control, name = replace(control, source=path), checkpoint.path.name
        guesses = title in (CONTROLNET, DIFFERENCE, CONTROL_LORA, UNION)
        kinds = checkpoint.shapes.get(names.get("task_embedding", ""), (len(KINDS),))[0] if title == UNION else 0
    elif isinstance(source, ControlNet | T2IAdapter | LLLite):
        title = name = type(source).__name__
        guesses = isinstance(source, ControlNet)
        kinds = len(source.task_embedding) if isinstance(source, ControlNetUnion) else 0
    else:
        raise UsageError(f"controls: source: expected a path or what load_control gives, found {type(source).__name__}")
    if control.guess and not guesses:
        raise UsageError(f"controls: guess: expected a ControlNet, found {name}, {title}")
    if kinds:
        return replace(control, kind=kind_for(control, name, kinds))
    if control.kind is not None:
        raise UsageError(f"controls: kind: is for a ControlNet Union, found {name}, {title}; leave it out")
    return control


def kind_for(control: Control, name: str, kinds: int) -> str:
    kind = control.preprocess if control.kind is None and control.preprocess in KINDS else control.kind
    try:
        number_of(kind, kinds)
    except UsageError as error:
        raise UsageError(f"controls: {error}: {name} is a ControlNet Union, which is told what its picture is") from None
    assert kind is not None
    return kind


def from_recipe(facts: Mapping[str, Any]) -> Control:
    """By the path of its file, else by its name; warns where that is another.  Raises UsageError, CheckpointError."""
    for name in ("source", "image"):
        if not isinstance(facts.get(name), str):
            raise UsageError(f"controls: {name}: the picture was made with one that had no file; it cannot be made again")
    control = Control(**{name: facts[name] for name in KEPT if name in facts})
    source, name = Path(facts["source"]), Path(facts["source"]).stem
    source = source if source.exists() else resolve(name, "controlnet")
    if facts.get("sha256") not in (None, file_sha256(source)):
        warnings.warn(f"{source} is not the control that this picture was made with ({name})", stacklevel=2)
    return replace(control, source=source)
