"""Benchmarks: the library beside Nova's and Ironic's own code, and beside what the machine can do at all.

``python -m benchmarks --help`` (with ``tests`` on PYTHONPATH), or ``make bench``. See docs/explanation/performance.md.
"""
