"""fastpeft plan."""

from typing import TextIO

from fastpeft.training.plan_config import PlanConfig

CONFIG = PlanConfig


def run(config: PlanConfig, results: TextIO) -> dict:
    """Print the table unless only JSON is asked for, and return the plan as plain values."""
    from fastpeft.training.plan import make_plan

    plan = make_plan(config)
    if not config.json:
        results.write(plan.table() + "\n")
    return plan.to_dict()
