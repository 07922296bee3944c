"""`moeplan order`: the prompts of a batch job in an order in which neighbours use the same experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moeplan.cli import options as o
from moeplan.cli.files import File
from moeplan.cli.terminal import echo, emit_json, plural, progress
from moeplan.errors import UsageError

if TYPE_CHECKING:
    from moeplan.replay.order_file import Encode, OrderSettings
    from moeplan.trace import Trace

__all__ = ["order"]


@Parameter(name="*")
@dataclass(frozen=True)
class QueueFlags:
    """How the queue is served."""

    instances: o.Int = 1
    """Independent instances, each with the whole model. The queue is split into OUTPUT-1, OUTPUT-2, .."""
    batch: o.Int = 8
    """Requests that decode together, on each data-parallel rank or instance."""
    window: o.Int = 200_000
    """Lines that are ordered at a time. Larger windows save more and take more memory."""
    recorded: bool = False
    """The trace was recorded from this file, in its order: go by the experts of the earlier answers."""

    def settings(self, seed: int) -> OrderSettings:
        """The same as the library's value."""
        from moeplan.replay.order_file import OrderSettings

        return OrderSettings(self.instances, self.batch, self.window, self.recorded, seed)


@Parameter(name="*")
@dataclass(frozen=True)
class TextFlags:
    """How texts become what the trace's prompts are kept as."""

    tokenizer: Annotated[Path | None, File("input"), Parameter(metavar="PATH")] = None
    """The model's tokenizer.json or its folder. Texts are tokenized with it, as the trace's prompts were."""
    prompt_secret: Annotated[Path | None, File("input")] = None
    """File with the secret of hashed tokens. Default: beside the trace, TRACE.secret."""

    def encode(self) -> Encode:
        """From a text to token ids, or to words without a tokenizer."""
        from moeplan.replay.order_file import encode_words, load_tokenizer

        return encode_words if self.tokenizer is None else load_tokenizer(self.tokenizer)

    def secret(self, trace: Trace | None) -> bytes | None:
        """The secret that the trace's prompts are hashed under; None for ids."""
        from moeplan.trace.prompts import read_secret, secret_beside

        if self.prompt_secret is not None:
            return read_secret(self.prompt_secret)
        if trace is None or trace.prompts_info is None or trace.prompts_info.kind != "hashed":
            return None
        return read_secret(secret_beside(trace.path))


def order(
    prompts: Annotated[Path, File("input"), Parameter(help="JSONL with prompts, chat messages or batch requests.")],
    /,
    *,
    output: Annotated[Path, File("file"), o.output("JSONL", "the same lines in order")],
    trace: Annotated[Path | None, File("input"), Parameter(metavar="TRACE")] = None,
    plan: o.PlanIn = None,
    queue: QueueFlags = QueueFlags(),
    text: TextFlags = TextFlags(),
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Order the prompts of a batch job so that fewer expert weights are read.

    Prompts whose answers use the same experts become neighbours, which decode together. Every line comes out once,
    unchanged. Without --trace or --plan, prompts that share words become neighbours.

    Args:
        trace: A moeplan trace, of the same model and with prompt tokens: experts are predicted from the prompts.
    """
    from moeplan.io.paths import check_outputs
    from moeplan.planning.store import load_plan
    from moeplan.replay.order_file import instance_path, order_file
    from moeplan.trace import open_trace

    settings = queue.settings(seed)
    paths = [instance_path(output, number, settings.instances) for number in range(settings.instances)]
    check_outputs({"--json": json, **{str(path): path for path in paths}}, [prompts, trace, plan, *vars(text).values()])
    if queue.recorded and trace is None:
        raise UsageError("--recorded needs --trace")
    given = None if trace is None else open_trace(trace)
    made = None if plan is None else load_plan(plan)
    how: Any = {"trace": given, "plan": made, "encode": text.encode(), "secret": text.secret(given)}
    with progress("order") as tick:
        found = order_file(prompts, output, **how, settings=settings, progress=tick)
    for line in repr(found).splitlines():
        echo(line)
    for path, part in zip(paths, found.instances, strict=True):
        echo(f"wrote {path} ({plural(len(part), 'prompt')})")
    emit_json(json, found.to_dict())
