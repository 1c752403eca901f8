"""Measures what the methods cost on the active backend: time, memory, compilation.

    KERAS_BACKEND=jax python -m benchmarks time --model minilm --json jax-time.json

`__main__` has the commands. docs/benchmarks.md says what each command measures, and
how.
"""
