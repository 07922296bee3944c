"""Recording from a running vLLM server (0.30 to 0.33) that was started with `--enable-return-routed-experts`.

The flag is the server's; a request asks for nothing. Prompts go to `/v1/completions`, chats to `/v1/chat/completions`,
and either answers with `choices[0].routed_experts` (see `vllm_responses`). Servers behind Dynamo answer the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.importers.routed_experts import EngineResponse
from moeplan.importers.vllm_responses import read_response
from moeplan.progress import Progress, silent
from moeplan.record.http_client import Server
from moeplan.record.prompts import Prompt
from moeplan.record.recording import Prompts
from moeplan.record.server import ServedOptions, openai_request, record_served, served_version, sole_answer
from moeplan.trace.reader import Trace

__all__ = ["VllmEngine", "record_vllm"]


def record_vllm(
    prompts: Prompts,
    out: str | Path,
    options: ServedOptions = ServedOptions(),
    *,
    url: str = "http://127.0.0.1:8000",
    progress: Progress = silent,
) -> Trace:
    """Have a vLLM server continue prompts, and store which experts they use.

    Args:
        prompts: a file or folder of prompts, or `Prompt` values.
        options: the model's number of experts at least, as in `ServedOptions(model=moeplan.load_model("MODEL_DIR"))`.
        url: address of the server, which runs with `--enable-return-routed-experts`.

    Raises:
        MoeplanError: as `record_served`.

    Examples:
        >>> import moeplan
        >>> options = moeplan.ServedOptions(model=moeplan.load_model("MODEL_DIR"), max_new_tokens=64)  # doctest: +SKIP
        >>> trace = moeplan.record_vllm("prompts.jsonl", "my-trace", options)  # doctest: +SKIP
    """
    return record_served(url, VllmEngine.of, prompts, out, options, progress)


@dataclass(frozen=True)
class VllmEngine:
    """vLLM's requests and answers.

    Attributes:
        model: as the server calls it.
        version: of the server; None where it does not say.
    """

    model: str
    version: str | None = None

    @classmethod
    def of(cls, server: Server, model: str) -> VllmEngine:
        """The engine behind a server, which may tell its version at `/version`."""
        return cls(model, served_version(server, "/version"))

    @property
    def source(self) -> dict[str, Any]:
        """What a trace says about the server."""
        return {"record": "vllm", "vllm": self.version}

    def request(self, prompt: Prompt, new: int, temperature: float, seed: int) -> tuple[str, dict[str, Any]]:
        """(path, body) for a prompt."""
        return openai_request(self.model, prompt, new, temperature, seed)

    def read(self, response: dict[str, Any], where: str) -> EngineResponse:
        """The one answer of a response."""
        return sole_answer(read_response(response, 0, where, {}), where)
