"""The sketches that a training may start with now and others that it may switch on later."""

from __future__ import annotations

from backsketch.planning.plan.estimate import CAUTION
from backsketch.planning.plan.plan import Plan
from backsketch.planning.plan.prediction import exact_plan, predict
from backsketch.planning.plan.search import make_plan
from backsketch.planning.profiling.families import REFERENCE
from backsketch.planning.profiling.records import Option, ProfileData, SiteProfile

__all__ = ["auto_plan"]

_WORTH = 0.02  # of a step's time, to be saved at a site


def auto_plan(profile: ProfileData) -> Plan:
    """The plan for time, or, where that is exact now, sketches that a controller may switch on later.

    Early in training all rows matter alike, so that hardly any sketch pays; the times stay what they are. A
    :class:`backsketch.Controller` on the sketches that save time is exact until they pay.

    Args:
        profile: of :func:`backsketch.profile`.

    Returns:
        A plan. ``reason`` says what a controller has to wait for, or why nothing saves time on this device;
        ``is_exact`` is true in the latter case alone.
    """
    plan = make_plan(profile, "time", None, None, None)
    if not plan.is_exact:
        return plan
    rules: dict[str, str] = {}
    for site in profile.sites:
        saver = _saver(profile, site)
        if saver is not None:
            rules |= saver.rules
    if not rules:
        return exact_plan(profile, f"no sketch saves time on this device; {plan.reason}")
    later = predict(profile, rules)
    return Plan(later.texts, later.predicted, f"at first {plan.reason}", later.exact_names)


def _saver(profile: ProfileData, site: SiteProfile) -> Option | None:
    """Of the family that saves most time here below the reference keep, the sketch at that keep."""
    # Recomputing saves bytes; where it seems to save more time than saving, that is noise.
    below = [o for o in site.options if o.keep < REFERENCE and o.family != "recompute"]
    best = min(below, key=site.seconds, default=None)
    if best is None:
        return None
    if site.seconds(best) + CAUTION * best.error_seconds > -_WORTH * profile.step_seconds:
        return None
    return next(o for o in site.options if (o.family, o.keep) == (best.family, REFERENCE))
