"""Plans: group requests and place experts. The front door is `solve`."""

from moeplan.plan.problem import Decision, Options, Problem
from moeplan.plan.requests import RequestSet, read_requests
from moeplan.plan.solver import Result, solve

__all__ = ["Decision", "Options", "Problem", "RequestSet", "Result", "read_requests", "solve"]
