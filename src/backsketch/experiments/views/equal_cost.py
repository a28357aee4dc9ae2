"""Equal cost: time to a target accuracy or loss, arm by arm, and which term of rho decided it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backsketch.experiments.problems.step_time import PARTS
from backsketch.experiments.store import Sweep
from backsketch.experiments.views.arms import (
    Arm,
    arms,
    best_exact,
    mean_error,
    relative_step,
    relative_time,
)
from backsketch.experiments.views.page import COLOURS, Page, TextTable, dress, new_figure

__all__ = ["Terms", "by_epoch", "page", "terms"]

INK = "#2b2d34"
OWN = "†"  # a step whose time is that of its own runs, as where a controller changes it
GREYS = ("#8a939b", "#b3bac0", "#ccd2d6", "#dde1e4")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def page(sweep: Sweep) -> Page:
    """The comparison, the terms of rho and the parts of a step, and a figure of the runs over time."""
    found = arms(sweep)
    tables = [_comparison(found), _analysis(found), _steps(found)]
    return Page(sweep.name, sweep.about, tables, {sweep.name: _figure(found)})


def _comparison(found: Sequence[Arm]) -> TextTable:
    header = (
        "arm", "best lr", "steps to target", "step", "time to target", "over best exact",
        "backward GFLOP to target", f"final {found[0].goal.key}", "saved", "seeds",
    )  # fmt: skip
    own = [arm for arm in found if not arm.quiet]
    clock = "of the runs themselves" if len(own) == len(found) else "on a quiet machine"
    marked = (
        f"; {OWN}: of its own runs, as the exact one it is compared with"
        if 0 < len(own) < len(found)
        else ""
    )
    title = f"to {found[0].goal}; steps × seconds of a step {clock}{marked}"
    return TextTable(title, header, [_row(arm, found) for arm in found])


def _row(arm: Arm, found: Sequence[Arm]) -> tuple[str, ...]:
    base = best_exact(found, arm.model)
    steps = [s for s in arm.steps.values() if s is not None]
    ratio = relative_time(arm, base) if base else None
    missed = f"{len(arm.runs) - len(steps)} of {len(arm.runs)} missed"
    arrived = len(steps) == len(arm.runs)
    flops = [s * arm.first.result["backward_flops"] / 1e9 for s in steps]
    return (
        arm.name,
        f"{arm.lr:g}",
        _with_error(steps, "{:.0f}") if arrived else missed,
        f"{1e3 * arm.step_seconds:.1f} ms" + _mark(arm, found),
        _with_error(list((arm.seconds or {}).values()), "{:.1f} s") if arrived else "",
        "" if ratio is None else _pair(*ratio, form="{:.2f}"),
        f"{statistics.fmean(flops):.0f}" if arrived and arm.is_even else "",
        _with_error([arm.goal.scale * value for value in arm.finals], arm.goal.form),
        f"{arm.saved_bytes / 2**20:.1f} MiB",
        str(len(arm.runs)),
    )


def _mark(arm: Arm, found: Sequence[Arm]) -> str:
    return "" if arm.quiet or not any(other.quiet for other in found) else f" {OWN}"


def _with_error(values: Sequence[float], form: str) -> str:
    return _pair(*mean_error(values), form=form)


def _pair(mean: float, error: float, form: str) -> str:
    text = form.format(mean)
    if math.isnan(error):
        return text
    number, space, unit = text.partition(" ")
    return f"{number} ± {form.format(error).partition(' ')[0]}{space}{unit}"


class Terms:
    r"""The terms of :math:`\rho = c\,(1 + \omega\beta/(1+\beta))` of an arm, against the exact arm it resembles.

    Attributes:
        cost: c, seconds of a step over those of the exact arm at the same batch size.
        multiplier: v = 1 + ω, mean over the run.
        noise: β/(1 + β), mean over the exact run; 1 where the mean gradient is lost in the noise.
        steps: predicted factor on the number of steps, the mean over the run of 1 + ω β/(1 + β).
        measured_steps: the measured one, or None.
    """

    def __init__(self, arm: Arm, exact: Arm) -> None:
        omega, noise = by_epoch(arm, "extra_variance"), by_epoch(exact, "noise_scale")
        shares = {epoch: 1.0 if math.isinf(b) else b / (1 + b) for epoch, b in noise.items()}
        last = max(shares)
        self.cost = relative_step(arm, exact)
        self.multiplier = 1 + statistics.fmean(omega.values())
        self.noise = statistics.fmean(shares.values())
        self.steps = 1 + statistics.fmean(w * shares[min(e, last)] for e, w in omega.items())
        both = [(arm.steps[s], exact.steps[s]) for s in arm.steps.keys() & exact.steps.keys()]
        ratios = [a / b for a, b in both if a is not None and b is not None]
        self.measured_steps = (
            statistics.fmean(ratios) if both and len(ratios) == len(both) else None
        )

    @property
    def rho(self) -> float:
        """Predicted time to the target over that of the exact arm."""
        return self.cost * self.steps

    @property
    def measured(self) -> float | None:
        """The measured one."""
        return None if self.measured_steps is None else self.cost * self.measured_steps


def terms(arm: Arm, found: Sequence[Arm]) -> Terms | None:
    """Against the exact arm of the same model, batch size and epochs; None where there is none."""
    own = arm.first.result
    for other in found:
        result = other.first.result
        same = all(own[key] == result[key] for key in ("batch_size", "epochs"))
        if other.is_exact and not other.is_twin and same and other.model == arm.model:
            return Terms(arm, other)
    return None


def by_epoch(arm: Arm, key: str) -> dict[int, float]:
    """Mean over seeds by epoch; what was not finite counts as infinite."""
    found: dict[int, list[float]] = {}
    for run in arm.runs:
        for epoch, value in run.result[key].items():
            found.setdefault(int(epoch), []).append(math.inf if value is None else value)
    return {epoch: statistics.fmean(values) for epoch, values in found.items()}


def _analysis(found: Sequence[Arm]) -> TextTable:
    header = (
        "arm", "c", "v", "β/(1+β)", "steps, predicted", "steps, measured", "ρ, predicted",
        "ρ, measured", "backward FLOPs",
    )  # fmt: skip
    rows = []
    for arm in found:
        parts = terms(arm, found) if arm.is_sketched else None
        if parts is not None:
            numbers = (
                parts.cost, parts.multiplier, parts.noise, parts.steps, parts.measured_steps,
                parts.rho, parts.measured, arm.first.result["backward_flops_ratio"],
            )  # fmt: skip
            rows.append((arm.name, *("not reached" if n is None else f"{n:.2f}" for n in numbers)))
    title = "the terms of ρ, against exact training at the same batch size, epochs and target"
    return TextTable(title, header, rows)


def _steps(found: Sequence[Arm]) -> TextTable:
    """Where the time of a step goes; arms that make the same steps stand once."""
    rows, seen = [], set()
    for arm in found:
        key = (arm.first.step_key, arm.name if arm.is_twin else "")
        if arm.parts and key not in seen:
            seen.add(key)
            parts = [f"{1e3 * seconds:.1f}" for seconds in arm.parts.values()]
            rows.append((arm.name, *parts, f"{1e3 * arm.step_seconds:.1f}"))
    header = ("a step, ms", *PARTS, "all")
    return TextTable("the parts of a step on a quiet machine, medians", header, rows)


def _figure(found: Sequence[Arm]) -> Figure:
    figure, panels = new_figure(3, 14, 4.6)
    over_steps, over_seconds, tested = panels
    goal = found[0].goal
    shown = [arm for arm in found if not arm.is_twin]
    for arm, style in _styles(shown):
        steps, losses = _mean_curve(arm)
        _draw(over_steps, steps, losses, arm.name, style)
        _draw(over_seconds, [s * arm.step_seconds for s in steps], losses, arm.name, style)
        looks, values = _mean_tested(arm)
        shows = [goal.scale * value for value in values]
        _draw(tested, [s * arm.step_seconds for s in looks], shows, arm.name, style)
    dress(over_steps, "steps", "training loss", "loss against steps")
    dress(over_seconds, "seconds", "training loss", "loss against seconds")
    dress(
        tested, "seconds", goal.name, f"{goal.key}; line: the target, {goal.scale * goal.value:g}"
    )
    for axes in panels:
        axes.set_xlim(left=0)
    for axes in (over_steps, over_seconds):
        _loss_scale(axes, shown)
    tested.axhline(goal.scale * goal.value, color=INK, linewidth=0.8)
    tested.set_ylim(*(_loss_range(shown) if goal.is_loss else _accuracy_range(shown)))
    handles, labels = tested.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
    return figure


def _accuracy_range(shown: Sequence[Arm]) -> tuple[float, float]:
    """From what exact runs have after a third of their steps to a little above the best."""
    values = [_mean_tested(arm)[1] for arm in shown]
    exact = [own for arm, own in zip(shown, values) if arm.is_exact]
    low = min(own[(len(own) - 1) // 3] for own in exact or values)
    high = max(max(own) for own in values)
    return 100 * low, 100 * min(high + 0.08 * (high - low), 1.0)


def _loss_range(shown: Sequence[Arm]) -> tuple[float, float]:
    """From a little below the best to what exact runs have after a third of their steps."""
    values = [_mean_tested(arm)[1] for arm in shown]
    exact = [own for arm, own in zip(shown, values) if arm.is_exact]
    high = max(own[(len(own) - 1) // 3] for own in exact or values)
    low = min(min(own) for own in values)
    span = max(high - low, 0.1)
    return low - 0.08 * span, low + span


def _draw(
    axes: Axes, x: Sequence[float], y: Sequence[float], name: str, style: dict[str, object]
) -> None:
    axes.plot(x, y, label=name, **style)  # type: ignore[arg-type]


def _styles(found: Sequence[Arm]) -> list[tuple[Arm, dict[str, object]]]:
    """Exact arms in greys behind, the best of them in ink; sketched ones in colours, by sketch."""
    best = {id(best_exact(found, model)) for model in {arm.model for arm in found}}
    exact = [arm for arm in found if arm.is_exact and id(arm) not in best]
    sketches = list(dict.fromkeys(arm.first.step_key[0] for arm in found if not arm.is_exact))
    pairs: list[tuple[Arm, dict[str, object]]] = []
    dashes: dict[str, int] = {}
    for arm in found:
        if id(arm) in best:
            style = {"color": INK, "linewidth": 2.2, "zorder": 3}
        elif arm.is_exact:
            number = exact.index(arm)
            grey, dash = GREYS[number % len(GREYS)], DASHES[number // len(GREYS) % len(DASHES)]
            style = {"color": grey, "linewidth": 1.3, "linestyle": dash, "zorder": 1}
        else:
            sketch = arm.first.step_key[0]
            number = dashes[sketch] = dashes.get(sketch, -1) + 1
            colour = COLOURS[sketches.index(sketch) % len(COLOURS)]
            dash = DASHES[number % len(DASHES)]
            style = {"color": colour, "linewidth": 1.6, "linestyle": dash, "zorder": 2}
        pairs.append((arm, style))
    return pairs


def _mean_curve(arm: Arm) -> tuple[list[float], list[float]]:
    """Training loss against steps, mean over seeds and over three neighbouring stretches."""
    curves = [run.result["curve"] for run in arm.runs]
    losses = [statistics.fmean(values) for values in zip(*(c["train_loss"] for c in curves))]
    smooth = [statistics.fmean(losses[max(i - 1, 0) : i + 2]) for i in range(len(losses))]
    return curves[0]["step"], smooth


def _mean_tested(arm: Arm) -> tuple[list[float], list[float]]:
    looks = [run.result["evaluations"] for run in arm.runs]
    values = [statistics.fmean(values) for values in zip(*(e[arm.goal.key] for e in looks))]
    return looks[0]["step"], values


def _loss_scale(axes: Axes, shown: Sequence[Arm]) -> None:
    """Logarithmic, with room for what exact runs do; what diverges leaves the picture."""
    exact = [_mean_curve(arm)[1] for arm in shown if arm.is_exact]
    curves = exact or [_mean_curve(arm)[1] for arm in shown]
    low, high = min(map(min, curves)) / 1.15, max(own[0] for own in curves) * 1.1
    axes.set_yscale("log")
    marks = (1, 2, 3, 5) if high / low > 8 else (1, 1.2, 1.4, 1.6, 1.8, 2, 2.3, 3, 4, 5, 7)
    steps = [m * 10**e for e in range(-4, 2) for m in marks]
    ticks = [tick for tick in steps if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
