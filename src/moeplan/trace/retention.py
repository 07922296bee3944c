"""What of the requests is stored: all of them or only those long enough, sums over N of a domain, prompt features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeplan.errors import UsageError
from moeplan.trace.prompts import PromptPolicy

__all__ = ["RetentionPolicy"]


@dataclass(frozen=True)
class RetentionPolicy:
    """What a trace stores of the requests that are added to it.

    Attributes:
        min_tokens: requests of fewer rows (prefill and decode together) are dropped.
        aggregate: N, to store sums of N requests of a domain in place of token rows; None for token rows.
        prompts: what is kept of the prompts; None for nothing.
        fewer_picks: tokens may have fewer than k picks; False refuses them.
    """

    min_tokens: int = 1
    aggregate: int | None = None
    prompts: PromptPolicy | None = None
    fewer_picks: bool = False

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise UsageError(f"--min-tokens {self.min_tokens} is not positive")
        if self.aggregate is not None and self.aggregate < 2:
            raise UsageError(f"--aggregate {self.aggregate} must be at least 2")
        if self.aggregate is not None and self.prompts is not None:
            raise UsageError("sums over requests have no prompts", hint="leave out --aggregate or --keep-prompt-tokens")

    def source(self) -> dict[str, Any]:
        """What a trace's `source` says of it, so that a recording is resumed with the policy it was begun with."""
        return {
            **({"min_tokens": self.min_tokens} if self.min_tokens > 1 else {}),
            **({"aggregate": self.aggregate} if self.aggregate else {}),
            **(self.prompts.source() if self.prompts else {}),
            **({"fewer_picks": True} if self.fewer_picks else {}),
        }

    def check(self, domains: Sequence[str], *, weights: bool = False) -> None:
        """Refuse, before any work, what could only end without a trace.

        Args:
            domains: the label of every request.
            weights: gate weights are to be stored.

        Raises:
            UsageError: no domain has N requests, or weights, which belong to tokens, are asked for beside sums.
        """
        if self.aggregate is None:
            return
        if weights:
            raise UsageError(
                "--aggregate stores no tokens, and so no gate weights",
                hint="leave --keep-gate-weights or --aggregate out",
            )
        largest = max(Counter(domains).values(), default=0)
        if largest < self.aggregate:
            raise UsageError(
                f"--aggregate {self.aggregate}: no domain has so many requests, the largest has {largest}",
                hint="give a smaller number, or one label for all with --domain",
            )
