r"""What extra variance means for the batch size and the learning rate.

A minibatch of n samples has SGD variance :math:`\sigma^2 = s^2/n`. With the extra variance
:math:`\omega\sigma^2` of a sketch the noise is that of an exact batch of

.. math:: n_{\text{eff}} = \frac{n}{1 + \omega}

samples: *the effective batch*. Rules for the learning rate at another batch size then apply as they are, with
:math:`n_{\text{eff}}/n = 1/(1+\omega)` in the place of the ratio of batches.

- SGD: the step that decreases a quadratic model most is :math:`\eta \propto 1/(1 + \beta v)` (derivation in
  :mod:`backsketch.theory.cost`; McCandlish et al. 2018, equation 2.7), so that
  :math:`\eta'/\eta = (1+\beta)/(1+\beta(1+\omega))`. Where noise dominates, :math:`\beta \to \infty`, this is
  the linear scaling rule (Goyal et al. 2017).
- Adam: the square root scaling rule (Malladi et al. 2022), :math:`\eta'/\eta = (1+\omega)^{-1/2}`.
"""

from __future__ import annotations

import math

__all__ = ["effective_batch", "in_words", "learning_rate_factor"]


def effective_batch(extra_variance: float) -> float:
    r"""The batch size whose exact gradient is as noisy, as a fraction of the nominal one: :math:`1/(1+\omega)`.

    Raises:
        ValueError: a negative extra variance.

    Example:
        >>> round(effective_batch(0.15), 2)
        0.87
    """
    if not extra_variance >= 0:
        raise ValueError(f"extra_variance must not be negative; got {extra_variance!r}")
    return 1 / (1 + extra_variance)


def learning_rate_factor(
    extra_variance: float, optimizer: str = "sgd", noise_scale: float = math.inf
) -> float:
    r"""By what to multiply the learning rate that suits exact training.

    Args:
        extra_variance: :math:`\omega`.
        optimizer: ``"sgd"`` or ``"adam"`` (with and without decoupled weight decay).
        noise_scale: :math:`\beta`, for SGD; infinite is the linear scaling rule.

    Raises:
        ValueError: a negative number, another optimizer.

    Example:
        >>> round(learning_rate_factor(0.15), 2), round(learning_rate_factor(0.15, "adam"), 2)
        (0.87, 0.93)
        >>> round(learning_rate_factor(0.15, noise_scale=0.1), 3)  # where the signal dominates, noise matters less
        0.987
    """
    if not noise_scale >= 0:
        raise ValueError(f"noise_scale must not be negative; got {noise_scale!r}")
    if optimizer == "adam":
        return math.sqrt(effective_batch(extra_variance))
    if optimizer != "sgd":
        raise ValueError(f"optimizer must be 'sgd' or 'adam'; got {optimizer!r}")
    if math.isinf(noise_scale):
        return effective_batch(extra_variance)
    effective_batch(extra_variance)  # its check
    return (1 + noise_scale) / (1 + noise_scale * (1 + extra_variance))


def in_words(extra_variance: float, noise_scale: float) -> str:
    """Both rules for a training whose learning rate was tuned for exact gradients."""
    if not extra_variance:
        return "the gradients are exact: the learning rate that suits exact training stays right"
    return (
        f"your effective batch is now {effective_batch(extra_variance):.2f} of nominal (extra variance "
        f"{extra_variance:.2f}); multiply a learning rate that was tuned for exact training by "
        f"{learning_rate_factor(extra_variance):.2f} for SGD where noise dominates "
        f"({learning_rate_factor(extra_variance, 'sgd', noise_scale):.2f} at the present noise scale "
        f"{noise_scale:.2g}), by {learning_rate_factor(extra_variance, 'adam'):.2f} for Adam"
    )
