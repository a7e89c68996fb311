"""What a server adds to drawing: to the first picture after its start, to an answer, and to the pictures in a second."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...pipeline import load
from ...system.device import name_of
from ..report import Report

PROMPT = "a red circle on a blue background"
STEPS, CLIENTS = 20, 4


def bench(report: Report, args: Any) -> None:
    """The tiny checkpoint, whose pictures take least: what is added shows most.  Rounds with and without a server take turns."""
    pipe = load(device=str(report.clock.device), dtype=report.clock.dtype)
    options: dict[str, Any] = {"steps": STEPS, "guidance_scale": 7.5, "sampler": "euler"}
    rounds, count = max(1, args.repeats), 4 * CLIENTS

    def alone() -> float:
        return timed(lambda: [pipe(PROMPT, seed=seed, **options) for seed in range(count)])

    report.table(f"minisd serve, tiny checkpoint, {STEPS} steps", ("time ms", "pictures/s", "of Python's"))
    with serving(report) as (port, began):
        ask(port, 0)
        report.add("start to first picture", time=time.perf_counter() - began)
        added = [above(port) for _ in range(5 * rounds)]
        report.add("answer, above the drawing itself (median)", time=statistics.median(added))
        report.add("answer, above the drawing itself (least)", time=min(added))  # nearest to a machine with nothing else to do
        pipe(PROMPT, **options)
        pairs = []
        with ThreadPoolExecutor(CLIENTS) as threads:
            for _ in range(rounds):
                pairs.append((alone(), timed(lambda: list(threads.map(lambda seed: ask(port, seed), range(count))))))
    python, server = (statistics.median(each) for each in zip(*pairs, strict=True))
    report.add("Python, one after the other", time=python / count, **{"pictures/s": count / python, "of_Python's": 1.0})
    share = statistics.median(one / other for one, other in pairs)
    report.add(f"the server, {CLIENTS} clients", time=server / count, **{"pictures/s": count / server, "of_Python's": share})


def above(port: int) -> float:
    """Seconds of an answer that are none of drawing."""
    start = time.perf_counter()
    drawing = ask(port, 1)
    return time.perf_counter() - start - drawing


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextlib.contextmanager
def serving(report: Report) -> Iterator[tuple[int, float]]:
    """A server in a process of its own, on a free port, and when it was started."""
    device, dtype = str(report.clock.device), name_of(report.clock.dtype)
    command = [sys.executable, "-P", "-m", "minisd", "serve", "-m", "tiny", "--port", "0", "--device", device, "--dtype", dtype]
    began = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "MINISD_API_KEY"}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                log.seek(0)
                raise RuntimeError((log.read().strip().splitlines() or ["the server did not start"])[-1])
            yield int(url.rpartition(":")[2]), began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def ask(port: int, seed: int) -> float:
    """The seconds of drawing that an answer tells."""
    body = {"prompt": PROMPT, "steps": STEPS, "cfg_scale": 7.5, "sampler": "K_EULER", "seed": seed, "image_encoding": "png"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/generate/sd", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(f"the server answered {answer.status}: {found}")
        return float(found["prediction_time_ms"]) / 1000
    finally:
        connection.close()
