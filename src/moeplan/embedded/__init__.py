"""The model and the trace that come with the package: small, but trained and recorded, not generated.

`model` is a Qwen3-MoE of 6 million parameters (its card beside it says what it is and is not);
`trace` was recorded from it with `moeplan record transformers`. Both are read wherever a model
or a trace is asked for and the word ``embedded`` is given.
"""

from pathlib import Path

__all__ = ["MODEL", "TRACE", "WORD", "named"]

WORD = "embedded"
MODEL = Path(__file__).with_name("model")
TRACE = Path(__file__).with_name("trace")


def named(given: str | Path, what: Path) -> Path:
    """`what` (`MODEL` or `TRACE`) where the word is given and nothing of that name lies there; else the path given."""
    path = Path(given)
    return what if str(given) == WORD and not path.exists() else path
