r"""Epochs against cost: when a noisier, cheaper step reaches a target sooner.

Units: an exact training step costs 1, of which the forward pass is a third (one product in three). The
*noise scale* :math:`\beta` is the SGD variance of the minibatch gradient over the squared norm of the mean
gradient; the *variance multiplier* :math:`v = 1 + \omega` counts the extra variance of a sketch in units of
the SGD variance at the same batch size.

Derivation of the trade-off. Near a point where one step of size :math:`\eta` decreases the loss by
:math:`\eta \|g\|^2 - \tfrac{L \eta^2}{2} E\|\hat g\|^2`, with
:math:`E\|\hat g\|^2 = \|g\|^2 (1 + \beta v)`, the best step size gives a decrease of
:math:`\|g\|^2 / (2L(1 + \beta v))`. The number of steps to a target is therefore proportional to
:math:`1 + \beta v`, and the time to :math:`c (1 + \beta v)`.
"""

from __future__ import annotations

import math

__all__ = [
    "break_even_extra_variance",
    "checkpoint_step_cost",
    "layer_step_cost",
    "projection_step_cost",
    "region_step_cost",
    "smaller_batch_ratio",
    "time_to_target_ratio",
]

FORWARD = 1 / 3


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {value!r}")


def time_to_target_ratio(c: float, v: float, beta: float) -> float:
    r"""Time to a target relative to exact training: :math:`\rho = c\,(1 + \beta v)/(1 + \beta)`.

    Args:
        c: cost of a step, exact = 1.
        v: variance multiplier, exact = 1.
        beta: noise scale; ``math.inf`` is the noise-dominated limit :math:`c v`.

    Raises:
        ValueError: ``c < 0``, ``v < 1`` or ``beta < 0``.

    Example:
        >>> time_to_target_ratio(0.5, 1.4, math.inf)
        0.7
        >>> round(time_to_target_ratio(0.5, 1.4, 1.0), 3)
        0.6
    """
    _check("c", c, 0)
    _check("v", v, 1)
    _check("beta", beta, 0)
    if math.isinf(beta):
        return c * v
    return c * (1 + beta * v) / (1 + beta)


def smaller_batch_ratio(b: float, beta: float) -> float:
    r"""The rival, a batch of fraction b: :math:`\rho_b = (b + \beta)/(1 + \beta)`.

    It costs b and has :math:`v = 1/b`. In the noise-dominated limit the ratio is 1: a smaller batch gains
    nothing there, whatever its size.

    Raises:
        ValueError: ``b`` outside (0, 1] or ``beta < 0``.
    """
    _check("b", b, 0, 1)
    return time_to_target_ratio(b, 1 / b, beta)


def break_even_extra_variance(c: float, beta: float) -> float:
    r"""The extra variance at which a step of cost c takes as long as exact training.

    :math:`\omega = (1/c - 1)(1 + \beta)/\beta`, the solution of :func:`time_to_target_ratio` = 1.

    Raises:
        ValueError: ``c`` outside (0, 1] or ``beta < 0``.
    """
    _check("c", c, 0, 1)
    _check("beta", beta, 0)
    if c == 0 or beta == 0:
        return math.inf
    return (1 / c - 1) * (1 if math.isinf(beta) else (1 + beta) / beta)


def layer_step_cost(keep_input: float, keep_weight: float) -> float:
    """A step with each product at a fraction of its arithmetic: ``(1 + keep_input + keep_weight) / 3``.

    Example:
        >>> round(layer_step_cost(0.25, 0.25), 3)
        0.5
    """
    _check("keep_input", keep_input, 0, 1)
    _check("keep_weight", keep_weight, 0, 1)
    return FORWARD * (1 + keep_input + keep_weight)


def region_step_cost(keep: float, mode: str = "save") -> float:
    """A step whose whole model is a region: ``(1 + 2 keep)/3`` (save) or ``(1 + 3 keep)/3`` (recompute).

    Activation checkpointing is recompute at keep 1: 4/3.

    Raises:
        ValueError: ``keep`` outside [0, 1] or an unknown mode.
    """
    _check("keep", keep, 0, 1)
    factors = {"save": 2, "recompute": 3}
    if mode not in factors:
        raise ValueError(f"mode must be 'save' or 'recompute'; got {mode!r}")
    return FORWARD * (1 + factors[mode] * keep)


def checkpoint_step_cost(share: float = 1.0) -> float:
    """Activation checkpointing: a ``share`` of the forward pass is computed twice, ``(3 + share)/3``.

    Its rival among the sketches, a recomputed region, is ``region_step_cost(keep, "recompute")``.

    Example:
        >>> round(checkpoint_step_cost(), 4), round(region_step_cost(0.5, "recompute"), 4)
        (1.3333, 0.8333)
    """
    _check("share", share, 0, 1)
    return FORWARD * (3 + share)


def projection_step_cost(keep: float, rows: int, inputs: int, outputs: int) -> float:
    r"""A layer whose input is stored as a projection :math:`SX` of ``r = keep * rows`` rows.

    Beside the shrunken ``grad_weight`` it pays :math:`r N d_{in}` for :math:`SX` in the forward pass and
    :math:`r N d_{out}` for :math:`SG` in the backward, in units of a product :math:`N d_{in} d_{out}`:

    .. math:: c = \tfrac13\bigl(2 + p + p N (1/d_{in} + 1/d_{out})\bigr) .

    The other memory savers add no product: stored rows cost ``layer_step_cost(1, keep)``, quantization
    ``layer_step_cost(1, 1)``.

    Example:
        >>> round(projection_step_cost(0.1, 1024, 512, 512), 3)  # cheaper than exact only for few rows
        0.833
    """
    _check("keep", keep, 0, 1)
    return FORWARD * (2 + keep + keep * rows * (1 / inputs + 1 / outputs))
