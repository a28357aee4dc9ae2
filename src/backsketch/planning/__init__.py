"""Planning: the variance ledger, profiles, plans, the controller and benchmarks."""

from backsketch.planning.controller import Change as Change
from backsketch.planning.controller import Controller as Controller
from backsketch.planning.ledger import Ledger as Ledger
from backsketch.planning.ledger import SiteError as SiteError
from backsketch.planning.plan import Bill as Bill
from backsketch.planning.plan import Plan as Plan
from backsketch.planning.profile import profile as profile
from backsketch.planning.record import Profile as Profile
from backsketch.planning.variance import variance as variance
