"""The engine: everything that touches the bytes of an image, in Cython.

Policy is Python's, bytes are the engine's: callers cross the border per image, extent or batch, never per block.
Each module is a ``.pyx`` with its Python contract in the ``.pyi`` beside it and, where other modules ``cimport`` it, a
``.pxd``. Slow, plain twins of the parsers and kernels live in ``reference.py``; the tests compare the two.
"""
