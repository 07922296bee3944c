"""Plans: group requests and place experts. The front door is `solve`."""

from moeplan.planning.problem import Decision, Options, Problem
from moeplan.planning.requests import RequestSet, read_requests
from moeplan.planning.solver import Result, solve

__all__ = ["Decision", "Options", "Problem", "RequestSet", "Result", "read_requests", "solve"]
