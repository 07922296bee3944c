"""Replay: exact accounting of plans on traces, and the comparison of strategies on unseen requests."""

from moeplan.replay.comparison import Setup, compare, replay
from moeplan.replay.table import Comparison, TableRow

__all__ = ["Comparison", "Setup", "TableRow", "compare", "replay"]
