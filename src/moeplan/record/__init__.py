"""Live recordings, from prompts to a trace: of a model in this process, or of a vLLM or SGLang server."""

from moeplan.record.prompts import Prompt as Prompt
from moeplan.record.prompts import read_prompts as read_prompts
from moeplan.record.server import ServedOptions as ServedOptions
from moeplan.record.sglang import record_sglang as record_sglang
from moeplan.record.transformers import TransformersOptions as TransformersOptions
from moeplan.record.transformers import record_transformers as record_transformers
from moeplan.record.transformers_model import LoadedModel as LoadedModel
from moeplan.record.vllm import record_vllm as record_vllm
