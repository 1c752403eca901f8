"""Counters of the work that is really done, one file per backend.

Each has `executed_flops(function, *arguments)`.
"""
