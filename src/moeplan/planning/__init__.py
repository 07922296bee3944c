"""Plans: group requests and place experts. The front door is `solve`."""

from moeplan.planning.plan import Plan, PlanningTask, Provenance, Signature
from moeplan.planning.problem import Decision, Options, Problem
from moeplan.planning.requests import RequestSet, read_requests
from moeplan.planning.solver import solve

__all__ = [
    "Decision",
    "Options",
    "Plan",
    "PlanningTask",
    "Problem",
    "Provenance",
    "RequestSet",
    "Signature",
    "read_requests",
    "solve",
]
