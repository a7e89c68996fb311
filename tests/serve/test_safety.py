"""Who may ask, from where, how much, and that nobody gets at anything but pictures."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import subprocess
import sys
import time
import zlib

import pytest
from PIL import Image
from serving import PROMPT, Server, b64, environment, picture, png, same, serving

from minisd.addons.wanted import TAG
from minisd.serve.settings import Settings
from minisd.text.added import MARK

QUICK = {"prompt": PROMPT, "steps": 1, "sampler": "K_EULER", "image_encoding": "png", "seed": 1}
KEY = "correct-horse-battery"
NAMES = (
    "../tiny", "../../etc/passwd", "/etc/passwd", "/etc/passwd.safetensors", "..\\tiny", "C:\\tiny.safetensors", "tiny/../tiny",
    ".",
    "..", "~", "~root/x", "./tiny.safetensors", "weights/tiny.safetensors", "file:///etc/passwd", "http://127.0.0.1/x", "//x/y",
    "\\\\host\\share", "evil", "evil.safetensors", "models", "models/evil", "tiny\0", "tiny\n", "\u202etiny", "%2e%2e%2fetc",
    "tiny;ls", "$(ls)", "`ls`", "|ls", "*", "?iny", "tin[y]", "-m", "--help", "octoai:../x", "octoai:/etc/passwd", "a" * 5000, "",
    " ", "\ud7ff", "ｔｉｎｙ", "tiny.ckpt.exe", "con", "nul", "tiny:stream", "/dev/zero", "/dev/stdin", "/proc/self/environ",
    "/proc/self/mem", "....//....//etc/passwd", "..%2f..%2f", "%00", "tiny%00.safetensors", "log.txt", "here/log.txt",
    "<script>alert(1)</script>", "';--", "{prompt}", "embeddings/../clay", "lit-vae/../../x",
)  # fmt: skip
PLACES = [
    ("/generate/sd", lambda name: {"checkpoint": name}),
    ("/generate/sd", lambda name: {"vae": name}),
    ("/generate/sd", lambda name: {"loras": {name: 1.0}}),
    ("/generate/sd", lambda name: {"textual_inversions": {name: "x"}}),
    ("/generate/sd", lambda name: {"prompt": f"embedding:{name} x"}),
    ("/generate/sd", lambda name: {"prompt": f"<lora:{name}:1> x"}),
    ("/generate/controlnet-sd15", lambda name: {"controlnet": name, "controlnet_image": b64(Image.new("RGB", (8, 8)))}),
    ("/sdapi/v1/txt2img", lambda name: {"override_settings": {"sd_model_checkpoint": name}}),
    ("/sdapi/v1/txt2img", lambda name: {"override_settings": {"sd_vae": name}}),
    ("/sdapi/v1/txt2img", lambda name: {"refiner_checkpoint": name}),
    ("/v1/images/generations", lambda name: {"model": name}),
]


SOME = [pytest.param(*place, marks=pytest.mark.slow if i % 4 else ()) for i, place in enumerate(PLACES)]


@pytest.mark.parametrize(("path", "fields"), SOME, ids=range(len(PLACES)))
def test_no_name_becomes_a_path(server, path, fields):
    base = QUICK if path.startswith("/generate") else {"prompt": PROMPT, "steps": 1}
    before = server.figure("minisd_jobs_total")
    for name in NAMES:
        prompt = fields(name).get("prompt")
        if not name.strip() or (
            prompt and (len(prompt) > 9000 or not (TAG.search(prompt) or f"embedding:{name}" in marked(prompt)))
        ):
            continue  # nothing, or words of a prompt
        answer = server.post(path, base | fields(name))
        assert answer.status in (400, 404, 422), (name, answer.body[:200])
        assert b"/tmp" not in answer.body
        assert b"root:" not in answer.body
    assert server.figure("minisd_jobs_total") == before


def marked(prompt: str) -> list[str]:
    return [f"embedding:{name}" for name in MARK.findall(prompt)]


def test_a_large_body_is_refused_before_it_is_read(server):
    for _ in range(3):  # so that the allocator has what drawing keeps
        server.post("/generate/sd", QUICK)
    before = server.rss
    for chunked in (False, True):
        began = time.monotonic()
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        head = f"POST /generate/sd HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
        head += "Transfer-Encoding: chunked\r\n\r\n" if chunked else f"Content-Length: {300 << 20}\r\n\r\n"
        connection.sendall(head.encode())
        piece = b"x" * (1 << 20)
        for _ in range(300):
            connection.sendall(b"100000\r\n" + piece + b"\r\n" if chunked else piece)
        answer = connection.recv(4096)
        connection.close()
        assert answer.startswith(b"HTTP/1.1 413 "), answer[:100]
        assert time.monotonic() - began < 5
        assert server.rss - before < 45 << 20
    assert server.lines("request")[-1]["status"] == 413


BAD = [
    b"", b"{", b"null", b"[]", b"1", b'"x"', b"{}", b'{"prompt": NaN}', b'{"prompt": "x", "steps": NaN}',
    b'{"prompt": "x", "steps": 1e400}', b'{"prompt": "x", "cfg_scale": Infinity}',
    b'{"prompt": "x", "cfg_scale": -Infinity}', b'{"prompt": "\\ud800"}', b'{"\\ud800": 1, "prompt": "x"}',
    b'{"prompt": "x", "\\udfff": {"\\ud800": NaN}}', b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "\xff\xfe"}',
    b"\xef\xbb\xbf{}", b'{"prompt": "x", "steps": 1' + b"0" * 6000 + b"}", b'{"prompt": ["x"]}', b'{"prompt": {"x": 1}}',
    b'{"prompt": "x", "loras": {"x": NaN}}', b'{"prompt": "x", "loras": [1]}', b'{"prompt": "x", "seed": -5}',
    b'{"prompt": "x", "seed": 1e30}', b'{"prompt": "x", "seed": [[1]]}', b'{"prompt": "x", "override_settings": {"x": NaN}}',
    b'{"prompt": "x", "override_settings": {"x": "\\ud800"}}',
    b'{"prompt": "x", "alwayson_scripts": {"controlnet": {"args": 1}}}',
    b'{"prompt": "x", "alwayson_scripts": {"controlnet": {"args": [null]}}}', b'{"prompt": "x\\u0000y"}',
    b'{"prompt": "((((((((x"}', b'{"prompt": "(x:1e999)"}', b'{"prompt": "x", "width": 0, "height": 0}',
    b'{"prompt": "x", "width": -8}', b"\x00" * 100, b'{"prompt": "x", "n": true}',
    b'{"prompt": "x", "size": "9999999999x9999999999"}', b'{"prompt": "x", "width": 8.5}',
    b'{"prompt": "x", "seed": 9223372036854775807}',
    b'{"prompt": "x", "unknown": {"a": [[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]}}',
]  # fmt: skip


ELSEWHERE = ("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options", "/v1/images/generations", "/v1/assets")


@pytest.mark.parametrize("path", ["/generate/sd", *(pytest.param(path, marks=pytest.mark.slow) for path in ELSEWHERE)])
def test_bad_json_is_a_fault_of_its_sender(server, path):
    for body in BAD:
        if body == b"{}" and path in ("/sdapi/v1/options", "/sdapi/v1/txt2img"):
            continue  # which is in order
        sent = body.replace(b'"prompt": "x"', b'"prompt": "x", "steps": 1') if b"steps" not in body else body
        answer = server.post(path, sent)
        assert answer.status < 500, (body[:100], answer.body[:300])
        assert json.loads(answer.body) is not None or answer.status == 200
        assert b"Traceback" not in answer.body


def test_what_is_too_much_never_waits_in_the_queue(server):
    before = server.figure("minisd_jobs_total")
    at, above = {"steps": 200, "num_images": 16, "width": 2048, "height": 2048}, {}
    assert Settings().limits.steps == at["steps"]
    for fields in (
        {"steps": 201}, {"steps": 10**6}, {"num_images": 17}, {"num_images": 10**4}, {"width": 2056, "height": 2048},
        {"width": 8192, "height": 8192}, {"prompt": "x" * 10_001}, {"prompt": "x" * 1_000_000}, {"negative_prompt": "x" * 10_001},
        {"steps": 200, "num_images": 16, "width": 2048, "height": 2048}, {"width": 64, "height": 10**9}, {"steps": 0},
    ):  # fmt: skip
        answer = server.post("/generate/sd", QUICK | above | fields)
        assert answer.status == 422, fields
    for fields in ({"n": 17}, {"size": "8192x8192"}, {"steps": 201}):
        assert server.post("/v1/images/generations", {"prompt": "x"} | fields).status == 400
    for fields in ({"n_iter": 4, "batch_size": 5}, {"steps": 201}, {"width": 8192, "height": 8192}):
        assert server.post("/sdapi/v1/txt2img", {"prompt": "x"} | fields).status == 422
    assert server.figure("minisd_jobs_total") == before


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that unpacks to side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(side // 8 + 1)) for _ in range(side)) + rows.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def test_pictures_that_are_bombs_or_none(server):
    server.post("/generate/sd", QUICK)
    before = server.rss
    for data in (
        bomb(13_000),
        bomb(20_000),
        bomb(4200),
        b"",
        b"x",
        png(Image.new("RGB", (64, 64)))[:-30],
        b"GIF89a" + bytes(50),
        b"<svg/>",
    ):
        answers = [server.post("/generate/sd", QUICK | {"init_image": base64.b64encode(data).decode()}) for _ in range(3)]
        answer = answers[-1]
        assert {each.status for each in answers} == {422}
        assert answer.json["detail"][0]["loc"] == ["body", "init_image"]
        assert b"PIL" not in answer.body
        assert b" 0x" not in answer.body
        assert min(line["seconds"] for line in server.lines("request")[-3:]) < 0.05  # others may be at work on the machine
    assert server.rss - before < 20 << 20
    for image in (
        Image.new("CMYK", (64, 64)),
        Image.new("I;16", (64, 64), 60_000),
        Image.new("1", (1, 1)),
        Image.new("P", (64, 64)),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG" if image.mode == "CMYK" else "PNG")
        fields = {"init_image": base64.b64encode(buffer.getvalue()).decode(), "width": 64, "height": 64, "strength": 1.0}
        assert server.post("/generate/sd", QUICK | fields).status == 200


def test_pages_of_others_may_not_ask(server):
    for headers, status in (
        ({"Host": "evil.example"}, 400), ({"Host": f"evil.example:{server.port}"}, 400), ({"Host": "10.0.0.1"}, 400),
        ({"Host": f"localhost:{server.port}"}, 200), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
        ({"Origin": f"http://127.0.0.1:{server.port}"}, 200), ({"Content_Type": "text/plain"}, 422),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 422),
    ):  # fmt: skip
        answer = server.post("/generate/sd", QUICK, **headers)
        assert answer.status == status, headers
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert server.ask("OPTIONS", "/generate/sd", Origin="http://evil.example").status == 403


@pytest.mark.slow
def test_others_need_the_key(tmp_path):
    command = [sys.executable, "-m", "minisd", "serve", "--port", "0", "--host", "0.0.0.0"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(None, tmp_path), cwd=tmp_path)
    assert run.returncode == 2
    assert "MINISD_API_KEY" in run.stderr
    with serving(tmp_path / "here", "--host", "0.0.0.0", "--allow-host", "studio", MINISD_API_KEY=KEY) as running:
        for answer in (running.get("/v1/models"), running.post("/generate/sd", QUICK, Authorization="Bearer wrong"),
                       running.get("/metrics"), running.get("/sdapi/v1/options", Authorization=f"Token {KEY}")):  # fmt: skip
            assert answer.status == 401
        assert running.get("/v1/models").json["error"]["type"] == "authentication_error"
        assert running.get("/healthz").status == 200
        assert running.get("/openapi.json", Authorization=f"Bearer {KEY}").status == 404
        basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
        for given in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {basic}"):
            assert running.get("/v1/models", Authorization=given).status == 200
        for host, status in (("studio", 200), ("10.1.2.3:80", 200), ("evil.example", 400)):
            assert running.get("/healthz", Host=host).status == status
        later(running)
        log = running.log.read_text()
    assert KEY not in log
    assert PROMPT not in log


def later(running: Server) -> None:
    """OctoAI's client asks for later answers without a key, at an address that nobody guesses."""
    given = running.post("/generate/sd", QUICK, Authorization=f"Bearer {KEY}", X_OctoAI_Async="1").json
    path = "/" + given["poll_url"].split("/", 3)[3]
    assert len(given["response_id"]) >= 30
    end = time.monotonic() + 20
    while running.get(path).json["status"] != "completed":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert running.get(f"{path}/response").json["images"]
    assert running.get("/later/guess").status == 404


@pytest.mark.slow
def test_prompts_name_loras_and_are_logged_for_who_asks(models, tmp_path, tiny):
    with serving(tmp_path / "here", "--prompt-loras", "--log-prompts", models=models) as running:
        body = QUICK | {"prompt": f"<lora:clay:0.7> {PROMPT}", "steps": 3, "cfg_scale": 4}
        found = picture(running.post("/generate/sd", body).json["images"][0]["image_b64"])
        assert same(found, tiny(PROMPT, steps=3, guidance_scale=4, seed=1, loras=[(models / "clay.safetensors", 0.7)]).images[0])
        (running.log.parent / "clay.ckpt").write_bytes((models / "clay.safetensors").read_bytes())  # where the server works
        for prompt in ("(embedding:clay.ckpt:1.1) x", "x [embedding:clay.ckpt]"):
            answer = running.post("/generate/sd", body | {"prompt": prompt})
            assert (answer.status, answer.json["detail"][0]["type"]) == (422, "model_not_found"), prompt
        for prompt in ("<lora:/etc/passwd:1> x", "<lora:evil:1> x", "<lo<lora:clay:0>ra:/etc/passwd:1> x", "<lora:clay:x> y"):
            assert running.post("/generate/sd", body | {"prompt": prompt}).status == 422, prompt
        assert running.lines("job")[0]["prompt"] == PROMPT


@pytest.mark.slow  # half a minute of waiting
def test_slow_clients_are_sent_away(server):
    """Sockets that say half of a head or of a body are in nobody's way, and closed in time."""
    half = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(50)]
    for i, each in enumerate(half):
        head = b"POST /generate/sd HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
        each.sendall(head if i % 2 else head + b"\r\n{")
    began = time.monotonic()
    assert server.get("/healthz").status == 200
    for i, each in enumerate(half):
        answer = each.recv(4096)
        assert answer == b"" if i % 2 else answer.startswith(b"HTTP/1.1 408 ")
    assert 25 < time.monotonic() - began < 40


@pytest.mark.slow
def test_a_second_head_is_not_waited_for_without_end(server, monkeypatch):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/healthz")
    assert connection.getresponse().read()
    assert connection.sock is not None
    connection.sock.sendall(b"GET /heal")
    began = time.monotonic()
    assert connection.sock.recv(100) == b""
    assert time.monotonic() - began < 15
