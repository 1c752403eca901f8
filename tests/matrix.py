"""What `fit` offers, and whether it works: the rows of the table in docs/fit.md.

A test that keeps the promise of a row is marked with `row`; `test_fit.py` compares the
rows with the table. `python tests/matrix.py` prints the table.
"""

import pathlib

BACKENDS = ("jax", "tensorflow", "torch")
ROWS = {}


def row(feature, note="", **exceptions):
    """Marks a test of a feature.

    Args:
        feature: String, the first column.
        note: String, the last column.
        **exceptions: What the table says of a backend, where it is not "works".
    """
    answers = [exceptions.get(backend, "works") for backend in BACKENDS]
    cells = (*answers, note)
    assert ROWS.setdefault(feature, cells) == cells, feature
    return lambda test: test


def table():
    lines = ["| | JAX | TensorFlow | PyTorch | |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join([feature, *cells])} |" for feature, cells in ROWS.items()]
    return "\n".join(lines).replace("  |", " |") + "\n"


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import matrix
    import test_fit  # noqa: F401, marks its tests

    print(matrix.table())
