"""What there is: `minisd doctor`, what a report of a fault should carry; `minisd samplers` and `minisd styles`, to choose from;
`minisd tokens "PROMPT"`, how a prompt is read; `minisd completion SHELL`: a script by which bash, zsh or fish completes commands
and options.

The script is made from the very parsers, so it cannot say anything else than they do:

    eval "$(minisd completion bash)"                                  in ~/.bashrc; likewise zsh in ~/.zshrc, after compinit
    minisd completion fish > ~/.config/fish/completions/minisd.fish
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import Parser, add_options, add_output_options

if TYPE_CHECKING:
    from ..text.added import Added

Known = Mapping[str, tuple[str, list[tuple[str, str]]]]  # what each command does, and its options
SHELLS = ("bash", "zsh", "fish")


def doctor_parser() -> Parser:
    made = Parser(
        prog="minisd doctor",
        description="This machine, what is installed, where minisd looks for models and what it keeps: for a report of a fault.",
        epilog="Opens no model and does not fail: what cannot be told says why.  The home folder is shown as ~.",
    )
    add_output_options(made)
    return made


def doctor(args: argparse.Namespace) -> int:
    from ..workbench.doctor import as_text, examined

    facts = examined()
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0


def samplers_parser() -> Parser:
    made = Parser(
        prog="minisd samplers",
        description="The samplers for --sampler: order of convergence, calls of the network a step, whether they add noise, the "
        "schedule that they take by default, their own options, and what other programs call them.",
        epilog='A name may end in a schedule: "DPM++ 2M Karras".  Names of A1111, ComfyUI, diffusers, OctoAI and '
        "stable-diffusion.cpp are known, however they are written.",
    )
    add_output_options(made)
    return made


def samplers(args: argparse.Namespace) -> int:
    from ..diffusion.samplers.facts import all_facts, as_table

    rows = all_facts()
    print(json.dumps({"samplers": rows}) if args.json else as_table(rows))
    return 0


def styles_parser() -> Parser:
    made = Parser(
        prog="minisd styles",
        description="The styles for --style: words that go around a prompt, {prompt} standing for it.",
        epilog="Own ones: a table name,prompt,negative_prompt as A1111's styles.csv, in the working folder, in A1111's own, or "
        "named by MINISD_STYLES; theirs come first.",
    )
    add_output_options(made)
    return made


def styles(args: argparse.Namespace) -> int:
    from ..library.styles import as_text, files
    from ..library.styles import styles as known

    listed = known()
    if args.json:
        entries = [vars(style) | {"source": str(style.source)} for style in listed.values()]
        print(json.dumps({"files": list(map(str, files())), "styles": entries}))
        return 0
    print(as_text(listed))
    return 0


def tokens_parser() -> Parser:
    made = Parser(
        prog="minisd tokens",
        description="How a prompt is read: the parts that AND joins, what changes at which step, chunks, tokens and weights.",
        epilog="Call k of the network, from 0, takes the first entry whose step is at least k, as A1111 has it.",
    )
    made.add_argument("prompt", metavar="PROMPT")
    made.add_argument("-m", "--model", metavar="FILE", help="whose text encoders, by its header (default: tiny, of SD 1.x)")
    made.add_argument("--as-negative", action="store_true", help="as a negative prompt: AND and a weight at its end are words")
    add_options(made, ("steps", "emphasis", "plain_prompt"))
    add_output_options(made)
    return made


def tokens(args: argparse.Namespace) -> int:
    from ..addons.embeddings import read_embeddings, with_embedding
    from ..files.checkpoint import open_checkpoint
    from ..files.recognition import recognise
    from ..library.embeddings import named_in
    from ..library.names import resolve
    from ..library.places import tiny_checkpoint
    from ..models.shapes import below
    from ..options import checked
    from ..plan import check_text, reading_of
    from ..text.grammar import all_pieces, parse
    from ..text.listing import as_text, listed

    reading = reading_of(args.emphasis, args.plain_prompt)
    check_text("negative_prompt" if args.as_negative else "prompt", args.prompt, reading)
    steps = checked("steps", args.steps)
    file = open_checkpoint(resolve(args.model) if args.model else tiny_checkpoint())
    towers = recognise(file, vae_given=True).family.towers
    shapes = [below(file.shapes, tower.name) for tower in towers]
    widths = [next(shape[1] for key, shape in each.items() if key.endswith("token_embedding.weight")) for each in shapes]
    added: Sequence[Added] = ()

    def add(path: Path, name: str) -> None:
        nonlocal added
        for embedding in read_embeddings(path, name):
            added = with_embedding(added, embedding, widths)

    for found in named_in(all_pieces(args.prompt, not args.as_negative, steps, reading), reading):
        found.teach(add)
    facts = listed(parse(args.prompt, steps, reading, joins=not args.as_negative), towers, reading, added)
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0


def completion_parser() -> Parser:
    made = Parser(prog="minisd completion", description="Print a script that teaches a shell the commands and options of minisd.")
    made.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def completion(args: argparse.Namespace, commands: Mapping[str, tuple[str, Parser]]) -> int:
    """commands: what each does, and its parser."""
    known = {name: (summary, flags(parser)) for name, (summary, parser) in commands.items()}
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](known))
    return 0


def flags(parser: Parser) -> list[tuple[str, str]]:
    """A parser's options, with what they are for."""
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return [(flag, (action.help or "").replace("%%", "%")) for action in shown for flag in action.option_strings]


def bash(commands: Known) -> str:
    cases = "\n".join(f'    {name}) words="{" ".join(flag for flag, _ in flags)}" ;;' for name, (_, flags) in commands.items())
    drawing = " ".join(flag for flag, _ in commands["draw"][1])
    return f"""\
_minisd() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words
  case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="{drawing}" ;;
  esac
  if [[ $COMP_CWORD == 1 ]]; then words="{" ".join(commands)} --help --version"; fi
  if [[ $COMP_CWORD == 1 || $word == -* ]]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}}
complete -o default -F _minisd minisd"""


def zsh(commands: Known) -> str:
    def described(pairs: list[tuple[str, str]]) -> str:
        return " ".join(quoted(f"{name}:{text}") for name, text in pairs)

    cases = "\n".join(f"    {name}) found=({described(flags)}) ;;" for name, (_, flags) in commands.items())
    names = described([(name, summary) for name, (summary, _) in commands.items()])
    return f"""\
_minisd() {{
  local -a found
  if (( CURRENT == 2 )); then found=({names}); _describe command found; return; fi
  case $words[2] in
{cases}
    *) found=({described(commands["draw"][1])}) ;;
  esac
  if [[ $PREFIX == -* ]]; then _describe option found; else _files; fi
}}
compdef _minisd minisd"""


def fish(commands: Known) -> str:
    lines = []
    for name, (summary, flags) in commands.items():
        lines.append(f"complete -c minisd -n __fish_use_subcommand -a {name} -d {quoted(summary)}")
        where = (
            f"'__fish_seen_subcommand_from {name}'"
            if name != "draw"
            else "'not __fish_seen_subcommand_from " + (" ".join(other for other in commands if other != "draw") + "'")
        )
        for flag, text in flags:
            kind = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            lines.append(f"complete -c minisd -n {where} {kind} -d {quoted(text)}")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """For a shell, in single quotes; what would end them or a description is left out."""
    return "'" + text.replace("'", "").replace("\\", "").replace("\n", " ") + "'"
