"""Precompute: its time beside its encoders' own, and its cache as it grows.

precompute   ``python -m benchmarks precompute``: how much slower it is than its encoders alone
cache_scale  ``python -m benchmarks cache_scale``: whether the cache stays fast and small
"""
