"""`minisd again PICTURE.png`: the same picture, from the recipe that it carries."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .draw import as_grid, report
from .models import compare_again
from .options import Parser, add_device, check_output

if TYPE_CHECKING:
    from ..pictures.found import Found
    from ..pipeline import Pipeline


def parser() -> Parser:
    made = Parser(
        prog="minisd again",
        description="Make a picture again from the recipe in its minisd chunk; one of A1111, Forge, ComfyUI, InvokeAI, kohya's "
        "scripts or stable-diffusion.cpp (PNG, JPEG, WebP) as near as minisd comes, with what it did not understand.",
    )
    made.add_argument("picture", type=Path, metavar="PICTURE.png")
    made.add_argument(
        "-o", "--output", type=Path, metavar="PNG", help="where to (default: PICTURE-again.png in the working folder)"
    )
    files = made.add_argument_group("files that are no longer at the recorded paths")
    files.add_argument("-m", "--model", metavar="FILE", help="the checkpoint, or its name in minisd models")
    files.add_argument("--vae", metavar="FILE", action="append", help="the VAE that took the place of the checkpoint's")
    files.add_argument("--refiner", metavar="FILE", help="the checkpoint that finished it")
    files.add_argument("--init", dest="init_image", metavar="PICTURE", help="the picture that it was drawn over")
    files.add_argument("--mask", metavar="PICTURE", help="the mask that it was drawn under")
    made.add_argument("--dry-run", action="store_true", help="of another program's picture: print the command, and draw nothing")
    add_device(made)
    return made


def again(args: argparse.Namespace) -> int:
    from ..pictures.foreign import ForeignPictureError
    from ..pictures.metadata import read_recipe

    try:
        recipe = read_recipe(args.picture)
    except ForeignPictureError as error:
        if error.found is None:
            raise
        return again_like(error.found, args)
    if args.dry_run:
        raise UsageError(f"--dry-run: expected a picture of another program, found {args.picture}, which minisd makes as it is")
    output = check_output(args.output, Path(f"{args.picture.stem}-again.png"))
    if "compare" in recipe:
        return compare_again(recipe, output, args)
    check_fits(recipe, args)
    from ..pictures.grids import grid
    from ..pipeline import load
    from ..recipe import repeat
    from ..result import with_bar

    device = args.device or here(recipe)
    same = device == recipe.get("device")  # another kind of device has a number format of its own
    common: dict[str, Any] = {"device": device, "dtype": args.dtype or (recipe.get("dtype") if same else None)}
    common |= {"offload": args.offload}
    how: dict[str, Any] = {name: recipe.get(name) for name in ("prediction", "zero_snr")}
    how |= {name: recipe.get(name) is True for name in ("ema", "fp8")}
    how |= {"vae": args.vae or recipe.get("vae_paths") or recipe.get("vae_path")}
    pipe = load(args.model or recipe.get("model_path"), **common, **how)
    refiner = args.refiner or recipe.get("refiner_path")
    request = repeat(recipe, pipe.checkpoint.path, {"init_image": args.init_image, "mask": args.mask})
    second = load(refiner, **common) if refiner else None
    add_embeddings([each for each in (pipe, second) if each], recipe)
    with told_of(args.picture):
        steps = pipe.stream(request, refiner=second)
    result = with_bar(steps, hidden=None)
    if "grid" in recipe:
        sheet = grid(result.images)
        result = replace(result, images=[sheet], seeds=result.seeds[:1], metadata=[as_grid(result)])
    return report(result, output, args)


def add_embeddings(pipes: Sequence[Pipeline], recipe: Mapping[str, Any]) -> None:
    from ..library.embeddings import found_again

    for name, path in map(found_again, recipe.get("embeddings") or ()):
        for pipe in pipes:
            pipe.add_embedding(path, name)


def again_like(found: Found, args: argparse.Namespace) -> int:
    """A picture of another program, as near as minisd comes: says what was understood, what was not, and what to expect."""
    from .draw import draw, parse

    print(f"minisd: {args.picture}: by {found.program}", file=sys.stderr)
    for thing, words in found.said:
        print(f"minisd:   {thing} -> {' '.join(words)}", file=sys.stderr)
    for thing in found.lacking:
        print(f"minisd:   not understood: {thing}", file=sys.stderr)
    for name in lost_words(found):
        print(f"minisd:   embedding {name!r}: not in the library, so its name is read as plain words", file=sys.stderr)
    print("minisd:   expect the same picture up to rounding at best: other kernels, other last digits", file=sys.stderr)
    given = [("-m", args.model), ("--device", args.device), ("--dtype", args.dtype), ("--init", args.init_image)]
    given += [("--vae", vae) for vae in args.vae or ()] + [("--mask", args.mask), ("--refiner", args.refiner)]
    more = [word for flag, value in given if value for word in (flag, str(value))]
    if args.dry_run:
        print(found.command(*more))
        return 0
    if "PICTURE" in found.words(*more):
        raise UsageError("init_image: the picture was drawn over another, which it does not carry; give it with --init")
    model = args.model or model_of(found)
    output = check_output(args.output, Path(f"{args.picture.stem}-again.png"))
    more += [] if args.model else ["-m", str(model)]
    flags = [flag for flag in ("offload", "json", "debug") if getattr(args, flag)]
    return draw(parse([*found.words(*more), "-o", str(output), *(f"--{flag}" for flag in flags)]))


def lost_words(found: Found) -> list[str]:
    """The embeddings that a picture's prompts named and that are in no folder called embeddings."""
    from ..library.embeddings import lying_there

    there = {name.casefold() for name in lying_there(" ".join(found.embeddings))}
    return [name for name in found.embeddings if name.casefold() not in there]


def model_of(found: Found) -> Path:
    """The checkpoint that a picture names, by its hash or else by its name.  Raises UsageError."""
    from ..errors import CheckpointError
    from ..library.names import list_models, resolve

    if found.model_hash:
        for each in list_models():
            if each.model_hash and each.model_hash.startswith(found.model_hash[:10].lower()):
                return each.path
    try:
        if found.model:
            return resolve(found.model)
    except CheckpointError:
        pass
    known = f"{found.model or 'unnamed'}{f' (hash {found.model_hash})' if found.model_hash else ''}"
    what_now = "-m FILE draws with another, --dry-run shows the command"
    raise UsageError(f"model: the picture's, {known}, is not on this machine; {what_now}")


@contextlib.contextmanager
def told_of(picture: Path) -> Iterator[None]:
    """Has errors about what the picture's recipe says name the picture; those about files name the options that replace them."""
    try:
        yield
    except UsageError as error:
        if str(error).startswith(("init_image", "mask", "refiner")):
            raise
        raise UsageError(f"{picture}: its minisd chunk: {error}") from None


def here(recipe: Mapping[str, Any]) -> str | None:
    """The device that the picture was drawn on, if this machine has it; else whatever it has, with a warning."""
    from ..system.device import to_device

    device = recipe.get("device")
    try:
        to_device(device)
    except UsageError:
        warnings.warn(f"the picture was drawn on {device!r}, which this machine has not: expect small differences", stacklevel=2)
        return None
    return device


def check_fits(recipe: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Raises UsageError where a file is given that the picture was drawn without: it would be another picture."""
    known = {"--vae": ("vae", args.vae), "--refiner": ("refiner", args.refiner)}
    known |= {"--init": ("init_sha256", args.init_image), "--mask": ("mask_sha256", args.mask)}
    for flag, (name, given) in known.items():
        if given and not recipe.get(name):
            raise UsageError(f"{flag}: expected none, as the picture was drawn without, found {given}")
