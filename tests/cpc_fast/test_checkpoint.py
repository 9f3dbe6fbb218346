"""A run that is stopped anywhere goes on to the same weights; one process writes a folder at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import SET_TINY, TINY_CONFIG, make_set, save, texture
from torch import nn

from cpc_fast import checkpoint, cli, saving, train
from cpc_fast.checkpoint import checkpoint_config
from cpc_fast.detector import Detector
from cpc_fast.errors import CpcFastError, Stopped, UsageError
from cpc_fast.runs import other_images

IMAGES = [texture(i) for i in range(10)]
CONFIG = TINY_CONFIG.replace(epochs=3, shifts=("noise",), flips=True)


class Encoder(nn.Module):
    """With dropout, so that torch's own random numbers matter, and a part that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.map, self.drop, self.unused = nn.Linear(256, 8), nn.Dropout(0.2), nn.Linear(3, 3)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.drop(self.map(patches.flatten(1)))


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("encoder", [None, Encoder], ids=["own", "dropout"])
def test_stopped_after_every_step_it_ends_at_the_same_weights(tmp_path, encoder):
    make = encoder or (lambda: None)
    Detector.fit(IMAGES, CONFIG, out=tmp_path / "whole", encoder=make())
    stops, position = 0, None
    while position is None or position.epoch < 3:
        steps = iter((False, True) if stops else (True,))  # after the first step, then after every second call
        with pytest.raises(Stopped):
            Detector.fit(
                IMAGES, CONFIG, out=tmp_path / "cut", resume=stops > 0, encoder=make(), stop=lambda s=steps: next(s)
            )
        stops, position = stops + 1, checkpoint_config(tmp_path / "cut")[1]
        assert 2 * position.epoch + position.step == min(2 * stops - 1, 6)
    Detector.fit(IMAGES, CONFIG, out=tmp_path / "cut", resume=True, encoder=make())
    assert stops >= 3
    for name in ("model.safetensors", "checkpoint.safetensors", "best.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "cut" / name), name


def test_the_best_state_is_kept_and_can_be_resumed(tmp_path):
    Detector.fit(IMAGES, CONFIG, out=tmp_path)
    last, best = tmp_path / "checkpoint.safetensors", tmp_path / "best.safetensors"
    _, about = saving.read_tensors(best, "checkpoint")
    assert about["position"]["loss"] == about["position"]["best"] <= checkpoint_config(tmp_path)[1].loss
    damaged = last.read_bytes()[:1000]
    last.unlink()  # it may be one file with the best
    last.write_bytes(damaged)
    with pytest.raises(CpcFastError, match=r"is damaged.*best\.safetensors' is another state of it: copy it to "):
        Detector.fit(IMAGES, CONFIG, out=tmp_path, resume=True)
    last.write_bytes(best.read_bytes())
    Detector.fit(IMAGES, CONFIG, out=tmp_path, resume=True)


def test_the_config_of_a_run_is_read_without_its_weights(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "isfinite", lambda _: pytest.fail("weights are looked through"))
        assert checkpoint_config(tmp_path)[0] == CONFIG.replace(epochs=1)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"no" * 50):
        path.unlink()  # it may be one file with the best
        path.write_bytes(damaged)
        with pytest.raises(CpcFastError, match=r"checkpoint\.safetensors' is damaged \(.*; restore it from a copy"):
            checkpoint_config(tmp_path)
    save_file({}, path, {"about": "[]"})
    with pytest.raises(CpcFastError, match=r"is damaged \(its record is no JSON object"):
        checkpoint_config(tmp_path)


def test_a_long_epoch_is_saved_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    seen = []
    save = checkpoint.Checkpoint.save
    monkeypatch.setattr(
        checkpoint.Checkpoint, "save", lambda self, at: (seen.append((at.epoch, at.step)), save(self, at))
    )
    Detector.fit(IMAGES, CONFIG, epochs=2, out=tmp_path)
    assert seen == [(0, 1), (1, 0), (1, 1), (2, 0)]


def test_a_fresh_fit_keeps_the_run_that_is_there_until_its_own_first_state(tmp_path):
    Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def kept() -> bool:
        return before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "run.lock"}

    def interrupt(_: object) -> None:
        assert kept()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Detector.fit(IMAGES, CONFIG, seed=1, out=tmp_path, fresh=True, on_step=interrupt)
    assert kept()
    with pytest.raises(Stopped):  # which saves
        Detector.fit(IMAGES, CONFIG, seed=1, out=tmp_path, fresh=True, stop=lambda: True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    Detector.fit(IMAGES, CONFIG, seed=1, out=tmp_path, resume=True)
    Detector.fit(IMAGES, CONFIG, seed=1, out=tmp_path / "other")
    assert same(tmp_path / "model.safetensors", tmp_path / "other" / "model.safetensors")


# Other images


def test_a_run_is_of_its_images_wherever_they_are(tmp_path, capsys):
    one, two, run = (tmp_path / name for name in ("one", "two", "run"))
    fit = ["--out", str(run), "--device", "cpu", "--resume"]
    make_set(one, train=6)
    assert cli.run(["fit", str(one), *fit[:-1], *SET_TINY, "--epochs", "1"]) == 0
    capsys.readouterr()
    save(make_set(two, train=6) / "train" / "good" / "000.png", texture(50))
    for left in ("model.safetensors", "checkpoint.safetensors"):  # finished, then not
        assert cli.run(["fit", str(two), *fit]) == 2
        said = capsys.readouterr().err
        assert f"on other images (there '{one}', 6; now '{two}', 6, whose names or sizes differ); name its own" in said
        assert "or choose another run folder" in said
        one = one.rename(tmp_path / f"moved {left}")
        assert cli.run(["fit", str(one), *fit]) == 0
        one = one.rename(tmp_path / "one")
        (run / "model.safetensors").unlink()
        capsys.readouterr()
    rewrite(run / "checkpoint.safetensors", lambda _, about: about.pop("trained_on"))
    assert cli.run(["fit", str(two), *fit]) == 0  # one of an older version does not know better


def test_a_detector_of_an_older_version_knows_how_many_images_it_is_of():
    record = {"trained_on": {"data": "one", "normal images": "6 (5 to learn from, 1 for the threshold)"}}
    given = {"data": "two", "normal images": "6", "digest": "f0"}
    assert other_images(record, given) == ""
    assert other_images(record, {**given, "normal images": "7"}) == "other images (there 'one', 6; now 'two', 7)"


def test_arrays_are_known_by_their_pixels(tmp_path):
    Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path)
    Detector.fit([image.copy() for image in IMAGES], CONFIG, epochs=1, out=tmp_path, resume=True)
    for others in ([*IMAGES[1:], IMAGES[0]], IMAGES[1:]):
        with pytest.raises(UsageError, match=r"begun on other images \(there '10 arrays', 10; now '(10|9) arrays', "):
            Detector.fit(others, CONFIG, epochs=1, out=tmp_path, resume=True)


# Losses that are no numbers


def spoil(monkeypatch, bad: set[int], what: str = "loss") -> None:
    """The loss, or only its gradient, is NaN in these steps."""
    forward = train.CPC.forward

    def spoilt(self, images, shifted=None, seed=0, **options):
        result = forward(self, images, shifted, seed, **options)
        if seed in bad and what == "loss":
            result.loss = result.loss * float("nan")
        elif seed in bad:
            result.loss.register_hook(lambda gradient: gradient * float("inf"))
        return result

    monkeypatch.setattr(train.CPC, "forward", spoilt)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch, what):
    spoil(monkeypatch, {1, 3}, what)
    seen = []
    detector = Detector.fit(IMAGES, CONFIG, out=tmp_path, on_step=lambda step: seen.append(step.skipped))
    assert seen == [0, 1, 1, 2, 2, 2]
    assert all(value.isfinite().all() for value in detector.model.state_dict().values())
    assert checkpoint_config(tmp_path)[1].skipped == 2


def test_after_too_many_it_stops_with_the_last_good_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 3)
    spoil(monkeypatch, {3, 4, 5})
    states = []
    monkeypatch.setattr(
        train, "average_weights", lambda optimizer, *_: states.append([w.detach().clone() for w in optimizer.state])
    )
    with pytest.raises(CpcFastError, match=r"loss was nan for 3 steps in a row \(epoch 3\); they changed nothing"):
        Detector.fit(IMAGES, CONFIG, out=tmp_path)
    found = load_file(tmp_path / "checkpoint.safetensors")
    last = {tuple(weight.flatten()[:3].tolist()) for weight in states[-1]}
    kept = {tuple(value.flatten()[:3].tolist()) for name, value in found.items() if name.startswith("model.")}
    assert last <= kept
    assert all(value.isfinite().all() for value in found.values())


def test_weights_that_are_not_finite_replace_nothing(tmp_path):
    detector = Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    optimizer = train.make_optimizer(detector.model, CONFIG)
    detector.model.members[0].predictor.weight.data[0, 0, 0] = float("inf")
    kept = checkpoint.Checkpoint(tmp_path, detector.model, optimizer, detector.config, {})
    with pytest.raises(
        CpcFastError, match=r"no longer finite \(model\.members\.0\.predictor\.weight\), so they were not saved"
    ):
        kept.save(train.Position(1))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


# Files that do not fit their config


def rewrite(path: Path, change) -> None:
    tensors, about = saving.read_tensors(path, "checkpoint")
    change(tensors, about)
    save_file(tensors, path, {"about": json.dumps(about)})


CHANGES = {
    "shape": (lambda t, a: t.update({"random.cpu": t["random.cpu"][None]}), "not uint8"),
    "dtype": (
        lambda t, a: t.update({"model.members.0.predictor.weight": t["model.members.0.predictor.weight"].double()}),
        "is float64",
    ),
    "missing": (lambda t, a: t.pop("model.pixel_mean"), "'model.pixel_mean' is missing"),
    "more": (lambda t, a: t.update(other=torch.zeros(1)), "'other' is not expected"),
    "slots": (lambda t, a: a.update(slots=["optimizer.99.step"]), "its slots"),
    "no slots": (lambda t, a: a.update(slots=None), "its slots"),
    "random": (lambda t, a: t.update({"random.cpu": t["random.cpu"][:9]}), "its random numbers"),
    "position": (lambda t, a: a["position"].update(epoch=-1), "its position"),
    "no position": (lambda t, a: a.update(position="end"), "its position"),
    "config": (lambda t, a: a["config"].update(width=10**9), "width is 1000000000"),
    "type": (lambda t, a: a["config"].update(epochs="3"), "epochs is '3'; it must be a whole number"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_read(tmp_path, kind):
    Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path)
    change, words = CHANGES[kind]
    rewrite(tmp_path / "checkpoint.safetensors", change)
    with pytest.raises(CpcFastError, match=words) as caught:
        Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path, resume=True)
    assert str(tmp_path) in str(caught.value)


def test_a_hostile_config_takes_no_memory(tmp_path):
    """A model of the largest config there may be: told from the header, without room for its weights."""
    Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda _, about: about["config"].update(width=4096, steps=64))
    with pytest.raises(CpcFastError, match=r"do not fit its config .*\('any', 16384\).* and \d+ more"):
        Detector.load(tmp_path)


# One process at a time


def test_what_torchrun_starts_again_goes_on_only_when_told_to(tmp_path, capsys, monkeypatch):
    old, new = (make_set(tmp_path / name, train=6) for name in ("old", "new"))
    fit = ["fit", "--out", str(tmp_path / "run"), "--device", "cpu", *SET_TINY]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.run([*fit, str(old), "--resume"]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert cli.run([*fit, str(old), "--resume", "--epochs", "1"]) == 0  # nothing there: it begins
    kept = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for count in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert cli.run([*fit, str(new)]) == 2
        assert "holds a run already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == kept
    assert cli.run([*fit, str(old), "--resume", "--epochs", "1"]) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in kept}


HOLD = """
import sys, time
from pathlib import Path
from cpc_fast.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_one_does_not_matter(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            with pytest.raises(CpcFastError, match=f"by another process \\(process {holder.pid} on .*; wait for its"):
                Detector.fit(IMAGES, CONFIG, out=tmp_path)
            assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        finally:
            holder.kill()
    assert (tmp_path / "run.lock").exists()  # left by the dead
    Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path)
    assert not (tmp_path / "run.lock").exists()


def test_what_a_killed_process_left_aside_is_removed(tmp_path):
    Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path)
    (tmp_path / ".checkpoint.safetensors.4711.tmp").write_bytes(b"half")
    Detector.fit(IMAGES, CONFIG, epochs=1, out=tmp_path, resume=True)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UsageError, match="holds a run already"):
        Detector.fit(IMAGES, CONFIG, out=tmp_path)


# SIGTERM and SIGKILL


def test_sigterm_saves_in_mid_epoch_says_so_and_exits_with_0(tmp_path):
    data = make_set(tmp_path / "data")
    command = [sys.executable, "-m", "cpc_fast.cli", "fit", str(data), "--out", str(tmp_path / "run"), *SET_TINY]
    with subprocess.Popen([*command, "--epochs", "4000"], stderr=subprocess.PIPE, text=True) as fit:
        for line in fit.stderr:
            if "epoch 2 of" in line:
                break
        fit.send_signal(signal.SIGTERM)
        said = fit.stderr.read().splitlines()
        assert fit.wait(timeout=240) == 0
    assert said[-1].startswith("Stopped in epoch ")
    assert f"All of it is saved in {tmp_path / 'run'}. Go on with: cpc-fast fit" in said[-1]
    assert checkpoint_config(tmp_path / "run")[1].epoch >= 1


def test_killed_at_random_moments_it_ends_at_the_same_weights(tmp_path):
    """Three kills here; `python3 -m benchmarks.kills --kills 50` does more."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "3", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "3 kills" in done.stdout
