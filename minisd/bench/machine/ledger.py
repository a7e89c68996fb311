"""bench start: the wait from a command to the first picture on disk, entry by entry, in a fresh process.

Once with nothing remembered (no compiled kernels, no hash of the file), and once more with what the first has left.  Entries
follow one another, so they add up to the whole.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# In the order of a start; each is explained by what `main` puts into it.
ENTRIES = {
    "python": "Python itself",
    "torch": "import torch",
    "minisd": "import minisd",
    "context": "the device's context",
    "load": "the file to the device",
    "compile": "waiting for the compiler",
    "text": "the prompt",
    "plans": "the first step, beyond another: plans, …",
    "steps": "the steps",
    "decode": "decoding",
    "hash": "the hash of the file",
    "save": "the PNG",
}


def bench(report: Any, args: Any) -> None:
    from ..networks import MODELS
    from ..processes import PROMPT, checkpoint

    clock = report.clock
    with checkpoint(report, args) as path, tempfile.TemporaryDirectory() as folder:
        model, steps = MODELS[args.model], 20 if args.full else 4
        side = 8 * (model.latents if args.full else model.latents // 4)
        own = path.stem == args.model
        job: dict[str, Any] = {"path": str(path), "prompt": PROMPT, "steps": steps, "out": f"{folder}/out.png"}
        job |= {"device": str(clock.device), "dtype": str(clock.dtype).removeprefix("torch."), "side": side}
        report.table(
            f"from a command to {model.name if own else path.stem} on disk, {side}x{side}, {steps} steps, {clock.device}",
            ("cold s", "again s"),
        )
        caches = {name: Path(folder, name) for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME")}
        with report.attempt("the first process"):
            cold, again = (ledger(job, caches) for _ in range(2))
            for name, label in ENTRIES.items():
                report.add(label, cold=cold[name], again=again[name])
            report.add("all of it", cold=sum(cold.values()), again=sum(again.values()))
        report.note("cold: no compiled kernel, no hash and no library's plan is kept; the file is in the page cache in both")


def ledger(job: dict[str, Any], caches: dict[str, Path]) -> dict[str, float]:
    """The seconds of every entry, from a process of its own."""
    from ...warmup.starting import said, started

    start = time.time()
    (found,) = said(started(__name__, job | {"start": start}, caches))
    return found


class Ledger:
    """Seconds by entry; what an entry holds of another is that one's alone."""

    def __init__(self) -> None:
        self.seconds, self.open = dict.fromkeys(ENTRIES, 0.0), list[float]()

    @contextmanager
    def entry(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.open.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] += whole - self.open.pop()
            if self.open:
                self.open[-1] += whole

    def within(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time on an entry of its own."""

        def timed(*given: Any, **more: Any) -> Any:
            with self.entry(name):
                return run(*given, **more)

        return timed


def main() -> None:
    """In the process of its own."""
    job, kept = json.load(sys.stdin), Ledger()
    kept.seconds["python"] = time.time() - job["start"]
    with kept.entry("minisd"):
        from ...warmup.starting import begin_early

        begin_early(job["path"], job["device"], job["dtype"], (job["side"], job["side"]))
    with kept.entry("torch"):
        import torch
    with kept.entry("minisd"):
        from ... import pipeline
        from ...files import checkpoint
        from ...request import Request
        from ...warmup import starting
    device = torch.device(job["device"])

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with kept.entry("context"):
        torch.empty(1, device=device)
        wait()
    for module, name, entry in ((starting, "finish", "compile"), (checkpoint, "file_sha256", "hash")):
        vars(module)[name] = kept.within(entry, getattr(module, name))
    with kept.entry("load"):
        pipe = pipeline.load(job["path"], job["device"], job["dtype"])
        wait()
    pipe.codec.decode = kept.within("decode", pipe.codec.decode)  # type: ignore[method-assign]
    type(pipe.conditioner).read = kept.within("text", type(pipe.conditioner).read)  # type: ignore[method-assign]
    drawn(pipe.stream(Request(job["prompt"], "", job["side"], job["side"], job["steps"], seed=0)), kept, wait, Path(job["out"]))
    print(json.dumps(kept.seconds))


def drawn(stream: Any, kept: Ledger, wait: Callable[[], None], out: Path) -> None:
    """Draws to the end; the steps apart, of which the last tells how long one takes."""
    marks = list[float]()
    with kept.entry("plans"):
        next(stream)
        wait()
    with kept.entry("steps"):
        try:
            while True:
                start = time.perf_counter()
                next(stream)
                wait()
                marks.append(time.perf_counter() - start)
        except StopIteration as end:
            result = end.value
    usual = sorted(marks)[len(marks) // 2] if marks else 0.0
    kept.seconds["plans"] = max(0.0, kept.seconds["plans"] - usual)
    kept.seconds["steps"] += usual
    with kept.entry("save"):
        result.save(out)


if __name__ == "__main__":
    main()
