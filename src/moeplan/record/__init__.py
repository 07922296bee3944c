"""Live recording: Transformers hooks, vLLM and SGLang servers."""
