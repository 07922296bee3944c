"""Reading YAML that somebody else made: the safe loader only, no aliases, no key twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from moeplan.engines.loading import CUT_OFF, TwiceError, load_text
from moeplan.engines.report import Report, show

__all__ = ["load_yaml"]

#: YAML is parsed slowly and into much memory; DeepSeek-V3 on 320 slots is 0.1 MB.
MAX_YAML_BYTES = 4 * 1024 * 1024


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader (no tag makes an object) that takes no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain value", key_node.start_mark)
            if key in seen:
                raise TwiceError(show(key))
            seen.add(key)
        return super().construct_mapping(node, deep=deep)  # type: ignore[no-any-return]


def load_yaml(report: Report) -> Any:
    """The parsed file; None with a finding. An alias is refused: with a few of them, lines unfold to gigabytes."""
    text = load_text(report, MAX_YAML_BYTES)
    if text is None:
        return None
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 8:
                what = "has an alias (*)" if isinstance(event, yaml.AliasEvent) else "is nested too deeply"
                report.fault(f"line {event.start_mark.line + 1}", what, "write the list out")
                return None
        return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader
    except TwiceError as error:
        report.fault(f"key {error}", "stands twice: only the last counts", "leave one of them")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        report.fault(place, f"is not whole YAML ({error.problem})", CUT_OFF)
    except (yaml.YAMLError, ValueError) as error:
        report.fault("", f"is not YAML ({' '.join(str(error).split())[:80]})", CUT_OFF)
    return None
