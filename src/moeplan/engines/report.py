"""Result of checking a placement file: each error with its place and a suggested fix, and what was not checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeplan.engines.placement import EnginePlacement
from moeplan.errors import FormatError, UsageError
from moeplan.model.spec import ModelSpec

__all__ = ["EpSettings", "Finding", "Report", "other_engine_hint", "show"]


@dataclass(frozen=True)
class EpSettings:
    """EP size, nodes and redundant experts that the engine starts with; None where not known.

    Attributes:
        ep_size: GPUs that share the experts. nodes: nodes that these GPUs fill. redundant: R, redundant slots.
    """

    ep_size: int | None = None
    nodes: int | None = None
    redundant: int | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--ep-size", self.ep_size, 1),
            ("--nodes", self.nodes, 1),
            ("--redundant", self.redundant, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{flag} {value} is below {least}")
        if self.ep_size is not None and self.nodes is not None and self.ep_size % self.nodes:
            raise UsageError(
                f"--ep-size {self.ep_size} does not divide over --nodes {self.nodes}",
                hint="--ep-size counts all GPUs that share the experts, over all nodes",
            )


@dataclass(frozen=True)
class Finding:
    """One error or warning.

    Attributes:
        place: key, layer, slot in the file. what: the problem. hint: a suggested fix.
        legal: the engine accepts it and serves correctly: a warning, not an error.
    """

    place: str
    what: str
    hint: str = ""
    legal: bool = False

    def line(self, path: Path) -> str:
        """The whole finding as one line."""
        return FormatError(self.what, where=f"{path}: {self.place}" if self.place else str(path), hint=self.hint).line()


@dataclass(repr=False)
class Report:
    """Everything found in one file; the engines' readers add to it.

    Attributes:
        path, engine: the file, and the engine that reads it.
        model, layout: what is known, completed from the file itself.
        findings: errors and warnings, in the order of the file.
        unchecked: what could not be checked, one line each, with the flag that would.
        rows, slots: rows of the map, and slots of a row; None if unknown.
        placement: what the file holds, if it has no error and enough is known; MoE layers only.
    """

    path: Path
    engine: str
    model: ModelSpec = field(default_factory=ModelSpec)
    layout: EpSettings = field(default_factory=EpSettings)
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    rows: int | None = None
    slots: int | None = None
    placement: EnginePlacement | None = None

    def __repr__(self) -> str:
        lines = [f"{self.path}, {self.engine}: {'valid' if self.ok else f'invalid, {len(self.errors)} errors'}"]
        lines += [("warning: " if f.legal else "") + f.line(self.path) for f in self.findings]
        return "\n".join(lines + [f"not checked: {what}" for what in self.unchecked])

    @property
    def errors(self) -> list[Finding]:
        """Findings with which the engine would fail or serve wrong results."""
        return [finding for finding in self.findings if not finding.legal]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def add_error(self, place: str, what: str, hint: str = "") -> None:
        """Add an error."""
        self.findings.append(Finding(place, what, hint))

    def add_warning(self, place: str, what: str, hint: str = "") -> None:
        """Add a warning: the engine accepts it."""
        self.findings.append(Finding(place, what, hint, legal=True))

    def record(self, place: str, flag: str, key: str, value: int) -> None:
        """Set a number of `model` or `layout` from the file; an error where it contradicts what was given."""
        given = self.model.num_experts if key == "num_experts" else getattr(self.layout, key)
        if given is None:
            try:
                if key == "num_experts":
                    self.model = self.model.override(num_experts=value)
                else:
                    self.layout = replace(self.layout, **{key: value})
            except UsageError as error:  # GPUs do not divide over the nodes
                self.add_error(place, f"is {value}: {error.what}", "correct one of them")
        elif given != value:
            self.add_error(place, f"is {value}, but {flag} says {given}", "correct one of the two")

    def require_placement(self) -> EnginePlacement:
        """The placement.

        Raises:
            FormatError: the first error. UsageError: what neither the file nor a flag gives.
        """
        for finding in self.errors[:1]:
            more = f" (and {len(self.errors) - 1} more: moeplan check lists them)" if len(self.errors) > 1 else ""
            where = f"{self.path}: {finding.place}" if finding.place else str(self.path)
            raise FormatError(finding.what + more, where=where, hint=finding.hint)
        if self.placement is None:
            open_questions = (
                (self.model.num_experts, "the number of experts", "--config, or --num-experts"),
                (self.model.moe_layers, "which layers have experts", "--config, or --num-layers and --dense-layers"),
                (self.layout.ep_size, "how many GPUs share the experts", "--ep-size"),
                (self.layout.nodes, "how many nodes these GPUs fill", "--nodes"),
            )
            missing = [(what, flag) for value, what, flag in open_questions if value is None]
            missing = missing or [("how many hidden layers there are", "--config or --num-layers")]
            raise UsageError(
                f"does not say {', '.join(what for what, _ in missing)}",
                where=str(self.path),
                hint=f"give {', '.join(flag for _, flag in missing)}",
            )
        return self.placement


def other_engine_hint(data: Any, engine: str) -> str:
    """The end of a hint where a file's keys look like those of another engine; else empty."""
    if not isinstance(data, dict):
        return ""
    marks = {
        "vllm": data.get("format") == "moeplan-vllm",
        "sglang": set(data) == {"physical_to_logical_map"},
        "tensorrt-llm": "initial_global_assignments" in data,
        "vllm-ascend": "layer_list" in data,
    }
    names = {"vllm": "vLLM", "sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM", "vllm-ascend": "vLLM-Ascend"}
    whose = next((name for name, mark in marks.items() if mark), engine)
    return "" if whose == engine else f"; is it {names[whose]}'s? use --engine {whose}"


def show(value: Any) -> str:
    """A value of a file, short enough for a line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:37] + ".."
