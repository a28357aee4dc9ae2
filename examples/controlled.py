"""Hold the extra variance of a region at a target while training changes what it costs."""

import torch
from torch import nn

import backsketch as bs

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
)
x = torch.randn(2048, 64)
y = x[:, :10].argmax(1)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
bs.sketch_(model, bs.Region(keep=0.5))
controller = bs.Controller(model, target_extra_variance=0.1, interval=5)

for _ in range(60):
    rows = torch.randint(len(x), (256,))
    nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    controller.step()
    optimizer.step()
    optimizer.zero_grad()

print(controller)
print(*controller.log, sep="\n")
