"""Handwritten digits that scikit-learn ships: 1,797 real 8x8 images, 10 classes.

Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (its test set).
"""

import importlib.util
from pathlib import Path

import numpy as np

from ist_jax.data.source import ArraySource, DataSet, Entry, Facts
from ist_jax.key import Options

_TEST = 360  # images, a fifth of all


def load(directory: str, options: Options) -> DataSet:
    """A fixed, stratified split: 1,437 images to train on, 360 to test on; ink is bright."""
    images, labels = read()
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)  # of 16 levels of ink
    description = f"digits: {len(labels):,} real 8x8 images embedded in scikit-learn"
    sources = [ArraySource(images[numbers], labels[numbers]) for numbers in split(labels)]
    return DataSet(description, sources[0], sources[1], tuple("0123456789"))


def read() -> tuple[np.ndarray, np.ndarray]:
    """Images float64 [1797, 64], 0 to 16, and labels int64 [1797]: as `load_digits` of scikit-learn.

    Read from its file: to import scikit-learn takes far longer than to read them.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations, "it is installed with this package"
    folder = Path(package.submodule_search_locations[0])
    table = np.loadtxt(folder / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return table[:, :-1], table[:, -1].astype(int)


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the images to train and to test on, in order: as many of each class as its share.

    The draw is that of `sklearn.model_selection.train_test_split` with `random_state=0`: a property of the
    data set, the same whatever a run's seed is.
    """
    source, counts = np.random.RandomState(0), np.bincount(labels)
    train = _apportion(counts, len(labels) - _TEST, source)
    test = _apportion(counts - train, _TEST, source)
    orders = [np.flatnonzero(labels == c)[source.permutation(count)] for c, count in enumerate(counts)]
    parts = [np.split(order, [n, n + m])[:2] for order, n, m in zip(orders, train, test, strict=True)]
    first, second = (source.permutation(np.concatenate(part)) for part in zip(*parts, strict=True))
    return first, second


def _apportion(counts: np.ndarray, total: int, source: np.random.RandomState) -> np.ndarray:
    """`total` in whole numbers, proportional to `counts`; largest remainders first, ties drawn by lot."""
    exact = counts / counts.sum() * total
    found, remainder = np.floor(exact).astype(int), exact % 1
    for value in np.unique(remainder)[::-1]:
        if missing := total - found.sum():
            tied = np.flatnonzero(remainder == value)
            found[source.choice(tied, min(len(tied), missing), replace=False)] += 1
    return found


DIGITS = Entry(load, lambda _: Facts((8, 8, 1), 10, 1_437))
