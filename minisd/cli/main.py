"""The command line.  Every command is a thin call of a Python function, imported when it is needed: --help stays fast.

stdout carries data (the path of a picture, JSON), everything else goes to stderr.  Exit codes: 0 done, 1 other errors,
2 wrong usage, 3 bad checkpoint, 4 out of memory, 5 NaN, 6 output could not be written, 130 interrupted (143 by SIGTERM, 129 by
SIGHUP), 141 nobody reads stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from .. import __version__
from ..errors import NO_THREAD, THREADLESS, MinisdError, OutOfMemoryError, OutputError, UsageError, is_lack_of_memory
from . import about, again, bench, draw, files, lora, models, serve
from .inside import attend, explain, numerics, traces
from .options import Parser, one_line, with_flags
from .streams import careful_streams, ended_by_signals
from .work import batch, score, warm

CLOSED = 141  # as the shell counts SIGPIPE
LEAST = 700 << 20  # bytes of address space: with less, the libraries that torch loads may end the process by themselves
WITHOUT_TORCH = ("inspect", "models", "styles", "completion")

EXAMPLES = """\
examples:
  minisd "a red circle on a blue background"
  minisd "a photograph of an astronaut riding a horse" -m v1-5-pruned-emaonly.safetensors --steps 30 --seed 7
  minisd "the same in winter" -m sd_xl_base_1.0.safetensors --refiner sd_xl_refiner_1.0.safetensors --init photo.jpg
"""


@dataclass(frozen=True)
class Command:
    usage: str
    summary: str
    parser: Callable[[], Parser]
    run: Callable[[argparse.Namespace], int]
    parse: Callable[[Sequence[str]], argparse.Namespace] | None = None  # where the parser alone does not say it all


COMMANDS = {
    "draw": Command('"PROMPT" [...]', 'draw (draw may be left out: minisd "PROMPT")', draw.parser, draw.draw, draw.parse),
    "again": Command("PICTURE.png", "make a picture again from the recipe that it carries", again.parser, again.again),
    "inspect": Command("FILE", "what a checkpoint is, and why, from its header alone", files.inspect_parser, files.inspect),
    "diff": Command("A B", "what is different between two checkpoints, and how much", files.diff_parser, files.diff),
    "merge": Command("A B -o OUT", "mix checkpoints", files.merge_parser, files.merge),
    "convert": Command(
        "FILE -o OUT",
        "write it anew as .safetensors: another dtype, pruned, with another VAE",
        files.convert_parser,
        files.convert,
    ),
    "save": Command("-m FILE", "put a checkpoint together from parts, under the next free number", files.save_parser, files.save),
    "lora": Command(
        "extract A B -o OUT", "LoRAs: out of two checkpoints, smaller, several as one, with other names", lora.parser, lora.lora
    ),
    "compare": Command(
        '"PROMPT" …', "checkpoints against seeds, or over other settings: one picture", models.compare_parser, models.compare
    ),
    "batch": Command("MANIFEST -o OUT", "draw every row of a file of prompts, on one machine or many", batch.parser, batch.batch),
    "score": Command("FOLDER …", "what batches have drawn, in numbers for every model", score.parser, score.score),
    "tokens": Command(
        '"PROMPT"', "how a prompt is read: its parts, steps, chunks, tokens and weights", about.tokens_parser, about.tokens
    ),
    "trace": Command('"PROMPT" -o OUT', "draw, and keep the whole way on file", traces.trace_parser, traces.trace),
    "verify": Command("TRACE", "draw a trace again: the first difference, and how large", traces.verify_parser, traces.verify),
    "explain": Command(
        '"PROMPT" -o HTML',
        "draw, and write a page that follows the picture through the machine",
        explain.explain_parser,
        explain.explain,
    ),
    "attend": Command(
        '"PROMPT" -o PNG', "draw, and show where the pixels look in the prompt, word by word", attend.attend_parser, attend.attend
    ),
    "numerics": Command(
        "--a float32 --b bfloat16",
        "two ways to compute, layer by layer: where errors enter; --nan",
        numerics.numerics_parser,
        numerics.numerics,
    ),
    "models": Command(
        "[add FILE]", "what models there are on this machine; import one", models.models_parser, models.models, models.parse
    ),
    "bench": Command(
        "WHAT", "how fast this machine draws, beside its limits and diffusers", bench.parser, bench.bench, bench.parsed
    ),
    "warm": Command("[MODEL …]", "compile the kernels that models launch, before anybody draws", warm.parser, warm.warm),
    "samplers": Command(
        "", "which samplers there are, and what they are called elsewhere", about.samplers_parser, about.samplers
    ),
    "styles": Command("", "which styles there are: words that go around a prompt", about.styles_parser, about.styles),
    "serve": Command(
        "[-m NAME …]", "draw for programs, over HTTP: the APIs of OctoAI, A1111 and OpenAI", serve.parser, serve.serve
    ),
    "doctor": Command("", "this machine and what is installed: for a report of a fault", about.doctor_parser, about.doctor),
    "completion": Command(
        "SHELL", "what teaches bash, zsh or fish these commands and options", about.completion_parser, lambda args: complete(args)
    ),
}


def complete(args: argparse.Namespace) -> int:
    return about.completion(args, {name: (command.summary, command.parser()) for name, command in COMMANDS.items()})


def help_text() -> str:
    """The commands first, then what may be said of a drawing."""
    rows = [(f"minisd {name} {command.usage}", command.summary) for name, command in COMMANDS.items()]
    wide = max(len(usage) for usage, _ in rows)
    commands = "\n".join(f"  {usage.ljust(wide)}  {summary}" for usage, summary in rows)
    version = f"{'minisd -V, --version'.ljust(wide)}  which minisd this is"
    drawing = draw.parser().format_help().partition("options:\n")[2]
    return (
        'usage: minisd "PROMPT" [options], or minisd COMMAND …  (minisd COMMAND --help)\n\n'
        f"minisd {__version__}: opens a raw Stable Diffusion checkpoint and draws.\n\n"
        f"commands:\n{commands}\n  {version}\n\noptions of a drawing:\n{drawing}\n{EXAMPLES}"
    )


def run(arguments: Sequence[str]) -> int:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if first in ("-V", "--version", "version"):
        print(f"minisd {__version__}")
        return 0
    if first not in WITHOUT_TORCH:
        check_address_space()
        check_working_folder(first)
    command = COMMANDS.get(first)
    if command is None:
        check_no_command(arguments)
        return draw.draw(draw.parse(arguments))
    parse = command.parse or command.parser().parse_args
    return command.run(parse(arguments[1:]))


def check_working_folder(command: str) -> None:
    """Raises UsageError where it was deleted: libraries that torch loads end the process there by themselves."""
    try:
        os.getcwd()
    except OSError:
        if command != "doctor":
            raise UsageError("the working folder is gone; change into one that is there") from None
        os.chdir(os.sep)  # it neither reads nor writes there


def check_address_space() -> None:
    """Raises OutOfMemoryError where a limit (ulimit -v) leaves no room for torch."""
    with contextlib.suppress(ImportError):  # Windows
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY and limit < LEAST:
            raise OutOfMemoryError(f"memory: {limit >> 20} MB of address space are allowed, torch needs more; see ulimit -v")


def check_no_command(arguments: Sequence[str]) -> None:
    """Asks where a prompt looks like a command that is misspelt: a single word that is nearly one."""
    first = arguments[0] if arguments else ""
    close = get_close_matches(first, COMMANDS, 1, cutoff=0.75)
    if close and not first.startswith("-"):
        Parser(prog="minisd").error(f"did you mean the command {close[0]}? if {first!r} is a prompt: minisd draw {first!r}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    data = "--json" in arguments or arguments[:1] == ["completion"]
    with careful_streams(data) as closed, ended_by_signals() as came:
        warnings.showwarning = lambda message, *_: tell(message)
        try:
            status = run(arguments)
            sys.stdout.flush()
            return CLOSED if closed and status == 0 else status
        except KeyboardInterrupt:
            return interrupted(came)
        except BrokenPipeError:
            leave_stdout()
            return CLOSED
        except Exception as error:
            if debug:
                raise
            if came:  # a library that was interrupted while it was imported has errors of its own
                return interrupted(came)
            if isinstance(error, MinisdError):
                print(f"minisd: error: {one_line(error)}", file=sys.stderr)
                return error.exit_code
            if isinstance(error, MemoryError | ImportError | RuntimeError | SystemError | OSError):
                return refused(error)
            raise


def interrupted(came: Sequence[int]) -> int:
    print("minisd: interrupted", file=sys.stderr)
    return 128 + came[0] if came else 130


def refused(error: Exception) -> int:
    """What the machine says no with, in one line; raises what it does not know."""
    if is_lack_of_memory(error):
        reason = THREADLESS if NO_THREAD in str(error) else "there is not enough memory for this"
        print(f"minisd: error: {reason}", file=sys.stderr)
        return OutOfMemoryError.exit_code
    if isinstance(error, ImportError):
        print(f"minisd: error: a library cannot be loaded: {one_line(error)} (see minisd doctor)", file=sys.stderr)
        return MinisdError.exit_code
    if not isinstance(error, OSError):
        raise error
    # Files that are read or written have a name: what has none is standard output.
    what = "standard output could not be written" if error.filename is None else f"{error.filename} cannot be used"
    print(f"minisd: error: {what}: {error.strerror or error}", file=sys.stderr)
    if error.filename is not None:
        return MinisdError.exit_code
    leave_stdout()
    return OutputError.exit_code


def tell(message: Warning | str) -> None:
    print(f"minisd: warning: {with_flags(' '.join(str(message).split()))}", file=sys.stderr)


def leave_stdout() -> None:
    """Nothing more goes there, or Python complains while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
