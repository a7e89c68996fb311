"""`minisd completion SHELL`: a script by which bash, zsh or fish completes commands and options.

Made from the very parsers, so it cannot say anything else than they do:

    eval "$(minisd completion bash)"                                  in ~/.bashrc; likewise zsh in ~/.zshrc, after compinit
    minisd completion fish > ~/.config/fish/completions/minisd.fish
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from .options import Parser

Known = Mapping[str, tuple[str, list[tuple[str, str]]]]  # what each command does, and its options
SHELLS = ("bash", "zsh", "fish")


def parser() -> Parser:
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
