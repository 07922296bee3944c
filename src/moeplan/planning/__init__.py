"""Plans: group requests and place experts. Start at `solve`."""

from moeplan.planning.plan import Plan, PlanningTask, Provenance, Signature
from moeplan.planning.problem import MoveLimit, PlanningProblem, Solution, Strategy
from moeplan.planning.requests import RequestSet, read_requests
from moeplan.planning.solver import solve

__all__ = [
    "MoveLimit",
    "Plan",
    "PlanningProblem",
    "PlanningTask",
    "Provenance",
    "RequestSet",
    "Signature",
    "Solution",
    "Strategy",
    "read_requests",
    "solve",
]
