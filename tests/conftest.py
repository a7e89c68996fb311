from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: each worker has a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

with suppress(ValueError):  # not in the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background has ignored

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where there is no GPU, kernels run in Triton's interpreter.  Triton reads this when it is first imported: by what follows.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers import REDUCED, Oracle, write_checkpoint

import minisd

if os.environ.get("TRITON_INTERPRET"):
    with suppress(ImportError):  # Triton is for Linux
        from interpreter import repair_index

        repair_index()

torch.backends.cudnn.allow_tf32 = False  # float32 is compared to five digits; by default a GPU convolves with three


# What most changes break first, in under a minute: pytest -m quick.
QUICK = (
    "models",
    "diffusion",
    "text",
    "pictures",
    "test_cli",
    "test_request",
    "test_pipeline",
    "test_layout",
    "test_ways",
)
NOT_QUICK = (
    "triton",
    "test_every_sampler_and_guide",
    "test_six_sizes",
    "test_every_published_checkpoint",
    "test_what_changes",
    "test_over_many",
    "test_again",
    "test_every_module",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        among = {*item.path.relative_to(Path(__file__).parent).with_suffix("").parts} & {*QUICK}
        elsewhere = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if among and not elsewhere and not any(name in item.name for name in NOT_QUICK):
            item.add_marker("quick")


@pytest.fixture(scope="session")
def reduced_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.x at a tenth of the width, random weights, float32."""
    return write_checkpoint(tmp_path_factory.mktemp("reduced") / "reduced.safetensors")


@pytest.fixture(scope="session")
def reduced(reduced_file: Path) -> minisd.Pipeline:
    return minisd.load(reduced_file, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def oracle(reduced_file: Path) -> Oracle:
    return Oracle(reduced_file, REDUCED)


@pytest.fixture(scope="session")
def tiny() -> minisd.Pipeline:
    """The trained checkpoint in the box, as a user on a CPU gets it."""
    return minisd.load(device="cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
