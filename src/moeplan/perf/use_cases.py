"""Use cases: lengths of prompt and answer, beams, and the time limits that a cluster must keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moeplan.errors import UsageError
from moeplan.perf.serving import ServingFigures
from moeplan.perf.step_model import Workload

__all__ = ["USE_CASES", "UseCase", "find_use_cases"]


@dataclass(frozen=True)
class UseCase:
    """Lengths in tokens, beams, and limits in seconds; source: where the limits are from.

    drafts, accepted: speculation with the MTP layers, as in `moeplan.perf.step_model.Workload`.
    """

    name: str
    prompt: int
    output: int
    beams: int
    ttft_s: float
    tpot_s: float
    source: str = "limits as given"
    drafts: int = 0
    accepted: float = 1.0

    @property
    def workload(self) -> Workload:
        return Workload(self.prompt, self.output, self.beams, self.drafts, self.accepted)

    def miss(self, serving: ServingFigures) -> float:
        """How far over its limits, as a factor; 1 or less: within."""
        return max(serving.ttft_s / self.ttft_s, serving.tpot_s / self.tpot_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "prompt": self.prompt,
            "output": self.output,
            "beams": self.beams,
            "ttft_limit_ms": 1e3 * self.ttft_s,
            "tpot_limit_ms": 1e3 * self.tpot_s,
            "limits_from": self.source,
            "drafts": self.drafts,
            "accepted": self.accepted,
        }


_GENZ = "limits as in GenZ's repository, Paper charts/variables.py, commit 12bd09fd"
#: Lengths and beams: the paper's use cases. Limits: those that the charts of its section 7 were drawn with, in its
#: repository (abhibambhaniya/GenZ-LLM-Analyzer); chat has other lengths there (3000 / 1000), with the same limits.
USE_CASES = {
    case.name: case
    for case in (
        UseCase("qa", 1000, 200, 4, 0.2, 0.010, _GENZ),
        UseCase("summarise", 15000, 1000, 4, 2.0, 0.020, _GENZ),
        UseCase("chat", 2048, 128, 2, 0.2, 0.010, _GENZ),
        UseCase("code", 20000, 50, 4, 5.0, 0.020, _GENZ),
    )
}


def find_use_cases(
    name: str | None = None,
    *,
    prompt: int | None = None,
    output: int | None = None,
    beams: int | None = None,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
) -> list[UseCase]:
    """The use cases asked for, each with what the other arguments change of it.

    Args:
        name: of `USE_CASES`, or "all"; None: one of its own, for which lengths and limits must be given.

    Raises:
        UsageError: an unknown name; no name and a length or limit missing; a value that is not above 0.
    """
    lengths = {"prompt": prompt, "output": output, "beams": beams}
    limits = {"ttft": ttft_ms, "tpot": tpot_ms}
    for label, value in (lengths | limits).items():
        if value is not None and not value > 0:
            raise UsageError(f"{label} {value:g} is not above 0")
    if name is None:
        if prompt is None or output is None or ttft_ms is None or tpot_ms is None:
            raise UsageError(
                "no use case given", hint="give one, or the tokens of prompt and output and limits of ttft and tpot"
            )
        return [UseCase("own", prompt, output, beams or 1, ttft_ms / 1e3, tpot_ms / 1e3)]
    if name != "all" and name not in USE_CASES:
        raise UsageError(f'unknown use case "{name[:60]}"', hint=f"use {', '.join(USE_CASES)} or all")
    given: dict[str, Any] = {key: value for key, value in lengths.items() if value}
    given |= {f"{key}_s": value / 1e3 for key, value in limits.items() if value}
    source = "limits as given" if ttft_ms and tpot_ms else f"{_GENZ}, or as given" if ttft_ms or tpot_ms else _GENZ
    return [replace(case, source=source, **given) for key, case in USE_CASES.items() if name in (key, "all")]
