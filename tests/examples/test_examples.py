"""Every example runs, and its loss goes down."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = {"simclr_cifar_like": {"steps": 12, "batch": 64}, "clip_towers": {"steps": 25, "batch": 128}}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*FEW, "serve"}  # test_serve.py


@pytest.mark.parametrize("name", FEW)
def test_the_loss_of_an_example_goes_down(name, capsys):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.train(**FEW[name])
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3
    printed = capsys.readouterr().out
    assert "step   0  loss" in printed
    assert f"step {FEW[name]['steps'] - 1:3d}  loss" in printed
