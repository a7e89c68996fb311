"""From prompts, read by a grammar, to what the network is told at which call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.denoiser import Conditioning, Timeline
from ..errors import UsageError
from .added import NONE
from .attention import Piece
from .chunks import chunked, empty
from .conditioner import Conditioner
from .emphasis import away_from, scaled
from .grammar import Part, parse
from .tokenizer import LENGTH

Words = tuple[tuple[Piece, ...], ...]  # what each text encoder reads at one time
Line = tuple[tuple[int, Words], ...]  # what one picture is told in one role: (the last call that it holds for, words)
Said = tuple[Line, Words, int]  # a line, its words at one time, and up to how many chunks its last vector is repeated


def line(part: Part, second: Part | None, encoders: int) -> Line:
    """A part of a prompt; second: what the second text encoder reads instead, where there are two."""
    if encoders == 1 or second is None:
        return tuple((entry.last, (entry.pieces,) * encoders) for entry in part.entries)
    ends = sorted({entry.last for each in (part, second) for entry in each.entries})

    def at(part: Part, last: int) -> tuple[Piece, ...]:
        return next(entry.pieces for entry in part.entries if last <= entry.last)

    return tuple((last, (at(part, last), at(second, last))) for last in ends)


class Reader:
    """The texts of some pictures, each encoded once."""

    def __init__(
        self, conditioner: Conditioner, lines: Sequence[Line], emphasis: str, clip_skip: int | None = None, chunks: int = 1
    ) -> None:
        """chunks: how many times 77 tokens the contexts are long, at least."""
        self.emphasis, towers = emphasis, conditioner.family.towers
        texts = list(dict.fromkeys(words for line in lines for _, words in line))
        self.place = {words: i for i, words in enumerate(texts)}
        known = conditioner.added or [NONE] * len(towers)
        cut = [
            [chunked(pieces, emphasis, tower.pad, added) for pieces, tower, added in zip(words, towers, known, strict=True)]
            for words in texts
        ]
        self.lengths = [max(map(len, of_encoders)) for of_encoders in cut]
        self.length = length = max(chunks, *self.lengths)
        weighs = any(set(chunk.weights) != {1.0} for of_encoders in cut for found in of_encoders for chunk in found)
        ids, self.weights = [], []  # of each encoder, (T, 77*k)
        for i, tower in enumerate(towers):
            without = [empty(tower.pad)] * length
            filled = [[*of_encoders[i], *without[len(of_encoders[i]) :]] for of_encoders in cut]
            self.weights.append(side_by_side([[chunk.weights for chunk in text] for text in filled]))
            # ComfyUI weighs against no words, which are encoded only where something is weighed.
            against = [without] if emphasis == "comfy" and weighs else []
            ids.append(side_by_side([[chunk.ids for chunk in text] for text in (*filled, *against)]))
        self.contexts, self.pooled = conditioner.read(ids, clip_skip)
        self.rows: dict[Line, dict[Words, Conditioning]] = {}
        self.batches: dict[tuple[Said, ...], Conditioning] = {}

    def chunks(self, line: Line) -> int:
        """How many a line has by itself."""
        return max(self.lengths[self.place[words]] for _, words in line)

    def timeline(self, lines: Sequence[Line], chunks: Sequence[int] | None = None, before: int = 0) -> Timeline:
        """What B pictures are told in one role, a line each.

        chunks: up to which a shorter line's last vector is repeated, as A1111 does with the parts of a prompt (prompt_parser.py,
            stack_conds); beyond are chunks of no words.
        before: calls that another network has had of these lines.
        """
        found: list[tuple[int, Conditioning]] = []
        for end in sorted({last for line in lines for last, _ in line}):
            words = [next((words for last, words in line if end <= last), line[-1][1]) for line in lines]
            conditioning = self.batch(tuple(zip(lines, words, chunks or [0] * len(lines), strict=True)))
            if found and (found[-1][1] is conditioning or found[-1][0] < 0):
                found.pop()
            found.append((end - before, conditioning))
        return Timeline(tuple(found))

    def batch(self, said: tuple[Said, ...]) -> Conditioning:
        """Some texts in one; the same object for the same texts, so that nobody takes it for another."""
        if said not in self.batches:
            rows = [self.row(*each) for each in said]
            pooled = [row.pooled for row in rows if row.pooled is not None]
            self.batches[said] = Conditioning(torch.cat([row.context for row in rows]), torch.cat(pooled) if pooled else None)
        return self.batches[said]

    def row(self, line: Line, words: Words, chunks: int) -> Conditioning:
        if line not in self.rows:
            self.rows[line] = self.encoded(line)
        row, own = self.rows[line][words], self.chunks(line)
        if own >= chunks:
            return row
        context = row.context.clone()  # (1, 77*k, D)
        context[:, own * LENGTH : chunks * LENGTH] = context[:, own * LENGTH - 1, None]
        return replace(row, context=context)

    def encoded(self, line: Line) -> dict[Words, Conditioning]:
        """The texts of a line, with their weights."""
        counts = Counter(words for _, words in line)
        places = [self.place[words] for words in counts]
        often = torch.tensor(list(counts.values()), dtype=torch.float64)
        contexts = [self.weighted(i, places, often) for i in range(len(self.contexts))]
        context = torch.cat(contexts, dim=-1).split(1)  # the encoders' channels side by side
        pooled = [None] * len(places) if self.pooled is None else self.pooled[places].split(1)
        return {words: Conditioning(*row) for words, *row in zip(counts, context, pooled, strict=True)}

    def weighted(self, encoder: int, places: list[int], counts: Tensor) -> Tensor:
        """What an encoder makes of some texts, (T, 77*k, D)."""
        z, weights = self.contexts[encoder][places], self.weights[encoder][places]
        if self.emphasis in ("ignore", "none", "plain") or bool((weights == 1).all()):
            return z
        weights = weights.to(z.device)
        if self.emphasis == "comfy":
            return away_from(self.contexts[encoder][-1], z, weights)
        return scaled(z, weights, counts, keep_mean=self.emphasis == "original")


def side_by_side(texts: Sequence[Sequence[Sequence[float]]]) -> Tensor:
    """The chunks of each text one after the other, (T, 77*k)."""
    return torch.tensor([[number for chunk in chunks for number in chunk] for chunks in texts])


def encode(conditioner: Conditioner, texts: Sequence[str], emphasis: str, clip_skip: int | None = None) -> Conditioning:
    """Texts -> context (B, 77*k, D) and pooled (B, P).  Raises UsageError for those that no one conditioning can say."""
    lines = []
    for text in texts:
        (part, *more) = parse(text, 2, emphasis).parts
        if more:
            raise UsageError("prompts: expected a text without AND, which is a matter of guidance: give it as a prompt")
        (part,) = parse(text, 2, emphasis, joins=False).parts
        if len(part.entries) > 1:
            raise UsageError("prompts: expected a text that says the same at all steps, found editing: give it as a prompt")
        lines.append(line(part, None, len(conditioner.encoders)))
    ((_, conditioning),) = Reader(conditioner, lines, emphasis, clip_skip).timeline(lines).entries
    return conditioning
