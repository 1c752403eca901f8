"""The data of the examples: files of yours, or what installed packages bring."""

import importlib.resources
import re

import numpy as np


def read_texts(file):
    """Texts and labels of a file with lines `label<TAB>sentence`.

    The labels are 0, 1, 2 ...; the first line may be a head line.
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
    """Texts and labels of a file, or if it is None of the lexicon."""
    return lexicon() if file is None else read_texts(file)


def lexicon():
    """English words and phrases, and whether ten people found them positive."""
    file = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()]
    rows = [row for row in rows if re.fullmatch(r"[a-z][a-z' -]+", row[0])]
    texts, ratings = zip(*[(row[0], float(row[1])) for row in rows])
    return np.array(texts), (np.array(ratings) > 0).astype(int)


def read_images(file):
    """Images and labels to train and to test on, of an `.npz` file.

    The images are `x_train` and `x_test`, of shape (n, height, width, channels) and
    uint8, the labels `y_train` and `y_test`.
    """
    found = np.load(file)
    missing = {"x_train", "y_train", "x_test", "y_test"} - set(found)
    if missing:
        raise SystemExit(f"{file} has no {', '.join(sorted(missing))}.")
    return tuple(
        (found[f"x_{part}"], found[f"y_{part}"].ravel()) for part in ("train", "test")
    )


def load_images(file):
    """Images and labels to train and to test on, of a file, or if None of digits."""
    return digits() if file is None else read_images(file)


def digits():
    """Handwritten digits of 8 x 8 pixels, in three equal channels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images[..., None] * 15.9).astype("uint8").repeat(3, axis=-1)
    return (images[:1400], found.target[:1400]), (images[1400:], found.target[1400:])


def shuffled(*arrays, seed, limit=None):
    """At most `limit` rows of each array, in one random order."""
    order = np.random.default_rng(seed).permutation(len(arrays[0]))[:limit]
    return tuple(array[order] for array in arrays)


def split(x, y):
    """The first four fifths and the last."""
    cut = len(x) * 4 // 5
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])
