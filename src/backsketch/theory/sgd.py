r"""What unbiased, noisier gradients cost in steps: three convergence theorems, constants included.

Setting. f is L-smooth, :math:`x_{t+1} = x_t - \eta \hat g_t`, :math:`E[\hat g_t \mid x_t] = \nabla f(x_t)`, and

.. math:: E\|\hat g_t\|^2 \le (1+m)\,\|\nabla f(x_t)\|^2 + V . \tag{N}

*Sketches satisfy (N).* Let :math:`g_B` be the minibatch gradient, of variance at most :math:`\sigma^2`.
A sketch with :math:`E\|\hat g - g_B\|^2 \le \omega_r \|g_B\|^2` (relative variance) has
:math:`m = \omega_r,\ V = (1+\omega_r)\sigma^2`, because
:math:`E\|\hat g\|^2 = E\|g_B\|^2 + E\|\hat g - g_B\|^2`. A sketch with
:math:`E\|\hat g - g_B\|^2 \le \omega \sigma^2` (extra variance in units of SGD's) has
:math:`m = 0,\ V = (1+\omega)\sigma^2 = v\sigma^2`. See :func:`noise`.

Everything follows from one step. With :math:`a = 1 - \eta L (1+m)/2 > 0`,

.. math:: E f(x_{t+1}) \le f(x_t) - \eta a \|\nabla f(x_t)\|^2 + \tfrac{L\eta^2}{2} V .

All three are equalities or nearly so on some problem (see ``tests/test_theory_sgd.py``), so no constant
can be improved without more assumptions. Sources: Bottou, Curtis, Nocedal 2018, theorems 4.6 and 4.8;
Karimi, Nutini, Schmidt 2016 for the Polyak-Łojasiewicz form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = [
    "Noise",
    "Steps",
    "convex_bound",
    "convex_steps",
    "max_step_size",
    "noise",
    "nonconvex_bound",
    "nonconvex_steps",
    "strongly_convex_bound",
    "strongly_convex_steps",
]


class Noise(NamedTuple):
    """The constants of assumption (N): ``relative`` is m, ``additive`` is V."""

    relative: float
    additive: float


class Steps(NamedTuple):
    """How many steps of which size suffice."""

    steps: int
    step_size: float


def noise(sgd_variance: float, extra: float = 0.0, relative: float = 0.0) -> Noise:
    r"""Constants of a sketched minibatch gradient: :math:`m = \omega_r,\ V = (1 + \omega + \omega_r)\sigma^2`.

    Args:
        sgd_variance: :math:`\sigma^2`, the largest variance of the exact minibatch gradient.
        extra: :math:`\omega`, sketch variance in units of :math:`\sigma^2`.
        relative: :math:`\omega_r`, sketch variance in units of :math:`\|g_B\|^2`.

    Example:
        >>> noise(2.0, extra=0.5)
        Noise(relative=0.0, additive=3.0)
    """
    _positive(sgd_variance=sgd_variance, extra=extra, relative=relative, strict=False)
    return Noise(relative, (1 + extra + relative) * sgd_variance)


def max_step_size(smoothness: float, relative: float = 0.0) -> float:
    r""":math:`\eta = 1/(L(1+m))`, at which :math:`a = 1/2`: the step size that the theorems are read at."""
    _positive(smoothness=smoothness)
    return 1 / (smoothness * (1 + relative))


def _progress(step_size: float, smoothness: float, relative: float) -> float:
    """``a``, the share of the first-order decrease that is left."""
    _positive(step_size=step_size, smoothness=smoothness)
    a = 1 - step_size * smoothness * (1 + relative) / 2
    if a <= 0:
        raise ValueError(
            f"the step size must be less than 2 / (L (1 + m)) = {2 / (smoothness * (1 + relative)):g}; "
            f"got {step_size!r}"
        )
    return a


def strongly_convex_bound(
    steps: int,
    step_size: float,
    gap: float,
    smoothness: float,
    strong_convexity: float,
    noise: Noise,
) -> float:
    r"""Theorem 1: for :math:`\eta < 2/(L(1+m))` and f :math:`\mu`-strongly convex (or merely PL),

    .. math:: E f(x_T) - f^* \le r^T (f(x_0) - f^*) + (1 - r^T) \frac{\eta L V}{4 \mu a}, \qquad
              r = 1 - 2\eta\mu a \in [0, 1) .

    At :math:`\eta \le 1/(L(1+m))`, where :math:`a \ge 1/2`: rate :math:`1 - \eta\mu`, floor
    :math:`\eta L V/(2\mu)`.

    *Proof.* Put :math:`\|\nabla f\|^2 \ge 2\mu (f - f^*)` into the one-step inequality and sum the
    geometric series. Equality where :math:`\mu = L`.

    Args:
        steps: T.
        step_size: :math:`\eta`.
        gap: :math:`f(x_0) - f^*`.
        smoothness: L.
        strong_convexity: :math:`\mu`, in (0, L].
        noise: m and V.

    Raises:
        ValueError: a step size that is too large, or constants out of range.

    Example:
        >>> strongly_convex_bound(0, 0.1, 1.0, 2.0, 1.0, Noise(0.0, 0.0))
        1.0
    """
    a = _progress(step_size, smoothness, noise.relative)
    _positive(gap=gap, strict=False)
    if not 0 < strong_convexity <= smoothness:
        raise ValueError(f"strong_convexity must lie in (0, L]; got {strong_convexity!r}")
    kept = (1 - 2 * step_size * strong_convexity * a) ** steps
    floor = step_size * smoothness * noise.additive / (4 * strong_convexity * a)
    return kept * gap + (1 - kept) * floor


def convex_bound(
    steps: int, step_size: float, distance: float, smoothness: float, noise: Noise
) -> float:
    r"""Theorem 2: for f convex with a minimiser at distance D and :math:`\eta < 1/(L(1+m))`,

    .. math:: \frac1T \sum_{t<T} E f(x_t) - f^* \le
              \frac{D^2}{2\eta T b} + \frac{\eta V}{2 b}, \qquad b = 1 - \eta L (1+m),

    and by convexity the same for :math:`f(\bar x_T)`. At :math:`\eta = 1/(2L(1+m))`: :math:`b = 1/2`.

    *Proof.* Expand :math:`\|x_{t+1} - x^*\|^2`, use :math:`\langle \nabla f, x - x^*\rangle \ge f - f^*` and
    :math:`\|\nabla f\|^2 \le 2L(f - f^*)`, telescope.

    Raises:
        ValueError: a step size that is too large, or constants out of range.
    """
    _positive(steps=steps, step_size=step_size, smoothness=smoothness)
    b = 1 - step_size * smoothness * (1 + noise.relative)
    if b <= 0:
        limit = max_step_size(smoothness, noise.relative)
        raise ValueError(
            f"the step size must be less than 1 / (L (1 + m)) = {limit:g}; got {step_size!r}"
        )
    return distance**2 / (2 * step_size * steps * b) + step_size * noise.additive / (2 * b)


def nonconvex_bound(
    steps: int, step_size: float, gap: float, smoothness: float, noise: Noise
) -> float:
    r"""Theorem 3: for f bounded below and :math:`\eta < 2/(L(1+m))`,

    .. math:: \frac1T \sum_{t<T} E\|\nabla f(x_t)\|^2 \le
              \frac{f(x_0) - f^*}{\eta a T} + \frac{\eta L V}{2a} .

    At :math:`\eta \le 1/(L(1+m))`: :math:`2(f(x_0)-f^*)/(\eta T) + \eta L V`.

    *Proof.* Sum the one-step inequality over t.

    Raises:
        ValueError: a step size that is too large, or constants out of range.
    """
    a = _progress(step_size, smoothness, noise.relative)
    _positive(steps=steps)
    _positive(gap=gap, strict=False)
    return gap / (step_size * a * steps) + step_size * smoothness * noise.additive / (2 * a)


# How many steps --------------------------------------------------------------------------------------


def strongly_convex_steps(
    target: float, gap: float, smoothness: float, strong_convexity: float, noise: Noise
) -> Steps:
    r"""Steps after which theorem 1 promises a gap of ``target``, with the step size that it needs.

    :math:`\eta = \min\{1/(L(1+m)),\ \epsilon\mu/(LV)\}` leaves half of :math:`\epsilon` to the floor, and
    :math:`T = \lceil \log(2\Delta_0/\epsilon)/(\eta\mu) \rceil`. In the noise-dominated regime T is
    proportional to V, hence to v: the law behind :func:`backsketch.theory.time_to_target_ratio`.

    Example:
        >>> exact = strongly_convex_steps(0.01, 1.0, 10.0, 1.0, Noise(0, 5.0))
        >>> sketched = strongly_convex_steps(0.01, 1.0, 10.0, 1.0, Noise(0, 2 * 5.0))
        >>> round(sketched.steps / exact.steps, 3)
        2.0
    """
    _positive(target=target)
    largest = max_step_size(smoothness, noise.relative)
    step_size = _smaller(largest, target * strong_convexity, smoothness * noise.additive)
    if gap <= target:
        return Steps(0, step_size)
    return Steps(math.ceil(math.log(2 * gap / target) / (step_size * strong_convexity)), step_size)


def convex_steps(target: float, distance: float, smoothness: float, noise: Noise) -> Steps:
    r"""Steps after which theorem 2 promises ``target`` for the averaged iterate.

    :math:`\eta = \min\{1/(2L(1+m)),\ \epsilon/(2V)\}` and :math:`T = \lceil 2D^2/(\eta\epsilon) \rceil`.
    """
    _positive(target=target)
    largest = max_step_size(smoothness, noise.relative) / 2
    step_size = _smaller(largest, target, 2 * noise.additive)
    return Steps(math.ceil(2 * distance**2 / (step_size * target)), step_size)


def nonconvex_steps(target: float, gap: float, smoothness: float, noise: Noise) -> Steps:
    r"""Steps after which theorem 3 promises a mean squared gradient norm of ``target``.

    :math:`\eta = \min\{1/(L(1+m)),\ \epsilon/(2LV)\}` and :math:`T = \lceil 4\Delta_0/(\eta\epsilon) \rceil`.
    """
    _positive(target=target)
    largest = max_step_size(smoothness, noise.relative)
    step_size = _smaller(largest, target, 2 * smoothness * noise.additive)
    return Steps(math.ceil(4 * gap / (step_size * target)), step_size)


def _smaller(largest: float, numerator: float, denominator: float) -> float:
    return largest if denominator <= 0 else min(largest, numerator / denominator)


def _positive(strict: bool = True, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 if strict else value >= 0):
            raise ValueError(
                f"{name} must be {'positive' if strict else 'non-negative'}; got {value!r}"
            )
