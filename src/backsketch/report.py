"""What :func:`backsketch.sketch_` did, site by site, and why it left the rest alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from backsketch.arithmetic import Arithmetic, backward_arithmetic, spread_batch
from backsketch.estimators import Sketch
from backsketch.memory import mebibytes, saved_bytes
from backsketch.nn.swap import exact

__all__ = ["Report", "Site", "table_lines"]


@dataclass
class Site:
    """One row of the report.

    ``work`` is the predicted arithmetic of (grad_input, grad_weight) and ``saved`` the predicted bytes
    kept of the input, both as fractions of the exact layer; None where only a run can tell. ``reason``
    says why a site is exact, or what to expect of a sketched one. ``state`` is the live side of a
    region, whose guards run with the first batches: print the report again to see their verdict.
    ``products`` are the multiplications of its exact backward pass for one row; ``frozen`` says that its
    weights take no gradient, so that nothing is computed for them. ``measured`` is set by
    :meth:`Report.measure`: bytes saved for the backward pass, exact and sketched. ``refused`` marks a site
    whose sketch cannot act there.
    """

    name: str
    type: str
    sketch: Sketch | None
    reason: str = ""
    work: tuple[float, float] = (1.0, 1.0)
    saved: float | None = 1.0
    measured: tuple[int, int] | None = None
    state: Any = None
    products: int = 0
    frozen: bool = False
    refused: bool = False

    @property
    def status(self) -> str:
        """The reason, or what the guards of a region have found so far."""
        if self.state is None:
            return self.reason
        if self.state.status == "exact":
            return f"runs exactly: {self.state.reason}"
        pending = self.state.status == "pending"
        found = "guards run with the first batch" if pending else self.state.note
        return "; ".join(filter(None, [found, self.reason]))

    @property
    def acts(self) -> bool:
        """Whether the site is sketched, as far as is known: a region whose guards refused it is not."""
        return self.sketch is not None and (self.state is None or self.state.status != "exact")

    @property
    def backward(self) -> float:
        """Predicted arithmetic of the site's backward pass, as a fraction of exact."""
        if not self.acts:
            return 1.0
        return self.work[0] if self.frozen else sum(self.work) / 2

    @property
    def reduces(self) -> bool:
        """Whether the site's backward pass has less arithmetic, or cheaper, than the exact one."""
        return self.acts and (self.backward < 1 or _is_cheaper(self.sketch))


def _is_cheaper(sketch: Sketch | None) -> bool:
    return bool(getattr(sketch, "cheaper_arithmetic", False))


@dataclass
class Report:
    """The sites of a model; prints as a table, iterates over :class:`Site`.

    ``total`` is set by :meth:`measure`: bytes kept for the backward pass, exact and sketched; ``arithmetic``
    too: the products of matrices in an exact backward pass. ``unknown`` names the modules with weights that
    are of no known kind, and so are no sites; ``unknown_products`` is their arithmetic for one row.
    ``without`` counts what no module sketch can reach: attention that is a function, norms of other libraries.
    """

    sites: list[Site] = field(default_factory=list)
    total: tuple[int, int] | None = None
    arithmetic: Arithmetic | None = None
    unknown: str = ""
    unknown_products: int = 0
    without: str = ""

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"no site {name!r} in this report; it has {[s.name for s in self.sites]}")

    @property
    def sketched(self) -> list[Site]:
        """The sites that are sketched, as far as is known: guards of regions run with the first batch."""
        return [site for site in self.sites if site.acts]

    @property
    def exact(self) -> list[Site]:
        """The sites that were left exact, and the regions that were found to run exactly."""
        return [site for site in self.sites if not site.acts]

    @property
    def arithmetic_share(self) -> float:
        """Share of the exact backward pass's arithmetic whose sites are sketched.

        Estimated from the sizes of the weights, each used once a row, until :meth:`measure` has counted it.
        """
        if self.arithmetic is None:
            whole = sum(site.products for site in self.sites) + self.unknown_products
            return sum(site.products for site in self.sites if site.reduces) / max(whole, 1)
        counted = sum(
            self.arithmetic.modules.get(site.name, 0) for site in self.sites if site.reduces
        )
        return min(counted / max(self.arithmetic.total, 1), 1.0)

    def measure(self, model: nn.Module, *inputs: Any, **options: Any) -> Report:
        """Run the model, exact and as it is, and put what each site saves beside what was predicted.

        A storage counts for the module that saved it first: exact, a layer after a ReLU saves nothing of
        its own. What the backward passes keep in all, and which share of the backward arithmetic the sketched
        sites have, stands in the last lines.

        Args:
            model: the model that the report is of, in training mode.
            *inputs: arguments of its forward pass; a batch that is a dictionary may be given as it is.
            **options: its keyword arguments.

        Returns:
            This report.
        """
        inputs, options = spread_batch(model, inputs, options)
        with exact(model):
            before = saved_bytes(model, *inputs, **options)
        after = saved_bytes(model, *inputs, **options)
        for site in self.sites:
            site.measured = before.under(site.name), after.under(site.name)
        self.total = before.total, after.total
        names = [site.name for site in self.sites if site.products]
        self.arithmetic = backward_arithmetic(model, lambda: model(*inputs, **options), names)
        return self

    def __str__(self) -> str:
        header = ("site", "type", "sketch", "grad_input", "grad_weight", "saved", "measured", "")
        rows = [header, *(self._row(site) for site in self.sites)]
        if self.total is None:
            rows = [(*row[:6], row[7]) for row in rows]
        return "\n".join([*table_lines(rows), self._summary()])

    def _row(self, site: Site) -> tuple[str, ...]:
        name = site.name or "(model)"
        if site.sketch is None:
            return name, site.type, "exact", "", "", "", _bytes(site), site.reason
        fractions = (*site.work, site.saved) if site.acts else (None,) * 3
        times = ["" if f is None else f"×{f:.2f}" for f in fractions]
        if site.frozen and site.acts:
            times[1] = "frozen"
        return name, site.type, str(site.sketch), *times, _bytes(site), site.status

    def _summary(self) -> str:
        lines = [
            f"{len(self.sketched)} of {len(self.sites)} sites sketched; the columns are predicted "
            "arithmetic and saved input bytes against exact"
        ]
        frozen = sum(site.frozen for site in self.sites)
        if frozen:
            lines.append(f"frozen: the weights of {frozen} sites, which have no grad_weight")
        if self.unknown:
            lines.append(f"not known, so exact: {self.unknown}")
        if self.without:
            lines.append(f"without a place for a sketch: {self.without}")
        if self.total is not None:
            before, after = self.total
            lines.append(
                f"measured: {mebibytes(before)} kept for the backward pass exactly, "
                f"{mebibytes(after)} as it is (×{after / max(before, 1):.2f})"
            )
        return "\n".join([*lines, self._closing()])

    def _closing(self) -> str:
        share = f"{100 * self.arithmetic_share:.0f} % of the backward arithmetic is sketched"
        if self.arithmetic is None:
            return f"{share}, by the sizes of the weights; report.measure(model, batch) counts it"
        inside = sum(self.arithmetic.modules.values()) / max(self.arithmetic.total, 1)
        return f"{share}; {100 * max(1 - inside, 0):.0f} % lies outside the sites, in functions"


def table_lines(rows: Sequence[Sequence[str]], right_from: int | None = None) -> list[str]:
    """The lines of a table, the first row its header, with a rule below it; flush right from a column on."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = len(widths) if right_from is None else right_from
    rule = ["-" * w if name else "" for name, w in zip(rows[0], widths)]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in (rows[0], rule, *rows[1:])
    ]


def _bytes(site: Site) -> str:
    if site.measured is None:
        return ""
    before, after = (mebibytes(size) for size in site.measured)
    return before if site.sketch is None else f"{before} → {after}"
