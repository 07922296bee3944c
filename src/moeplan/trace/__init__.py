"""The trace: which experts every token of every request used."""

from moeplan.trace.format import PHASES, UNKNOWN, Requests, Rows
from moeplan.trace.reader import Trace, open_trace
from moeplan.trace.writer import TraceWriter

__all__ = ["PHASES", "UNKNOWN", "Requests", "Rows", "Trace", "TraceWriter", "open_trace"]
