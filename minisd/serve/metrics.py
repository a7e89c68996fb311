"""What a server tells of itself: figures for Prometheus, and one JSON object a line on stderr."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        common: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("minisd_requests", "Requests answered", ["path", "status"], **common)
        self.answering = Histogram("minisd_request_seconds", "From request to answer", ["path"], buckets=SECONDS, **common)
        self.jobs = Counter("minisd_jobs", "Jobs that have ended", ["door", "how"], **common)
        self.drawing = Histogram("minisd_drawing_seconds", "Of a job, models in memory", ["model"], buckets=SECONDS, **common)
        self.pictures = Counter("minisd_pictures", "Pictures drawn", ["model"], **common)
        self.queue = Gauge("minisd_queue_jobs", "Jobs that wait", **common)
        self.memory = Gauge("minisd_models_bytes", "That models take on a device", ["device"], **common)
        self.opened = Gauge("minisd_models_opened", "How often a model was opened on a device", ["device"], **common)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Log:
    """Never a prompt, a key or a picture, unless with_prompts lets prompts in."""

    def __init__(self, with_prompts: bool = False) -> None:
        self.with_prompts = with_prompts
        self.lock = threading.Lock()

    def __call__(self, event: str, **facts: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        line = json.dumps({"time": f"{now}Z", "event": event} | {k: v for k, v in facts.items() if v is not None}, default=str)
        with self.lock:
            print(line, file=sys.stderr, flush=True)


class ToLog(logging.Handler):
    """What libraries have to say, without their tracebacks."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log("library", name=record.name, level=record.levelname, message=record.getMessage()[:500])
