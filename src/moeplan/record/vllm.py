"""Recording from a running vLLM server (0.30 to 0.33) that was started with `--enable-return-routed-experts`.

The flag is the server's; a request asks for nothing. Prompts go to `/v1/completions`, chats to `/v1/chat/completions`,
and either answers with `choices[0].routed_experts` (see `vllm_responses`). Servers behind Dynamo answer the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeplan.importers.routed_experts import EngineResponse
from moeplan.importers.vllm_responses import read_response
from moeplan.record.http_client import Server
from moeplan.record.prompts import Prompt
from moeplan.record.server import openai_request, served_version, sole_answer

__all__ = ["VllmEngine"]


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
