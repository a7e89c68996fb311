"""Words that are added to a text encoder's vocabulary: textual inversion (Gal et al. 2022, arXiv 2208.01618).

Each stands for rows of its own, which take the place of token embeddings; here their ids go on behind the vocabulary's.
A1111 knows them by bare names (sd_hijack_clip.py, textual_inversion.py), ComfyUI as embedding:NAME (sd1_clip.py); both are
understood, bare names not in ComfyUI's dialect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError, shown
from .attention import BREAK, Piece
from .tokenizer import END_ID, TOKENS, encode

FIRST_ID = END_ID + 1
MOST_ROWS = TOKENS  # of one word: as many as a chunk holds
MARK = re.compile(r"(?:^|(?<=[ \n]))embedding:(\S+)")
Run = Callable[[Any, Tensor], Sequence[Tensor]]  # an encoder and ids (B, 77) -> every layer's output, (B, 77, D)
ENDINGS = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True)
class Added:
    """The added words of one text encoder: the ids that each stands for, by its name, and their rows (n, D)."""

    words: Mapping[str, range] = field(default_factory=dict)
    rows: Tensor | None = None

    def with_word(self, name: str, rows: Tensor) -> Added:
        """The same and one more; of two with one name the later counts."""
        before = 0 if self.rows is None else len(self.rows)
        ids = range(FIRST_ID + before, FIRST_ID + before + len(rows))
        return Added({**self.words, name: ids}, rows if self.rows is None else torch.cat([self.rows, rows]))

    def by_ids(self) -> list[tuple[list[int], range]]:
        """What each name is as tokens, the longest first."""
        found = [(encode(name), ids) for name, ids in self.words.items()]
        return sorted((pair for pair in found if pair[0]), key=lambda pair: -len(pair[0]))

    def marked(self, name: str) -> tuple[range, str]:
        """The word behind embedding:NAME, and what is left of the name as text.  Raises UsageError."""
        bare = name.rstrip(",")
        for each, rest in ((name, ""), (bare, name[len(bare) :])):
            for spelling in (each, *(each.removesuffix(ending) for ending in ENDINGS if each.endswith(ending))):
                if spelling in self.words:
                    return self.words[spelling], rest
        close = get_close_matches(bare, self.words, 1, 0.5)
        known = f"did you mean {close[0]}?" if close else f"known: {', '.join(self.words) or 'none'}; see add_embedding"
        raise UsageError(f"prompt: embedding:{shown(bare, 80)} is no embedding that is loaded; {known}")


NONE = Added()


def groups(text: str, added: Added, emphasis: str) -> list[list[list[int]]]:
    """The ids of a text in fragments, each of groups that belong together: a token alone, or the rows of an added word."""
    if emphasis == "plain":
        return [[[token] for token in encode(text)]]
    fragments: list[str | range] = []
    start = 0
    for mark in MARK.finditer(text):
        ids, rest = added.marked(mark[1])
        fragments += [text[start : mark.start()], ids]
        start = mark.end() - len(rest)
    found: list[list[list[int]]] = []
    for each in (*fragments, text[start:]):
        if isinstance(each, range):
            found.append([[*each]])
        elif each or not fragments:
            found.append([[token] for token in encode(each)] if emphasis == "comfy" else bare(encode(each), added))
    return found


def bare(ids: Sequence[int], added: Added) -> list[list[int]]:
    """Names among tokens give way to their rows."""
    names = added.by_ids() if added.words else []
    found: list[list[int]] = []
    i = 0
    while i < len(ids):
        name = next((pair for pair in names if [*ids[i : i + len(pair[0])]] == pair[0]), None)
        found.append([*name[1]] if name else [ids[i]])
        i += len(name[0]) if name else 1
    return found


def called(pieces: Iterable[Piece], added: Added, emphasis: str) -> list[str]:
    """The added words in a text, each once.  Raises UsageError for embedding:NAME that is none of them."""
    names = {ids[0]: name for name, ids in added.words.items()}
    fragments = (each for piece in pieces if piece != BREAK for each in groups(piece.text, added, emphasis))
    found = (names.get(group[0]) for fragment in fragments for group in fragment)
    return list(dict.fromkeys(name for name in found if name is not None))


def vocabulary_of(encoder: nn.Module) -> nn.Embedding:
    """Where an encoder looks its tokens up."""
    table = next(module for name, module in encoder.named_modules() if name.endswith("token_embedding"))
    assert isinstance(table, nn.Embedding)
    return table


def reading(run: Run, encoders: Sequence[nn.Module], added: Sequence[Added]) -> Run:
    """What runs an encoder, also where a text has added words."""

    def read(encoder: Any, ids: Tensor) -> Sequence[Tensor]:
        if int(ids.max()) < FIRST_ID:
            return run(encoder, ids)
        rows = next(each.rows for one, each in zip(encoders, added, strict=True) if one is encoder)
        assert rows is not None
        with extended(encoder, rows):
            return encoder.hidden_states(ids)  # type: ignore[no-any-return]

    return read


@contextmanager
def extended(encoder: nn.Module, rows: Tensor) -> Iterator[None]:
    """Within it the encoder takes ids beyond its vocabulary for these rows (n, D)."""
    table = vocabulary_of(encoder)
    asked: list[Tensor] = []

    def within(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        asked.append(args[0])
        return (args[0].masked_fill(args[0] >= FIRST_ID, 0),)

    def with_rows(_: nn.Module, __: object, output: Tensor) -> Tensor:  # (B, L, D)
        ids = asked.pop()
        return torch.where((ids >= FIRST_ID)[..., None], rows.to(output)[(ids - FIRST_ID).clamp(min=0)], output)

    hooks = table.register_forward_pre_hook(within), table.register_forward_hook(with_rows)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
