"""Where model files lie on this machine, by name: nothing is opened but ComfyUI's list of its folders, and nothing is written.

The order of search: $MINISD_MODELS, ./models, ./weights, the Hugging Face cache, ComfyUI, A1111 and Forge, minisd's own box.
"""

from __future__ import annotations

import errno
import os
import stat as modes
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..system.regular import first_line_of, open_regular

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")

# Where ComfyUI (folder_paths.py), A1111 and Forge (modules/paths.py) keep what minisd may use, below the folder of the program.
COMFYUI = ("checkpoints", "vae", "vae_approx", "loras", "controlnet", "embeddings")
A1111 = ("Stable-diffusion", "VAE", "VAE-approx", "VAE-taesd", "Lora", "LyCORIS", "ControlNet")
PROGRAMS = ("ComfyUI", "stable-diffusion-webui", "stable-diffusion-webui-forge")
MAX_LIST = 64 << 10  # bytes of extra_model_paths.yaml; the published example has 1,500


@dataclass(frozen=True)
class File:
    """A file that may be a model, by its name alone."""

    path: Path
    full: str  # its name with the folders between the searched one and it, without suffix: "sdxl/mymix"

    @property
    def short(self) -> str:
        return self.full.rsplit("/", 1)[-1]


def is_folder(path: Path) -> bool:
    """Whether there is a folder.  One that cannot be looked at (a network that is gone) is left out, with a word, once."""
    try:
        return modes.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            tell_left_out(path, error.strerror or str(error))
        return False


@cache
def tell_left_out(folder: Path, why: str) -> None:
    warnings.warn(f"{folder} is left out of the search for models: {why}", stacklevel=4)


@cache
def tell_missing(folder: Path) -> None:
    """Once, however often it is looked for."""
    warnings.warn(f"MINISD_MODELS: {folder} is not a folder", stacklevel=3)


def searched() -> list[Path]:
    """The folders that are searched, in this order, without those that do not exist."""
    given = [Path(os.path.expanduser(part)) for part in os.environ.get("MINISD_MODELS", "").split(os.pathsep) if part]
    for folder in given:
        if not is_folder(folder):
            tell_missing(folder)
    home = Path(os.path.expanduser("~"))
    programs = [place / name for place in (Path(), home, home / "Documents", home / "comfy") for name in PROGRAMS]
    folders: dict[str, Path] = {}
    for folder in (*given, Path("models"), Path("weights"), hub(), *programs):
        if is_folder(folder):
            folders.setdefault(os.path.realpath(folder), folder)
    return list(folders.values())


def hub() -> Path:
    """The cache of the Hugging Face libraries (huggingface_hub constants.py)."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def model_files() -> Iterator[File]:
    """Every file with the name of a model file in the searched folders, each once, and those in the box that no other hides."""
    seen: set[str] = set()
    names: set[str] = set()
    for root in searched():
        for file in reachable(root):
            place = os.path.join(os.path.realpath(file.path.parent), file.path.name)
            if place not in seen:
                yield file
            seen.add(place)
            names.add(file.short)
    yield from (file for file in walk(tiny_checkpoint().parent) if file.short not in names)


def reachable(root: Path) -> Iterator[File]:
    """The files of a searched folder, up to where it cannot be read any more."""
    try:
        yield from below(root)
    except OSError as error:
        tell_left_out(root, error.strerror or str(error))


def below(root: Path) -> Iterator[File]:
    """The files of a searched folder, or of a program whose folder it is."""
    if root == hub():
        yield from snapshots(root)
        return
    programs = [(root / "models", COMFYUI), (root / "models", A1111), (root, ("embeddings",))]
    folders = [folder / name for folder, names in programs for name in names]
    if not any(is_folder(root / "models" / names[0]) for names in (COMFYUI, A1111)):
        folders = [root]
    for folder in (*folders, *extra_folders(root / "extra_model_paths.yaml")):
        yield from walk(folder)


def walk(folder: Path) -> Iterator[File]:
    """Files below a folder.  Links to files are followed, links to folders are not: they may lead anywhere, and in circles."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = Path(parent).relative_to(folder)
        yield from (File(Path(parent, name), (inner / stem(name)).as_posix()) for name in sorted(names) if is_model_name(name))


def snapshots(root: Path) -> Iterator[File]:
    """Single files in the Hugging Face cache, models--ORG--NAME/snapshots/REVISION/FILE, as "ORG/NAME/FILE"."""
    for repository in sorted(root.glob("models--*")):
        revisions = sorted(path.name for path in (repository / "snapshots").glob("*"))
        current = first_line_of(repository / "refs" / "main")
        name = repository.name.removeprefix("models--").replace("--", "/")
        for revision in [current] if current in revisions else revisions:
            folder = repository / "snapshots" / revision
            for path in sorted(folder.glob("*")):
                if is_model_name(path.name):
                    yield File(path, f"{name}/{stem(path.name)}")


def extra_folders(path: Path) -> Iterator[Path]:
    """The folders that ComfyUI's extra_model_paths.yaml adds (ComfyUI utils/extra_config.py).

    Of YAML this reads what that file uses: sections of `kind: folder`, or of `kind: |` with a folder on each line below.
    """
    try:
        with open_regular(path) as file:
            lines = file.read(MAX_LIST).decode("utf-8", "replace").splitlines()
    except OSError:
        return
    sections: list[dict[str, list[str]]] = [{}]
    key, level = "", 0
    for line in lines:
        text = f" {line}".split(" #")[0].strip()
        indent = len(line) - len(line.lstrip())
        if not text:
            continue
        if indent == 0:
            sections.append({})
        elif key and indent > level:
            sections[-1][key].append(text)
        else:
            name, _, value = text.partition(":")
            value = value.strip().strip("\"'")
            key, level = name if value.startswith(("|", ">")) else "", indent
            sections[-1][name] = [] if key else [value]
    for section in sections:
        base = path.parent / os.path.expandvars(os.path.expanduser("".join(section.get("base_path", []))))
        folders = [base / folder for kind in COMFYUI for folder in section.get(kind, []) if folder]
        yield from (folder for folder in folders if str(folder).isprintable())


def is_model_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def stem(name: str) -> str:
    return os.path.splitext(name)[0]


def tiny_checkpoint() -> Path:
    """The trained checkpoint that minisd carries: beside the package when installed, in weights/ in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "weights" / "tiny.safetensors"
    return installed if installed.exists() else package.parent / "weights" / "tiny.safetensors"
