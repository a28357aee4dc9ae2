"""``bs.profile`` and the profile that it returns: what is measured, and the plans that follow from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from backsketch.convert import restore_
from backsketch.nn.swap import is_swapped
from backsketch.planning.measure.passes import LossFn
from backsketch.planning.plan.candidates import auto_plan
from backsketch.planning.plan.plan import Plan
from backsketch.planning.plan.prediction import predict
from backsketch.planning.plan.search import make_plan
from backsketch.planning.plan.trial import tried
from backsketch.planning.profiling.profiler import STAGES, first_batches, measured, stages
from backsketch.planning.profiling.records import ProfileData
from backsketch.regions import RunsExactly
from backsketch.rules import unwrap
from backsketch.untouched import untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Profile", "profile"]


@dataclass(frozen=True)
class Profile(ProfileData):
    """What :func:`backsketch.profile` measured, and the plans that can be made from it.

    See :class:`backsketch.planning.profiling.records.ProfileData` for the numbers.
    """

    def plan(
        self,
        objective: str = "time",
        max_extra_variance: float | None = None,
        max_saved_bytes: float | None = None,
        max_time: float | None = None,
    ) -> Plan:
        """Choose a sketch for every site.

        Args:
            objective: ``"time"`` minimises the predicted time to a target relative to exact training
                (:func:`backsketch.theory.time_to_target_ratio`); ``"memory"`` the saved bytes;
                ``"variance"`` the extra variance, for which a limit on time or bytes is needed.
            max_extra_variance: at most this, in units of SGD's variance; by default 0.1 for ``"memory"`` and 1 for
                ``"time"``.
            max_saved_bytes: at most this many bytes.
            max_time: a step takes at most this fraction of an exact one. For ``"memory"`` 1.1 by default.

        Returns:
            A :class:`Plan`: 8-bit products alone where nothing else beats exact training or a smaller batch, the
            exact one where they are not faster either.

        Raises:
            ValueError: an unknown objective, a limit that is not positive, limits that no plan meets.
        """
        return make_plan(self, objective, max_extra_variance, max_saved_bytes, max_time)

    def auto_plan(self) -> Plan:
        """What ``--sketch auto`` trains with: the plan for time, or sketches for a controller to switch on later.

        See :func:`backsketch.planning.auto_plan`.
        """
        return auto_plan(self)

    def predict(self, rules: Mapping[str, object]) -> Plan:
        """The plan that these rules are, with what it costs.

        Args:
            rules: patterns and sketches as a plan spells them (``plan.texts``): a site with one of its options
                for each, and ``""`` for a mask on the output.

        Raises:
            ValueError: a rule is none of the profile's options.

        Example:
            ``profile.predict({"": "mask:keep=0.8", "blocks.0.mlp": "region:keep=0.5,row_dims=2"}).predicted``
        """
        return predict(self, rules)

    def plot(self, plan: Plan | None = None) -> Figure:
        """A matplotlib figure: time against extra variance, a line over the keeps for each site.

        Args:
            plan: its choices are marked.

        Raises:
            ModuleNotFoundError: matplotlib is missing; it is in the extra ``backsketch[train]``.
        """
        from backsketch.planning.plots import plot_profile

        return plot_profile(self, plan)


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn[Any],
    *,
    progress: bool = True,
) -> Profile:
    """Measure what sketches would do to the training of a model.

    Finds the sites by itself, times each by itself on this device, counts the bytes that they save for the
    backward, and measures the extra variance of each at keep 0.5 on two batches, carried to the other keeps, and
    below masks, by the closed form of the row scores. The plan for time is then measured as a whole, and dropped
    if it does not hold.

    Args:
        model: without sketches; it is left as it was, gradients, buffers, modes and random streams included.
        batches: an iterable of at least two batches, as training draws them; the first four are used.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss of a batch.
        progress: show a progress bar.

    Returns:
        A :class:`Profile`: ``print`` it, :meth:`Profile.save` it, :meth:`Profile.plan` with it.

    Raises:
        ValueError: fewer than two batches, a loss that is not finite, a model that is sketched already or has
            nothing to sketch.
    """
    model = unwrap(model)
    data = first_batches(batches)
    if any(is_swapped(m) for m in model.modules()):
        raise ValueError("profile: the model is sketched already; call bs.restore_(model) first")
    with (
        stages("profile", STAGES + len(data), progress) as tick,
        untouched(model, training=True, seed=0),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RunsExactly)  # regions are tried here
        try:
            found, exact = measured(model, data, loss_fn, tick)
            return Profile(**vars(tried(found, model, data, loss_fn, exact, tick)))
        finally:
            restore_(model)
