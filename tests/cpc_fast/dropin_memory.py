"""What the drop-ins save: peak memory of one forward and backward pass on a CPU, beside the original's.

    python tests/cpc_fast/dropin_memory.py            prints the table
    python tests/cpc_fast/dropin_memory.py --write    and puts it into docs/dropin.md

Each loss runs in a process of its own: resident memory at its highest, less what it was when the inputs were there.
Needs Linux, and the originals (see originals.py).
"""

import argparse
import subprocess
import sys
from pathlib import Path

import originals
import torch
from torch.nn import functional as F

from cpc_fast import dropin
from cpc_fast.dropin import lightly, pytorch_metric_learning

DOCUMENT = Path(__file__).parents[2] / "docs" / "dropin.md"
MARKS = "<!-- memory: begin -->", "<!-- memory: end -->"
N, M, D = 4096, 16384, 128


def vectors(*shape):
    return torch.randn(*shape).requires_grad_()


# name: (shapes, original, drop-in); both take the vectors
CASES = {
    "InfoNCE, in-batch": (
        f"N = {N}",
        lambda: (vectors(N, D), vectors(N, D)),
        lambda: originals.info_nce().InfoNCE(),
        lambda: dropin.InfoNCE(),
    ),
    "InfoNCE, unpaired negatives": (
        f"N = {N // 4}, M = {M}",
        lambda: (vectors(N // 4, D), vectors(N // 4, D), vectors(M, D)),
        lambda: originals.info_nce().InfoNCE(),
        lambda: dropin.InfoNCE(),
    ),
    "InfoNCE, paired negatives": (
        f"N = {N // 4}, M = 256",
        lambda: (vectors(N // 4, D), vectors(N // 4, D), vectors(N // 4, 256, D)),
        lambda: originals.info_nce().InfoNCE(negative_mode="paired"),
        lambda: dropin.InfoNCE(negative_mode="paired"),
    ),
    "lightly NTXentLoss, two views": (
        f"N = {N // 2}",
        lambda: (vectors(N // 2, D), vectors(N // 2, D)),
        lambda: originals.lightly().NTXentLoss(),
        lambda: lightly.NTXentLoss(),
    ),
    "lightly NTXentLoss, memory bank": (
        f"N = {N // 4}, bank {M}",
        lambda: (vectors(N // 4, D), vectors(N // 4, D)),
        lambda: originals.lightly().NTXentLoss(memory_bank_size=(M, D)),
        lambda: lightly.NTXentLoss(memory_bank_size=(M, D)),
    ),
    "ClipLoss": (
        f"N = {N}",
        lambda: (vectors(N, D), vectors(N, D)),
        lambda: clip(originals.open_clip().ClipLoss()),
        lambda: clip(dropin.ClipLoss()),
    ),
    "SupConLoss, 100 labels": (
        f"N = {N}",
        lambda: (vectors(N, D),),
        lambda: labelled(originals.pytorch_metric_learning().SupConLoss(), 100),
        lambda: labelled(dropin.SupConLoss(), 100),
    ),
    "metric-learning NTXentLoss, two views": (
        f"N = {N // 16}",
        lambda: (vectors(N // 16, D),),
        lambda: labelled(originals.pytorch_metric_learning().NTXentLoss(), N // 32),
        lambda: labelled(pytorch_metric_learning.NTXentLoss(), N // 32),
    ),
    "metric-learning NTXentLoss, 64 labels": (
        f"N = {N // 16}",
        lambda: (vectors(N // 16, D),),
        lambda: labelled(originals.pytorch_metric_learning().NTXentLoss(), 64),
        lambda: labelled(pytorch_metric_learning.NTXentLoss(), 64),
    ),
}


def clip(loss):
    return lambda images, texts: loss(F.normalize(images, dim=1), F.normalize(texts, dim=1), torch.tensor(14.3))


def labelled(loss, labels):
    return lambda embeddings: loss(embeddings, torch.arange(len(embeddings)) % labels)


def resident(field: str) -> float:
    """MiB. VmRSS: now. VmHWM: at its highest. (getrusage would begin with what the parent held.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(name: str, which: str) -> None:
    _, inputs, original, ours = CASES[name]
    loss = {"original": original, "ours": ours}[which]()
    tensors = inputs()
    few = [t.detach()[:64, :8] if t.ndim == 3 else t.detach()[:64] for t in tensors]
    loss(*(t.clone().requires_grad_() for t in few)).backward()  # libraries load before we look
    Path("/proc/self/clear_refs").write_text("5")  # the highest is measured from here on
    before = resident("VmRSS")
    loss(*tensors).backward()
    print(f"{resident('VmHWM') - before:.0f}")


def child(name: str, which: str) -> int:
    command = [sys.executable, "-W", "ignore", __file__, "--case", name, "--which", which]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of the drop-ins and of the originals.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/dropin.md")
    parser.add_argument("--case")
    parser.add_argument("--which", choices=["original", "ours"])
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case, arguments.which)
        return
    lines = [
        f"| D = {D}, float32, torch {torch.__version__}, CPU | size | original, MiB | drop-in, MiB |",
        "|---|---|---|---|",
    ]
    for name, (size, *_) in CASES.items():
        lines.append(f"| {name} | {size} | {child(name, 'original')} | {child(name, 'ours')} |")
        print(lines[-1], flush=True)
    if arguments.write:
        text = DOCUMENT.read_text()
        before, after = text[: text.index(MARKS[0]) + len(MARKS[0])], text[text.index(MARKS[1]) :]
        DOCUMENT.write_text(before + "\n" + "\n".join(lines) + "\n" + after)


if __name__ == "__main__":
    main()
