"""Recording from a running SGLang server (0.5.23) that was started with `--enable-return-routed-experts`.

Each request asks with `return_routed_experts`. Prompts go to `/generate`, whose answer also names the data-parallel
rank that served it (`meta_info.dp_rank`), chats to `/v1/chat/completions`; a gateway that knows only OpenAI's paths
gets prompts at `/v1/completions`. Picks are plain int32, so layers and k must be known (see `sglang_responses`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeplan.errors import UsageError
from moeplan.importers.routed_experts import EngineResponse
from moeplan.importers.sglang_responses import read_response
from moeplan.model.spec import ModelSpec
from moeplan.record.http_client import Server
from moeplan.record.prompts import Prompt
from moeplan.record.server import openai_request, served_version, sole_answer

__all__ = ["SglangEngine"]


@dataclass(frozen=True)
class SglangEngine:
    """SGLang's requests and answers.

    Attributes:
        model: as the server calls it.
        form: (hidden layers, k).
        openai: ask for prompts at `/v1/completions` instead of `/generate`.
        version: of the server; None where it does not say.
    """

    model: str
    form: tuple[int, int]
    openai: bool = False
    version: str | None = None

    @classmethod
    def of(cls, server: Server, model: str, spec: ModelSpec, *, openai: bool = False) -> SglangEngine:
        """The engine behind a server, which may tell its version at `/server_info`.

        Raises:
            UsageError: hidden layers or k are not known.
        """
        if spec.layers is None or spec.top_k is None:
            raise UsageError(
                "SGLang sends picks without their shape",
                where=server.url,
                hint="give --config with the model's folder, or --num-layers (dense ones included) and --top-k",
            )
        return cls(model, (spec.layers, spec.top_k), openai, served_version(server, "/server_info"))

    @property
    def source(self) -> dict[str, Any]:
        """What a trace says about the server."""
        return {"record": "sglang", "sglang": self.version, "openai": self.openai}

    def request(self, prompt: Prompt, new: int, temperature: float, seed: int) -> tuple[str, dict[str, Any]]:
        """(path, body) for a prompt."""
        if self.openai or prompt.messages is not None:
            path, body = openai_request(self.model, prompt, new, temperature, seed)
            return path, {**body, "return_routed_experts": True}
        sampling = {
            "max_new_tokens": new,
            "temperature": temperature,
            "sampling_seed": seed,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        what = {"text": prompt.text} if prompt.token_ids is None else {"input_ids": list(prompt.token_ids)}
        return "/generate", {**what, "sampling_params": sampling, "return_routed_experts": True}

    def read(self, response: dict[str, Any], where: str) -> EngineResponse:
        """The one answer of a response."""
        return sole_answer([read_response(response, self.form, 0, where, {})], where)
