"""Triton for a GPU that need not be there: what would be launched on it, compiled and not run.

To be used in a process of its own: it changes Triton and minisd.kernels for good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..fast.choice import kernels

# By the names that people have for them: the compute capability, major and minor as one number.
GPUS = {
    "a100": 80, "a40": 86, "rtx3090": 86, "l4": 89, "l40s": 89, "rtx4090": 89, "h100": 90, "h200": 90, "b200": 100,
    "rtx5090": 120,
}  # fmt: skip
CAPABILITIES = tuple(sorted(set(GPUS.values())))


def capability_of(gpu: str, option: str = "--gpu") -> int:
    """The compute capability of a GPU by its name or "sm_90".  Raises UsageError, which names the option."""
    plain = "".join(letter for letter in gpu.lower() if letter not in " _-")
    found = GPUS.get(plain) or (int(plain[2:]) if plain.startswith("sm") and plain[2:].isdecimal() else 0)
    if found not in CAPABILITIES:
        known = ", ".join([*GPUS, *(f"sm_{each}" for each in CAPABILITIES)])
        raise UsageError(f"{option}: expected one of {known}, found {gpu!r}")
    return found


def pretend(capability: int) -> None:
    """From now on Triton compiles for this capability, and kernels take tensors on the meta device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class AbsentGPU:
        """What Triton asks of a driver before it compiles."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(AbsentGPU())
    kernels().checks.DEVICES, kernels().checks.ABSENT = ("meta",), capability


def instead_of_launching(what: Callable[..., Any]) -> None:
    """From now on a launch is `what(kernel, run)`: run() compiles the variant, unless it is there, and returns it."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compiling(self: Any, *args: Any, **options: Any) -> Any:
        return what(self, lambda: run(self, *args, **{**options, "warmup": True}))

    JITFunction.run = compiling


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel that is launched somewhere, and how to compile it (into Triton's cache)."""

    kernel: str
    module: str  # of minisd.kernels
    part: str  # where it is launched first
    compiled: Callable[[], Any]  # -> triton's CompiledKernel


class Variants:
    """Notes every variant that a launch asks for, once, and neither compiles nor launches it."""

    def __init__(self) -> None:
        from triton.runtime.jit import JITFunction

        self.part, self.found = "", dict[tuple[Any, str], Variant]()
        compiled = getattr(JITFunction._do_compile, "real", JITFunction._do_compile)  # of another one's `noted`

        def noted(function: Any, key: str, *how: Any) -> None:
            name, module = function.fn.__name__.removesuffix("_kernel"), function.fn.__module__.rpartition(".")[2]
            one = Variant(name, module, self.part, lambda: compiled(function, key, *how))
            self.found.setdefault((function, key), one)

        noted.real = compiled  # type: ignore[attr-defined]
        JITFunction._do_compile = noted
        instead_of_launching(lambda kernel, run: run())

    def begin(self, part: str) -> None:
        self.part = part
