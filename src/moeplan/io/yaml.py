"""Reading untrusted YAML: the safe loader, without aliases and duplicate keys."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from moeplan.errors import FormatError

__all__ = ["parse_yaml"]

_TRUNCATED = "the file may be truncated: copy or export it again"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader (no tag makes an object) that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a scalar", key_node.start_mark)
            if key in seen:
                raise FormatError(
                    "is duplicate: only the last one counts", where=f"key {key!r:.40}", hint="remove one of them"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)  # type: ignore[no-any-return]


def parse_yaml(text: str) -> Any:
    """The value of YAML text. Aliases are refused: a few lines with them can expand to gigabytes.

    Raises:
        FormatError: with the line or the key as its place.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 8:
                what = "has an alias (*)" if isinstance(event, yaml.AliasEvent) else "is nested too deeply"
                raise FormatError(what, where=f"line {event.start_mark.line + 1}", hint="write the list out")
        return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else None
        raise FormatError(f"is invalid or truncated YAML ({error.problem})", where=place, hint=_TRUNCATED) from None
    except (yaml.YAMLError, ValueError) as error:
        raise FormatError(f"is not YAML ({' '.join(str(error).split())[:80]})", hint=_TRUNCATED) from None
