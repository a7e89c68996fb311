"""The rows: minisd's command line, and the same picture by each peer that is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...system.device import name_of
from .. import peers
from ..report import Report
from .spending import Spent, spent

COLUMNS = ("time s", "ready s", "CPU s", "peak GB", "to ours")
FIRST, AGAIN = "minisd, first use of the file", "minisd, used before"  # our own rows
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """label: of its row; package: what is imported; script: what draws; first: a module that prepares its files, once."""

    label: str
    package: str
    script: tuple[str, ...]
    first: str = ""
    on_gpu: bool = False


# Scripts of theirs alone are run by their paths: then nothing of minisd is imported.
PEERS = {
    "eager": Peer("diffusers", "diffusers", (str(HERE / "with_diffusers.py"),), on_gpu=True),
    "openvino": Peer("OpenVINO", "openvino", ("-m", f"{__package__}.with_openvino"), f"{__package__}.conversion"),
    "sdcpp": Peer("stable-diffusion.cpp", "stable_diffusion_cpp", (str(HERE / "with_sdcpp.py"),)),
}


@dataclass(frozen=True)
class Job:
    """What everybody draws, from which file."""

    path: str
    prompt: str
    width: int
    height: int
    steps: int
    device: str
    dtype: str
    seed: int = 0
    guidance: float = 7.5
    threads: int = 1
    folder: str = ""  # for files that are wanted on the way, a picture among them

    def command(self) -> list[str]:
        """minisd's."""
        told = ["-m", "minisd", self.prompt, "-m", self.path, "--size", f"{self.width}x{self.height}", "--sampler", "euler"]
        told += ["--steps", str(self.steps), "--seed", str(self.seed), "--cfg", str(self.guidance), "--device", self.device]
        return [*python(), *told, "--dtype", self.dtype, "--debug", "-o", f"{self.folder}/out.png"]

    def asked_of(self, script: tuple[str, ...]) -> list[str]:
        return [*python(), *script, json.dumps(vars(self))]


def python() -> list[str]:
    # -P keeps the working directory off the path: in a checkout, diffusers would take kernels/ for another package.
    return [sys.executable, "-P"]


def bench(report: Report, kinds: list[str], name: str, **asked: Any) -> None:
    """One process each, one after another; kinds: the peers that are wanted; asked: of a `Job`, what the machine does not say."""
    clock = report.clock
    with tempfile.TemporaryDirectory() as folder:
        machine: dict[str, Any] = {"device": str(clock.device), "dtype": name_of(clock.dtype), "threads": torch.get_num_threads()}
        job = Job(**machine, **asked, folder=folder)
        what = f"{job.width}x{job.height}, {job.steps} steps, guidance, euler, {job.dtype}"
        report.table(f"{name} picture from a command to a PNG, {what}, a fresh process each", COLUMNS)
        # The first process fills the caches of hashes and of compiled kernels, the second finds them there.
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        environment |= {"TRITON_CACHE_DIR": f"{folder}/cache", "XDG_CACHE_HOME": f"{folder}/hashes"}
        ours = None
        with report.attempt(FIRST):
            add(report, FIRST, spent(job.command(), environment))
        with report.attempt(AGAIN):
            found = spent(job.command(), environment)
            ours = found.seconds
            add(report, AGAIN, found, ours)
        report.note("the first use of a file also finds out its hash, for the recipe; ready: the weights are there")
        wanted = [PEERS[kind] for kind in kinds if kind in PEERS and (PEERS[kind].on_gpu or not clock.is_cuda)]
        for peer in wanted:
            if importlib.util.find_spec(peer.package):
                with report.attempt(peer.label):
                    by_peer(report, peer, job, environment, ours)
        if missing := [peer.label for peer in wanted if not importlib.util.find_spec(peer.package)]:
            report.note(f"not installed: {', '.join(missing)}")


def by_peer(report: Report, peer: Peer, job: Job, environment: dict[str, str], ours: float | None) -> None:
    if peer.package == "diffusers":
        peers.write_configs(Path(job.path), Path(job.folder))
    if peer.first:
        add(report, f"{peer.label}: converting, compiling, once", spent(job.asked_of(("-m", peer.first)), environment))
    add(report, peer.label, spent(job.asked_of(peer.script), environment), ours)


def add(report: Report, label: str, found: Spent, ours: float | None = None) -> None:
    peak, share = found.peak / 1e9 if found.peak else None, found.seconds / ours if ours else None
    report.add(label, time=found.seconds, ready=found.ready, CPU=found.processor, peak_GB=peak, to_ours=share)
