"""A bank in memory, streamed from the host or a file, and shared by processes: the same scores to the bit."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from samples import TINY_CONFIG, texture

from cpc_fast import bank as module
from cpc_fast.answers import fingerprint
from cpc_fast.bank import StreamedBank, bank_losses, host_rows
from cpc_fast.detector import Detector
from cpc_fast.export import Program
from cpc_fast.predictions import Predictor
from tests import processes


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 64)


def problem(rows, members=2):
    torch.manual_seed(0)
    examined = []
    for _ in range(members):
        latents = torch.randn(1, 5, 6, 24)
        examined.append((latents, Predictor(24, (1, 2), directions=4)(latents[None])))
    return examined, torch.randn(rows, members * 24)


@pytest.mark.parametrize("rows", [1, 64, 130, 500])
def test_wherever_the_bank_is(rows, tmp_path, small_blocks):
    examined, bank = problem(rows)
    with torch.no_grad():
        in_memory = bank_losses(examined, bank)
        save_file({"odd": torch.zeros(3, dtype=torch.uint8), "bank": bank}, tmp_path / "bank.safetensors")
        streamed = StreamedBank.open(tmp_path / "bank.safetensors")
        assert (len(streamed), len(streamed.blocks)) == (rows, -(-rows // 64))
        assert torch.equal(bank_losses(examined, streamed), in_memory)
        assert torch.equal(bank_losses(examined, StreamedBank(bank)), in_memory)
        plain = []
        for (latents, predictions), normal in zip(examined, bank.split(24, 1), strict=True):
            own = latents.flatten(0, 2)[predictions.targets]
            rows_of = torch.arange(len(predictions.counts)).repeat_interleave(torch.tensor(predictions.counts))
            made = torch.einsum("ndc,nc->nd", predictions.weight[rows_of], predictions.contexts[predictions.sources])
            plain.append(torch.nn.functional.softplus((made @ normal.T).logsumexp(1) - (made * own).sum(1)))
    torch.testing.assert_close(in_memory, torch.cat(plain), rtol=1e-4, atol=1e-5)


def test_a_bank_has_rows():
    with pytest.raises(ValueError, match=r"StreamedBank: a bank must be \(m, d\). Got \(5,\)."):
        StreamedBank(torch.zeros(5))


def shared(rank, world):
    module.BLOCK_ROWS = 64
    found = []
    with torch.inference_mode():
        for rows in (130, 500, 20):  # some ranks have no block
            examined, bank = problem(rows)
            found.append(bank_losses(examined, StreamedBank(bank, across_ranks=True)))
    return [each.clone() for each in found]


@pytest.mark.parametrize("world", [2, 4])
def test_shared_by_processes(world, tmp_path, small_blocks):
    answers = processes.run(world, shared, tmp_path)
    for at, rows in enumerate((130, 500, 20)):
        with torch.no_grad():
            alone = bank_losses(*problem(rows))
        assert all(torch.equal(each[at], alone) for each in answers)


def test_all_rows_whoever_scores_them(tmp_path, small_blocks, monkeypatch):
    bank = torch.randn(130, 4)
    save_file({"bank": bank}, tmp_path / "bank.safetensors")
    monkeypatch.setattr(module, "rank_and_world", lambda: (1, 2))
    shares = [
        StreamedBank(bank, across_ranks=True),
        StreamedBank.open(tmp_path / "bank.safetensors", across_ranks=True),
    ]
    for each in (bank, *shares):
        assert torch.equal(host_rows(each), bank)
        assert torch.equal(torch.cat([*module.host_blocks(each)]), bank)
    assert [len(share.blocks) for share in shares] == [2, 2]  # of three


def test_a_detector_that_leaves_its_bank_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 24)
    detector = Detector.fit([texture(i) for i in range(6)], TINY_CONFIG, out=tmp_path / "run", epochs=1, members=2)
    loaded, streamed = Detector.load(tmp_path / "run"), Detector.load(tmp_path / "run", stream_bank=True)
    assert isinstance(streamed.bank, StreamedBank)
    assert len(streamed.bank) == TINY_CONFIG.bank_size
    for image in (texture(7), texture(8)):
        maps = [each.inspect(image).map for each in (detector, loaded, streamed)]
        assert (maps[0] == maps[1]).all()
        assert (maps[0] == maps[2]).all()
    streamed.save(tmp_path / "again")
    assert torch.equal(Detector.load(tmp_path / "again").bank, detector.bank)
    assert torch.equal(Program(streamed, (48, 48)).bank, detector.bank)
    assert fingerprint(streamed) == fingerprint(loaded)


def test_no_more_than_three_blocks_are_on_a_gpu(monkeypatch, small_blocks):
    """The host runs ahead of the scores by two blocks; it copies a third once the first of them is scored."""
    seen, said = [], []

    class Block(torch.Tensor):
        def pin_memory(self):
            return self

        def to(self, device, non_blocking):
            said.append(f"copy {int(self)}")
            return self

        def record_stream(self, stream):
            pass

    class Stream:
        def wait_stream(self, other):
            pass

        def record_event(self):
            number = seen[-1]
            return SimpleNamespace(synchronize=lambda: said.append(f"wait for {number}"))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    bank = StreamedBank(torch.zeros(5 * 64, 1), device="cuda")
    monkeypatch.setattr(bank, "read", lambda block: torch.tensor(block).as_subclass(Block))
    for block in bank:
        seen.append(int(block))
    assert seen == [0, 1, 2, 3, 4]
    assert said == ["copy 0", "copy 1", "copy 2", "wait for 0", "copy 3", "wait for 1", "copy 4"]
