"""moeplan: which requests decode together and where each expert lives, for multi-node mixture-of-experts inference.

The public names stand in `__init__.pyi` and are loaded when first used: `import moeplan` itself imports nothing heavy.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
