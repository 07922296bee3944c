"""Live recordings, from prompts to a trace: of a model in this process, or of a vLLM or SGLang server."""

from moeplan.record.prompts import Prompt, read_prompts
from moeplan.record.server import ServedOptions
from moeplan.record.sglang import record_sglang
from moeplan.record.transformers import TransformersOptions, record_transformers
from moeplan.record.transformers_model import LoadedModel
from moeplan.record.vllm import record_vllm

__all__ = [
    "LoadedModel",
    "Prompt",
    "ServedOptions",
    "TransformersOptions",
    "read_prompts",
    "record_sglang",
    "record_transformers",
    "record_vllm",
]
