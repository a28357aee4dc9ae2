"""Planning: the variance ledger and benchmarks."""

from backsketch.planning.ledger import Ledger as Ledger
from backsketch.planning.ledger import SiteError as SiteError
from backsketch.planning.variance import variance as variance
