"""SimCLR with a drop-in: two views of each image, of 32 x 32 colour blobs (so that nothing is downloaded).

python examples/simclr_cifar_like.py            under a minute on a CPU; the loss falls from about log(2 x 256 - 1)
"""

import torch
from torch import nn

from cpc_fast.dropin.lightly import NTXentLoss  # before: from lightly.loss import NTXentLoss


def images(count: int) -> torch.Tensor:
    """(count, 3, 32, 32): coarse random colours, enlarged."""
    return nn.functional.interpolate(torch.rand(count, 3, 4, 4), 32, mode="bilinear")


def view(batch: torch.Tensor) -> torch.Tensor:
    """Shifted, flipped, brightened, noisy."""
    shift = torch.randint(-4, 5, (2,)).tolist()
    batch = batch.roll(shift, (2, 3)) * (0.7 + 0.6 * torch.rand(len(batch), 1, 1, 1))
    batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
    return batch + 0.05 * torch.randn_like(batch)


def train(steps: int = 60, batch: int = 256) -> list[float]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 64, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64)]
    encoder, criterion, data = nn.Sequential(*layers), NTXentLoss(temperature=0.2), images(2048)
    optimizer, losses = torch.optim.Adam(encoder.parameters(), lr=2e-3), []
    for step in range(steps):
        chosen = data[torch.randint(len(data), (batch,))]
        loss = criterion(encoder(view(chosen)), encoder(view(chosen)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    train()
