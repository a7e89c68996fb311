"""Cross-attention maps: where the pixels of a picture look in its prompt, word by word, layer by layer, step by step.

In every cross-attention each pixel spreads a weight of 1 over the 77 tokens (or k times 77).  A word's map is the sum over its
tokens, in the mean over the heads (Hertz et al. 2022, arXiv 2208.01626, section 3.1; Tang et al. 2022, arXiv 2210.04885).  The
weights themselves are never kept: head by head they are added up, or a kernel does that while it attends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..addons.wanted import wanted
from ..errors import UsageError
from ..fast import choice
from ..fast.operations import has_copy_engine
from ..models import ops
from ..models.unet import CrossAttention
from ..pipeline import Pipeline
from ..plan import Plan, planned
from ..request import request_of
from ..result import Result
from ..text.added import NONE
from ..text.chunks import chunked
from ..text.grammar import parse
from ..text.listing import words as spelled
from ..text.tokenizer import END_ID, LENGTH, bpe, encode
from ..walks import course
from .taps import Watched, check_pipeline, watched

Groups = Callable[[int, int], Tensor]  # (the call of the UNet, how many tokens S) -> (S, W), 1 where a token belongs to a word
START, END = "<start>", "<end>"  # what stands before and behind the words; every row of the end belongs to it


@dataclass(frozen=True)
class Attention:
    """Where a picture's pixels looked.  maps: by the name of a layer (steps, words, h, w), in the mean over heads and calls."""

    result: Result
    words: tuple[str, ...]
    maps: dict[str, Tensor]
    size: tuple[int, int]  # (h, w) of the latents

    def of(self, word: str, layer: str | None = None, step: int | None = None) -> Tensor:
        """A word's map (h, w) at the size of the latents: of a layer and a step, or in the mean over all.  Raises UsageError."""
        if word not in self.words:
            raise UsageError(f"word: expected one of {', '.join(map(repr, self.words))}, found {word!r}")
        if layer is not None and layer not in self.maps:
            raise UsageError(f"layer: expected one of {', '.join(self.maps)}, found {layer!r}")
        chosen = self.maps.values() if layer is None else [self.maps[layer]]
        steps = len(next(iter(self.maps.values())))
        if step is not None and not -steps <= step < steps:
            raise UsageError(f"step: expected one of {steps}, from 0, found {step}")
        place = self.words.index(word)
        rows = [maps[:, place] if step is None else maps[[step], place] for maps in chosen]  # (steps, h, w) each
        sized = [F.interpolate(each.mean(0)[None, None], self.size, mode="bilinear")[0, 0] for each in rows]
        return torch.stack(sized).mean(0)


@dataclass
class Columns:
    """Adds up, while a picture is drawn, what every cross-attention gives to groups of tokens."""

    engine: Watched
    at: Groups
    size: tuple[int, int]
    queries: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # by layer and step: (W, h, w)
    counts: dict[str, dict[int, int]] = field(default_factory=dict)
    now: tuple[int, str] | None = None  # the thread and the layer that attends, for the kernel

    def add(self, layer: str, found: Tensor) -> None:
        """found: (W, L)."""
        call = self.engine.call()
        assert call is not None
        found = found.detach().float().cpu().view(len(found), *map_size(found.shape[1], self.size))
        sums, counts = self.sums.setdefault(layer, {}), self.counts.setdefault(layer, {})
        sums[call.step] = sums[call.step] + found if call.step in sums else found
        counts[call.step] = counts.get(call.step, 0) + 1

    def groups(self, keys: Tensor) -> Tensor:
        """For keys (B, S, C): (S, W)."""
        call = self.engine.call()
        assert call is not None
        return self.at(call.index, keys.shape[1]).to(keys.device)

    def see_query(self, layer: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self.engine.call() is not None:
            self.queries[layer] = output[-1:]  # of the prompt, whose row is the last

    def see_key(self, layer: str, heads: int, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        query = self.queries.pop(layer, None)
        if query is not None:
            self.add(layer, summed(query, output[-1:], self.groups(output), heads))

    def begin(self, layer: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.now = (threading.get_ident(), layer) if self.engine.call() is not None else None

    def end(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.now = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
        """`ops.attention` by the kernel that sums the columns while it attends."""
        assert self.now is not None
        apart = [x.contiguous() for x in ops.split_heads(heads, q, k, v)]
        out, columns = choice.kernels().attention_columns(*apart, self.groups(k))
        self.add(self.now[1], columns[-1])
        return ops.joined_heads(out)

    def maps(self) -> dict[str, Tensor]:
        """By layer: (steps, W, h, w)."""
        return {
            layer: torch.stack([sums[step] / self.counts[layer][step] for step in sorted(sums)])
            for layer, sums in self.sums.items()
        }


def summed(q: Tensor, k: Tensor, groups: Tensor, heads: int) -> Tensor:
    """q (1, L, C), k (1, S, C), groups (S, W) -> (W, L): the weights of one head after the other, added up by group."""
    (q,), (k,) = ops.split_heads(heads, q.float(), k.float())
    total = q.new_zeros(q.shape[1], groups.shape[1])  # (L, W)
    for query, key in zip(q, k, strict=True):
        total += (query @ key.T * query.shape[-1] ** -0.5).softmax(-1) @ groups
    return (total / heads).T


def map_size(length: int, size: tuple[int, int]) -> tuple[int, int]:
    """The height and width of a feature map of so many pixels: those of the latents, halved a few times, as the UNet halves."""
    height, width = size
    while height * width > length:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != length:
        raise UsageError(f"attention: expected feature maps of {size[0]}x{size[1]} latents, halved; found {length} pixels")
    return height, width


def attention(
    pipe: Pipeline, *given: Any, words: Sequence[str] | None = None, kernel: bool | None = None, **options: Any
) -> Attention:
    """Draws one picture, and keeps where its pixels looked.

    given, options: what the pipeline's own call takes, for one picture, a text as prompt, without AND and without a refiner.
    words: of the prompt, or some of them in a row; by default all, with what stands before and behind: their maps sum to 1.
    kernel: whether a Triton kernel sums up while it attends, so that no weights are ever written; by default on a GPU that can.
    Raises UsageError, and what drawing raises.
    """
    check_pipeline(pipe)
    request, _ = wanted(request_of(given, options), pipe.stack.kept)  # which takes <lora:…> out of the prompt
    if not isinstance(request.prompt, str) or request.num_images != 1 or request.refiner is not None:
        raise UsageError("attention: expected a text as prompt, for one picture, and no refiner")
    plan = planned(request, pipe.capabilities())
    named, groups = grouped(pipe, plan, words)
    kernel = suits(pipe) if kernel is None else kernel
    if kernel:
        with choice.using("attention"):
            choice.wants("attention", pipe.device)  # says what is missing
    size = plan.shape[1], plan.shape[2]
    with collecting(pipe, groups, size, kernel) as columns:
        result = pipe(replace(request, seed=plan.seeds[0]))
    return Attention(result, named, columns.maps(), size)


def suits(pipe: Pipeline) -> bool:
    """Whether the kernel is for the GPU that draws: it fetches by a copy engine, as Hopper and later ones have it."""
    return pipe.device.type == "cuda" and choice.triton_builds() and has_copy_engine(torch.empty(0, device=pipe.device))


def grouped(pipe: Pipeline, plan: Plan, words: Sequence[str] | None) -> tuple[tuple[str, ...], Groups]:
    """The words whose maps are wanted, and which tokens are theirs at each call.  Raises UsageError."""
    parts = parse(plan.prompts[0], course(plan, pipe)[0].calls, plan.reading).parts
    if len(parts) != 1:
        raise UsageError("attention: expected a prompt without AND, whose parts are several")
    tower, added = pipe.family.towers[0], (pipe.conditioner.added or [NONE])[0]
    entries = []  # (the last call that it holds for, ids)
    for entry in parts[0].entries:
        chunks = chunked(entry.pieces, plan.reading, tower.pad, added)
        entries.append((entry.last, [token for chunk in chunks for token in chunk.ids]))
    named = tuple(words) if words is not None else tuple(dict.fromkeys(each for _, ids in entries for each in labels(ids)))
    places = [(last, [columns_of(word, ids) for word in named]) for last, ids in entries]
    for i, word in enumerate(named):
        if not any(found[i] for _, found in places):
            known = ", ".join(dict.fromkeys(each for _, ids in entries for each in labels(ids)))
            raise UsageError(f"words: expected words of the prompt ({known}), found {word!r}"[:500])

    def at(call: int, length: int) -> Tensor:
        found = next((columns for last, columns in places if call <= last), places[-1][1])
        known = len(next(ids for last, ids in entries if call <= last or last == entries[-1][0]))
        groups = torch.zeros(length, len(named))
        for i, columns in enumerate(found):
            groups[list(columns), i] = 1
            if named[i] in (START, END):  # of the chunks that another prompt has more
                more = [place for place in range(known, length) if (place % LENGTH == 0) == (named[i] == START)]
                groups[more, i] = 1
        return groups

    return named, at


def labels(ids: Sequence[int]) -> list[str]:
    """The word that each token belongs to; a word of several tokens is whole at the last of them."""
    found: list[str] = []
    for first in range(0, len(ids), LENGTH):
        chunk = ids[first : first + LENGTH]
        end = chunk.index(END_ID) if END_ID in chunk else LENGTH
        found.append(START)
        run: list[int] = []
        for token in chunk[1:end]:
            run.append(token)
            letters = bpe().id_to_token(token)
            if letters is None or letters.endswith("</w>"):
                found += [spelled(run) if letters else "[row]"] * len(run)
                run = []
        found += [spelled(run)] * len(run) + [END] * (len(chunk) - end)
    return found


def columns_of(word: str, ids: Sequence[int]) -> set[int]:
    """The places of a word's tokens, or of several words in a row, wherever they stand."""
    known = labels(ids)
    if word in known:
        return {place for place, label in enumerate(known) if label == word}
    wanted = encode(word)
    starts = [i for i in range(len(ids)) if wanted and list(ids[i : i + len(wanted)]) == wanted and known[i] != END]
    return {start + i for start in starts for i in range(len(wanted))}


@contextmanager
def collecting(pipe: Pipeline, at: Groups, size: tuple[int, int], kernel: bool) -> Iterator[Columns]:
    """Has the cross-attentions of a pipeline add up what they give to groups of tokens, for the length of a with block."""
    layers = {name: each for name, each in pipe.model.named_modules() if name.endswith(".attn2")}
    if not layers:
        raise UsageError("attention: expected a UNet with cross-attention, found none")
    with watched(pipe) as engine, ExitStack() as undo:
        columns = Columns(engine, at, size)
        for name, module in layers.items():
            assert isinstance(module, CrossAttention)
            if kernel:
                undo.callback(module.register_forward_pre_hook(partial(columns.begin, name)).remove)
                undo.callback(module.register_forward_hook(columns.end).remove)
                continue
            looks = (module.to_q, partial(columns.see_query, name)), (module.to_k, partial(columns.see_key, name, module.heads))
            for each, look in looks:
                look.only_looks = True  # type: ignore[attr-defined]  # fast/ways.py, hooked
                undo.callback(each.register_forward_hook(look).remove)
        if kernel:
            before = ops.REPLACEMENTS["attention"]
            undo.callback(ops.REPLACEMENTS.__setitem__, "attention", before)

            def ask(*tensors: Any, **options: Any) -> Any:
                ours = columns.now is not None and columns.now[0] == threading.get_ident()
                return columns.attend if ours else before(*tensors, **options)

            ops.REPLACEMENTS["attention"] = ask
        yield columns
