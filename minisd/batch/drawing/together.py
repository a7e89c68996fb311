"""Which rows are drawn in one call.

On a GPU those of a piece whose texts take equally many chunks of 77 tokens: in one call all are filled up to the longest, and
that changes a picture.

On a CPU four pictures at a time where they are small: a network's weights are then read, and every operation is called, once
for four.  Large pictures gain nothing by it.  Times as fast a picture, by the pixels of its latents (AMD EPYC, Zen 5, bfloat16):

    SD 1.5, two threads   2.1 (8x8), 1.4 (16x16), 1.04 (32x32), 1.01 (64x64)
    the tiny checkpoint   1.5 (16x16, one thread)

But a picture must not depend on those beside it, and the libraries that multiply promise nothing: they choose their ways by the
sizes of matrices.  So the first four rows of a kind are drawn in both ways, and only where every digit is the same it is used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import MinisdError
from ...plan import picture_size
from ...result import Result
from ...text.added import NONE
from ...text.chunks import chunked
from ...text.grammar import parse
from ...workbench.teaching import teach
from ..rows import PICTURES, Row
from ..shards import Piece, grouped, kin

if TYPE_CHECKING:
    from .drawer import Drawer

FEW = 4  # pictures of a call on a CPU
SMALL = 256  # pixels of their latents
SHOWN = {"prompt", "negative_prompt", "seed", "subseed", "steps", "guidance_scale"}


class Together:
    """What one drawer knows of it.  known: by the kind of a row, whether four in a call are to the bit those of four calls."""

    def __init__(self, drawer: Drawer) -> None:
        self.drawer = drawer
        self.known: dict[str, bool] = {}

    def calls(self, piece: Piece) -> Iterator[list[Row]]:
        if self.drawer.device.type != "cpu":
            yield from grouped(piece.rows, self.length)
            return
        for rows in grouped(piece.missing, kin):
            for group in grouped(rows, self.length) if len(rows) >= FEW else [rows]:
                yield from self.fours(group, piece.apart)

    def fours(self, rows: Sequence[Row], apart: bool) -> Iterator[list[Row]]:
        """What is left is drawn one by one: three in a call are another size than four."""
        for i in range(0, len(rows), FEW):
            four = list(rows[i : i + FEW])
            if len(four) == FEW and not apart and self.joins(four):
                yield four
            else:
                yield from ([row] for row in four)

    def joins(self, rows: Sequence[Row]) -> bool:
        """Whether four pictures may be drawn in one call on a CPU."""
        given = {**self.drawer.job.defaults, **rows[0].fields}
        if not self.known.get(self.kind(rows), True) or any(given.get(name) for name in (*PICTURES, "controls")):
            return False
        with contextlib.suppress(MinisdError, ValueError):  # the drawing says what is wrong
            model = self.drawer.model_of(rows[0]).capabilities()
            width, height = picture_size(self.drawer.request(rows[:1], None), model, None)
            return width * height <= SMALL * model.downscale**2
        return False

    def drawn(self, rows: Sequence[Row], draw: Callable[[Sequence[Row]], Result]) -> list[Result]:
        """The pictures of a call on a CPU; the first of a kind are drawn one by one as well."""
        if len(rows) == 1:
            return [draw(rows)]
        mine = self.kind(rows)
        if self.known.get(mine):
            return [draw(rows)]
        joint = None if mine in self.known else draw(rows)
        alone = [draw([row]) for row in rows]
        if joint is not None:
            self.known[mine] = all(same(joint, i, one) for i, one in enumerate(alone))
        return alone

    def kind(self, rows: Sequence[Row]) -> str:
        """What decides over the sizes of matrices: nearly all but what a picture shows.  A scale of 1 halves the batch, and of
        pictures from the same noise a part is computed once."""
        given = {**self.drawer.job.defaults, **rows[0].fields}
        scales = [row.fields.get("guidance_scale", given.get("guidance_scale")) == 1 for row in rows]
        twins = [
            [each.index(one) for one in each] for each in ([row.fields["seed"] for row in rows], [row.fields for row in rows])
        ]
        common = {name: value for name, value in given.items() if name not in SHOWN}
        return json.dumps([common, scales, twins, self.length(rows[0])], sort_keys=True, default=str)

    def length(self, row: Row) -> int:
        """How many chunks of 77 tokens the longest of its texts takes."""
        given = {**self.drawer.job.defaults, **row.fields}
        reading = "plain" if given.get("plain_prompt") else given.get("emphasis") or "original"
        found = [1]
        with contextlib.suppress(MinisdError, ValueError):  # the drawing says what is wrong
            pipe = self.drawer.model_of(row)
            teach([pipe], self.drawer.request([row], None))
            added = (pipe.conditioner.added or [NONE])[0]
            for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
                pieces = parse(given.get(name) or "", 2, reading, joins=name == "prompt").parts
                found += [len(chunked(entry.pieces, reading, 0, added)) for each in pieces for entry in each.entries]
        return max(found)


def same(joint: Result, i: int, alone: Result) -> bool:
    """Whether a picture of a call is to the bit that of its own, with the same recipe."""
    latents = torch.equal(joint.latents[i], alone.latents[0])
    return latents and joint.images[i].tobytes() == alone.images[0].tobytes() and joint.metadata[i] == alone.metadata[0]
