"""Cases say what they cost; providers are judged before they are timed; slopes and ratios are counted right."""

import time

import pytest
import torch

import cpc_kernels
from benchmarks import cases, end_to_end, measure, providers
from benchmarks.cases import Case

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_names_are_unique_and_found():
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    assert cases.find("CPC v1, S 64, D 1024").s == 64
    ranks = [case.gpu for case in cases.for_gpu()]
    assert ranks == sorted(set(ranks))


def test_costs():
    dense = Case("", 8, 16, 4)
    assert dense.flops == 6 * 8 * 16 * 4
    assert dense.bytes == 2 * (8 + 16) * 4 * 4 + 8 * 8 + 4 * 8
    assert dense.scores_bytes == 8 * 16 * 4
    bank = Case("", 8, 16, 4, learns="anchors")
    assert bank.flops == 4 * 8 * 16 * 4
    assert bank.gradient_bytes == 8 * 4 * 4
    sampled = Case("", 8, 16, 4, k=3, s=5)
    assert sampled.flops == 6 * 8 * 3 * 6 * 4
    assert sampled.floor_ms(copy_gb_s=1e9, matmul_tflop_s=1e-9) == sampled.flops
    assert sampled.floor_ms(copy_gb_s=1e-9, matmul_tflop_s=1e9) == sampled.bytes * 1e3
    assert Case.from_json(sampled.to_json()) == sampled


def test_every_kind_of_case_is_judged_and_timed():
    for name in (
        "dense 8192, D 256, bf16",
        "bank of 64k patches, 1k queries",
        "CPC, S 16, D 256",
        "CPC_audio, K 12, S 128",
    ):
        race = measure.Race(
            cases.find(name).tiny(), CPU, 0.05, memory=False, only=lambda provider: not provider.compiles
        )
        race.run()
        rows = {row["provider"]: row for row in race.rows()}
        assert not [row for row in rows.values() if row["status"] in ("wrong", "failed")], rows
        timed = [row for row in rows.values() if "median_ms" in row]
        assert len(timed) >= 3
        assert timed[0]["ours"]
        assert timed[0]["ratio"] == 1


def test_a_step_of_the_model_is_timed_with_its_host(monkeypatch):
    monkeypatch.setattr(measure.Clock, "__call__", None)  # which on a GPU begins once the host has run ahead
    contest = end_to_end.Contest("", CPU, {"ours": lambda: time.sleep(0.01), "plain": lambda: None}, 1, {}, 0.0)
    contest.run(1)
    assert contest.samples["ours"][0] >= 10


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch, which goes on using it
def test_one_lane_of_a_race_does_not_forget_what_another_compiled(monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: forgotten.append(True))
    for lane in (torch.add, torch.mul):
        providers.compiled(lane)
    assert not forgotten
    measure.Race(cases.find("CPC, S 16, D 256").tiny(), CPU, 0.05, memory=False, only=lambda provider: False)
    assert len(forgotten) == 1


def test_rows_and_columns():
    case = Case("", 12, 12, 8, learns="clip")
    problem = providers.make_problem(case, 0)
    true = providers.truth(case, problem)
    for name in ("ours: chunked", "eager"):
        loss = providers.find("dense", name).build(case, CPU)
        assert providers.right(case, providers.judge(case, problem, loss, true))


def test_a_wrong_provider_is_not_timed(monkeypatch):
    case = Case("", 12, 20, 8)

    def half(given, device):
        return lambda p: providers.eager_dense(p.anchors, p.candidates, p.positives, p.scale / 2)

    wrong, broken = providers.Provider("half", half), providers.Provider("broken", lambda case, device: 1 / 0)
    large = providers.Provider("large", half, memory=lambda case: 1 << 60)
    ours = providers.find("dense", "ours: chunked")
    monkeypatch.setitem(providers.PROVIDERS, "dense", (ours, wrong, broken, large))
    race = measure.Race(case, CPU, 0.01, memory=False)
    race.run()
    rows = {row["provider"]: row for row in race.rows()}
    assert [rows[name]["status"] for name in ("half", "broken", "large")] == ["wrong", "failed", "too big"]
    assert "median_ms" not in rows["half"]
    assert "off by" in rows["half"]["why"]


class Tired:
    """A criterion that raises from its third call on."""

    def __init__(self):
        self.calls = 0

    def __call__(self, p):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("tired")
        return providers.eager_dense(p.anchors, p.candidates, p.positives, p.scale)


def tell_to(monkeypatch):
    said = []
    monkeypatch.setattr(measure, "tell", said.append)
    return said


def test_a_peer_that_raises_while_timed_is_dropped(monkeypatch):
    ours = providers.find("dense", "ours: chunked")
    tired = providers.Provider("tired", lambda case, device: Tired())
    monkeypatch.setitem(providers.PROVIDERS, "dense", (ours, tired))
    said = tell_to(monkeypatch)
    race = measure.Race(Case("", 12, 20, 8), CPU, 0.01, memory=False)
    race.run()
    rows = {row["provider"]: row for row in race.rows()}
    assert (rows["tired"]["status"], "median_ms" in rows["tired"]) == ("failed", False)
    assert "tired" in rows["tired"]["why"]
    assert rows["ours: chunked"]["rounds"] >= measure.MIN_ROUNDS
    assert said[:4] == ["ours: chunked", "tired", "tired", "ours: chunked"]


def test_a_base_that_raises_is_named_and_ends_the_race(monkeypatch):
    tired = providers.Provider("ours: tired", lambda case, device: Tired(), ours=True)
    monkeypatch.setitem(providers.PROVIDERS, "dense", (tired, providers.find("dense", "eager")))
    said = tell_to(monkeypatch)
    race = measure.Race(Case("", 12, 20, 8), CPU, 0.01, memory=False)
    with pytest.raises(RuntimeError, match="tired"):
        race.run()
    assert said[-1] == "ours: tired"


def test_a_peer_whose_memory_cannot_be_measured_is_dropped(monkeypatch):
    def extra_memory(case, provider, device, race):
        if not provider.ours:
            raise RuntimeError("out of memory")
        return 1.0

    monkeypatch.setattr(measure, "extra_memory", extra_memory)
    monkeypatch.setitem(
        providers.PROVIDERS, "dense", tuple(providers.find("dense", name) for name in ("ours: chunked", "eager"))
    )
    said = tell_to(monkeypatch)
    race = measure.Race(Case("", 12, 20, 8), CPU, 0.01)
    assert [lane.status for lane in race.lanes] == ["ok", "failed"]
    assert said == ["ours: chunked", "eager", "ours: chunked", "eager"]


def test_idle_blocks_are_free(monkeypatch):
    free = [10]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.insert(0, 90))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 100))
    assert measure.free_bytes(torch.device("cuda")) == 90


def test_seeded_providers_draw_what_the_others_were_given():
    case = Case("", 12, 20, 8, s=3)
    pytest.importorskip("triton")
    loss = providers.find("sampled", "ours: triton, seeded").build(case, DEVICE)
    for seed in range(2):
        problem = providers.make_problem(case, seed, DEVICE)
        assert problem.drawn.seed.item() == providers.SEED + seed
        drawn = cpc_kernels.draw_negatives(problem.drawn, problem.positives, case.m, case.n)
        assert torch.equal(drawn, problem.negatives)
        assert providers.right(case, providers.judge(case, problem, loss, providers.truth(case, problem, seeded=True)))


def test_exponents():
    assert abs(measure.exponent([1, 2, 4], [5, 10, 20]) - 1) < 1e-9
    assert abs(measure.exponent([1, 2, 4], [1, 4, 16]) - 2) < 1e-9
