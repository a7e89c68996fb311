"""Many requests, clients that go away, ends, faults: each picture is the right one, or nobody is kept waiting for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import json
import random
import signal
import statistics
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import uvicorn
from serving import LIT, PROMPT, picture, same, serving, until
from uvicorn.server import ServerState

import minisd
from minisd.errors import UsageError
from minisd.serve.app import Protocol, create_app
from minisd.serve.errors import RefusedError
from minisd.serve.jobs import Job, Queue
from minisd.serve.service import Service
from minisd.serve.settings import Settings, is_loopback
from minisd.serve.shelf import Drawing, Shelf, bytes_of

QUICK = {"prompt": PROMPT, "steps": 2, "sampler": "K_EULER", "cfg_scale": 4, "image_encoding": "png"}
LONG = QUICK | {"steps": 200, "width": 192, "height": 192}


def test_fifty_at_once_get_their_own_pictures_or_hear_when_to_ask_again(server, tiny):
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda seed: server.post("/generate/sd", QUICK | {"seed": seed}), range(1, 51)))
    assert {answer.status for answer in answers} <= {200, 429}
    right = [(seed, answer) for seed, answer in enumerate(answers, 1) if answer.status == 200]
    assert len(right) >= 8
    for seed, answer in right:
        (expected,) = tiny(PROMPT, steps=2, guidance_scale=4, seed=seed).images
        assert same(picture(answer.json["images"][0]["image_b64"]), expected), seed
    for answer in answers:
        assert answer.status == 200 or 1 <= int(answer.headers["retry-after"]) <= 30


def test_a_client_that_goes_away_ends_its_drawing(server):
    until(lambda: server.get("/healthz").json["waiting"] == 0)
    before = len(server.lines("job"))
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/generate/sd", json.dumps(LONG), {"Content-Type": "application/json"})
    progress = lambda: server.get("/sdapi/v1/progress?skip_current_image=true").json  # noqa: E731
    until(lambda: progress()["state"]["sampling_step"] > 2)
    seen = progress()["state"]["sampling_step"]
    connection.close()
    until(lambda: len(server.lines("job")) > before)
    job = server.lines("job")[-1]
    assert job["how"] == "cancelled"
    assert job["steps"] <= seen + 2  # the one that was being drawn when it was seen, and one more
    assert server.lines("request")[-1]["status"] in (200, 499)
    assert server.post("/generate/sd", QUICK).status == 200


@pytest.mark.slow
def test_one_that_waits_and_goes_away_is_never_drawn(server):
    before = len(server.lines("job"))
    with contextlib.ExitStack() as open_:
        for _ in range(3):
            connection = open_.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)))
            connection.request("POST", "/generate/sd", json.dumps(LONG), {"Content-Type": "application/json"})
        until(lambda: server.get("/healthz").json["waiting"] == 2)
    until(lambda: server.get("/healthz").json["waiting"] == 0)
    assert server.post("/generate/sd", QUICK).status == 200
    assert len(server.lines("job")) == before + 2


@pytest.mark.slow
def test_an_end_lets_the_picture_in_the_making_be_finished(tmp_path):
    with serving(tmp_path / "here") as running, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(running.post, "/generate/sd", QUICK | {"steps": 60}) for _ in range(3)]
        until(lambda: running.get("/sdapi/v1/progress").json["state"]["sampling_step"])  # before, two of three may wait, too
        until(lambda: running.get("/healthz").json["waiting"] == 2)
        running.process.send_signal(signal.SIGTERM)
        answers = [each.result() for each in asked]
        assert sorted(answer.status for answer in answers) == [200, 503, 503]
        assert all("retry-after" in answer.headers for answer in answers if answer.status == 503)
        assert running.process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_an_end_that_cannot_wait(tmp_path):
    with serving(tmp_path / "here", "--grace", "1", end=signal.SIGINT) as running, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(running.post, "/generate/sd", LONG | {"num_images": 16})
        until(lambda: running.get("/sdapi/v1/progress").json["state"]["sampling_step"])
        began = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert asked.result().status >= 400
        assert running.process.wait(20) == 130
        assert time.monotonic() - began < 6
        assert "Traceback" not in running.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_at_any_moment(tmp_path, number):
    chance, answers = random.Random(number), []
    for i in range(25):
        with serving(tmp_path / str(i), "--grace", "5", end=number) as running:
            body = QUICK | {"steps": chance.randint(1, 20)}
            asking = threading.Thread(target=lambda: answers.append(ignoring(running, body)))  # noqa: B023  # ends in this round
            asking.start()
            time.sleep(chance.random() * 1.5)
        asking.join(20)
        assert "Traceback" not in running.log.read_text()
    assert len(answers) == 25
    for answer in filter(None, answers):  # a whole picture, or a word that there is none
        assert answer.status in (200, 503)
        assert answer.status == 503 or picture(answer.json["images"][0]["image_b64"]).convert("RGB").size == (64, 64)
    assert any(answer and answer.status == 200 for answer in answers)


def ignoring(running, body):
    """None where nobody took the request any more."""
    with contextlib.suppress(ConnectionRefusedError, http.client.RemoteDisconnected, ConnectionResetError):
        return running.post("/generate/sd", body)


@pytest.fixture
def service():
    found = Service(Settings(devices=("cpu",)))
    found.log = lambda *_, **__: None
    for worker in found.workers:
        worker.start()
    yield found
    found.stop()


def draw(service, **options):
    drawing = Drawing(service.index.default(), {"prompt": PROMPT, "steps": 2, "seed": 1} | options)
    return asyncio.run(service.drawn(drawing, None, "test"))


def failing(service, monkeypatch, answer):
    """Until the patch goes, the network answers so at its second call."""
    draw(service)
    (pipe,) = (each.value for each in service.workers[0].shelf.kept.values())
    calls = [0]
    forward = pipe.unet.forward

    def broken(*args):
        calls[0] += 1
        return answer(forward(*args)) if calls[0] % 2 == 0 else forward(*args)

    monkeypatch.setattr(pipe.unet, "forward", broken)


def raise_lack(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB at 0x7f")


@pytest.mark.parametrize(
    ("answer", "status", "code", "times"),
    [
        (raise_lack, 507, "out_of_memory", 3),
        pytest.param(raise_lack, 507, "out_of_memory", 20, marks=pytest.mark.slow),
        pytest.param(lambda x: x * float("nan"), 500, "not_finite", 3, marks=pytest.mark.slow),
        pytest.param(lambda x: 1 / 0, 500, "internal_error", 3, marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_told_and_the_next_picture_is_right(service, monkeypatch, tiny, answer, status, code, times):
    (expected,) = tiny(PROMPT, steps=2, seed=1).images
    for _ in range(times):
        with monkeypatch.context() as patch:
            failing(service, patch, answer)
            with pytest.raises(RefusedError) as refused:
                draw(service)
        assert (refused.value.status, refused.value.code) == (status, code)
        assert refused.value.headers["x-should-retry"] == "false"
        assert "0x7f" not in refused.value.message
        assert "zero" not in refused.value.message
        assert same(draw(service).pictures[0], expected)


def test_the_tensors_of_a_picture_without_room_do_not_live_as_long_as_its_error(service, monkeypatch):
    held = []

    def fill_memory(x):
        large = x + 1
        held.append(weakref.ref(large))
        raise_lack(large)

    draw(service)
    failing(service, monkeypatch, fill_memory)
    with pytest.raises(RefusedError) as refused:
        draw(service)
    assert isinstance(refused.value.__context__, minisd.OutOfMemoryError)
    assert [each() for each in held] == [None]


def test_a_lora_of_one_request_is_none_of_the_next(service, tiny):
    done = draw(service)
    assert same(done.pictures[0], tiny(PROMPT, steps=2, seed=1).images[0])
    assert done.seconds > 0


def test_the_shelf_holds_its_budget_and_gives_up_what_was_used_longest_ago():
    tiny_path, size = minisd.load(device="cpu").checkpoint.path, bytes_of(minisd.load(device="cpu"))
    shelf = Shelf("cpu", None, int(size * 2.5))
    other = minisd.load(LIT, device="cpu")
    first = shelf.pipeline(tiny_path, None, set())
    second = shelf.pipeline(LIT, None, set())
    assert bytes_of(other) == bytes_of(second)
    assert shelf.pipeline(tiny_path, None, set()) is first
    third = shelf.pipeline(LIT, LIT, set())  # with a VAE of its own: the one before last has to go
    assert shelf.pipeline(tiny_path, None, set()) is first
    assert shelf.pipeline(LIT, LIT, set()) is third
    assert shelf.opened == 3
    assert shelf.used <= shelf.memory
    assert shelf.pipeline(LIT, None, {(LIT, LIT)}) is not second
    assert (LIT, LIT) in shelf.kept  # what is in use stays


def test_a_queue_counts_who_still_waits():
    queue = Queue(2)
    jobs = [Job(Drawing(None, {}), "test") for _ in range(3)]  # type: ignore[arg-type]
    queue.put(jobs[0])
    queue.put(jobs[1])
    queue.seconds = 100.0
    with pytest.raises(RefusedError) as full:
        queue.put(jobs[2])
    assert (full.value.status, full.value.retry) == (429, 30)
    jobs[0].cancel()
    queue.put(jobs[2])
    assert (len(queue), queue.take()) == (2, jobs[1])
    queue.close()
    assert isinstance(jobs[2].future.exception(), RefusedError)
    assert queue.take() is None


def test_settings_say_who_may_come():
    assert [is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "10.0.0.1", "studio")] == [
        True, True, True, True, False, False, False
    ]  # fmt: skip
    with pytest.raises(UsageError, match="MINISD_API_KEY"):
        Settings("10.0.0.1").check()
    with pytest.raises(UsageError, match="8 or more"):
        Settings(key="short").check()
    assert Settings().knows("[::1]:7860")
    assert not Settings().knows("10.0.0.1:7860")
    assert not Settings("0.0.0.0", key="x" * 8).knows("10.0.0.1.evil.example")


@pytest.mark.slow
def test_memory_stays_flat_over_500_requests_and_50_other_models(tmp_path):
    with serving(tmp_path / "here", "--memory", "0.02") as running:  # room for one: each change opens a file
        rss = []
        for i in range(700):
            model = "tiny-lit" if i // 10 % 2 else "tiny"
            body = QUICK | {"seed": i + 1, "checkpoint": model, "steps": 1}
            assert running.post("/generate/sd", body).status == 200
            rss.append(running.rss)
        assert running.figure("minisd_models_opened") >= 60
    after = rss[200:]  # a model in the making has a file's size beside it: the slope tells, not the ends
    slope = statistics.linear_regression(range(len(after)), after).slope
    assert slope * 100 < 1 << 20, rss[::10]


def test_an_answered_request_is_let_go_when_its_connection_closes(service):
    """Timers would keep it for seconds, and at a thousand requests in a second all of them."""
    held: list[weakref.ref[Protocol]] = []

    async def ask() -> None:
        app = create_app(service)
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(app, http=Protocol, lifespan="off", log_config=None)  # type: ignore[arg-type]
        config.load()

        def made() -> Protocol:
            protocol = Protocol(config, ServerState(), {})
            held.append(weakref.ref(protocol))
            return protocol

        listening = await loop.create_server(made, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        listening.close()
        await asyncio.sleep(0.05)
        gc.collect()
        assert [each() for each in held] == [None]

    asyncio.run(ask())


@pytest.mark.slow
def test_the_first_picture_takes_four_seconds_from_the_start(tmp_path):
    """Of a processor: on a machine with nothing else to do they pass as fast."""
    with serving(tmp_path / "here", OMP_NUM_THREADS="1") as running:
        assert running.post("/generate/sd", QUICK | {"steps": 20}).status == 200
        fields = Path(f"/proc/{running.process.pid}/stat").read_text().rpartition(")")[2].split()
        spent = (int(fields[11]) + int(fields[12])) / 100  # user and system, in clock ticks
    assert spent <= 4


@pytest.mark.slow
def test_a_lack_of_main_memory_is_told_and_the_next_picture_is_right(tmp_path):
    """A real one, at 20 places: so many MB of address space (ulimit -v) above what a small picture takes."""
    import resource

    with serving(tmp_path / "here") as running:
        expected = running.post("/generate/sd", QUICK | {"seed": 1}).json["images"]
        lacked, base = 0, running.vsz
        for i in range(20):
            most = base + (60 + 5 * i << 20)
            resource.prlimit(running.process.pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            status = running.post("/generate/sd", QUICK | {"width": 2048, "height": 2048}).status
            assert status in (200, 507)
            lacked += status == 507
            assert running.post("/generate/sd", QUICK | {"seed": 1}).json["images"] == expected
        assert lacked >= 10
        assert "Traceback" not in running.log.read_text()
