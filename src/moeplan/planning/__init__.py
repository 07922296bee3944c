"""Plans: group requests and place experts. Start at `solve`."""

from moeplan.planning.plan import Plan, PlanningTask, Provenance, Signature
from moeplan.planning.prediction import Prediction
from moeplan.planning.predictor import PromptPredictor
from moeplan.planning.problem import MoveLimit, PlanningProblem, Solution, Strategy
from moeplan.planning.prompt_router import Calibration, prompt_router
from moeplan.planning.prompt_text import GroupScores, PromptText
from moeplan.planning.requests import RequestSet, read_requests
from moeplan.planning.solver import solve

__all__ = [
    "Calibration",
    "GroupScores",
    "MoveLimit",
    "Plan",
    "PlanningProblem",
    "PlanningTask",
    "Prediction",
    "PromptPredictor",
    "PromptText",
    "Provenance",
    "RequestSet",
    "Signature",
    "Solution",
    "Strategy",
    "prompt_router",
    "read_requests",
    "solve",
]
