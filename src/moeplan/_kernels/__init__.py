"""The loops that carry the weight, compiled by numba, each beside a plain NumPy reference that tests hold it to.

Importing this package imports numba (about half a second); `import moeplan` does not.
"""
