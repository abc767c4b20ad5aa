"""Handwritten digits that scikit-learn ships: 1,797 real 8x8 images, 10 classes.

Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (its test set).
"""

import numpy as np

from ist_jax.data.source import ArraySource, DataSet, Entry, Facts
from ist_jax.key import Options


def load(directory: str, options: Options) -> DataSet:
    """A fixed, stratified split: 1,437 images to train on, 360 to test on; ink is bright."""
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)  # of 16 levels of ink
    # the seed is a property of the data set, the same whatever a run's is
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    description = f"digits: {len(labels):,} real 8x8 images embedded in scikit-learn"
    sources = [ArraySource(images[numbers], labels[numbers]) for numbers in (train, test)]
    return DataSet(description, sources[0], sources[1], tuple("0123456789"))


DIGITS = Entry(load, lambda _: Facts((8, 8, 1), 10, 1_437))
