"""What is kept for the backward pass, exact and with inputs, activations and norms in four bits."""

import torch
from torch import nn

import backsketch as bs

model = nn.Sequential(
    nn.Linear(128, 512), nn.LayerNorm(512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)
)  # fmt: skip
x = torch.randn(512, 128)

exact = bs.saved_bytes(model, x).total
report = bs.sketch_(model, bs.Quantized(bits=4))
kept = bs.saved_bytes(model, x).total
print(report)
print(
    f"saved for the backward pass: {exact / 2**20:.2f} MiB exact, {kept / 2**20:.2f} MiB sketched"
)
assert kept < 0.4 * exact
