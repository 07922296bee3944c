"""Recording from a running SGLang server (0.5.23) that was started with `--enable-return-routed-experts`.

Each request asks with `return_routed_experts`. Prompts go to `/generate`, whose answer also names the data-parallel
rank that served it (`meta_info.dp_rank`), chats to `/v1/chat/completions`; a gateway that knows only OpenAI's paths
gets prompts at `/v1/completions`. Picks are plain int32, so layers and k must be known (see `sglang_responses`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.importers.routed_experts import EngineResponse
from moeplan.importers.sglang_responses import picks_shape, read_response
from moeplan.model.spec import ModelSpec
from moeplan.progress import Progress, silent
from moeplan.record.http_client import Server
from moeplan.record.prompts import Prompt
from moeplan.record.recording import Prompts
from moeplan.record.server import NEUTRAL, ServedOptions, openai_request, record_served, served_version, sole_answer
from moeplan.trace.reader import Trace

__all__ = ["SglangEngine", "record_sglang"]


def record_sglang(
    prompts: Prompts,
    out: str | Path,
    options: ServedOptions = ServedOptions(),
    *,
    url: str = "http://127.0.0.1:30000",
    openai: bool = False,
    progress: Progress = silent,
) -> Trace:
    """Have an SGLang server continue prompts, and store which experts they use.

    Args:
        prompts: a file or folder of prompts, or `Prompt` values.
        options: the model's experts, hidden layers and k, as in `ServedOptions(model=moeplan.load_model("MODEL_DIR"))`.
        url: address of the server, which runs with `--enable-return-routed-experts`.
        openai: use `/v1/completions` in place of `/generate`, for a gateway without it.

    Raises:
        MoeplanError: as `record_served`.

    Examples:
        >>> import moeplan
        >>> options = moeplan.ServedOptions(model=moeplan.load_model("MODEL_DIR"), max_new_tokens=64)  # doctest: +SKIP
        >>> trace = moeplan.record_sglang("prompts.jsonl", "my-trace", options)  # doctest: +SKIP
    """

    def engine_of(server: Server, model: str) -> SglangEngine:
        return SglangEngine.of(server, model, options.model, openai=openai)

    return record_served(url, engine_of, prompts, out, options, progress)


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
        form = picks_shape(spec, server.url)
        return cls(model, form, openai, served_version(server, "/server_info"))

    @property
    def source(self) -> dict[str, Any]:
        """What a trace says about the server."""
        return {"record": "sglang", "sglang": self.version, "openai": self.openai}

    def request(self, prompt: Prompt, new: int, temperature: float, seed: int) -> tuple[str, dict[str, Any]]:
        """(path, body) for a prompt."""
        if self.openai or prompt.messages is not None:
            path, body = openai_request(self.model, prompt, new, temperature, seed)
            return path, {**body, "return_routed_experts": True}
        sampling = {"max_new_tokens": new, "temperature": temperature, "sampling_seed": seed, **NEUTRAL}
        what = {"text": prompt.text} if prompt.token_ids is None else {"input_ids": list(prompt.token_ids)}
        return "/generate", {**what, "sampling_params": sampling, "return_routed_experts": True}

    def read(self, response: dict[str, Any], where: str) -> EngineResponse:
        """The one answer of a response."""
        return sole_answer(read_response(response, self.form, 0, where, {}), where)
