"""Nova's and Ironic's own code, from PyPI, unpatched, each in an environment of its own.

These modules run there: they use the standard library, ``benchmarks.meter`` and the peer.
"""
