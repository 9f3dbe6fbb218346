"""Training on several gloo processes: one process's loss, gradients and weights."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import SET_TINY, TINY_CONFIG, make_set, texture
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cpc_fast.commands.options import choose_device
from cpc_fast.detector import Detector
from cpc_fast.errors import UsageError
from cpc_fast.model import CPC
from cpc_fast.torchrun import own_gpu, together
from tests import processes

CASES = [
    {"negatives": negatives, "across_ranks": exchange, "context": context, "place": place}
    for negatives, exchange, context, place in [
        ("batch", "ring", "masked-conv", True),
        ("other-images", "ring", "none", False),
        ("batch", "gathered", "none", True),
        ("sampled", "auto", "none", True),
    ]
]
# with its own patches as candidates, a rank computes what one process does where it has all images
LOCAL = [
    ({"negatives": negatives, "across_ranks": "local", "context": "masked-conv", "place": True}, counts)
    for negatives, counts in [("batch", (4, 0)), ("other-images", (0, 4)), ("sampled", (0, 4)), ("hard", (4, 0))]
]
IMAGES = {  # how many of the four images each rank has, for each case
    2: [*zip(CASES, [(3, 1), (4, 0), (4, 0), (3, 1)], strict=True), *LOCAL],
    4: [(CASES[1], (2, 1, 1, 0)), (CASES[3], (2, 1, 1, 0))],
}


def whole_batch():
    g = torch.Generator().manual_seed(5)
    return (torch.randn(4, 1, 48, 48, generator=g, dtype=torch.float64) for _ in range(2))


def model_of(case):
    torch.manual_seed(0)
    return CPC(TINY_CONFIG.replace(**case)).double()


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


def step(rank, world):
    """(loss, gradients) of every case, after DistributedDataParallel has averaged."""
    answers = []
    for case, counts in IMAGES[world]:
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        images, shifted = whole_batch()
        model = DistributedDataParallel(model_of(case))
        loss = model(images[own], shifted[own], seed=7).loss
        loss.backward()
        answers.append((loss.detach(), gradients(model)))
    return answers


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_of_ddp_is_that_of_one_process(world, tmp_path):
    answers = processes.run(world, step, tmp_path)
    for at, (case, counts) in enumerate(IMAGES[world]):
        images, shifted = whole_batch()
        alone = model_of(case)
        loss = alone(images, shifted, seed=7).loss
        loss.backward()
        for rank in range(world):
            found, grads = answers[rank][at]
            what = f"{case} {counts} rank {rank}"
            torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0, msg=lambda m, w=what: f"{w}: {m}")
            for ours, theirs in zip(grads, gradients(alone), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=lambda m, w=what: f"{w}: {m}")


def fit_one_by_one(rank, world):
    config = TINY_CONFIG.replace(batch_size=1, across_ranks="local", precision="float32")
    detector = Detector.fit([texture(i) for i in range(5)], config)
    return detector.threshold.value, detector.model.state_dict()


def test_a_rank_that_never_has_an_image_fits_along(tmp_path):
    """One image to a step: the second rank has none, and with across_ranks=local no candidates either."""
    found = processes.run(2, fit_one_by_one, tmp_path)
    alone = fit_one_by_one(0, 1)
    for threshold, weights in found:
        assert threshold == pytest.approx(alone[0], rel=1e-3, abs=1e-3)
        for ours, theirs in zip(weights.values(), alone[1].values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


class Small(nn.Module):
    """With a batch norm, and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.unused = nn.Linear(2, 2)

    def forward(self, patches):
        return self.net(patches)


def fit_of_ones_own(rank, world):
    """The state of a trained encoder; of predictors on a frozen one, with all that it does without, and none of it."""
    images, states = [texture(i) for i in range(5)], []
    config = TINY_CONFIG.replace(epochs=1, batch_size=2, precision="float32", jitter=0.0, flips=False)
    disturbed = {"jitter": 0.5, "gamma": 0.5, "patch_jitter": 0.5, "flips": True}
    for learns, changes in ((True, {}), (False, {}), (False, disturbed)):
        torch.manual_seed(0)
        encoder = Small().requires_grad_(learns)
        states.append(Detector.fit(images, config.replace(**changes), encoder=encoder).model.state_dict())
    return states


def test_encoders_of_ones_own(tmp_path):
    """What lies in no gradient does not hold the ranks up, they end with one batch norm, and a frozen encoder sees
    pictures as they are."""
    first, second = processes.run(2, fit_of_ones_own, tmp_path)
    for one, other in [*zip(first, second, strict=True), (first[1], first[2])]:
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    assert first[0]["members.0.encoder.net.1.num_batches_tracked"] > 0


def test_there_is_no_ring_for_sampled_negatives():
    with pytest.raises(UsageError, match="across_ranks is 'ring'; it must be auto, local or gathered with sampled"):
        TINY_CONFIG.replace(negatives="sampled", across_ranks="ring")
    with pytest.raises(UsageError, match="across_ranks is 'gathered'; it must be auto or local with hard"):
        TINY_CONFIG.replace(negatives="hard", across_ranks="gathered")


# nothing of the images is drawn: they are as large as the window
# float32: Adam makes a step of every rounding of a gradient near 0
SAME_PICTURES = ["jitter=0", "flips=false", "batch_size=3", "across_ranks=ring", "precision=float32"]


def test_torchrun_fits_what_one_process_fits(tmp_path):
    """Two ranks, three images to a step: the weights, and all that follows from them, are one process's."""
    data, out = make_set(tmp_path / "data", train=8), tmp_path / "run"
    settings = [part for setting in SAME_PICTURES for part in ("--set", setting)]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "cpc_fast.cli", "fit", str(data), "--out", str(out), "--device", "cpu", *SET_TINY, *settings),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parents[2], start_new_session=True, **pipes
    ) as fit:
        try:
            said, complained = fit.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            os.killpg(fit.pid, signal.SIGKILL)
            raise
    assert fit.returncode == 0, complained
    assert said.count("Fitted on 8") == 1
    assert complained.count("epoch 2 of 2") == 1
    assert "Warning" not in complained
    found = Detector.load(out)
    alone = Detector.fit(data, found.config)
    for ours, theirs in zip(found.model.state_dict().values(), alone.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert found.threshold.value == pytest.approx(alone.threshold.value, rel=1e-2, abs=1e-2)
    assert not (out / "run.lock").exists()


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    """With torch.cuda and the group's start replaced: which device and backend are asked for."""
    asked = []
    for name, value in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": asked.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", asked.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    assert own_gpu(choose_device("auto")) == torch.device("cuda")  # alone: the current one
    rank = {"TORCHELASTIC_RUN_ID": "0", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    for name in ("auto", "cuda"):
        with together(choose_device(name)) as device:
            assert device == torch.device("cuda", 1)
    assert asked == [torch.device("cuda", 1), "nccl"] * 2
    with pytest.raises(UsageError, match="--device cuda:0: torchrun gives every process a GPU of its own"):
        together(choose_device("cuda:0")).__enter__()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="torchrun started 2 processes here, but there are 2 GPUs"):
        own_gpu(choose_device("auto"))
