"""Profile a model after a few steps, take the plan, and see what it predicts and what is measured."""

import torch
from torch import nn

import backsketch as bs

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
)
x = torch.randn(1024, 64)
batches = [(part, part[:, :10].argmax(1)) for part in x.split(256)]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for batch in batches * 10:
    loss_fn(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()

profile = bs.profile(model, batches, loss_fn, progress=False)
print(profile)
plan = profile.plan()
print(plan)
bs.sketch_(model, plan)
print("sketched" if plan.rules else f"trains exactly: {plan.reason}")
