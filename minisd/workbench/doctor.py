"""What a report of a fault should carry: the machine, what is installed on it, where minisd looks and what it keeps.

Nothing here fails and no model is opened: what cannot be told says why in its place.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from .. import __version__
from ..errors import UsageError, shown
from ..library.places import reachable, searched, tiny_checkpoint
from ..system.cache import place

PACKAGES = {"torch": "torch", "triton": "triton", "safetensors": "safetensors", "tokenizers": "tokenizers", "numpy": "numpy"}
PACKAGES |= {"pillow": "PIL"}  # by what each is imported as
PATIENCE = 0.5  # seconds for a question about folders, which may lie on a network that is gone

# What changes minisd's behaviour, its own first; then that of Triton and PyTorch below it.
VARIABLES = (
    "MINISD_MODELS", "MINISD_STYLES", "MINISD_API_KEY", "MINISD_KERNELS", "MINISD_FAST", "MINISD_CPU", "MINISD_CUDNN_BENCHMARK",
    "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "RAY_USAGE_STATS_ENABLED", "TRITON_INTERPRET",
    "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DEFAULT_FP_FUSION", "CC", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "TMPDIR", "PYTHONIOENCODING", "PYTHONUTF8",
)  # fmt: skip
SECRET = ("MINISD_API_KEY",)  # never shown


def examined() -> dict[str, Any]:
    """The answer to each question, ready for JSON: a text, or facts by their names, or a list of those.

    What cannot be told is a text that begins with "not known", and says why.  The home folder is written as ~.
    """
    given = dict(os.environ)  # before kernels are imported, which adds to it
    questions: dict[str, Callable[[], Any]] = {"minisd": lambda: __version__, "python": python, "system": platform.platform}
    questions |= {name: partial(version, module) for name, module in PACKAGES.items()}
    questions |= {"device": device, "kernels": kernels, "memory": memory}
    questions |= {"models": lambda: in_time(models), "disk": lambda: in_time(disk), "caches": lambda: in_time(caches)}
    questions["environment"] = lambda: environment(given)
    return {name: tidy(answer(question)) for name, question in questions.items()}


def answer(question: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return question()
    except Exception as error:  # whatever is broken on this machine is what the reader wants to know
        return f"not known: {type(error).__name__}: {error or 'no reason given'}"


def in_time(question: Callable[[], Any]) -> Any:
    """The answer of a question that may wait for ever.  Raises what the question raises, TimeoutError."""
    given: list[Any] = []

    def ask() -> None:
        try:
            given.append(question())
        except Exception as error:
            given.append(error)

    asked = Thread(target=ask, daemon=True)
    asked.start()
    asked.join(PATIENCE)
    if not given:
        raise TimeoutError(f"no answer in {PATIENCE} s: a folder with very many files, or on a network that is gone")
    if isinstance(given[0], Exception):
        raise given[0]
    return given[0]


def tidy(found: Any) -> Any:
    """Printable, not too long, and without the name of who asks: ~ where their home folder is written."""
    if isinstance(found, Mapping):
        return {tidy(key): tidy(value) for key, value in found.items()}
    if isinstance(found, list):
        return [tidy(each) for each in found]
    if not isinstance(found, str):
        return found
    for home in homes():
        found = re.sub(rf"{re.escape(home)}(?![\w-])", "~", found)
    return shown(" ".join(found.split()), 300)


def homes() -> list[str]:
    """The home folder as $HOME and as the system says it, the longer first."""
    found = {os.path.expanduser("~")}
    try:
        import pwd

        found.add(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):  # Windows; a user without an entry
        pass
    found |= {os.path.realpath(home) for home in found if os.path.isabs(home)}
    return sorted((home for home in found if os.path.isabs(home) and home != "/"), key=len, reverse=True)


def python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()})"


def version(module: str) -> str:
    """Imported, not looked up: what is installed and broken is told by what it raises."""
    try:
        return str(import_module(module).__version__)
    except ModuleNotFoundError as error:
        if error.name == module:
            return "not installed"
        raise


def device() -> dict[str, Any]:
    """What draws where nobody says another device."""
    import torch

    from ..system.device import cpu_bfloat16, name_of, to_device, to_dtype

    here = to_device(None)
    drawn = {"draws_in": name_of(to_dtype(None, here))}
    if here.type != "cuda":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        facts = {"CPU": cpu_name(), "cores": cores, "threads": torch.get_num_threads()}
        return facts | {"bfloat16": ", ".join(cpu_bfloat16()) or "not computed"} | drawn
    about = torch.cuda.get_device_properties(here)
    facts = {"GPU": about.name, "memory_bytes": about.total_memory, "compute_capability": f"{about.major}.{about.minor}"}
    return facts | {"driver": driver(), "CUDA": torch.version.cuda, "GPUs": torch.cuda.device_count()} | drawn


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def driver() -> str:
    """The version of NVIDIA's driver, as it tells it itself on Linux."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[0] if found else "not known"


def kernels() -> dict[str, Any]:
    """Which of minisd's kernels draw, and why not the others.  None is built for this: that takes seconds."""
    from ..fast import choice
    from ..fast.cpu import compiled
    from ..system.device import to_device

    names, auto = choice.chosen()
    here, installed = to_device(None), choice.has_triton()
    used, why = sorted(names), f"MINISD_KERNELS={os.environ.get('MINISD_KERNELS') or 'auto'}"
    if auto and here.type != "cuda":
        used, why = [], f"on a {here.type.upper()} PyTorch's own operations are taken"
        if here.type == "cpu" and compiled.expected():
            used, why = ["attention"], "in bfloat16 it is compiled C (MINISD_CPU, minisd[native]); all else is PyTorch's own"
    elif auto and not installed:
        used, why = [], "Triton cannot be imported"
    elif auto and not (os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")):  # triton/runtime/build.py
        used, why = [], "Triton finds no C compiler"
    elif used and not auto:
        try:
            choice.wants(used[0], here)
        except UsageError as error:
            used, why = [], str(error)
    return {"used": ", ".join(used) or "none", "why": why, "Triton": "there" if installed else "missing"}


def memory() -> dict[str, int | None]:
    import torch

    from ..system.memory import free_memory

    facts = {"free_bytes": free_memory(torch.device("cpu"))}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["all_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        facts["free_on_GPU_bytes"] = free_memory(torch.device("cuda", torch.cuda.current_device()))
    return facts


def models() -> list[Any]:
    """The searched folders, with how many files have the names of models, and what is said of those that are left out."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        box = tiny_checkpoint().parent
        folders = {os.path.realpath(folder): folder for folder in (*searched(), box)}
        found: list[Any] = [{"folder": str(folder), "files": sum(1 for _ in reachable(folder))} for folder in folders.values()]
    return found + [str(each.message) for each in told]


def disk() -> dict[str, Any]:
    """Where the cache is, or will be."""
    folder = place("library").parent
    standing = next(each for each in (folder, *folder.parents) if each.exists())
    return {"cache": str(folder), "free_bytes": shutil.disk_usage(standing).free}


def caches() -> dict[str, Any]:
    own = answer(lambda: size_of(place("library").parent))
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    built = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))  # triton/knobs.py
    return {"minisd_bytes": own, "Triton_bytes": answer(lambda: size_of(built))}


def size_of(folder: Path) -> int:
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what minisd does, and any that looks as if it were meant to."""
    found = {name: "(set)" if name in SECRET else given[name] for name in VARIABLES if name in given}
    strange = sorted(name for name in given if name.startswith("MINISD_") and name not in VARIABLES)
    return found | {name: f"{given[name]} (which minisd does not know)" for name in strange}


def as_text(facts: Mapping[str, Any]) -> str:
    """A line for each answer; where one is a list, for each of its entries."""
    rows = [(name, each) for name, found in facts.items() for each in (found if isinstance(found, list) else [found])]
    return "\n".join(f"{name:<11}  {said(found)}" for name, found in rows)


def said(found: Any) -> str:
    if isinstance(found, Mapping):
        return ", ".join(fact(key, value) for key, value in found.items()) or "none"
    return str(found)


def fact(key: str, value: Any) -> str:
    if key in VARIABLES or key.startswith("MINISD_"):
        return f"{key}={value}"
    if key.endswith("_bytes") and isinstance(value, int):
        value = f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
    return f"{key.removesuffix('_bytes').replace('_', ' ')} {value}"
