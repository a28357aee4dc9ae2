"""Check that a module of your own has unbiased gradients under a sketch, and see a biased one refused."""

import torch
from torch import Tensor, nn

import backsketch as bs


class Gate(nn.Module):
    """Two linear layers that multiply each other."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


class Biased(nn.Linear):
    """A layer whose backward pass is off by a tenth in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            y.register_hook(lambda g: 1.1 * g)
        return y


model, x = Gate(), torch.randn(16, 6)
bs.sketch_(model, bs.Rows(keep=0.5))
print(bs.testing.check_unbiased(model, x, draws=400))

try:
    bs.testing.check_unbiased(Biased(6, 5), x, draws=50, reference=nn.Linear(6, 5))
except AssertionError as error:
    print("refused:", str(error).splitlines()[0])
else:
    raise SystemExit("a biased layer went unnoticed")
