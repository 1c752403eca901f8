"""Loads the data of the examples, from your own files or from installed packages."""

import importlib.resources
import re

import numpy as np


def read_texts(file):
    """Returns texts and labels from a file with lines `label<TAB>sentence`.

    The labels are 0, 1, 2 ... The first line may be a header.
    """
    rows = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        label, tab, text = line.partition("\t")
        if tab and label.strip().isdigit():
            rows.append((text, int(label)))
        elif number > 1 and line.strip():
            raise SystemExit(
                f"{file}, line {number}: must be a label 0, 1, 2 ..., a tab and a "
                f"sentence. Received: {line[:60]!r}"
            )
    if not rows:
        raise SystemExit(f"{file} has no lines `label<TAB>sentence`.")
    texts, labels = zip(*rows)
    return np.array(texts), np.array(labels)


def load_texts(file):
    """Returns texts and labels from a file, or from the lexicon if it is None."""
    return lexicon() if file is None else read_texts(file)


def lexicon():
    """Returns English words and phrases, and whether ten people rated them positive."""
    file = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()]
    rows = [row for row in rows if re.fullmatch(r"[a-z][a-z' -]+", row[0])]
    texts, ratings = zip(*[(row[0], float(row[1])) for row in rows])
    return np.array(texts), (np.array(ratings) > 0).astype(int)


def read_images(file):
    """Returns training and test images with labels from an `.npz` file.

    The images are `x_train` and `x_test`, of shape (n, height, width, channels) and
    uint8. The labels are `y_train` and `y_test`.
    """
    found = np.load(file)
    missing = {"x_train", "y_train", "x_test", "y_test"} - set(found)
    if missing:
        raise SystemExit(f"{file} has no {', '.join(sorted(missing))}.")
    return tuple(
        (found[f"x_{part}"], found[f"y_{part}"].ravel()) for part in ("train", "test")
    )


def load_images(file):
    """Returns training and test images from a file, or digits if it is None."""
    return digits() if file is None else read_images(file)


def digits():
    """Returns handwritten digits of 8 x 8 pixels, in three equal channels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images[..., None] * 15.9).astype("uint8").repeat(3, axis=-1)
    return (images[:1400], found.target[:1400]), (images[1400:], found.target[1400:])


def shuffled(*arrays, seed, limit=None):
    """Returns at most `limit` rows of each array, in the same random order."""
    order = np.random.default_rng(seed).permutation(len(arrays[0]))[:limit]
    return tuple(array[order] for array in arrays)


def split(x, y):
    """Splits off the last fifth of the data to test on."""
    cut = len(x) * 4 // 5
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])
