"""Flags that keep prompt tokens in a trace, and the file with the secret of hashed ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from moeplan.cli import options as o
from moeplan.cli.terminal import echo
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.trace.prompts import PromptPolicy
    from moeplan.trace.retention import RetentionPolicy

__all__ = ["PromptTokenFlags"]


@Parameter(name="*", group=o.REQUESTS)
@dataclass(frozen=True)
class PromptTokenFlags:
    """What of the prompts is stored."""

    keep_prompt_tokens: Literal["ids", "hashed"] | None = None
    """Store prompt tokens: ids can be read as text, hashed are counts under a secret; neither is anonymous."""
    prompt_secret: Path | None = None
    """File with the secret of hashed tokens, made if absent. Default: beside the trace, TRACE.secret."""

    @contextlib.contextmanager
    def added(self, policy: RetentionPolicy, output: Path, *, key: str = "") -> Iterator[RetentionPolicy]:
        """The policy with what is kept of the prompts; a secret that was made is removed if the block fails.

        Args:
            output: the trace that is written.
            key: names the secret of a source whose prompts are hashed already.
        """
        kind = self.keep_prompt_tokens
        if self.prompt_secret is not None and kind != "hashed":
            raise UsageError("--prompt-secret is for --keep-prompt-tokens hashed")
        if kind is None:
            yield policy
            return
        before = output.exists()
        prompts, made = self._prompts(kind, output, key)
        policy = replace(policy, prompts=prompts)
        try:
            yield policy
        except BaseException:
            begun = not before and (output / "trace.json").exists()  # a recording that was cut off needs it to go on
            if made is not None and not begun:
                made.unlink(missing_ok=True)
            raise
        if made is not None:
            echo(f"wrote the secret {made}: plans need it, whoever has it can search the prompts; keep it to yourself")

    def _prompts(self, kind: Literal["ids", "hashed"], output: Path, key: str) -> tuple[PromptPolicy, Path | None]:
        """What is kept, and the file of the secret where one was made."""
        from moeplan.trace.prompts import PromptPolicy, make_secret, read_secret, secret_beside

        if kind == "ids":
            return PromptPolicy(kind), None
        if key and self.prompt_secret is None:
            return PromptPolicy(kind, key=key), None
        file = self.prompt_secret or secret_beside(output)
        if file.exists():
            return PromptPolicy(kind, read_secret(file)), None
        return PromptPolicy(kind, make_secret(file)), file
