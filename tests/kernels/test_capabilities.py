"""What is here, what is missing, and the name under which results of a device are filed."""

import sys
from pathlib import Path

import pytest
import torch

from cpc_kernels.capabilities import CPP, device_name, load_library

capabilities = sys.modules["cpc_kernels.capabilities"]  # the function of that name hides it
CPU = torch.device("cpu")
needs_cpp = pytest.mark.skipif(not CPP.available, reason=CPP.reason)


@pytest.mark.parametrize(
    ("model", "starts"),
    [("AMD EPYC", "AMD EPYC (family 26 model 2, "), ("AMD EPYC 9654 Processor", "AMD EPYC 9654 Processor (")],
)
def test_a_cpu_that_hides_its_number_is_told_by_its_family(monkeypatch, model, starts):
    told = f"processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {model}\nflags\t\t: fpu\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert device_name(CPU).startswith(starts)
    assert ("family" in device_name(CPU)) == ("family" in starts)


def test_a_cpu_is_named_with_its_instructions_and_threads(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    threads = torch.get_num_threads()
    assert "AVX-512" in device_name(CPU)
    assert device_name(CPU).endswith(f", {threads} thread" + "s" * (threads > 1))


@needs_cpp
def test_a_library_on_one_thread_runs_and_has_its_cost(monkeypatch):
    monkeypatch.setattr(torch.ops.cpc_kernels_cpu, "threaded", lambda: False)
    found = load_library()
    assert found.available
    assert "built without OpenMP" in found.reason
    assert "one core" in found.cost


@needs_cpp
def test_a_library_of_other_sources_is_refused(monkeypatch):
    ours = capabilities.INTERFACE
    monkeypatch.setattr(torch.ops.cpc_kernels_cpu, "interface", lambda: ours + 1)
    found = load_library()
    assert not found.available
    assert f"from other sources than these (interface {ours + 1}, not {ours}); install again" in found.reason
    assert found.cost


@needs_cpp
def test_a_library_of_another_python_hides_none(monkeypatch, tmp_path):
    name, loaded = CPP.reason.split(",")[0], []
    (tmp_path / name).touch()
    (tmp_path / "_cpu.aaa.so").touch()
    monkeypatch.setattr(capabilities, "__file__", str(tmp_path / "capabilities.py"))
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert load_library().available
    assert loaded == [tmp_path / name]
    (tmp_path / name).unlink()
    assert "not built" in load_library().reason
