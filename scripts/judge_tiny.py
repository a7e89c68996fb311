"""Examines checkpoints of the tiny world: prompts that training never saw, judged by minisd/batch/scores/judge.py.

python scripts/judge_tiny.py             (100 held-back prompts on the tiny checkpoint: half a minute on 2 CPU cores)
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tiny_world import Scene, caption, held_back

import minisd
from minisd.batch.scores.judge import judge


def exam(count: int, number: int = 0) -> list[tuple[tuple[str, str, str], str, int]]:
    """(answer, prompt, seed): combinations that training never saw, in all wordings, each with its own seed.

    number: which exam; each has other wordings and seeds, so that one that was looked at can be put aside.
    """
    rng = random.Random(99 + number)
    combinations = held_back()
    rng.shuffle(combinations)
    answers = [combinations[i % len(combinations)] for i in range(count)]
    return [(answer, caption(Scene(*answer), rng), 1000 * (number + 1) + i) for i, answer in enumerate(answers)]


def examine(pipe: minisd.Pipeline, count: int, number: int = 0, **options: Any) -> tuple[Image.Image, list[int]]:
    """Draws `count` questions of an exam.

    Returns a sheet of the pictures, wrong ones framed in red, and how many are right in shape, colour, background and all three.
    """
    framed, right = [], [0, 0, 0, 0]
    for answer, prompt, seed in exam(count, number):
        image = pipe(prompt, seed=seed, **options).images[0]
        found = judge(image) or ("nothing",) * 3
        marks = [a == b for a, b in zip(answer, found, strict=True)]
        right = [total + mark for total, mark in zip(right, [*marks, all(marks)], strict=True)]
        if not all(marks):
            print(f"wrong: {prompt!r} seed {seed}: {' '.join(found)}")
        framed.append(ImageOps.expand(image, 3, "white" if all(marks) else "red"))
    width, height = framed[0].size
    sheet = Image.new("RGB", (10 * width, -(-count // 10) * height), "white")
    for i, picture in enumerate(framed):
        sheet.paste(picture, (i % 10 * width, i // 10 * height))
    return sheet, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="checkpoint to judge (default: the one in the box)")
    parser.add_argument("-n", "--count", type=int, default=100)
    parser.add_argument("--exam", type=int, default=0, metavar="N", help="which exam: other wordings and seeds (default: 0)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=7.5)
    parser.add_argument("--sheet", type=Path, help="write all pictures, wrong ones framed in red, to this PNG")
    args = parser.parse_args()
    sheet, right = examine(minisd.load(args.model), args.count, args.exam, steps=args.steps, guidance_scale=args.cfg)
    print("shape {} colour {} background {} all three {} of {}".format(*right, args.count))
    if args.sheet:
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
