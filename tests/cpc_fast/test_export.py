"""A detector as a program: the same scores and maps in torch.export and in onnxruntime, for batches of one or more."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from samples import SET_TINY, TINY_CONFIG, holed, make_set, texture

from cpc_fast import cli
from cpc_fast.detector import Detector, prepare
from cpc_fast.errors import CpcFastError, UsageError
from cpc_fast.export import FORMATS, TOLERANCE, Program, export
from cpc_fast.images import read_image
from cpc_kernels.capabilities import Capability

RELIABILITY = Path(__file__).parents[2] / "docs" / "reliability.md"
IMAGES = [texture(i) for i in range(8)]
CHOICES = [
    {},
    {"context": "masked-conv", "directions": 1, "standardise": "image", "finer": 2, "place": True, "members": 2},
    {"context": "masked-conv", "mirrored": True, "flips": True, "finer": 2, "place": True, "members": 2},
    {"mirrored": True, "flips": True, "directions": 2},
    {"ensemble": "max", "members": 2, "closing": 3, "finer": 2},
    {"channels": 3, "standardise": "imagenet", "norm": "layer", "patch_stride": 7, "steps": 3},
]


@pytest.mark.parametrize("changes", CHOICES, ids=str)
@pytest.mark.parametrize("size", [(48, 48), (27, 61)])  # some steps reach past the smaller grid
def test_the_program_says_what_the_detector_says(changes, size):
    detector = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, precision="float32", **changes)
    images = np.stack([texture(i, *size).repeat(detector.config.channels, 2) for i in range(50, 53)])
    scores, maps = Program(detector, size)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    for image, score, map in zip(images, scores, maps, strict=True):
        answer = detector.inspect(image)
        np.testing.assert_allclose(map.detach().numpy(), answer.map, rtol=TOLERANCE, atol=TOLERANCE)
        assert float(score) == pytest.approx(answer.score, rel=TOLERANCE, abs=TOLERANCE)


WITHOUT = """
import sys, torch
sys.modules["cpc_fast"] = sys.modules["cpc_kernels"] = None  # cannot be imported
about = {"about.json": ""}
program = torch.export.load(sys.argv[1], extra_files=about).module()
for batch in (1, 2, 5):
    scores, maps = program(torch.full((batch, 1, 48, 48), 77, dtype=torch.uint8))
    assert scores.shape == (batch,) and maps.shape == (batch, 48, 48)
for shape in ((1, 1, 40, 48), (1, 1, 48, 64), (1, 3, 48, 48)):
    try:
        program(torch.zeros(shape, dtype=torch.uint8))
    except AssertionError as error:
        assert sys.argv[2] in str(error), error
    else:
        raise SystemExit(f"{shape} is not refused")
print(float(scores[4]), about["about.json"])
"""


def test_the_torch_program_needs_torch_alone(tmp_path, capsys):
    run = tmp_path / "run"
    options = [*SET_TINY, "--set", "precision=float32", "--set", "depth=12", "--epochs", "1"]
    assert cli.run(["fit", str(make_set(tmp_path / "data")), "--out", str(run), *options]) == 0
    capsys.readouterr()
    assert cli.run(["export", str(run)]) == 0
    said = capsys.readouterr().out
    assert "detector.pt2; on random images it differs from torch here by " in said
    assert "images: uint8 (batch, 1, 48, 48), of values of 12 bits the upper 8: v >> 4\n" in said
    assert f"program = torch.export.load('{run / 'detector.pt2'}').module()\n" in said
    assert "scores, maps = program(images)  # float32 (batch,), (batch, 48, 48)\n" in said
    assert f"Scores above {Detector.load(run).threshold.value:.4g} are anomalous." in said
    assert "bfloat16" not in said
    refusal = re.search(r"heights and widths are refused \((.*)\); for another size: --size HxW\.\n", said)
    assert refusal
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, str(run / "detector.pt2"), refusal[1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    score, about = done.stdout.split(" ", 1)
    detector = Detector.load(run)
    assert json.loads(about)["threshold"] == detector.threshold.value
    assert json.loads(about)["depth"] == 12
    expected = detector.inspect(np.full((48, 48, 1), 77, np.uint8)).score
    assert float(score) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("cpu", "gpu", "where", "size"),
    [
        (True, None, "cpu", None),
        (False, True, "cuda", None),
        (True, True, "cpu and cuda", 40),
        (False, False, "", None),
        (False, False, "", 40),
    ],
)
def test_export_says_where_predict_computes_otherwise(tmp_path, capsys, monkeypatch, cpu, gpu, where, size):
    """gpu: whether there is one that is fast at bfloat16; None: there is none."""
    Detector.fit(IMAGES, TINY_CONFIG.replace(image_size=size), epochs=1, out=tmp_path)
    monkeypatch.setattr(sys.modules["cpc_fast.export"], "export", lambda *_: 0.0)
    monkeypatch.setattr(sys.modules["cpc_fast.train"], "FAST_BF16", Capability("bf16", cpu, "as told", ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    assert cli.run(["export", str(tmp_path), "--format", "onnx"]) == 0
    said = capsys.readouterr().out
    (threshold,) = (line for line in said.splitlines() if line.startswith("Scores above "))
    assert (f"predict computes in bfloat16 on {where} here and this file in float32" in threshold) == bool(where)
    assert ("bfloat16" in said) == bool(where)
    assert ("maximum at an image's own size, this file at 40 x 40: scores differ" in threshold) == bool(size)
    assert ("differ" in threshold) == bool(where or size)
    assert f"session = onnxruntime.InferenceSession('{tmp_path / 'detector.onnx'}')\n" in said
    assert 'scores, maps = session.run(["scores", "maps"], {"images": images})  # float32' in said
    assert "are refused (Got invalid dimensions); for another size: --size HxW." in said


@pytest.mark.parametrize("changes", CHOICES[1:2], ids=str)
def test_onnxruntime_says_the_same(tmp_path, changes, caplog):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    detector = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, **changes)
    path = tmp_path / "detector.onnx"
    assert export(detector, path, "onnx") <= TOLERANCE
    assert not [record.name for record in caplog.records if record.levelname == "WARNING"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["cpc_fast"])
    assert (about["height"], about["width"], about["threshold"]) == (48, 48, detector.threshold.value)
    for batch in (1, 3, 6):
        images = np.random.default_rng(batch).integers(0, 256, (batch, 1, 48, 48), dtype=np.uint8)
        scores, maps = session.run(None, {"images": images})
        expected = Program(detector, (48, 48))(torch.from_numpy(images))
        np.testing.assert_allclose(scores, expected[0].detach(), rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(maps, expected[1].detach(), rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(Exception, match="Got invalid dimensions"):  # as the command says
        session.run(None, {"images": np.zeros((1, 1, 40, 48), np.uint8)})
    assert [p.name for p in tmp_path.iterdir()] == ["detector.onnx"]


SNIPPETS = re.findall(r"^```python\n(# not run here.*?)^```", RELIABILITY.read_text(), re.MULTILINE | re.DOTALL)


def write_pictures() -> list[str]:
    """Grey, colour, palette and 12 bits, all of them to be turned."""
    stripes, hole = texture(50), holed(51)[0]
    colour = Image.fromarray(stripes.repeat(3, 2) // np.array([1, 2, 3], np.uint8))
    pictures = {
        "grey.jpg": Image.fromarray(stripes[..., 0]), "hole.png": Image.fromarray(hole[..., 0]), "colour.jpg": colour,
        "palette.png": colour.convert("P"), "deep.png": Image.fromarray(stripes[..., 0].astype(np.uint16) * 16 + 7),
    }  # fmt: skip
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, picture in pictures.items():
        picture.save(name, exif=turned)
    return list(pictures)


def test_the_document_goes_from_a_file_to_the_decision_of_predict(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    detector = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, precision="float32", depth=12)
    for format, path in FORMATS.items():
        export(detector, path, format)
    names: dict[str, object] = {}
    for name in write_pictures():
        expected = detector.predict([name])
        for code in SNIPPETS:
            capsys.readouterr()
            exec(code.replace("part.png", name), names)
            score, said = capsys.readouterr().out.split()
            assert float(score) == pytest.approx(expected.scores[0], rel=TOLERANCE, abs=TOLERANCE)
            assert said == ("anomalous" if expected.flagged[0] else "normal")


@pytest.mark.parametrize("changes", [{}, {"channels": 3}, {"image_size": 40}], ids=str)
def test_the_document_reads_as_predict_does(tmp_path, monkeypatch, changes):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    config = TINY_CONFIG.replace(depth=12, **changes)
    names: dict[str, Any] = {}
    exec(SNIPPETS[0].partition("session = ")[0], names)
    side = config.image_size or 48
    about = {"depth": 12, "channels": config.channels, "height": side, "width": side}
    for name in write_pictures():
        mine = names["read"](name, about, scaled=config.image_size is not None)
        assert np.array_equal(mine[0].transpose(1, 2, 0), prepare(read_image(name, depth=12), config))


def test_the_name_says_the_format(tmp_path, capsys, monkeypatch):
    Detector.fit(IMAGES, TINY_CONFIG, epochs=1, out=tmp_path)
    formats = []
    monkeypatch.setattr(sys.modules["cpc_fast.export"], "export", lambda d, p, format, s: formats.append(format) or 0.0)
    for options in (["--out", "x.onnx"], ["--out", "x.PT2"], ["--out", "x.bin"], ["--out", "x", "--format", "onnx"]):
        assert cli.run(["export", str(tmp_path), *options]) == 0
    assert formats == ["onnx", "torch", "torch", "onnx"]
    capsys.readouterr()
    assert cli.run(["export", str(tmp_path), "--out", "x.onnx", "--format", "torch"]) == 2
    assert "--out x.onnx ends as a file of onnx, and --format is torch; leave one" in capsys.readouterr().err
    assert cli.run(["export", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is a folder; name the file to write." in capsys.readouterr().err
    assert len(formats) == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_does_not_end_the_process():
    code = f"""
import sys, torch
sys.path[:] = {sys.path!r}
from pathlib import Path
from cpc_fast.export import _as_torch
class Program(torch.nn.Module):
    def forward(self, images):
        return images.float()
try:
    _as_torch(Program(), torch.zeros(2, 3), Path("/dev/full"), "about")
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "No space left on device\n"), done.stderr


def test_what_cannot_be_exported(tmp_path, monkeypatch, capsys):
    detector = Detector.fit([*IMAGES[:4], texture(9, 40, 40)], TINY_CONFIG, epochs=1)
    with pytest.raises(UsageError, match=r"several sizes, and .* from 16 pixels \(one patch\) .* --size 48x48\.$"):
        export(detector, tmp_path / "x.pt2")
    with pytest.raises(
        UsageError, match=r"size is 8 x 48; both sides must be from one patch \(16\) to 8192 pixels: --size 48x48"
    ):
        export(detector, tmp_path / "x.pt2", size=(8, 48))
    with pytest.raises(UsageError, match="no format 'tf'; there are torch and onnx"):
        export(detector, tmp_path / "x", "tf")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CpcFastError, match=r"pip install 'cpc_fast\[onnx\]'"):
        export(detector, tmp_path / "x.onnx", "onnx", (48, 48))
    assert not list(tmp_path.iterdir())
    assert cli.run(["export", str(tmp_path), "--format", "tf"]) == 2
    assert "--format is 'tf'; it must be torch or onnx" in capsys.readouterr().err
    assert cli.run(["export", str(tmp_path), "--size", "big"]) == 2
    assert "--size is 'big'; a height of 128 and a width of 256" in capsys.readouterr().err
