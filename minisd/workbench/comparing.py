"""One prompt drawn in many ways, in one labelled picture: checkpoints against seeds, or samplers, steps and guidance.

Columns and rows are two `Axis`; every cell is the picture that its own Request would give alone.  One checkpoint is loaded at a
time, and all of its cells are drawn before the next.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import CheckpointError, MinisdError, NonFiniteError, OutOfMemoryError, UsageError, shown
from ..files.checkpoint import open_checkpoint
from ..files.recognition import recognise
from ..library.names import resolve
from ..library.places import SUFFIXES, tiny_checkpoint
from ..options import AXES, MAX_IMAGES, TEXT, checked
from ..pictures.grids import labelled_grid
from ..pictures.image import save_png
from ..pipeline import Pipeline, load
from ..plan import RANDOM_SEEDS
from ..recipe import file_facts, repeat
from ..request import Request, request_of
from ..result import Result, Step, finish

MAX_PIXELS = 150_000_000  # of all cells; Pillow refuses to open a picture of more than 179 million

Model = str | os.PathLike[str] | None  # path or name of a checkpoint; None: the tiny one in the box

NAMES = ("model", *AXES)  # of what may be compared
EXPECTED = {"lora": "names and strengths, such as clay:0.5"}
LEFT_OPEN = ("width", "height", "spacing")  # options that every checkpoint and sampler settles for itself where nobody does
GUIDANCE = "guidance_scale"  # likewise, but for comparisons that were made before it was
FAILED = {NonFiniteError: "NaN", OutOfMemoryError: "out of memory"}  # what stands in the place of a picture


@dataclass(frozen=True)
class Axis:
    """What changes from column to column, or from row to row."""

    name: str  # one of AXES
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """From "sampler=ddim,euler", or "lora=clay:0,0.5,1" for one LoRA at three strengths.  Raises UsageError."""
        name, mark, values = text.partition("=")
        found = [value.strip() for value in values.split(",")] if mark else []
        return cls.checked(name, with_names(found) if name == "lora" else found)

    @classmethod
    def checked(cls, name: object, values: object) -> Axis:
        """An axis whose values are all of its kind.  Raises UsageError."""
        if name not in NAMES:
            raise UsageError(f"axis: expected one of {', '.join(NAMES)}, such as steps=10,20, found {shown(str(name), 100)!r}")
        kind = AXES[str(name)].kind if name != "model" else TEXT
        try:
            converted = tuple(kind.parse(str(value)) for value in values) if isinstance(values, list | tuple) else ()
        except ValueError:
            converted = ()
        if name == "lora" and converted:  # the text is what a recipe keeps
            converted = tuple(map(str, values))  # type: ignore[call-overload]
        if not converted or "" in converted:
            expected = f"{name}=A,B,… with {EXPECTED.get(name, 'names' if kind.parse is str else 'numbers')}"
            raise UsageError(f"axis: expected {expected}, found {shown(f'{name}={values}', 100)!r}")
        return cls(str(name), converted)


def with_names(values: Sequence[str]) -> list[str]:
    """Numbers alone are strengths of the LoRA before them."""
    found: list[str] = []
    for value in values:
        number = re.fullmatch(r"-?[0-9]*\.?[0-9]+", value)
        found.append(f"{AXES['lora'].kind.parse(found[-1])[0]}:{value}" if number and found else value)
    return found


@dataclass(frozen=True)
class Comparison:
    """A finished comparison; its lists go by cell, row by row."""

    sheet: Image.Image
    images: list[Image.Image | None]  # None where there is a failure
    metadata: list[dict[str, Any] | None]
    failures: list[MinisdError | None]
    recipe: dict[str, Any]  # of the sheet

    def save(self, path: str | os.PathLike[str], replace: bool = True) -> Path:
        """Writes the sheet as a PNG from which `minisd again` makes it once more; returns the path.  Raises OutputError.

        replace: False takes the next free name.
        """
        return save_png(self.sheet, path, self.recipe, replace)


@dataclass(frozen=True)
class Cells:
    """All that is to be drawn; `models` and `requests` go by cell, row by row."""

    x: Axis  # from column to column
    y: Axis  # from row to row
    models: list[Path]
    requests: list[Request]


def compare(
    prompt: str,
    models: Sequence[Model] = (None,),
    seeds: Sequence[int] = (),
    x: Axis | None = None,
    y: Axis | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: bool = False,
    **more: Any,
) -> Comparison:
    """Draws a prompt in every combination of two axes; by default checkpoints (columns) against seeds (rows).

    models: paths or names of checkpoints, None for the tiny one in the box.  seeds: by default one, at random, for all cells.
    x, y: other axes, such as Axis("sampler", ("ddim", "euler")).  Where one is given, the other is `models` or `seeds`,
        whichever has several; a third thing that changes has no place in the picture.
    more: options of `Request`, for all cells.  device, dtype, offload: see `pipeline.load`.
    NaN or too little memory for some cells does not end the others; if no cell has a picture, the first error is raised.
    Raises UsageError and CheckpointError, as far as headers tell before anything is drawn.
    """
    cells = settle_cells(request_of((prompt,), more), models, seeds, x, y)
    return finish(stream(cells, partial(load, device=device, dtype=dtype, offload=offload)))


def stream(cells: Cells, open_model: Callable[[Path], Pipeline]) -> Generator[Step, None, Comparison]:
    """Draws as a generator: yields every step, counted over all cells, and returns the Comparison (`pipeline.finish` gets it)."""
    drawn: dict[int, Result | MinisdError] = {}
    total = sum(request.steps for request in cells.requests)
    for model in dict.fromkeys(cells.models):
        own = {i: cells.requests[i] for i, path in enumerate(cells.models) if path == model}
        before = sum(cells.requests[i].steps for i in drawn)
        try:
            drawn |= yield from draw(open_model, model, own, before, total)
        except MinisdError as error:
            if not any(isinstance(cell, Result) for cell in drawn.values()):
                raise
            drawn |= dict.fromkeys(own, detached(error))  # what other checkpoints have drawn is not lost
    return finished(cells, [drawn[i] for i in range(len(cells.models))])


def draw(
    open_model: Callable[[Path], Pipeline], model: Path, requests: Mapping[int, Request], before: int, total: int
) -> Generator[Step, None, dict[int, Result | MinisdError]]:
    """The cells of one checkpoint, which is in memory for as long as this generator runs.

    before, total: steps of the cells that came before, and of all.
    """
    pipe = open_model(model)
    for request in requests.values():  # a wrong one is told before any is drawn
        pipe.stream(request).close()
    found: dict[int, Result | MinisdError] = {}
    for i, request in requests.items():
        try:
            found[i] = yield from counted(pipe.stream(request), before, total)
        except (NonFiniteError, OutOfMemoryError) as error:
            found[i] = detached(error)
        before += request.steps
    return found


def counted(steps: Generator[Step, None, Result], before: int, total: int) -> Generator[Step, None, Result]:
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        yield replace(step, index=before + step.index, total=total)


def detached(error: MinisdError) -> MinisdError:
    """The error without its traceback, which would keep the checkpoint in memory."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def finished(cells: Cells, drawn: Sequence[Result | MinisdError]) -> Comparison:
    """The labelled sheet of all cells, with its recipe.  Raises the first error if there is nothing else."""
    failures = [cell if isinstance(cell, MinisdError) else None for cell in drawn]
    images = [cell.images[0] if isinstance(cell, Result) else None for cell in drawn]
    metadata = [cell.metadata[0] if isinstance(cell, Result) else None for cell in drawn]
    if all(failures):
        raise next(failure for failure in failures if failure)
    pictures = [cell.images[0] if isinstance(cell, Result) else FAILED.get(type(cell), "failed") for cell in drawn]
    sheet = labelled_grid(pictures, labels(cells.x), labels(cells.y), shown(str(cells.requests[0].prompt), 1000))
    return Comparison(sheet, images, metadata, failures, recipe_of(cells, next(facts for facts in metadata if facts)))


def settle_cells(
    request: Request, models: Sequence[Model], seeds: Sequence[int], x: Axis | None = None, y: Axis | None = None
) -> Cells:
    """Every combination of two axes, as `compare` explains them.  Raises UsageError, CheckpointError (files)."""
    if not isinstance(request.prompt, str) or request.num_images != 1:
        raise UsageError("prompt: expected one text, and one picture of it in each cell")
    seed = request.seed if request.seed not in (None, -1) else secrets.randbelow(RANDOM_SEEDS)
    seeds = [secrets.randbelow(RANDOM_SEEDS) if each == -1 else each for each in seeds]
    x, y = settle_axes(Axis("model", tuple(models) or (None,)), Axis("seed", tuple(seeds) or (seed,)), x, y)
    x, y = (with_paths(axis) for axis in (x, y))
    if len(x.values) * len(y.values) > MAX_IMAGES:
        raise UsageError(f"compare: expected at most {MAX_IMAGES:,} cells, found {len(x.values) * len(y.values):,}")
    everywhere = {"model": path_of(models[0] if models else None), "seed": seeds[0] if seeds else seed}
    combinations: list[dict[str, Any]] = [everywhere | {x.name: column, y.name: row} for row in y.values for column in x.values]
    requests = [cell(request, each) for each in combinations]
    cells = Cells(x, y, [each["model"] for each in combinations], requests)
    check_models(cells)
    return cells


def with_paths(axis: Axis) -> Axis:
    """With files by their paths.  Raises UsageError, CheckpointError."""
    if axis.name == "model":
        return replace(axis, values=tuple(map(path_of, axis.values)))
    if axis.name == "lora":
        parsed = [AXES["lora"].kind.parse(value) for value in axis.values]
        named = [(resolve(name, "lora"), *(f"{number:g}" for number in numbers)) for name, *numbers in parsed]
        return replace(axis, values=tuple(":".join(map(str, each)) for each in named))
    return axis


def cell(request: Request, values: Mapping[str, Any]) -> Request:
    """The request of one cell; a LoRA comes to those of all."""
    changes = {AXES[name].name: value for name, value in values.items() if name not in ("model", "lora")}
    if "lora" in values:
        changes["loras"] = [*(request.loras or ()), AXES["lora"].kind.parse(values["lora"])]
    return replace(request, **changes)


def settle_axes(models: Axis, seeds: Axis, x: Axis | None, y: Axis | None) -> tuple[Axis, Axis]:
    """(columns, rows): as given; where one is not, checkpoints or seeds, those first of which there are several."""
    given = [axis.name for axis in (x, y) if axis]
    if len(set(given)) < len(given):
        raise UsageError(f"axes: expected two different ones, found {given[0]} twice")
    spare = [axis for axis in sorted((models, seeds), key=lambda axis: len(axis.values) == 1) if axis.name not in given]
    if x is None and y is None:
        return models, seeds
    chosen = [axis or spare.pop(0) for axis in (x, y)]
    for axis in (models, seeds):
        if len(axis.values) > 1 and axis not in chosen:
            others = " and ".join(other.name for other in chosen)
            raise UsageError(f"axes: expected one {axis.name} beside {others}, found {len(axis.values)}; a picture has two axes")
    return chosen[0], chosen[1]


def path_of(model: Model) -> Path:
    return tiny_checkpoint() if model is None else resolve(model)


def check_models(cells: Cells) -> None:
    """Opens every checkpoint before the first is loaded.  Raises CheckpointError, UsageError."""
    pixels = 0
    for model in dict.fromkeys(cells.models):
        found = recognise(open_checkpoint(model))
        if found.task != "draw":
            raise CheckpointError(model, f"is trained to {found.task}, expected a checkpoint that draws from text alone")
        for request in (request for request, other in zip(cells.requests, cells.models, strict=True) if other == model):
            check_size(request)
            pixels += (request.width or found.size[0]) * (request.height or found.size[1])
    if pixels > MAX_PIXELS:
        raise UsageError(f"compare: expected at most {MAX_PIXELS:,} pixels in all cells, found {pixels:,}; take fewer or smaller")


def check_size(request: Request) -> None:
    for name in ("steps", "width", "height"):
        checked(name, getattr(request, name))


def labels(axis: Axis) -> list[str]:
    """What stands at the columns or rows."""
    if axis.name == "lora":
        return [shown(of_lora(value), 200) for value in axis.values]
    if axis.name != "model":
        return [f"{axis.name} {value:g}" if isinstance(value, float) else f"{axis.name} {value}" for value in axis.values]
    for name in (lambda path: path.stem, lambda path: f"{path.parent.name}/{path.stem}"):
        found = [shown(name(path), 200) for path in axis.values]
        if len(set(found)) == len(set(axis.values)):
            return found
    return [shown(str(path), 200) for path in axis.values]


def of_lora(value: str) -> str:
    """A LoRA without its folder and suffix, and its strengths."""
    name, *strengths = os.path.basename(value).split(":")
    stem, suffix = os.path.splitext(name)
    return ":".join([stem if suffix in SUFFIXES else name, *strengths])


def recipe_of(cells: Cells, first: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of the first picture, with what changes from cell to cell."""
    axes = {
        name: {
            "name": axis.name,
            "type": "Checkpoint name" if axis.name == "model" else AXES[axis.name].axis,
            "values": labels(axis) if axis.name == "model" else axis.values,
        }
        for name, axis in (("x", cells.x), ("y", cells.y))
    }
    models = [file_facts("model", open_checkpoint(path)) for path in dict.fromkeys(cells.models)]
    asked = {name: getattr(cells.requests[0], name) for name in (*LEFT_OPEN, GUIDANCE)}
    if "lora" in (cells.x.name, cells.y.name):  # what is the same in all
        first = dict(first) | {"loras": [*first["loras"]]}
        del first["loras"][len(cells.requests[0].loras or ()) - 1]
    return dict(first) | {"compare": axes | {"models": models, "asked": asked}}


def cells_again(recipe: Mapping[str, Any]) -> Cells:
    """What the recipe of a sheet describes.  Warns where a checkpoint is no longer the one it was.

    Raises UsageError for a recipe that is not whole, CheckpointError for files that are gone.
    """
    try:
        compared = recipe["compare"]
        files = [
            {name: file[name] for name in ("model", "model_path", "model_sha256")}
            | {"model_tensors_sha256": file.get("model_tensors_sha256")}
            for file in compared["models"]
        ]
        given = [(compared[name]["name"], compared[name]["values"]) for name in ("x", "y")]
        asked = {name: compared["asked"][name] for name in LEFT_OPEN}
        asked |= {name: value for name, value in compared["asked"].items() if name == GUIDANCE}
    except (KeyError, TypeError):
        raise UsageError("the picture's minisd chunk is not that of a comparison") from None
    models = [None if file["model_path"] is None else str(file["model_path"]) for file in files] or [None]
    for model, file in zip(models, files, strict=False):
        repeat(dict(recipe) | file, open_checkpoint(path_of(model)).path)  # warns; what is no checkpoint is not hashed first
    request = repeat(dict(recipe) | asked | {"model_sha256": None, "model_tensors_sha256": None}, path_of(models[0]))
    x, y = (Axis("model", tuple(models)) if name == "model" else Axis.checked(name, values) for name, values in given)
    return settle_cells(request, models[:1], (), x, y)
