"""Handwritten digits that scikit-learn ships: 1,797 real 8x8 images, 10 classes.

Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (its test set).
"""

import numpy as np

from ist_jax.data.source import ArraySource, DataSet, Entry, Facts
from ist_jax.key import Options

_INK_LEVELS = 16
_TEST_FRACTION = 0.2
_SPLIT_SEED = 0  # a property of the data set, the same whatever a run's seed is


def load(directory: str, options: Options) -> DataSet:
    """A fixed, stratified split: 1,437 images to train on, 360 to test on; ink is bright."""
    from sklearn import datasets, model_selection  # slow to import

    del directory, options  # it is embedded, and there is nothing to choose
    images, labels = datasets.load_digits(return_X_y=True)
    images = np.round(images * (255 / _INK_LEVELS)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=_TEST_FRACTION, stratify=labels, random_state=_SPLIT_SEED
    )
    description = f"digits: {len(labels):,} real 8x8 images embedded in scikit-learn"
    sources = [ArraySource(images[numbers], labels[numbers]) for numbers in (train, test)]
    return DataSet(description, sources[0], sources[1], tuple("0123456789"))


DIGITS = Entry(load, lambda _: Facts((8, 8, 1), 10, 1_437))
