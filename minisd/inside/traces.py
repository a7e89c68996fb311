"""Traces: the whole way of a picture on file, and the same way taken again beside it, up to the first difference.

A trace is a .safetensors file.  Its tensors are what conditions the UNet, the noise levels, and for every call of the UNet what
it was asked (x), the noise that it found for each role (eps) and the estimate of the finished latents; of every block of the
networks it keeps a hash and a sketch (sketches.py).  The metadata has the recipe of the picture, and the names of all of these in
the order in which they came to be, each with its hash.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ..diffusion.denoiser import Call, Conditioning, Noise, Timeline
from ..errors import CheckpointError, UsageError, taken_apart
from ..fast.engine import moments
from ..fast.ways import Moment, Walk
from ..files.checkpoint import open_checkpoint
from ..files.tensors import read_stored
from ..pipeline import Pipeline
from ..request import Request, request_of
from ..result import Result
from ..system.atomic import check_place, replacing
from .sketches import SUMS, fingerprint, parts_of, sketch
from .taps import Watched, check_pipeline

VERSION = "1"
ESTIMATES = ("denoised", "unconditional")  # the guided one, and that of the negative prompt where the sampler asks for it
Note = Callable[[str, Tensor, bool], None]  # (name, value, whether it is kept as it is)


@dataclass
class Trace:
    """What came to be on the way of a picture, in its order."""

    recipe: dict[str, Any]
    names: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)  # by name, those that are small
    sketches: list[Tensor] = field(default_factory=list)  # of the others, in their order: (1 + SUMS,) each
    calls: list[Call] = field(default_factory=list)
    threads: int = 0  # of the CPU, whose number is part of the order in which sums are made

    def note(self, name: str, value: Tensor, keep: bool) -> None:
        self.names.append(name)
        self.hashes.append(fingerprint(value))
        if keep:
            self.kept[name] = value.detach().clone().cpu().contiguous()
        else:
            self.sketches.append(sketch(value))

    def sketch_of(self, name: str) -> Tensor:
        """Of one that is not kept: (1 + SUMS,), float64."""
        if not hasattr(self, "places"):
            self.places = {each: i for i, each in enumerate(each for each in self.names if each not in self.kept)}
        return self.sketches[self.places[name]]

    @property
    def steps(self) -> int:
        return self.calls[-1].step + 1

    def write(self, path: Path) -> Path:
        """As a .safetensors file, whole or not at all.  Raises OutputError."""
        calls = [[call.index, call.step, call.sigma, call.of] for call in self.calls]
        facts = {"names": self.names, "hashes": self.hashes, "calls": calls, "threads": self.threads, "recipe": self.recipe}
        metadata = {"format": "pt", "minisd_trace": VERSION, "minisd_facts": json.dumps(facts)}
        sketches = torch.stack(self.sketches).float() if self.sketches else torch.zeros(0, 1 + SUMS)
        with replacing(path) as draft:
            mode = draft.stat().st_mode
            save_file(self.kept | {"sketches": sketches}, draft, metadata)
            draft.chmod(stat.S_IMODE(mode))  # which the library makes its own
        return path


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Raises CheckpointError for a file that is no trace."""
    file = open_checkpoint(path)
    version = file.metadata.get("minisd_trace")
    if version is None:
        raise CheckpointError(file.path, "expected a trace, found another .safetensors file", "minisd trace makes traces")
    if version != VERSION:
        raise CheckpointError(file.path, f"expected a trace of version {VERSION}, found {version[:20]!r}")
    with taken_apart(file.path):
        facts = json.loads(file.metadata["minisd_facts"])
        kept = {name: read_stored(file, name) for name in file.entries if name != "sketches"}
        sketches = list(read_stored(file, "sketches").double())
        calls = [Call(int(index), int(step), float(sigma), of) for index, step, sigma, of in facts["calls"]]
        names, hashes = [str(name) for name in facts["names"]], [str(each) for each in facts["hashes"]]
        made = Trace(dict(facts["recipe"]), names, hashes, kept, sketches, calls, int(facts["threads"]))
        if not calls or len(names) != len(hashes) or len(names) != len(kept) + len(sketches) or not kept.keys() <= set(names):
            raise ValueError("names, hashes and tensors do not fit together")
        if not all(f"call.{call.index}.{what}" in kept for call in calls for what in ("x", "denoised")):
            raise ValueError("a call of the network is missing")
    return made


def trace(pipe: Pipeline, path: str | os.PathLike[str], *given: Any, **options: Any) -> Result:
    """Draws one picture, and writes its way to a .safetensors file; returns the picture.

    given, options: what the pipeline's own call takes, for one picture without a refiner.
    Raises UsageError, OutputError, and what drawing raises.
    """
    check_pipeline(pipe)
    path, request = checked_name(path), request_of(given, options)
    made = Trace({}, threads=torch.get_num_threads())
    result = traced(pipe, request, made.note, made.calls)
    made.recipe = result.metadata[0]
    made.write(path)
    return result


def checked_name(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"output {path}: expected a name that ends in .safetensors")
    check_place(path)
    return path


def traced(pipe: Pipeline, request: Request, note: Note, calls: list[Call], answers: Answers | None = None) -> Result:
    """Draws a picture and notes all on its way.  calls: gets the questions to the UNet.  answers: of those before."""
    if request.refiner is not None or request.num_images != 1 or not isinstance(request.prompt, str):
        raise UsageError("trace: expected a text as prompt, for one picture, and no refiner")
    if request.latents is not None or callable(request.sampler) or request.guide or request.transform or request.observe:
        raise UsageError("trace: expected a request that a recipe can tell, without functions or noise of the caller's own")
    with tracing(pipe, note, calls, answers):
        result = pipe(request)
    note("picture", torch.from_numpy(np.asarray(result.images[0]).copy()), True)
    return result


@dataclass(frozen=True)
class Answers:
    """What a trace knows of the questions before one, and what conditions the UNet: a walk goes on from there."""

    of: Trace
    first: int  # the first call that the network itself answers

    def conditioning(self, role: str, i: int, like: Conditioning) -> Conditioning:
        def known(part: str, like: Tensor | None) -> Tensor | None:
            value = self.of.kept.get(f"conditioning.{role}.{i}.{part}")
            return value if value is None or like is None else value.to(like)

        context = known("context", like.context)
        assert context is not None
        return Conditioning(context, None, known("vector", like.vector), known("extra", like.extra))

    def answer(self, call: int, like: Tensor, pair: bool) -> Any:
        """What the sampler was answered: the estimate, and for one of CFG++ that of the negative prompt."""
        first, second = (self.of.kept.get(f"call.{call}.{name}") for name in ESTIMATES)
        assert first is not None
        if not pair:
            return first.to(like)
        if second is None:
            raise UsageError("from_step: the trace is of another sampler")
        return first.to(like), second.to(like)


@contextmanager
def tracing(pipe: Pipeline, note: Note, calls: list[Call], answers: Answers | None) -> Iterator[None]:
    before, own = pipe.engine, Tracing(pipe, note, calls, answers)
    pipe.engine = own
    try:
        with ExitStack() as hooks:
            for name, module in parts_of(pipe.model):
                hooks.callback(module.register_forward_hook(own.hook(name)).remove)
            yield
    finally:
        pipe.engine = before


class Tracing(Watched):
    """Draws with the modules as they stand, and notes all that comes to be."""

    def __init__(self, pipe: Pipeline, note: Note, calls: list[Call], answers: Answers | None) -> None:
        super().__init__(pipe.engine)
        self.answers, self.met = answers, dict[str, int]()
        self.write, self.calls = note, calls

    def note(self, name: str, value: Tensor, keep: bool) -> None:
        """What happens again, as a text encoder that reads many texts, gets a number."""
        self.met[name] = count = self.met.get(name, 0) + 1
        self.write(name if count == 1 else f"{name}#{count}", value, keep)

    def hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            call = self.call()
            self.note(name if call is None else f"call.{call.index}.{name}", output, False)

        see.only_looks = True  # type: ignore[attr-defined]
        return see

    def walk(self, walk: Walk, x: Tensor, noise: Noise) -> Iterator[Moment]:
        walk = replace(walk, conditioning=self.conditioned(walk), observe=self.see(walk.guide.roles))
        self.note("sigmas", walk.levels.sigmas, True)
        denoise = walk.denoiser()
        answer, first = denoise.pair if walk.sampler.pair else denoise, self.answers.first if self.answers else 0

        def ask(x: Tensor, sigma: Tensor) -> Any:
            k = len(denoise.calls)
            if self.answers and k < first:
                denoise.calls.append(self.answers.of.calls[k])
                return self.answers.answer(k, x, walk.sampler.pair)
            self.note(f"call.{k}.x", x, True)
            found = answer(x, sigma)
            self.calls.append(denoise.calls[-1])
            estimates = found if walk.sampler.pair else (found,)
            for name, estimate in zip(ESTIMATES, estimates, strict=False):
                self.note(f"call.{k}.{name}", estimate, True)
            return found

        if walk.sampler.pair:
            denoise.pair = ask  # type: ignore[method-assign]
        return self.noting_end(self.through(denoise, moments(walk, denoise, x, noise, "plain", ask)))

    def noting_end(self, steps: Iterator[Moment]) -> Iterator[Moment]:
        moment = None
        for moment in steps:
            yield moment
        if moment is not None:
            self.note("latents", moment.latents, True)

    def conditioned(self, walk: Walk) -> Sequence[Timeline]:
        """What the roles are told, noted; or as the trace has it."""
        told = []
        for role, timeline in zip(walk.guide.roles, walk.conditioning, strict=True):
            entries = []
            for i, (last, each) in enumerate(timeline.entries):
                own = self.answers.conditioning(role, i, each) if self.answers else each
                parts = {"context": own.context, "vector": own.vector, "extra": own.extra}
                for part, value in parts.items():
                    if value is not None and not self.answers:
                        self.note(f"conditioning.{role}.{i}.{part}", value, True)
                entries.append((last, own))
            told.append(Timeline(tuple(entries)))
        return told

    def see(self, roles: Sequence[str]) -> Callable[[Call, Tensor, Sequence[Tensor]], None]:
        """Notes the noise that each role found: x = x_0 + sigma eps."""

        def seen(call: Call, x: Tensor, estimates: Sequence[Tensor]) -> None:
            named = roles if len(estimates) == len(roles) else roles[-len(estimates) :]
            for role, estimate in zip(named, estimates, strict=True):
                self.note(f"call.{call.index}.eps.{role}", (x - estimate) / call.sigma, True)

        return seen


def picture_of(trace: Trace) -> Image.Image:
    return Image.fromarray(trace.kept["picture"].numpy())
