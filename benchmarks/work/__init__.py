"""Counters of the work that is really done, one file a backend.

Each has `executed_flops(function, *arguments)`.
"""
