"""Writes docs/api.md, the reference of the Python API, from the docstrings: python scripts/api_page.py

Signatures and fields are those of the source, comments included, so the page is the same on every machine and Python.  A public
name without a docstring is an error; tests/test_docs.py holds the page against what is made here.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import minisd
from minisd import batch, inside
from minisd.workbench import converting, differing, inspecting, merging

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """\
# API

Every public name, from its docstring. [Python](python.md) shows how they are used, [Inside](inside.md) what looks into a model.
This page is written by `python scripts/api_page.py`.
"""
WIDTH = 130
CALLED = ("__call__", "__getitem__")  # methods with these names are public, too

MADE_BY_USERS = (batch.draw_rows,)  # classes that are called as functions are: their methods are another's business

Named = tuple[str, Any]  # as a program imports it


def of(module: Any, path: str, *names: str) -> list[Named]:
    return [(f"{path}.{name}", getattr(module, name)) for name in names]


GROUPS: list[tuple[str, str, list[Named]]] = [
    (
        "Drawing",
        "`pipe = minisd.load(FILE)`, and then `pipe(prompt, …)` with the fields of `Request` by name.",
        of(minisd, "minisd", "load", "Pipeline", "Request", "Result", "Step"),
    ),
    (
        "Controls",
        "Pictures that a drawing follows: see [Add-ons](addons.md#controlnets-and-their-kin).",
        of(minisd, "minisd", "Control", "load_control"),
    ),
    ("Samplers and noise", "Without a pipeline.", of(minisd, "minisd", "sample", "noise")),
    (
        "Inside",
        "What a model does while it draws: see [Inside](inside.md).",
        of(minisd, "minisd", "tap") + of(inside, "minisd.inside", *(name for name in inside.__all__ if name != "tap")),
    ),
    (
        "Files",
        "From file to file, as the commands of the same names: see [Files](files.md).",
        of(inspecting, "minisd.workbench.inspecting", "inspect")
        + of(merging, "minisd.workbench.merging", "merge")
        + of(converting, "minisd.workbench.converting", "convert")
        + of(differing, "minisd.workbench.differing", "diff"),
    ),
    ("Many pictures", "See [Batch](batch.md).", of(batch, "minisd.batch", "draw_rows")),
    (
        "Errors",
        "All that a user can do something about: `except minisd.MinisdError` catches them.",
        of(minisd, "minisd", *sorted(name for name in minisd.__all__ if name.endswith("Error"))),
    ),
]


def page() -> str:
    """The whole of it.  Raises ValueError where a public name has no docstring."""
    contents = [f"[{title}](#{title.lower().replace(' ', '-')})" for title, _, _ in GROUPS]
    parts = [HEAD, ", ".join(contents) + ".\n"]
    for title, about, names in GROUPS:
        parts.append(f"## {title}\n\n{about}\n")
        parts += (part for name, value in names for part in entry(name, value))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def entry(path: str, value: Any) -> Iterator[str]:
    """What stands there of a name, in Markdown."""
    yield f"### `{path}`\n"
    name = path.rpartition(".")[2]
    if not inspect.isclass(value) or value in MADE_BY_USERS:
        yield block(signature(name, value.__init__ if inspect.isclass(value) else value).removesuffix(" -> None"))
        yield prose(path, value)
        return
    fields = fields_of(value)
    if fields:
        yield block(f"class {name}:\n{fields}")
    yield prose(path, value)
    if not issubclass(value, Exception):
        for own, method in vars(value).items():
            if callable(function_of(method)) and (not own.startswith("_") or own in CALLED):
                yield f"#### `{name}.{own}`\n"
                is_value = isinstance(method, property | cached_property)
                yield block(value_of(own, method) if is_value else signature(own, method))
                yield prose(f"{path}.{own}", method)


def block(text: str) -> str:
    return f"```text\n{text}\n```\n"


def function_of(method: Any) -> Any:
    """The function as it was written, without what decorates it."""
    inner = method.fget if isinstance(method, property) else method.func if isinstance(method, cached_property) else method
    return inspect.unwrap(inner) if inspect.isfunction(inner) else None


def node_of(function: Any) -> ast.FunctionDef:
    node = ast.parse(textwrap.dedent(inspect.getsource(function_of(function)))).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def value_of(name: str, method: Any) -> str:
    returns = node_of(method).returns
    return f"{name}: {ast.unparse(returns)}" if returns else name


def signature(name: str, function: Any) -> str:
    """In one line where it fits, else with a line for each parameter."""
    node = node_of(function)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    parameters = parameters_of(node, function)
    whole = f"{name}({', '.join(parameters)}){returns}"
    if len(whole) <= WIDTH:
        return whole
    return f"{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f"){returns}"


def parameters_of(node: ast.FunctionDef, function: Any) -> list[str]:
    """Each as it is written, without `self`."""
    given, names = node.args, function_of(function).__globals__
    if any(ast.unparse(each).startswith("taking_options(") for each in node.decorator_list):
        return ["prompt: Text | Sequence[str] | Request", "**options: the fields of Request"]
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + [*given.defaults]
    found = [said(*pair, names) for pair in zip(plain, defaults, strict=True)]
    if given.posonlyargs:
        found.insert(len(given.posonlyargs), "/")
    if given.vararg or given.kwonlyargs:
        found.append(f"*{ast.unparse(given.vararg)}" if given.vararg else "*")
    found += [said(*pair, names) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    found += [f"**{ast.unparse(given.kwarg)}"] if given.kwarg else []
    return [each for each in found if each != "self"]


def said(parameter: ast.arg, default: ast.expr | None, names: dict[str, Any]) -> str:
    """names: of the function's module, where a default may be a constant's."""
    if default is None:
        return ast.unparse(parameter)
    value = names[default.id] if isinstance(default, ast.Name) else None
    text = repr(value) if isinstance(value, int | float | str) else ast.unparse(default)
    if isinstance(default, ast.Constant) and isinstance(default.value, str):
        text = f'"{default.value}"'
    return ast.unparse(parameter) + (" = " if parameter.annotation else "=") + text


def fields_of(kind: type) -> str:
    """The lines of a class that declare fields, with their comments."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    declared = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    return "\n".join(line for each in declared for line in lines[each.lineno - 1 : each.end_lineno])


ITEM = re.compile(r"(\w+(?:, \w+)*): ")  # of parameters, or of what a result holds
BETWEEN = re.compile(r"(?:(?<=\.)|;) +(?=(?:\w+, )*\w+: )|(?<=\.) +(?=Raises )")  # two of them in one line


def prose(path: str, value: Any) -> str:
    """A docstring in Markdown: paragraphs, and a point for each parameter that it explains.  Raises ValueError without one."""
    documented = function_of(value).__doc__ if not inspect.isclass(value) else value.__dict__.get("__doc__")
    if not documented or (inspect.isclass(value) and documented.startswith(f"{value.__name__}(")):  # a dataclass's own
        raise ValueError(f"{path}: expected a docstring, found none")
    parts = [part for each in paragraphs(inspect.cleandoc(documented)) for part in BETWEEN.split(each)]
    return "".join(shown(part) for part in parts).lstrip("\n") + "\n"


def paragraphs(text: str) -> Iterator[str]:
    """The lines that belong together, joined: an explained name begins one, and so does a sentence after a finished one."""
    held: list[str] = []
    for line in text.splitlines():
        ended = not held or held[-1].endswith((".", ":"))
        begins = ITEM.match(line) or (held and ITEM.match(held[0]) and ended and line[:1].isupper())
        if held and (not line or begins):
            yield " ".join(held)
            held = []
        if line.startswith("    ") and not held:
            yield line  # of an example
        elif line:
            held.append(line.strip())
    if held:
        yield " ".join(held)


def shown(part: str) -> str:
    """A paragraph, a point, or a line of an example: with what is between it and the one before, in lines not too long."""
    if part.startswith("    "):
        return f"\n\n{block(part.strip())}".rstrip()
    found = ITEM.match(part)
    if not found:
        return f"\n\n{filled(escaped(part))}\n"
    names = ", ".join(f"`{name}`" for name in found[1].split(", "))
    text = part[found.end() :].rstrip(";")
    return "\n" + filled(f"- {names}: {escaped(text)}" + ("" if text.endswith((".", ":")) else "."), "  ")


def filled(text: str, indent: str = "") -> str:
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(re.sub(r"^(\s*)([-+#>]|\d+[.)])(?= )", r"\1\\\2", line) if i else line for i, line in enumerate(lines))


def escaped(text: str) -> str:
    """As Markdown shows it; what is between backticks stays."""
    pieces = re.split(r"(`[^`]*`)", re.sub(r" {2,}", " ", text))
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<])", r"\\\1", piece) for piece in pieces)


if __name__ == "__main__":
    PAGE.write_text(page())
