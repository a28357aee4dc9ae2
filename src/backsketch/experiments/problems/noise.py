"""What theory needs to know: one quiet exact run, and the variance of every arm at the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import backsketch as bs
from backsketch.experiments.problems.descent import schedule, sketch_
from backsketch.experiments.problems.objective import Objective, objective

__all__ = ["GaussNewton", "Noise", "run"]

PROBES = 8  # vectors per spectrum


@dataclass(frozen=True)
class Noise:
    """A quiet exact run, and the variances of all arms at the target.

    Attributes:
        sketches: text of the sketches whose error is measured, all at the same weights.
        lr, quiet_batch_size: of the quiet run; the run goes on to a tenth of the target.
        batch_size: whose variance is measured.
        batches, draws: what the variances are averaged over; rows: of the Hessian.
    """

    data: str
    sketches: Sequence[str]
    lr: float
    target: float
    limit: int | None = None
    widths: Sequence[int] = ()
    l2: float = 0.0
    batch_size: int = 64
    quiet_batch_size: int = 1024
    max_steps: int = 6000
    batches: int = 48
    draws: int = 4
    rows: int = 1024


def run(options: Noise) -> dict[str, Any]:
    """``time`` and ``gap`` along the quiet run; at the target ``slope`` ‖∇F‖², variances, curvatures.

    ``sgd_variance`` and ``extra`` (by sketch) are variances of the gradient at ``batch_size``;
    ``sgd_spectrum`` and ``extra_spectrum`` are pairs of curvature and share of that variance; ``sharpness`` is
    the largest eigenvalue of H, the Gauss-Newton matrix with the regulariser.
    """
    task = objective(options.data, options.limit, options.l2, tuple(options.widths))
    model = task.build(0)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, weight_decay=options.l2)
    generator = torch.Generator().manual_seed(1)
    times, gaps, found = [0.0], [task.gap(model)], None
    looks = set(schedule(options.max_steps))
    for step in range(1, options.max_steps + 1):
        rows = torch.randint(len(task.y), (options.quiet_batch_size,), generator=generator)
        optimizer.zero_grad()
        task.loss(model, rows).backward()
        optimizer.step()
        if step in looks:
            times.append(options.lr * step)
            gaps.append(task.gap(model))
            if found is None and gaps[-1] <= options.target:
                found = _measure(task, options, model)
            if gaps[-1] <= options.target / 10:
                break
    if found is None:
        raise ValueError(f"the quiet run ends at a gap of {gaps[-1]:.3g}: raise lr or max_steps")
    return {"time": times, "gap": gaps, **found}


def _measure(task: Objective, options: Noise, model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    size = (options.batches, options.batch_size)
    batches = torch.randint(len(task.y), size, generator=generator)
    hessian = GaussNewton(model, task, options.rows)
    slope = _flat(task.gradient(model))
    exact = torch.stack([_gradient(task, model, rows) for rows in batches])
    noise = exact - exact.mean(0)
    correction = options.batches / (options.batches - 1)
    found: dict[str, Any] = {
        "slope": float(slope.double().square().sum()),
        "sgd_variance": correction * _mean_square(noise),
        "sgd_spectrum": hessian.spectrum(noise[:PROBES]),
        "sharpness": hessian.sharpness(),
        "extra": {},
        "extra_spectrum": {},
    }
    for sketch in options.sketches:
        sketch_(model, sketch)
        bs.seed(3)
        draws = [
            _gradient(task, model, rows) - g
            for rows, g in zip(batches, exact)
            for _ in range(options.draws)
        ]
        bs.restore_(model)
        found["extra"][sketch] = _mean_square(torch.stack(draws))
        probes = torch.stack(draws[:: max(1, len(draws) // PROBES)])
        found["extra_spectrum"][sketch] = hessian.spectrum(probes)
    return found


def _gradient(task: Objective, model: nn.Module, rows: Tensor) -> Tensor:
    return _flat(torch.autograd.grad(task.loss(model, rows), list(model.parameters())))


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def _mean_square(vectors: Tensor) -> float:
    return float(vectors.double().square().sum(1).mean())


class GaussNewton:
    """The Gauss-Newton matrix of the mean cross-entropy on some rows, plus ``l2`` times the identity."""

    def __init__(self, model: nn.Module, task: Objective, rows: int) -> None:
        self.l2, self.parameters = task.l2, list(model.parameters())
        self.z = model(task.x[:rows])
        self.p = self.z.detach().softmax(1)
        # Jᵀu is linear in u: its derivative along v is J v, without forward-mode differentiation.
        self.u = torch.zeros_like(self.z, requires_grad=True)
        self.pulled = torch.autograd.grad(self.z, self.parameters, self.u, create_graph=True)

    def product(self, vector: Tensor) -> Tensor:
        """``H v``."""
        split = vector.split([p.numel() for p in self.parameters])
        parts = [part.view(p.shape) for part, p in zip(split, self.parameters)]
        (moved,) = torch.autograd.grad(self.pulled, self.u, parts, retain_graph=True)
        # (diag p − p pᵀ) z in every row.
        curved = self.p * (moved - (self.p * moved).sum(1, keepdim=True))
        back = torch.autograd.grad(self.z, self.parameters, curved / len(curved), retain_graph=True)
        return _flat(back) + self.l2 * vector

    def spectrum(self, vectors: Tensor, nodes: int = 8) -> list[list[float]]:
        """Gauss quadrature of how the energy of some vectors is spread over the eigenvalues of H."""
        total = float(vectors.double().square().sum())
        pairs = []
        for vector in vectors:
            energy = float(vector.double().square().sum())
            for value, weight in self._lanczos(vector, nodes) if energy > 0 else []:
                pairs.append([max(value, 0.0), weight * energy / total])
        return pairs

    def sharpness(self) -> float:
        """The largest eigenvalue."""
        size = sum(p.numel() for p in self.parameters)
        start = torch.randn(size, generator=torch.Generator().manual_seed(0))
        return max(value for value, _ in self._lanczos(start, 20))

    def _lanczos(self, start: Tensor, nodes: int) -> list[tuple[float, float]]:
        """Ritz values with the squared first components of their vectors; fully reorthogonalised."""
        basis = [start / start.norm()]
        diagonal, off = [], []
        for _ in range(nodes):
            w = self.product(basis[-1])
            diagonal.append(float(w @ basis[-1]))
            q = torch.stack(basis)
            for _ in range(2):
                w = w - q.T @ (q @ w)
            norm = float(w.norm())
            if norm < 1e-6 * abs(diagonal[0]) or len(diagonal) == nodes:
                break
            off.append(norm)
            basis.append(w / norm)
        t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for i, value in enumerate(off[: len(diagonal) - 1]):
            t[i, i + 1] = t[i + 1, i] = value
        values, vectors = torch.linalg.eigh(t)
        return list(zip(values.tolist(), vectors[0].square().tolist()))
