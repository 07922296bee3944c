"""The public names, once."""

from .api import plan as plan
from .api import rebalance as rebalance
from .cluster import Cluster as Cluster
from .cluster import Deployment as Deployment
from .cluster import Dispatch as Dispatch
from .cluster import ReplicaRule as ReplicaRule
from .errors import MoeplanError as MoeplanError
from .model.catalogue import load_model as load_model
from .model.spec import ModelSpec as ModelSpec
from .planning.balance import balance as balance
from .planning.plan import Plan as Plan
from .planning.plan import Provenance as Provenance
from .planning.plan import Signature as Signature
from .planning.problem import Problem as Problem
from .planning.problem import Strategy as Strategy
from .planning.requests import RequestSet as RequestSet
from .planning.requests import read_requests as read_requests
from .planning.store import load_plan as load_plan
from .planning.strategies.moeplan import MoeplanParams as MoeplanParams
from .planning.strategies.paper import PaperParams as PaperParams
from .profile.characterise import profile_trace as profile_trace
from .replay.compare import compare as compare
from .replay.drift import DriftReport as DriftReport
from .replay.drift import detect_drift as detect_drift
from .replay.evaluate import Evaluation as Evaluation
from .replay.evaluate import evaluate as evaluate
from .replay.settings import EvaluationSettings as EvaluationSettings
from .replay.statistics import Figure as Figure
from .replay.table import Comparison as Comparison
from .replay.table import TableRow as TableRow
from .trace.counts import CountsProfile as CountsProfile
from .trace.counts import read_counts as read_counts
from .trace.reader import Trace as Trace
from .trace.reader import open_trace as open_trace
from .trace.writer import TraceWriter as TraceWriter
from .types import ModelShape as ModelShape
from .types import Placement as Placement

__version__: str
