"""Every command and every option over whatever is hostile or unlucky: a documented exit code, one line, nothing left behind.

The commands are found by walking the command line's own parsers (tests/support/commands.py), so one that is added is tried
without a word here.  By default each argument meets a part of the corpus (tests/support/hostile.py), with `-m slow` all of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Command, alone, call, commands, is_file, is_output, judged, name_of, run, takes_value
from hostile import LONG, TEXTS, changed, files, outputs, with_recipe
from PIL import Image

from minisd.cli import main
from minisd.cli.main import COMMANDS
from minisd.library.places import tiny_checkpoint

DRAW = next(command for command in commands() if command.words == ("draw",))
ARGUMENTS = [
    (command, action)
    for command in commands()
    for action in command.actions
    if takes_value(action)
    # What batch has of draw is tried there: a row that cannot be drawn is no error of the command.
    and not (command.words == ("batch",) and {*action.option_strings} & DRAW.flags - {"-o", "--seed"})
]
QUICK = ["--steps", "1", "--size", "8x8", "--device", "cpu", "--seed", "1"]
DRAWN = 3  # values of an option by default, where honest ones are drawn with


def ids(pair: tuple[Command, object]) -> str:
    return f"{pair[0]} {name_of(pair[1])}"


def some(values: dict, count: int, of: str) -> dict:
    """`count` of the values, others for each argument."""
    step = max(1, len(values) // count)
    return dict(list(values.items())[zlib.crc32(of.encode()) % step :: step])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def honest(root):
    picture = root / "picture.png"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["a star", *QUICK, "-o", str(picture)]) == 0
    (root / "manifest.jsonl").write_text('{"id": "a", "prompt": "a star"}\n')
    return {"model": "tiny", "picture": str(picture), "manifest": str(root / "manifest.jsonl")}


@pytest.fixture(scope="module")
def corpus(root):
    found = files(root / "files")
    yield found
    assert not (root / "files" / "canary").exists(), "a pickle has been executed"


@pytest.fixture
def no_measuring(monkeypatch):
    """Nothing is measured, or served, where only arguments are looked at: that takes minutes, or for ever."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("minisd.cli.bench.import_module", lambda _: SimpleNamespace(**dict.fromkeys(FUNCTIONS, lambda *_: None)))


FUNCTIONS = ("bench", "bench_unet", "bench_vae", "bench_image", "bench_load")


def tried(command: Command, action, values: dict, honest: dict[str, str], root: Path) -> None:
    """Calls the command with each of the values for this argument, and says all that is wrong with how it went."""
    wrong = {}
    for name, value in values.items():
        argv = call(command, honest, action, os.fspath(value))
        with alone(root / "run") as (here, watched):
            found = run(argv, here, watched)
        if found:
            wrong[name] = found, [each[:100] for each in argv]
    assert not wrong


FILES = [(command, action) for command, action in ARGUMENTS if is_file(action) and not is_output(action)]


@pytest.mark.parametrize("argument", FILES, ids=ids)
@pytest.mark.usefixtures("no_measuring")
def test_files(argument, corpus, honest, root):
    command, action = argument
    short = {name: path for name, path in corpus.items() if not name.startswith(LONG)}
    first = not action.option_strings or action.required
    tried(command, action, short if first else some(short, 12, ids(argument)), honest, root)


@pytest.mark.slow
@pytest.mark.parametrize("argument", FILES, ids=ids)
@pytest.mark.usefixtures("no_measuring")
def test_all_files(argument, corpus, honest, root):
    tried(*argument, corpus, honest, root)


@pytest.mark.parametrize("argument", [each for each in ARGUMENTS if not is_file(each[1])], ids=ids)
@pytest.mark.usefixtures("no_measuring")
def test_texts(argument, honest, root):
    count = DRAWN if argument[0].words[0] in ("draw", "compare", "merge", "convert", "save") else 12
    tried(*argument, some(TEXTS, count, ids(argument)), honest, root)


@pytest.mark.slow
@pytest.mark.parametrize("argument", ARGUMENTS, ids=ids)
@pytest.mark.usefixtures("no_measuring")
def test_all_texts(argument, honest, root):
    tried(*argument, TEXTS, honest, root)


@pytest.mark.parametrize("argument", [each for each in ARGUMENTS if is_output(each[1])], ids=ids)
@pytest.mark.usefixtures("no_measuring")
def test_outputs(argument, honest, root, tmp_path):
    tried(*argument, outputs(tmp_path / "outputs"), honest, root)


@pytest.mark.parametrize("command", [each for each in commands() if any(map(is_output, each.actions))], ids=str)
@pytest.mark.usefixtures("no_measuring")
def test_what_stands_there_is_whole_after_an_error(command, corpus, honest, root):
    """Where a source turns out to be none, after the output has been named."""
    output = next(action for action in command.actions if is_output(action))
    wrong = []
    for source in ("header: no JSON", "model: half of tiny", "picture: a PNG cut", "not there"):
        with alone(root / "run") as (here, watched):
            (here / "mine.png").write_bytes(b"mine")
            argv = call(command, honest | dict.fromkeys(honest, str(corpus[source])), output, "mine.png")
            wrong += run(argv, here, watched)
            if command.words[0] in ("again", "convert", "merge", "save", "diff"):  # what draws may draw with tiny
                assert (here / "mine.png").read_bytes() == b"mine"
    assert not wrong


def test_every_command_is_walked():
    assert {command.words[0] for command in commands()} == set(COMMANDS)
    assert {("models", "add"), ("bench", "kernels")} <= {command.words for command in commands()}
    assert len(ARGUMENTS) > 120


def test_what_the_suite_asks_is_noticed(root, monkeypatch):
    """Each thing that must not happen is found where it happens."""
    assert judged(0, "x\n", "") == []
    assert judged(3, "", "minisd: error: a\n") == []
    for code, out, err in (
        (7, "", "minisd: error: a\n"),
        (3, "", ""),
        (3, "", "minisd: error: a\nminisd: error: b\n"),
        (0, "", "minisd: error: a\n"),
        (3, "", "Traceback (most recent call last):\nminisd: error: a\n"),
        (3, "", "minisd: error: \x1b[2J\n"),
        (3, "", f"minisd: error: {'x' * 3000}\n"),
        (3, "", "minisd: error: a"),
        (0, "\x1b[2J\n", ""),
    ):
        assert judged(code, out, err), (code, out, err)

    def fails(args):
        Path("stray").touch()
        Path("mine").write_text("theirs")
        return 3

    monkeypatch.setitem(COMMANDS, "doctor", SimpleNamespace(parse=lambda _: None, run=fails))
    with alone(root / "run") as (here, watched):
        (here / "mine").write_text("mine")
        assert run(["doctor"], here, watched) == ["exit code 3 with 0 errors", "left 'stray'", "changed 'mine'"]
        monkeypatch.setitem(COMMANDS, "doctor", SimpleNamespace(parse=lambda _: None, run=lambda _: 1 / 0))
        assert run(["doctor"], here, watched) == ["raised ZeroDivisionError: division by zero"]


# ---- recipes: what a picture or a merge says of itself, each field as everything that it may not be ----


def recipe_in(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.info["minisd"])


def made_again(recipe: dict, step: int, root: Path) -> None:
    wrong = {}
    for name, make in list(changed(recipe).items())[::step]:
        with alone(root / "run") as (here, watched):
            picture = with_recipe(here / "x.png", make())
            found = run(["again", str(picture), "--device", "cpu"], here, watched)
        if found:
            wrong[name] = found
    assert not wrong


@pytest.fixture(scope="module")
def compared(root, honest):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        wish = ["--steps", "1", "--size", "8x8", "--device", "cpu", "--seeds", "1"]
        assert main(["compare", "a star", "-m", "tiny", *wish, "-o", str(root / "compared.png")]) == 0
    return recipe_in(root / "compared.png")


def test_recipes(honest, compared, root):
    made_again(recipe_in(Path(honest["picture"])), 60, root)
    made_again(compared, 60, root)


@pytest.mark.slow
def test_all_recipes(honest, root):
    made_again(recipe_in(Path(honest["picture"])), 1, root)


@pytest.mark.slow
def test_all_recipes_of_comparisons(compared, root):
    made_again(compared, 1, root)


# ---- all of it at once, where nobody has named it ----


def test_a_library_of_hostile_files(corpus, root, monkeypatch):
    monkeypatch.setenv("MINISD_MODELS", str(root / "files"))
    for line in ("models", "models --all", "models --all --json", "doctor", "inspect tiny", "inspect 5"):
        argv = line.split()
        with alone(root / "run") as (here, watched):
            assert not run(argv, here, watched), argv


def test_folders_that_are_made_for_a_file_go_with_it(root, corpus):
    """Those alone that were made for it."""
    argv = ["save", "-m", "tiny", "--vae", str(corpus["header: a list"]), "--filename-prefix", "mine/new/er/x"]
    with alone(root / "run") as (here, watched):
        (here / "mine").mkdir()
        assert not run(argv, here, watched)
        assert list((here / "mine").iterdir()) == []


def test_a_model_that_is_cut_is_no_traceback(root):
    with alone(root / "run") as (here, watched):
        shutil.copy(tiny_checkpoint(), here / "x.safetensors")
        os.truncate(here / "x.safetensors", 1000)
        assert not run(["inspect", "x.safetensors", "--check", "--hash", "--tree"], here, watched)
