"""Planning: the variance ledger, profiles, plans, the controller and benchmarks."""

from backsketch.planning.control.controller import Change as Change
from backsketch.planning.control.controller import Controller as Controller
from backsketch.planning.ledger.account import variance as variance
from backsketch.planning.ledger.records import Ledger as Ledger
from backsketch.planning.ledger.records import SiteError as SiteError
from backsketch.planning.plan.plan import Bill as Bill
from backsketch.planning.plan.plan import Plan as Plan
from backsketch.planning.profiling.profiler import profile as profile
from backsketch.planning.profiling.records import Profile as Profile
