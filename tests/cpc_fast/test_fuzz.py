"""Damaged images, run folders and command lines, drawn by hypothesis: a result or one clear sentence, no traceback.

python3 -m pytest tests/cpc_fast/test_fuzz.py                              some of each
python3 -m pytest tests/cpc_fast/test_fuzz.py --hypothesis-profile=fuzz    10,000 images, 500 of everything else
"""

import contextlib
import io
import json
import shutil
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import SET_TINY, make_set, texture

from cpc_fast import cli
from cpc_fast.config import Config, read_settings
from cpc_fast.detector import Detector
from cpc_fast.errors import CpcFastError, ImageError
from cpc_fast.images import read_image
from cpc_fast.inputs import Shard

MANY = settings.get_profile("fuzz").max_examples == settings.default.max_examples
FEW = settings(max_examples=500 if MANY else 30, deadline=None, suppress_health_check=list(HealthCheck))
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")


def clear(error: CpcFastError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 1500
    assert all(word in text for word in words)
    text.encode()  # can be printed anywhere


@lru_cache
def whole(kind: str, colour: bool) -> bytes:
    pixels = texture(3, 16, 24)
    file = io.BytesIO()
    Image.fromarray(np.repeat(pixels, 3, 2) if colour else pixels[..., 0]).save(file, kind)
    return file.getvalue()


@st.composite
def damaged(draw, data: bytes, cuts: bool = True) -> bytes:
    """A few bytes overwritten, most of them near the start, where the headers are; some cut out, some put in."""
    broken = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        end = draw(st.sampled_from([min(len(broken), 64), min(len(broken), 600), len(broken)]))
        at = draw(st.integers(0, max(0, end - 1)))
        how = draw(st.sampled_from(["set", "set", "word", "cut", "end", "put"] if cuts else ["set", "word"]))
        if how == "set" and broken:
            broken[at] = draw(st.integers(0, 255))
        elif how == "word":
            word = struct.pack(
                draw(st.sampled_from([">I", "<I"])), draw(st.sampled_from([0, 1, 65535, 2**31, 2**32 - 1]))
            )
            broken[at : at + 4] = word
        elif how == "cut":
            del broken[at : at + draw(st.integers(1, 40))]
        elif how == "end":
            del broken[at:]
        elif how == "put":
            broken[at:at] = draw(st.binary(min_size=1, max_size=20))
    return bytes(broken)


@settings(FEW, max_examples=10_000 if MANY else 150)
@given(st.sampled_from(FORMATS), st.booleans(), st.data())
def test_image_bytes(kind, colour, data):
    try:
        image = read_image("x.png", data.draw(damaged(whole(kind, colour))))
    except ImageError as error:
        clear(error, "'x.png'")
    else:
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] in (1, 3)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    options = [*SET_TINY, "--epochs", "1", "--set", "width=2", "--set", "bank_size=8"]
    assert cli.run(["fit", str(make_set(folder / "data", train=5)), "--out", str(folder / "run"), *options]) == 0
    return folder


def run_of(fitted: Path, name: str, data: bytes) -> Path:
    """The run with one file replaced."""
    run = fitted / "fuzzed"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for path in (fitted / "run").iterdir():
        if path.name != name:
            shutil.copy(path, run)
    (run / name).write_bytes(data)
    return run


def load_and_use(run: Path) -> None:
    try:
        detector = Detector.load(run)
        detector.inspect(texture(1))
    except CpcFastError as error:
        clear(error)


@FEW
@given(data=st.data())
def test_bytes_of_a_detector(fitted, data):
    name = "model.safetensors"
    load_and_use(run_of(fitted, name, data.draw(damaged((fitted / "run" / name).read_bytes()))))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**30, -1, 0, "9"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@lru_cache
def taken_apart(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def other_record(draw, path: Path) -> bytes:
    """The file with one part of its record, or of its table of tensors, replaced by any JSON."""
    header, body = taken_apart(path)
    header = json.loads(json.dumps(header))
    about = json.loads(header["__metadata__"]["about"])
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from([about, header]))
        while True:
            key = draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
            if key == "__metadata__":
                break
            if isinstance(at[key], (dict, list)) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            at[key] = draw(JSON)
            break
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["about"] = json.dumps(about)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@FEW
@given(data=st.data())
def test_the_record_of_a_detector(fitted, data):
    path = fitted / "run" / "model.safetensors"
    load_and_use(run_of(fitted, path.name, data.draw(other_record(path))))


@FEW
@given(data=st.data())
def test_a_checkpoint(fitted, data):
    path = fitted / "run" / "checkpoint.safetensors"
    run = run_of(fitted, path.name, data.draw(st.one_of(other_record(path), damaged(path.read_bytes()))))
    said = call(["fit", str(fitted / "data"), "--out", str(run), "--resume"])
    assert "Error: unexpected" not in said, said


def call(arguments: list[str]) -> str:
    """What a command says where it fails: one line, and an exit code that is one of ours."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(arguments)
    assert code in (0, 1, 2), (code, arguments)
    lines = [line for line in err.getvalue().splitlines() if not line.startswith(("fit:", "Skipped:", "predict:"))]
    assert "Traceback" not in err.getvalue()
    assert (code == 0) == (not any(line.startswith("Error: ") for line in lines)) or "were skipped" in lines[-1]
    return err.getvalue()


WORDS = st.sampled_from([
    "fit", "predict", "evaluate", "export", "doctor", "data", "textures", "--out", "--set", "--resume", "--shard",
    "--size", "--epochs", "--format", "--min-area", "--device", "--help", "--version", "--debugging", "--", "-", "",
    "cpu", "x=1", "epochs=0", "shifts=,", "width=1e9", "crop=none", "2/8", "0/0", "-1", "1e3", "NaN", "nowhere",
    "nowhere/x.png", "\0", "\n", "\udcff",
])  # fmt: skip


@FEW
@given(st.lists(WORDS | st.text(max_size=6), max_size=7))
def test_command_lines(tmp_path_factory, words):
    nowhere = str(tmp_path_factory.getbasetemp() / "nowhere")
    words = [word.replace("nowhere", nowhere) if word.startswith("nowhere") else word for word in words]
    if "doctor" in words or "demo" in words or {"textures", "elpv"} & set(words):  # they would do their work
        words = [*words, "--no-such-option"]
    said = call(words)
    assert "Error: unexpected" not in said, (words, said)


@FEW
@given(
    st.lists(
        st.text(max_size=12)
        | st.sampled_from([f"{name}={v}" for name in vars(Config()) for v in (0, -1, "x", "9" * 30)])
    )
)
def test_settings_and_shards(words):
    for make in (lambda: Config().replace(**read_settings(words)), lambda: [Shard.parse(word) for word in words]):
        try:
            make()
        except CpcFastError as error:
            clear(error)
