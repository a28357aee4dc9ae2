"""Sweeps and reports: grids of small jobs that resume, and the tables and figures made from them.

Needs the extra ``backsketch[train]``. Nothing of it is imported by ``import backsketch``.
"""

from backsketch.experiments.config import Job as Job
from backsketch.experiments.config import SweepConfig as SweepConfig
from backsketch.experiments.config import SweepError as SweepError
from backsketch.experiments.store import Store as Store
from backsketch.experiments.store import Sweep as Sweep
from backsketch.experiments.sweep import run_sweep as run_sweep
