r"""How many steps of one size to a target, from one quiet run and one number for the noise.

On a quadratic, SGD splits exactly into a deterministic part and a noisy one that do not interact:

.. math:: E f(x_t) - f^* = \Delta(\eta t) + F_t(\eta), \qquad
          F_t(\eta) = \sum_j \frac{\eta C_{jj}}{4 (1 - \eta\lambda_j/2)} \bigl(1 - (1-\eta\lambda_j)^{2t}\bigr),

in the eigenbasis of the Hessian, C being the covariance of the gradient estimate.

*Proof.* Along direction j, :math:`E x_j^2 \leftarrow (1-\eta\lambda_j)^2 E x_j^2 + \eta^2 C_{jj}`, whose
solution from zero is :math:`\eta C_{jj}/(\lambda_j (2 - \eta\lambda_j))` times the bracket; f weighs it with
:math:`\lambda_j/2`.

For :math:`\eta\lambda \ll 1` and long times this is :math:`\eta \operatorname{tr} C/4`: the plain variance
:math:`v\sigma^2` decides, *whatever the curvature*. The step size that a target allows, hence the number of
steps, is then proportional to v. Where noise does not bind, sketches are free until it does.

Source: standard for quadratics, for example Bach and Moulines 2013.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Spectrum", "noise_floor", "steps_to_target"]

Spectrum = Sequence[tuple[float, float]]
r"""Curvatures :math:`\lambda_j` and the share :math:`C_{jj}/\operatorname{tr} C` of the variance at each; a
Lanczos quadrature of the noise gives it without any decomposition."""


def noise_floor(
    step_size: float, variance: float, spectrum: Spectrum, steps: float = math.inf
) -> float:
    r""":math:`F_t(\eta)`: the gap that the noise alone has caused after t steps; at infinity, the floor.

    Args:
        step_size: :math:`\eta`.
        variance: :math:`\operatorname{tr} C = v\sigma^2`.
        spectrum: where the variance lies.
        steps: t.

    Returns:
        The gap; infinite where a noisy direction has :math:`\eta\lambda \ge 2`.

    Raises:
        ValueError: a step size that is not positive, or negative values.

    Example:
        >>> round(noise_floor(0.1, 4.0, [(0.0001, 1.0)]), 3)  # flat: eta v sigma² / 4
        0.1
        >>> noise_floor(0.1, 4.0, [(10.0, 1.0)], steps=1)  # sharp: relaxed at once, and larger
        0.2
    """
    if not step_size > 0 or not variance >= 0 or not steps >= 0:
        raise ValueError(
            "the step size must be positive, variance and steps non-negative; got "
            f"{step_size!r}, {variance!r}, {steps!r}"
        )
    if any(step_size * curvature >= 2 for curvature, share in spectrum if share > 0):
        return math.inf
    parts = [
        share
        / (1 - step_size * c / 2)
        * (1 - abs(1 - step_size * c) ** (2 * steps) if c > 0 else 0)
        for c, share in spectrum
    ]
    return step_size * variance / 4 * sum(parts)


def steps_to_target(
    step_size: float,
    target: float,
    times: Sequence[float],
    gaps: Sequence[float],
    variance: float,
    spectrum: Spectrum,
) -> float:
    r"""Steps until the expected gap :math:`\Delta(\eta t) + F_t(\eta)` is at most ``target``.

    Args:
        step_size: :math:`\eta`.
        target: the gap to reach.
        times: :math:`\eta t` along a run with little noise.
        gaps: :math:`\Delta` of that run, at those times, decreasing.
        variance, spectrum: of the gradient estimate near the target, see :func:`noise_floor`.

    Returns:
        The number of steps; infinite where the noise keeps the target out of reach.

    Raises:
        ValueError: fewer than two points, or differing lengths.

    Example:
        >>> steps_to_target(0.1, 0.5, [0.0, 1.0, 2.0], [1.0, 0.5, 0.25], 0.0, [(1.0, 1.0)])
        10.0
    """
    if len(times) < 2 or len(times) != len(gaps):
        raise ValueError("need the same number of times and gaps, at least two")
    before = 0.0
    for i, (time, gap) in enumerate(zip(times, gaps)):
        total = gap + noise_floor(step_size, variance, spectrum, time / step_size)
        if total <= target:
            share = math.log(before / target) / math.log(before / total) if i else 0.0
            start = times[i - 1] if i else time
            return (start + share * (time - start)) / step_size
        before = total
    return math.inf
