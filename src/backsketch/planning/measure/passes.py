"""Repeatable backward passes: single sites on and off, all else equal, and nothing left behind.

Every pass of one batch sees the same dropout masks and buffers, and every site makes the same draws in
every pass of one name, whichever other sites are active (:func:`backsketch.sampling.keyed`). Hooks on the
sites, removed afterwards, tell the draws apart and catch what passes by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from backsketch.estimators import Sketch
from backsketch.nn.swap import is_swapped, sketch_of, switched
from backsketch.planning.measure.recorder import listen, tensors_of, vjp
from backsketch.regions import RegionModule
from backsketch.sampling import Keys, keyed
from backsketch.untouched import repeatable

__all__ = [
    "Caught",
    "Diverged",
    "LossFn",
    "Passes",
    "SketchedSite",
    "checked",
    "has_region",
    "passes",
    "sketched_sites",
]

B = TypeVar("B")
LossFn = Callable[[nn.Module, B], Tensor]
"""``loss_fn(model, batch)`` returns the scalar mean loss of a batch."""


class Diverged(ValueError):
    """The loss of a batch is not finite."""


@dataclass(frozen=True)
class SketchedSite:
    """A sketched module of a model."""

    index: int
    name: str
    module: nn.Module
    sketch: Sketch


@dataclass
class Caught:
    """What a pass showed of one site: a list entry per call of the module, in backward order for gradients.

    ``inputs`` are the first tensor arguments, ``cotangents`` the gradients of the outputs and
    ``grad_inputs`` those of the inputs, all that reaches them from elsewhere included.
    """

    inputs: list[Tensor] = field(default_factory=list)
    cotangents: list[Tensor] = field(default_factory=list)
    grad_inputs: list[Tensor] = field(default_factory=list)


def sketched_sites(model: nn.Module) -> list[SketchedSite]:
    """The sketched modules of a model, in the order of ``named_modules``."""
    swapped = [(name, m) for name, m in model.named_modules() if is_swapped(m)]
    found = []
    for i, (name, module) in enumerate(swapped):
        sketch = sketch_of(module)
        assert sketch is not None
        found.append(SketchedSite(i, name, module, sketch))
    return found


@dataclass
class Passes:
    """Runs passes of one model; made by :func:`passes`."""

    model: nn.Module
    loss_fn: LossFn[Any]
    sites: Sequence[SketchedSite]
    keys: Keys
    active: Collection[int] = ()
    caught: dict[int, Caught] | None = None
    order: list[int] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def gradient(
        self, batch: Any, number: int, active: Collection[int] = (), draw: int = 0
    ) -> list[Tensor]:
        """Gradient of each trainable parameter with the ``active`` sites sketched; zeros where unused.

        Args:
            batch: what the loss function takes.
            number: of the batch: fixes the dropout masks and, with ``draw``, the sketches' draws.
            active: indices of sites.
            draw: which of the repetitions.

        Raises:
            ValueError: the loss is not a finite scalar with a gradient.
        """
        with self.loss(batch, number, active, draw) as loss:
            return vjp(loss, list(self.parameters.values()))

    @contextmanager
    def loss(
        self, batch: Any, number: int, active: Collection[int] = (), draw: int = 0
    ) -> Iterator[Tensor]:
        """The loss of such a pass with its graph, for other backward passes than that of :meth:`gradient`."""
        self.keys.restart(number, draw)
        self.order.clear()
        with self._toggled(active), repeatable(self.model, number), torch.enable_grad():
            yield checked(self.loss_fn(self.model, batch), number)

    def observed(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], dict[int, Caught]]:
        """:meth:`gradient`, and what it showed at every site."""
        self.caught = {site.index: Caught() for site in self.sites}
        try:
            return self.gradient(*args, **kwargs), self.caught
        finally:
            self.caught = None

    @contextmanager
    def _toggled(self, active: Collection[int]) -> Iterator[None]:
        self.active = active
        with switched({site.module: site.index not in active for site in self.sites}):
            yield

    def listen(self, site: SketchedSite) -> list[Any]:
        """Put hooks on a site, which name its draws and catch what passes by; returns their handles."""

        def called(args: Any, kwargs: Any) -> Caught:
            if site.index in self.active:
                self.keys.at(site.index)  # draws of the forward pass
            caught = Caught() if self.caught is None else self.caught[site.index]
            tensors = tensors_of((args, kwargs))
            if self.caught is not None and tensors:
                caught.inputs.append(tensors[0].detach())
                if tensors[0].requires_grad:
                    tensors[0].register_hook(lambda g: caught.grad_inputs.append(g))
            return caught

        def arrived(caught: Caught, index: int, cotangent: Tensor) -> None:
            # Not where it is exact: the output of an inactive mask is that of the layer inside.
            if site.index in self.active:
                self.keys.at(site.index)
            self.order.append(site.index)
            if self.caught is not None:
                caught.cotangents.append(cotangent)

        return listen(site.module, called, arrived=arrived)


@contextmanager
def passes(
    model: nn.Module, loss_fn: LossFn[B], among: Sequence[SketchedSite] | None = None
) -> Iterator[Passes]:
    """A model ready for repeated passes; afterwards modes, hooks, buffers and streams are as before."""
    found = sketched_sites(model) if among is None else among
    modes = {module: module.training for module in model.modules()}
    with keyed() as keys:
        run = Passes(model, loss_fn, found, keys)
        handles = [handle for site in found for handle in run.listen(site)]
        try:
            if not model.training:  # parts that a training model keeps in eval mode stay there
                model.train()
            yield run
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes.items():
                module.training = training


def checked(loss: Any, number: int) -> Tensor:
    """The loss of a batch, if a gradient can be taken of it; else a ``ValueError`` says what is wrong."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn must return the scalar mean loss of a batch; got {loss!r}")
    if not bool(torch.isfinite(loss)):
        raise Diverged(
            f"the loss of batch {number} is {float(loss.detach())}: nothing can be measured from it. Check the "
            "batch, or load weights from before the divergence"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {number} has no gradient: is a parameter trainable, and does loss_fn call "
            "the model outside torch.no_grad?"
        )
    return loss


def has_region(site: SketchedSite) -> bool:
    """Whether a site is a region, whose rows are checked on its first batch."""
    return isinstance(site.module, RegionModule)
