"""Train a small model with and without a sketch, in a loop of your own."""

import torch
from torch import nn

import backsketch as bs

torch.manual_seed(0)
x = torch.randn(1024, 32)
y = x[:, :4].argmax(1)


def train(sketch: bs.Region | None) -> float:
    """The loss after 40 steps."""
    torch.manual_seed(1)
    bs.seed(1)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if sketch is not None:
        print(bs.sketch_(model, sketch))
    for _ in range(40):
        rows = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


exact, sketched = train(None), train(bs.Region(keep=0.5))
print(f"loss: exact {exact:.3f}, with half of the rows in the backward pass {sketched:.3f}")
assert sketched < 1.5 * exact
