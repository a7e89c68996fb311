"""A trace taken again: where the first difference is, how large, and how it grows from step to step."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..diffusion.denoiser import Call
from ..errors import CheckpointError, MinisdError, UsageError, shown, taken_apart
from ..options import FLAG, number, whole
from ..pipeline import Pipeline, load
from ..recipe import is_same, repeat
from ..system.device import name_of
from .sketches import apart, distance, fingerprint, sketch
from .traces import Answers, Trace, read_trace, traced

BOUND = 0.01  # of a value's norm: what is further off is past it, unless somebody says otherwise
PLACE = re.compile(r"call\.(\d+)\.(.+)")
WORDS = {
    "x": "x, what the network is asked: the sampler made it of what was before",
    "denoised": "the estimate: guidance made it of the roles' answers",
    "unconditional": "the estimate for the negative prompt",
    "sigmas": "the noise levels",
    "latents": "the finished latents: the sampler's last step",
    "picture": "the picture: rounding to 256 levels, and the mask",
}


@dataclass(frozen=True)
class Difference:
    """One value that is not as the trace has it."""

    name: str
    relative: float  # the norm of the difference, as a part of the value's own; inf where there is none to compare

    def facts(self, calls: list[Call]) -> dict[str, Any]:
        found = PLACE.fullmatch(self.name)
        place, what = (int(found[1]), found[2]) if found else (None, self.name)
        known = place is not None and place < len(calls)
        if what.startswith("eps."):
            words = f"the noise that the network found for the {what.removeprefix('eps.')} prompt"
        else:
            words = WORDS.get(what, what)
        relative = self.relative if math.isfinite(self.relative) else None
        return {"step": calls[place].step if known and place is not None else None, "call": place, "what": what} | {
            "words": words, "relative": relative
        }  # fmt: skip


@dataclass
class Comparison:
    """Values as they come to be, held against those of a trace."""

    wanted: Trace
    first_call: int | None  # only from this question to the UNet on
    bound: float
    checked: int = 0
    first: Difference | None = None
    past: Difference | None = None
    by_call: dict[int, dict[str, float]] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.hashes = dict(zip(self.wanted.names, self.wanted.hashes, strict=True))

    def concerns(self, name: str) -> bool:
        """What comes before the first call is taken from the trace, and not compared."""
        if self.first_call is None:
            return True
        found = PLACE.fullmatch(name)
        later = name in ("latents", "picture") or name.startswith("first_stage_model.decoder.")
        return later if found is None else int(found[1]) >= self.first_call

    def note(self, name: str, value: Tensor, keep: bool) -> None:
        if not self.concerns(name):
            return
        self.checked += 1
        self.met.add(name)
        relative = self.relative(name, value)
        found = PLACE.fullmatch(name)
        if found and (found[2] in ("x", "denoised") or found[2].startswith("eps.")):
            row = self.by_call.setdefault(int(found[1]), {})
            what = found[2].split(".")[0]
            row[what] = max(row.get(what, 0.0), relative or 0.0)
        if relative is None:
            return
        difference = Difference(name, relative)
        self.first = self.first or difference
        if not relative <= self.bound:
            self.past = self.past or difference

    def relative(self, name: str, value: Tensor) -> float | None:
        """How far off a value is; None where it is the very same."""
        if self.hashes.get(name) == fingerprint(value):
            return None
        known = self.wanted.kept.get(name)
        if known is not None:
            return distance(value, known) if value.shape == known.shape else math.inf
        return apart(sketch(value), self.wanted.sketch_of(name)) if name in self.hashes else math.inf

    def facts(self) -> dict[str, Any]:
        lacking = [name for name in self.wanted.names if name not in self.met and self.concerns(name)]
        if lacking:
            gone = Difference(lacking[0], math.inf)
            self.first, self.past = self.first or gone, self.past or gone
        calls = self.wanted.calls
        rows = [{"step": calls[k].step, "call": k, "sigma": calls[k].sigma, **row} for k, row in sorted(self.by_call.items())
                if k < len(calls)]  # fmt: skip
        return {
            "identical": self.first is None,
            "checked": self.checked,
            "bound": self.bound,
            "first": self.first.facts(calls) if self.first else None,
            "past": self.past.facts(calls) if self.past else None,
            "calls": rows,
        }


def verify(
    path: str | os.PathLike[str],
    pipe: Pipeline | None = None,
    bound: float = BOUND,
    from_step: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Draws the picture of a trace again, and holds all that comes to be against it; facts, ready for JSON.

    pipe: what draws; by default the trace's own model, on its device and in its number format, or on `device` and in `dtype`.
    bound: a part of a value's norm.  from_step: what is before this step of the sampler, from 0, is taken from the trace, as
    is the conditioning; the network is asked from there on.
    identical: whether every value has the same bits; first: the first difference, past: the first one past the bound, each with
    `step`, `what` (a module, or x, eps.ROLE, denoised, …), `words` for it, and `relative`, the norm of the difference as a part
    of the value's own, of modules estimated from sums to about a fifth (None: nothing to compare); calls: the same of x, eps and
    denoised, call by call; surroundings: what is not as it was.
    Raises UsageError, CheckpointError, and what drawing raises.
    """
    wanted = read_trace(path)
    bound = number(0, 1e9).check("bound", bound)
    with asked_of(path):
        pipe = pipe or pipeline_of(wanted.recipe, None, device, dtype)
        with taken_apart(path):
            request = repeat(wanted.recipe, pipe.checkpoint.path)
    answers = None
    if from_step is not None:
        whole(0, wanted.steps - 1).check("from_step", from_step)
        first = next(call.index for call in wanted.calls if call.step == from_step)
        answers = Answers(wanted, first)
    comparison = Comparison(wanted, answers.first if answers else None, bound)
    with threads(wanted.threads if pipe.device.type == "cpu" else 0):
        traced(pipe, request, comparison.note, [], answers)
    recipe = wanted.recipe
    about = {"trace": os.fspath(path), "model": str(pipe.checkpoint.path), "prompt": recipe.get("prompt")}
    return about | comparison.facts() | {"surroundings": surroundings(recipe, pipe)}


@contextmanager
def asked_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Has an error about what a trace's recipe asks for name the trace."""
    try:
        yield
    except CheckpointError:
        raise
    except UsageError as error:
        raise UsageError(f"{os.fspath(path)}: its recipe: {error}") from None


def pipeline_of(recipe: dict[str, Any], model: str | None, device: str | None, dtype: str | None) -> Pipeline:
    """What a recipe was drawn with; model: another in its place."""
    vae = recipe.get("vae_paths") or recipe.get("vae_path")
    how: dict[str, Any] = {name: recipe.get(name) for name in ("prediction", "zero_snr")}
    how |= {name: recipe.get(name) is True for name in ("ema", "fp8")}
    own = device is None or device == recipe.get("device")
    for name in ("model_path", "vae_path", "device", "dtype", "prediction"):
        if recipe.get(name) is not None and not isinstance(recipe[name], str):
            raise UsageError(f"{name}: expected a text, found {repr(recipe[name])[:80]}")
    if how["zero_snr"] is not None:
        FLAG.check("zero_snr", how["zero_snr"])
    return load(
        model or recipe.get("model_path"),
        device or recipe.get("device"),
        dtype or (recipe.get("dtype") if own else None),
        vae,
        **how,
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads of the CPU as the trace was drawn with: sums are made in another order otherwise."""
    before = torch.get_num_threads()
    if not 0 < count <= 1024:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def surroundings(recipe: dict[str, Any], pipe: Pipeline) -> list[str]:
    """What is not as it was when the trace was drawn."""
    now = {"version": __version__, "torch": torch.__version__, "device": pipe.device.type, "dtype": name_of(pipe.dtype)}
    names = {"version": "minisd"}
    changed = [
        f"{names.get(name, name)} {shown(str(recipe.get(name)), 40)}, now {value}"
        for name, value in now.items()
        if recipe.get(name) != value
    ]
    return changed if is_same(recipe, pipe.checkpoint.path) else [*changed, f"model {recipe.get('model')}, now another file"]


def check_within(facts: dict[str, Any]) -> None:
    """Raises MinisdError where a value is past the bound."""
    past = facts["past"]
    if past:
        raise MinisdError(f"verify: past the bound {facts['bound']:g} {place_of(past)}: {past['words']}")


def place_of(difference: dict[str, Any]) -> str:
    where = "before the first step" if difference["call"] is None else f"at step {difference['step']} (call {difference['call']})"
    if difference["what"] in ("latents", "picture") or difference["what"].startswith("first_stage_model"):
        where = "after the last step"
    return where


def as_text(facts: dict[str, Any]) -> str:
    """As a person reads them."""
    lines = [f"{shown(facts['trace'], 300)}: {shown(repr(facts['prompt']), 300)}"]
    lines += [f"  not as it was: {each}" for each in facts["surroundings"]]
    if facts["identical"]:
        return "\n".join([*lines, f"  all of {facts['checked']:,} values identical, to the bit"])
    for name, title in (("first", "first difference"), ("past", f"first past the bound {facts['bound']:g}")):
        each = facts[name]
        if each is None:
            lines.append(f"  nothing of {facts['checked']:,} values past the bound {facts['bound']:g}")
            continue
        size = "nothing to compare" if each["relative"] is None else f"{each['relative']:.2g} of its norm"
        lines.append(f"  {title}: {place_of(each)}, {shown(each['words'], 200)}: {size}")
    lines.append(f"  {'step':>6}{'call':>6}{'sigma':>10}{'x':>11}{'eps':>11}{'estimate':>11}")
    for row in facts["calls"]:
        numbers = "".join(f"{row.get(what, 0.0):>11.2g}" for what in ("x", "eps", "denoised"))
        lines.append(f"  {row['step']:>6}{row['call']:>6}{row['sigma']:>10.4g}{numbers}")
    return "\n".join(lines)
