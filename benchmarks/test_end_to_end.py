"""The training step and the scoring of one image against the plain version of the same model."""

import pytest

from benchmarks import end_to_end
from benchmarks.conftest import DEVICE


@pytest.fixture
def contest(benchmark, ledger, tiny):
    def run(made: end_to_end.Contest, rounds: int) -> dict:
        for step in made.everything.values():
            step()
        benchmark.pedantic(made.ours, setup=made.others, rounds=2 if tiny else rounds)
        assert all(error <= made.tolerance for error in made.errors.values()), made.errors
        if benchmark.stats is None:
            return {}
        made.samples["ours"] = [1e3 * seconds for seconds in benchmark.stats.stats.data]
        record = made.record()
        ledger.add("end_to_end", made.name, record)
        return record

    return run


def test_training_step(contest, tiny):
    size = {"side": 96, "batch": 2} if tiny else {"side": 256, "batch": 8}
    contest(end_to_end.training(DEVICE, side=size["side"], batch=size["batch"]), rounds=5)


def test_training_step_sampled(contest, tiny):
    size = {"side": 96, "batch": 2, "patch_size": 16, "patch_stride": 8, "width": 8} if tiny else {"batch": 2}
    contest(end_to_end.training(DEVICE, name="paper", **size, image_size=None), rounds=3)


def test_scoring(contest, tiny):
    contest(end_to_end.scoring(DEVICE, side=96 if tiny else 256), rounds=50)
