"""Examines checkpoints of the tiny world: prompts that training never saw, judged by minisd/batch/scores/judge.py.

python scripts/judge_tiny.py             (100 held-back prompts on the tiny checkpoint: half a minute on 2 CPU cores)
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tiny_world import Scene, article, caption, half_said, held_back, mask_of, outline_of, painted, training_scene

import minisd
from minisd.batch.scores.judge import Seen, look
from minisd.batch.scores.world import PLACES

SENSIBLE = 0.6  # overlap of an object with its shape; drawn ones have 0.65 or more
Question = tuple[dict[str, str], str, int]  # what must be seen, by the names of Seen's fields; prompt; seed


def exam(count: int, number: int = 0, kind: str = "said") -> list[Question]:
    """Questions about combinations that training never saw, in all wordings, each with its own seed.

    number: which exam; each has other wordings and seeds, so that one that was looked at can be put aside.
    kind: "said", everything but size and place; "place", in all of the nine places; "half", less than everything.
    """
    rng = random.Random(f"{kind} {number}")
    combinations = held_back()
    rng.shuffle(combinations)
    scenes = [Scene(*combinations[i % len(combinations)]) for i in range(count)]
    return [(*KINDS[kind](scene, rng), 1000 * (number + 1) + i) for i, scene in enumerate(scenes)]


def said(scene: Scene, rng: random.Random) -> tuple[dict[str, str], str]:
    return {"shape": scene.shape, "colour": scene.colour, "background": scene.background}, caption(scene, rng)


def with_place(scene: Scene, rng: random.Random) -> tuple[dict[str, str], str]:
    scene = replace(scene, place=rng.choice(list(PLACES)), size=rng.choice(["small", "medium"]))
    prompts = (caption(scene, rng) for _ in range(1000))
    return said(scene, rng)[0] | {"place": scene.place}, next(prompt for prompt in prompts if " the " in prompt)


def half(scene: Scene, rng: random.Random) -> tuple[dict[str, str], str]:
    prompt = half_said(scene, rng)
    words = prompt.split()
    wanted, _ = said(scene, rng)
    if f"{scene.background} background" not in prompt:
        del wanted["background"]
    return {field: word for field, word in wanted.items() if word in words}, prompt


KINDS = {"said": said, "place": with_place, "half": half}


def right(wanted: dict[str, str], seen: Seen | None) -> bool:
    """Whether a picture shows what was asked for, and an object of another colour than its background at all."""
    if seen is None or seen.colour == seen.background or seen.overlap < SENSIBLE:
        return False
    return all(getattr(seen, field) == word for field, word in wanted.items())


def examine(
    pipe: minisd.Pipeline, count: int, number: int = 0, kind: str = "said", **options: Any
) -> tuple[Image.Image, dict[str, int]]:
    """Draws `count` questions of an exam.

    Returns a sheet of the pictures, wrong ones framed in red, and how many are right: by what was asked for, and in "all".
    """
    framed: list[Image.Image] = []
    total: dict[str, int] = {}
    for wanted, prompt, seed in exam(count, number, kind):
        image = pipe(prompt, seed=seed, **options).images[0]
        seen = look(image)
        marks = {field: getattr(seen, field, None) == word for field, word in wanted.items()} | {"all": right(wanted, seen)}
        total = {field: total.get(field, 0) + marks.get(field, False) for field in [*total, *(set(marks) - set(total))]}
        if not marks["all"]:
            print(f"wrong: {prompt!r} seed {seed}: {seen}")
        framed.append(ImageOps.expand(image, 3, "white" if marks["all"] else "red"))
    width, height = framed[0].size
    sheet = Image.new("RGB", (10 * width, -(-count // 10) * height), "white")
    for i, picture in enumerate(framed):
        sheet.paste(picture, (i % 10 * width, i // 10 * height))
    return sheet, total


def examine_outlines(pipe: minisd.Pipeline, control: str, count: int, number: int = 0, **options: Any) -> dict[str, int]:
    """Draws within outlines what prompts say of the colours alone; how many pictures are right, and the colours without control.

    place: the object's middle is within 8 pixels of the outline's; size: its half side within 3.
    """
    rng, total = random.Random(f"outlines {number}"), dict.fromkeys(("place", "size", "shape", "colours", "without"), 0)
    for i in range(count):
        scene = replace(training_scene(rng), **dict(zip(("shape", "colour", "background"), rng.choice(held_back()), strict=True)))
        mask = mask_of(scene, rng)
        hint = minisd.Control(control, outline_of(mask, inside=i % 2 == 0))
        prompt = f"{article(scene.colour)} shape on {article(scene.background)} background"
        within, without = (
            look(pipe(prompt, seed=1000 * (number + 1) + i, controls=controls, **options).images[0]) for controls in ([hint], [])
        )
        wanted = look(painted(mask, scene))
        assert wanted is not None
        colours = (scene.colour, scene.background)
        total["without"] += without is not None and (without.colour, without.background) == colours
        if within is not None:
            total["place"] += math.dist(within.middle, wanted.middle) <= 8
            total["size"] += abs(within.half_side - wanted.half_side) <= 3
            total["shape"] += within.shape == scene.shape
            total["colours"] += (within.colour, within.background) == colours
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="checkpoint to judge (default: the one in the box)")
    parser.add_argument("-n", "--count", type=int, default=100)
    parser.add_argument("--exam", type=int, default=0, metavar="N", help="which exam: other wordings and seeds (default: 0)")
    parser.add_argument("--kind", choices=list(KINDS), default="said", help="what prompts say (default: all but size and place)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, help="guidance scale (default: the checkpoint's own)")
    parser.add_argument("--sheet", type=Path, help="write all pictures, wrong ones framed in red, to this PNG")
    parser.add_argument("--outlines", metavar="CONTROL", help="draw with this ControlNet within outlines, which no prompt tells")
    args = parser.parse_args()
    options = {"steps": args.steps} | ({} if args.cfg is None else {"guidance_scale": args.cfg})
    if args.outlines:
        found = examine_outlines(minisd.load(args.model), args.outlines, args.count, args.exam, **options)
        print(", ".join(f"{field} {count}" for field, count in found.items()), f"of {args.count}")
        return
    sheet, found = examine(minisd.load(args.model), args.count, args.exam, args.kind, **options)
    print(", ".join(f"{field} {count}" for field, count in found.items()), f"of {args.count}")
    if args.sheet:
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
