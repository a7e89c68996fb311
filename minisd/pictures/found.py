"""What was found in a picture of another program: the words of minisd for it, and what it has none for."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    program: str
    prompt: str
    negative: str
    said: tuple[tuple[str, tuple[str, ...]], ...]  # each thing as the program says it, and the words of a command for it
    lacking: tuple[str, ...] = ()  # what no word says
    like: str | None = None  # whose rules it is drawn by: one of diffusion.worlds.WORLDS
    model: str | None = None  # a name, without a path
    model_hash: str | None = None  # the first digits of the file's sha256
    embeddings: tuple[str, ...] = ()  # that its prompts named

    def words(self, *more: str) -> list[str]:
        """The arguments of `minisd draw`."""
        said = [word for _, each in self.said for word in each]
        if "--init" in more and "PICTURE" in said:
            at = said.index("PICTURE")
            said[at - 1 : at + 1] = []
        words = [*more, *(["--like", self.like] if self.like else []), *said]
        if self.negative:
            words += [f"--negative={self.negative}"] if self.negative.startswith("-") else ["-n", self.negative]
        return [*words, "--", self.prompt] if self.prompt.startswith("-") else [*words, self.prompt]

    def command(self, *more: str) -> str:
        """In one line, as a shell takes it."""
        model = ("-m", self.model) if self.model and "-m" not in more else ()
        return shlex.join(["minisd", "draw", *self.words(*more, *model)])
