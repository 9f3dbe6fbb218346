"""CLIP with a drop-in: two towers learn that their inputs come from the same hidden vector.

python examples/clip_towers.py            seconds on a CPU; the loss falls from about log(512)
"""

import torch
from torch import nn
from torch.nn.functional import normalize

from cpc_fast.dropin import ClipLoss  # before: from open_clip import ClipLoss


def tower(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 128), nn.GELU(), nn.Linear(128, 64))


def train(steps: int = 150, batch: int = 512) -> list[float]:
    torch.manual_seed(0)
    to_image, to_text = torch.randn(16, 96), torch.randn(16, 48)  # how the hidden vector shows in each
    image_tower, text_tower, criterion = tower(96), tower(48), ClipLoss()
    logit_scale = nn.Parameter(torch.tensor(10.0).log())
    parameters = [*image_tower.parameters(), *text_tower.parameters(), logit_scale]
    optimizer, losses = torch.optim.Adam(parameters, lr=2e-3), []
    for step in range(steps):
        hidden = torch.randn(batch, 16)
        images = torch.tanh(hidden @ to_image) + 0.1 * torch.randn(batch, 96)
        texts = torch.relu(hidden @ to_text) + 0.1 * torch.randn(batch, 48)
        image_features, text_features = normalize(image_tower(images), dim=1), normalize(text_tower(texts), dim=1)
        loss = criterion(image_features, text_features, logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.3f}  scale {logit_scale.exp().item():.1f}")
    return losses


if __name__ == "__main__":
    train()
