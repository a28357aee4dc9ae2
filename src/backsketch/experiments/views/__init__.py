"""What ``backsketch report`` makes of a sweep: tables and figures, from its results alone.

Adding a view is a file and a row here: a function from a :class:`~backsketch.experiments.store.Sweep` to a
:class:`Page`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from backsketch.experiments.store import Sweep
from backsketch.experiments.views import depth, equal_cost, ledger, paper, trade_off
from backsketch.experiments.views.page import Page as Page
from backsketch.experiments.views.page import TextTable as TextTable

VIEWS: Mapping[str, Callable[[Sweep], Page]] = MappingProxyType(
    {
        "trade_off": trade_off.page,
        "depth": depth.page,
        "ledger": ledger.page,
        "equal_cost": equal_cost.page,
        "paper": paper.page,
    }
)
