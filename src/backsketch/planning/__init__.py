"""Planning: the variance ledger, profiles, plans, the controller, auto and benchmarks."""

from backsketch.planning.auto.auto import Auto as Auto
from backsketch.planning.auto.budget import Budget as Budget
from backsketch.planning.auto.guard import SpeedGuard as SpeedGuard
from backsketch.planning.control.controller import Controller as Controller
from backsketch.planning.control.moves import Change as Change
from backsketch.planning.facade import Profile as Profile
from backsketch.planning.facade import profile as profile
from backsketch.planning.ledger.account import variance as variance
from backsketch.planning.ledger.records import Ledger as Ledger
from backsketch.planning.ledger.records import SiteError as SiteError
from backsketch.planning.plan.candidates import auto_plan as auto_plan
from backsketch.planning.plan.plan import CostEstimate as CostEstimate
from backsketch.planning.plan.plan import Plan as Plan
