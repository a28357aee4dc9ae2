"""Regions: run the whole backward pass of a submodule on the kept rows only.

:class:`Region` and :class:`Mask` are the configurations, :func:`attach` puts one on a module,
:func:`refusal` tells beforehand why it could not, and :class:`RegionState` says how it went.
:func:`record_scores` collects the row norms that a region computes anyway.
"""

from backsketch.regions.guards import refusal as refusal
from backsketch.regions.mask import mask_rows as mask_rows
from backsketch.regions.module import MaskedModule as MaskedModule
from backsketch.regions.module import RegionModule as RegionModule
from backsketch.regions.module import attach as attach
from backsketch.regions.spec import Mask as Mask
from backsketch.regions.spec import Region as Region
from backsketch.regions.state import RegionState as RegionState
from backsketch.regions.state import RunsExactly as RunsExactly
from backsketch.regions.state import forget as forget
from backsketch.regions.state import ignore_scores as ignore_scores
from backsketch.regions.state import record_scores as record_scores
from backsketch.regions.state import scores_of as scores_of
from backsketch.regions.state import state_of as state_of
