"""Counters of the work that is really executed, one file per backend.

Each file has `executed_flops(fn, *args)`.
"""
