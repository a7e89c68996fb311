"""minisd: opens a raw Stable Diffusion checkpoint and draws.  `pipe = minisd.load(FILE); pipe("a prompt").images[0]`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import CheckpointError, MinisdError, NonFiniteError, OutOfMemoryError, OutputError, UsageError

if TYPE_CHECKING:
    from .addons.controls.control import Control as Control
    from .addons.controls.files import load_control as load_control
    from .diffusion.noise import noise as noise
    from .diffusion.samplers import sample as sample
    from .inside import tap as tap
    from .pipeline import Pipeline as Pipeline
    from .pipeline import load as load
    from .request import Request as Request
    from .result import Result as Result
    from .result import Step as Step

__version__ = "0.1.0"

# In a checkout kernels/ and weights/ stand beside the package, and not in it, where an installed one has them.
_beside = os.path.dirname(os.path.dirname(__file__))
if os.path.isfile(os.path.join(_beside, "kernels", "attention.py")):
    __path__.append(_beside)

__all__ = [
    "CheckpointError",
    "Control",
    "MinisdError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "Pipeline",
    "Request",
    "Result",
    "Step",
    "UsageError",
    "load",
    "load_control",
    "noise",
    "sample",
    "tap",
]


def __getattr__(name: str) -> object:
    """These bring torch along, which takes seconds to import: only when somebody asks."""
    if name in ("load", "Pipeline", "Request", "Result", "Step"):
        from . import pipeline

        return getattr(pipeline, name)
    if name in ("load_control", "Control"):
        from .addons import controls

        return getattr(controls, name)
    if name == "noise":
        from .diffusion.noise import noise

        return noise
    if name == "sample":
        from .diffusion.samplers import sample

        return sample
    if name == "tap":
        from .inside import tap

        return tap
    raise AttributeError(f"module 'minisd' has no attribute {name!r}")


def __dir__() -> list[str]:
    """For completion, which shows what is there before anybody has asked for it."""
    return [*__all__, "__version__"]
