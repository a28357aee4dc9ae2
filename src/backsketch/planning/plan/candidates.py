"""The sketches that a training may start with now and others that it may switch on later."""

from __future__ import annotations

from dataclasses import replace

from backsketch.planning.plan.plan import CAUTION, LEAST_SAVING, Plan
from backsketch.planning.plan.prediction import assembled, chosen, exact_plan
from backsketch.planning.plan.search import make_plan
from backsketch.planning.profiling.families import REFERENCE
from backsketch.planning.profiling.records import Option, ProfileData, SiteProfile

__all__ = ["auto_plan"]


def auto_plan(profile: ProfileData) -> Plan:
    """The plan for time, and, where it draws no rows now, sketches that a controller may switch on later.

    8-bit products are in it from the first step wherever they are faster. Early in training all rows matter alike,
    so that hardly any draw of rows pays; the times stay what they are. A :class:`backsketch.Controller` on the
    sketches that save time is exact until they pay.

    Args:
        profile: of :func:`backsketch.profile`.

    Returns:
        A plan. ``reason`` says what a controller has to wait for, or why nothing saves time on this device;
        ``is_exact`` is true in the latter case alone.
    """
    plan = make_plan(profile, "time", None, None, None)
    now = chosen(profile, plan.texts)
    if any(o is not None and o.keep < 1 for o in now):
        return plan
    found = [_saver(profile, site, o) for site, o in zip(profile.sites, now)]
    if not any(o is not None and o.keep < 1 for o in found):
        if plan.is_exact:
            return exact_plan(profile, f"no sketch saves time on this device; {plan.reason}")
        return plan
    later = assembled(profile, None, found)[0]
    return replace(later, reason=f"at first {plan.reason or plan.predicted}")


def _saver(profile: ProfileData, site: SiteProfile, now: Option | None) -> Option | None:
    """The sketch at the reference keep of the family that saves most time here at low keeps; or what is there now.

    Where 8-bit products are used now, only together with them.
    """
    # Recomputing saves bytes; where it seems to save more time than saving, that is noise.
    below = [
        o
        for o in site.options
        if o.keep < REFERENCE and o.family != "recompute" and (now is None or o.in_8_bits)
    ]
    best = min(below, key=site.seconds, default=None)
    least = (0.0 if now is None else site.seconds(now)) - LEAST_SAVING * profile.step_seconds
    if best is None or site.seconds(best) + CAUTION * best.error_seconds > least:
        return now
    return next(o for o in site.options if (o.family, o.keep) == (best.family, REFERENCE))
