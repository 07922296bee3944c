"""moeplan: which requests decode together and where each expert lives, for multi-node mixture-of-experts inference."""

__version__ = "0.1.0"
