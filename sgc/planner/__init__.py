"""Does it fit, and with which optimizer? A training step, planned without the memory that it would take."""

from sgc.planner.models import BUILT_IN, PlanError
from sgc.planner.plan import Plan, Row, plan

__all__ = ["BUILT_IN", "Plan", "PlanError", "Row", "plan"]
