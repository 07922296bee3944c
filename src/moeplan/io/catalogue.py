"""Catalogues in JSON that users may extend: reading them, and names in any spelling."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moeplan.errors import UsageError
from moeplan.io.json import read_json

__all__ = ["find_name", "plain_name", "read_object"]

MAX_FILE_BYTES = 4 * 1024 * 1024


def find_name(name: str, known: Mapping[str, Iterable[str]], what: str, hint: str = "") -> str:
    """The key of `known` (key: its aliases) that `name` means; an unknown one is an error that names the near ones."""
    spelt = {plain_name(word): key for key, aliases in known.items() for word in (key, *aliases)}
    if plain_name(name) in spelt:
        return spelt[plain_name(name)]
    holding = [word for word in spelt if plain_name(name) and plain_name(name) in word]
    close = difflib.get_close_matches(plain_name(name)[:80], spelt, n=5, cutoff=0.5)
    near = list(dict.fromkeys(spelt[word] for word in (*holding, *close)))[:5]
    some = f"near it: {', '.join(near)}" if near else f"the catalogue has {', '.join(known)}"
    raise UsageError(f'unknown {what} "{name[:80]}"', hint=some + hint)


@functools.lru_cache(maxsize=1024)
def plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def read_object(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """A small JSON file that holds one object."""
    found: dict[str, Any] = read_json(path, dict[str, Any], max_bytes=max_bytes)
    return found
