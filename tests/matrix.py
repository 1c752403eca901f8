"""The rows of the table in docs/fit.md: the features of `fit`, and whether they work.

The decorator `row` marks a test of a row. If the feature works, the test must pass. If
it is refused, the test must end in a `ValueError` that names the feature. `test_fit.py`
compares the rows with the table. `python tests/matrix.py` prints the table.
"""

import functools
import pathlib
import re

import keras
import pytest

BACKENDS = ("jax", "tensorflow", "torch")
ROWS = {}


def row(feature, note="", **exceptions):
    """Marks a test of a feature.

    Args:
        feature: String, the first column.
        note: String, the last column.
        **exceptions: The entries of backends that are not "works": "refused", or "-" if
            the feature does not exist there.
    """
    assert set(exceptions) <= set(BACKENDS)
    assert set(exceptions.values()) <= {"refused", "-"}
    answers = [exceptions.get(backend, "works") for backend in BACKENDS]
    cells = (*answers, note)
    assert ROWS.setdefault(feature, cells) == cells, feature
    answer = exceptions.get(keras.config.backend())
    if answer is None:
        return lambda test: test
    if answer == "-":
        return pytest.mark.skip(reason=f"no {feature} on this backend")
    (name, *_) = re.findall(r"\w+", feature)

    def must_be_refused(test):
        @functools.wraps(test)
        def refused(*args, **kwargs):
            with pytest.raises(ValueError, match=name):
                test(*args, **kwargs)

        return refused

    return must_be_refused


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
