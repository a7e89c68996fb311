"""The commands that work on checkpoint files: inspect, save, convert, merge, diff.  Each is a thin call of a Python function."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import OPTIONS
from .options import Parser, add_output_options, add_training, byte_bar, size

if TYPE_CHECKING:
    import torch

DTYPE = "float32, bfloat16, float16, float8_e4m3fn or float8_e5m2"


def inspect_parser() -> Parser:
    parser = Parser(prog="minisd inspect", description="What a checkpoint is, from its header alone; what a LoRA is.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="also look for NaN and infinity (reads the whole file)")
    parser.add_argument(
        "--hash", action="store_true", help="also the model hashes, A1111's legacy one, too (reads the whole file)"
    )
    parser.add_argument("--tree", action="store_true", help="also block by block; with --check also how large the numbers are")
    parser.add_argument("--size", type=size, metavar="WxH", help="of the picture whose arithmetic --tree counts")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="a drawing of its UNet: blocks, skips, shapes, arithmetic")
    parser.add_argument("-m", "--model", metavar="CHECKPOINT", help="of a LoRA: also what it does to this checkpoint")
    add_output_options(parser)
    return parser


def inspect(args: argparse.Namespace) -> int:
    from ..library.names import resolve
    from ..workbench.inspecting import as_text, inspect

    if args.plot:
        from ..inside.shown.files import check_svg, write_text
        from ..inside.shown.unet_map import blueprint_of, drawn

        check_svg(args.plot)
        write_text(args.plot, drawn(blueprint_of(resolve(args.file), args.size)))
    facts = inspect(resolve(args.file), args.hash, args.check, args.tree, args.size)
    text = as_text(facts)
    if facts["looks_like"].startswith("a LoRA"):
        from ..workbench.loras import doctor

        facts["lora"] = doctor.examined(facts["path"], resolve(args.model) if args.model else None)
        text += "\n" + doctor.as_text(facts["lora"])
    elif args.model:
        raise UsageError(f"model: expected with a LoRA, found {facts['looks_like']}")
    print(json.dumps(facts) if args.json else text)
    return 0


def convert_parser() -> Parser:
    parser = Parser(
        prog="minisd convert", description="Write a checkpoint anew as .safetensors: another dtype, pruned, with another VAE."
    )
    parser.add_argument("file", metavar="FILE", help="a .safetensors or .ckpt checkpoint, or a folder of diffusers")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.safetensors", help="where to, over what is there"
    )
    parser.add_argument("--diffusers", action="store_true", help="to a folder of diffusers instead")
    add_writing_options(parser)
    parser.add_argument("--prune", action="store_true", help="leave out what nobody needs to draw")
    return parser


def convert(args: argparse.Namespace) -> int:
    from ..workbench.converting import convert
    from ..workbench.folders.folder import from_folder, to_folder

    dtype = stored_dtype(args.dtype)
    source, vae, text = files(args.file, args.vae, args.text)
    if source.is_dir() or args.diffusers:
        if args.prune or vae or text or args.prediction or args.zero_snr is not None:
            given = "--prune, --vae, --text, --prediction, --zero-snr"
            raise UsageError(f"{given}: expected with files on both sides; convert once more")
        with byte_bar("converting") as tell:
            print((from_folder if source.is_dir() else to_folder)(source, args.output, dtype, tell))
        return 0
    tell_replaced(args.output, [each for each in (source, vae, text) if each])
    with byte_bar("converting") as tell:
        path = convert(source, args.output, dtype, args.prune, vae, text, tell, args.prediction, args.zero_snr)
    return written(path, source if dtype and dtype.itemsize == 1 else None)


def save_parser() -> Parser:
    parser = Parser(
        prog="minisd save", description="Put a checkpoint together: a model, and the VAE or text encoders of other files."
    )
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="the checkpoint that the rest comes from")
    parser.add_argument(
        "--filename-prefix",
        default="checkpoints/minisd",
        metavar="PREFIX",
        help="folder and beginning of the name; a number follows, as ComfyUI gives it (default: checkpoints/minisd)",
    )
    add_writing_options(parser)
    return parser


def save(args: argparse.Namespace) -> int:
    from ..workbench.converting import save

    dtype = stored_dtype(args.dtype)
    source, vae, text = files(args.model, args.vae, args.text)
    with byte_bar("saving") as tell:
        path = save(source, args.filename_prefix, dtype, vae, text, tell, prediction=args.prediction, zero_snr=args.zero_snr)
    return written(path, source if dtype and dtype.itemsize == 1 else None)


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", metavar="NAME", help=f"{DTYPE} (default: what the file has)")
    parser.add_argument("--vae", metavar="FILE", help="with the VAE of this file")
    parser.add_argument("--text", metavar="FILE", help="with the text encoders of this checkpoint")
    add_training(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def files(source: str, vae: str | None, text: str | None) -> tuple[Path, Path | None, Path | None]:
    """The paths of what was named by path or by name."""
    from ..library.names import resolve

    return resolve(source), resolve(vae, "vae") if vae else None, resolve(text) if text else None


def stored_dtype(name: str | None) -> torch.dtype | None:
    from ..workbench.converting import STORABLE

    if name is not None and name not in STORABLE:
        raise UsageError(f"dtype: expected {DTYPE}, found {name!r}")
    return STORABLE[name] if name else None


def tell_replaced(output: Path, sources: Sequence[Path]) -> None:
    """Says beforehand that a source is about to go: the new file takes its place once it is whole."""
    if output.exists() and any(output.samefile(source) for source in sources if source.exists()):
        print(f"minisd: the result will take the place of {output}, which it is made from", file=sys.stderr)


def written(path: Path, source: Path | None) -> int:
    """Says where the result is and, where it was made coarser from `source`, by how much."""
    if source is not None and not path.samefile(source):
        from ..workbench.differing import diff, percent

        changes = [f"{part} {percent(facts['change'])}" for part, facts in diff(source, path)["parts"].items()]
        print(f"minisd: relative change: {', '.join(changes)}", file=sys.stderr)
    print(path)
    return 0


def merge_parser() -> Parser:
    parser = Parser(
        prog="minisd merge",
        description="Mix checkpoints: (1 - R) A + R B, or with --base C what B learned since C on top: A + R (B - C).",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="the first decides keys, dtype and metadata")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.safetensors", help="where to, over what is there"
    )
    parser.add_argument(
        "--ratio", type=float, action="append", default=[], metavar="R",
        help="how much of the second model; again for a third (default: equal shares; with --base 1)",
    )  # fmt: skip
    parser.add_argument("--base", metavar="C", help="mix what the models learned since this one")
    parser.add_argument("--method", default="weighted", metavar="NAME", help="weighted, slerp, ties or dare (default: weighted)")
    for part, what in (("unet", "UNet"), ("text", "text encoders"), ("vae", "VAE")):
        parser.add_argument(f"--{part}-ratio", type=float, metavar="R", help=f"another ratio for the {what}")
    parser.add_argument(
        "--blocks", metavar="RATIOS",
        help="ratios for blocks of the UNet: input.0-3=0.2,middle=0.5,output=1 (what stands outside of them, time_embed, "
        "label_emb and out, keeps the UNet's ratio unless it is named, too); or a number for each; or grad_v, grad_a, "
        "smoothstep, cosine, reverse-smoothstep, reverse-cosine, inputs, outputs; or comfy:INPUT,MIDDLE,OUT, the numbers of "
        "ComfyUI's ModelMergeBlocks, which say how much of the first model is kept",
    )  # fmt: skip
    parser.add_argument("--density", type=float, metavar="D", help="ties, dare: the part of the changes to keep (0.2, 0.1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="dare: of the choice (default: 0)")
    parser.add_argument("--dtype", metavar="NAME", help=f"{DTYPE} (default: the first model's)")
    add_training(parser, "the models differ, or a file")
    lora = OPTIONS["loras"]
    parser.add_argument(
        "--lora", dest="loras", type=lora.kind.parse, action="append", metavar=lora.metavar,
        help="with one model: put this into its weights, with its strength and another for the text; may be repeated",
    )  # fmt: skip
    parser.add_argument("--lora-blocks", metavar="SPEC", help="what multiplies it in blocks of the UNet, as --blocks names them")
    parser.add_argument("--lora-rule", default="paper", metavar="NAME", help="paper (default) or comfyui")
    parser.add_argument("--lora-partial", action="store_true", help="take of a LoRA what fits, where else it is refused")
    parser.add_argument("--from", dest="recipe", metavar="FILE", help="repeat the merge that made this file, from its sources")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def merge(args: argparse.Namespace) -> int:
    from ..library.names import resolve
    from ..library.places import model_files
    from ..workbench.merging import PARTS, merge, repeat

    by_part = {part: value for part in PARTS if (value := getattr(args, f"{part}_ratio")) is not None}
    models, base = [resolve(model) for model in args.models], resolve(args.base) if args.base else None
    tell_replaced(args.output, [*models, *([base] if base else [])])
    if args.loras:
        return merge_loras(args, models)
    options = (args.ratio, base, args.method, by_part, args.blocks, args.density, args.seed, stored_dtype(args.dtype))
    with byte_bar("merging") as tell:
        if args.recipe is None:
            said = {"prediction": args.prediction, "zero_snr": args.zero_snr}
            print(merge(models, args.output, *options, progress=tell, **said))
        elif models or any(options[:2]) or by_part or args.blocks or args.prediction or args.zero_snr is not None:
            raise UsageError("merge: expected models and ratios, or --from FILE, which has its own; found both")
        else:
            merged = resolve(args.recipe)
            tell_replaced(args.output, [merged])
            folders = [merged.parent, Path(), *{file.path.parent: None for file in model_files()}]
            print(repeat(merged, args.output, folders, tell))
    return 0


def merge_loras(args: argparse.Namespace, models: Sequence[Path]) -> int:
    """LoRAs into the weights of one checkpoint."""
    from ..addons.wanted import as_loras
    from ..workbench.loras.baking import bake

    others = (args.ratio, args.base, args.blocks, args.recipe, args.density, args.prediction, args.zero_snr)
    if len(models) != 1 or any(other not in (None, []) for other in others):
        raise UsageError(f"--lora: expected one model and no other recipe, found {len(models)} models; mix them first")
    loras = [replace(lora, blocks=args.lora_blocks) for lora in as_loras(args.loras)]
    with byte_bar("merging") as tell:
        print(bake(models[0], loras, args.output, stored_dtype(args.dtype), args.lora_rule, args.lora_partial, tell))
    return 0


def diff_parser() -> Parser:
    parser = Parser(prog="minisd diff", description="What is different between two checkpoints, and how much.")
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="a picture of it: the blocks of the UNet, darker where they differ"
    )
    add_output_options(parser)
    return parser


def diff(args: argparse.Namespace) -> int:
    from ..library.names import resolve
    from ..workbench.differing import as_text, diff, heat_map

    if args.plot:
        from ..pictures.image import check_writable, save_png

        check_writable(args.plot)
    with byte_bar("comparing") as tell:
        facts = diff(resolve(args.a), resolve(args.b), tell)
    if args.plot:
        save_png(heat_map(facts), args.plot, None)
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0
