"""The server of examples/serve.py: real requests over loopback, and hostile ones, which leave it able to answer."""

import http.client
import importlib.util
import io
import json
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
uvicorn = pytest.importorskip("uvicorn")

from cpc_fast.config import Config  # noqa: E402 (after what skips)
from cpc_fast.detector import Detector  # noqa: E402

SERVE = Path(__file__).parents[2] / "examples" / "serve.py"
EDGE = "the-edge"


def picture(seed: int, side: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 160, (side, side, 1), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def detector() -> Detector:
    config = Config(width=4, patch_size=16, patch_stride=8, steps=2, batch_size=4, epochs=1, bank_size=64)
    return Detector.fit([picture(i) for i in range(6)], config)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("serve", SERVE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MAX_BODY, module.MAX_PIXELS, module.SECONDS = 1 << 20, 512 * 512, 5
    return module


@pytest.fixture(scope="module")
def port(detector, example):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        options = uvicorn.Config(example.make_app(detector), log_level="critical", ws="none", lifespan="off")
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(30)


def form(*files: tuple[str, bytes]) -> bytes:
    parts = [
        f'--{EDGE}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + f"--{EDGE}--\r\n".encode()


def post(port: int, body: bytes, kind: str = f"multipart/form-data; boundary={EDGE}", method: str = "POST"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, "/score", body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


@pytest.fixture(autouse=True)
def it_still_answers(port, detector):
    """After every request, however hostile."""
    yield
    status, answers = post(port, form(("a.png", png(picture(9)))))
    assert status == 200
    assert answers[0]["score"] == detector.inspect(picture(9)).score


def test_images_get_the_scores_of_the_detector_in_their_order(port, detector):
    pictures = [picture(i) for i in (20, 21, 22)]
    status, answers = post(port, form(*((f"{i}.png", png(pixels)) for i, pixels in enumerate(pictures))))
    assert status == 200
    for i, (answer, pixels) in enumerate(zip(answers, pictures, strict=True)):
        found = detector.inspect(pixels)
        assert (answer["name"], answer["score"], answer["flagged"]) == (f"{i}.png", found.score, found.flagged)
        assert answer["other_light"] == found.other_light
        assert [segment["area"] for segment in answer["segments"]] == [segment.area for segment in found.segments]


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def test_a_bad_image_is_named_and_the_others_are_answered(port):
    files = [
        ("good.png", png(picture(1))), ("text.png", b"I am not an image"), ("bomb.png", bomb(60000)),
        ("large.png", png(picture(2, 600))), ("tiny.png", png(picture(3, 9))), ("cut.png", png(picture(4))[:300]),
        ("../../etc/passwd", b"x"), ("empty.png", b""),
    ]  # fmt: skip
    status, answers = post(port, form(*files))
    assert status == 200
    assert "score" in answers[0]
    words = ("not an image", "67,108,864", "cut it into pieces", "smaller than one patch", "cut short", "not an image")
    for answer, word in zip(answers[1:], (*words, "is empty (0 bytes)"), strict=True):
        assert word in answer["error"], answer


def test_a_name_that_json_cannot_hold_is_escaped(port):
    body = form(("+2AA-.png", png(picture(1))))
    status, answers = post(port, body, kind=f"multipart/form-data; boundary={EDGE}; charset=utf-7")
    assert (status, answers[0]["name"]) == (200, "\\ud800.png")


def test_too_many_files_none_and_what_is_no_form(port, example):
    image = png(picture(1))
    status, answer = post(port, form(*[("a.png", image)] * (example.MAX_FILES + 1)))
    assert (status, "Too many files" in answer["detail"]) == (400, True)
    assert post(port, form())[0] == 400
    field = f'--{EDGE}\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--{EDGE}--\r\n'.encode()
    assert post(port, field)[0] == 400
    assert post(port, b"no form at all")[0] == 400
    assert post(port, image, kind="image/png")[0] == 415
    assert post(port, b"{}", kind="application/json")[0] == 415
    assert post(port, b"", method="GET")[0] == 405


def raw(port: int, head: bytes, *parts: bytes) -> bytes:
    """What comes back while the request is still being sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:  # it has hung up
            pass
        try:
            return connection.recv(1000)
        except ConnectionResetError:
            return b"reset"


def test_a_huge_body_is_refused_before_and_while_it_comes(port, example):
    kind = f"Content-Type: multipart/form-data; boundary={EDGE}\r\n".encode()
    assert b" 413 " in raw(port, kind + b"Content-Length: 99999999999")
    start = form(("a.png", b""))[: -len(EDGE) - 8]
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    first = f"{len(start):x}\r\n".encode() + start + b"\r\n"
    said = raw(port, kind + b"Transfer-Encoding: chunked", first, *[chunk] * (2 * example.MAX_BODY >> 16))
    assert b" 413 " in said or said == b"reset"


def test_a_request_that_never_ends_is_let_go(port):
    kind = f"Content-Type: multipart/form-data; boundary={EDGE}\r\nContent-Length: 1000".encode()
    assert b" 408 " in raw(port, kind, b"--")


def test_more_at_once_than_there_is_room_for(port, example):
    kind = f"Content-Type: multipart/form-data; boundary={EDGE}\r\nContent-Length: 1000".encode()
    said: list[bytes] = []
    slow = [
        threading.Thread(target=lambda: said.append(raw(port, kind, b"--"))) for _ in range(3 * example.MAX_WAITING)
    ]
    for thread in slow:
        thread.start()
    for thread in slow:
        thread.join(60)
    assert sum(b" 503 " in each for each in said) >= example.MAX_WAITING
    assert sum(b" 408 " in each for each in said) >= example.MAX_WAITING
