"""Plug-ins of the engines: entry points that vLLM and SGLang call in every process they start.

Nothing here loads more than the standard library until an environment variable names a plan.
"""
