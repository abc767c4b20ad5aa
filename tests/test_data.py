"""Batches, augmentation and the embedded set."""

import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ist_jax import data
from ist_jax.data import augment, batches, digits
from ist_jax.runtime import devices


def indices(seed=0, round_index=0, num_examples=50, num_workers=3, local_steps=4, batch_size=5):
    shards = [np.arange(num_examples)] * num_workers
    return batches.train_indices(seed, round_index, shards, local_steps=local_steps, batch_size=batch_size)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 9))
def test_every_worker_sees_every_example_once_per_epoch(num_examples, local_steps, batch_size):
    per_round = local_steps * batch_size
    rounds = -(-2 * num_examples // per_round)
    stream = np.concatenate([
        indices(7, r, num_examples, 2, local_steps, batch_size).reshape(2, -1) for r in range(rounds)
    ], axis=1)  # fmt: skip
    for worker in range(2):
        for epoch in range(2):
            seen = stream[worker, epoch * num_examples : (epoch + 1) * num_examples]
            assert sorted(seen) == list(range(num_examples))


def test_workers_and_seeds_have_their_own_order():
    a, b = indices(seed=0), indices(seed=1)
    assert (a[0] != a[1]).any()
    assert (a != b).any()
    assert (a == indices(seed=0)).all()
    assert (indices(num_workers=8)[:3] == a).all()  # more workers change nobody's examples


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_counts_every_example_once_with_real_fillers(num_examples, batch_size, num_devices):
    plan = batches.eval_batches(num_examples, batch_size, num_devices)
    assert plan.indices.shape == plan.weights.shape
    assert plan.indices.shape[0] == num_devices
    counted = np.bincount(plan.indices[plan.weights > 0], minlength=num_examples)
    assert (counted == 1).all()
    assert plan.weights.sum() == num_examples
    assert plan.indices.min() >= 0
    assert plan.indices.max() < num_examples


def test_evaluation_batches_do_not_depend_on_the_devices():
    one, four = batches.eval_batches(90, 8, 1), batches.eval_batches(90, 8, 4)
    flat = four.indices.swapaxes(0, 1).reshape(-1, 8)
    assert (flat[: one.indices.shape[1]] == one.indices[0]).all()


def test_augmentation_shifts_and_mirrors_whole_images():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (5, 6, 7, 3), dtype=np.uint8)
    source = {"image": jnp.asarray(images), "label": jnp.arange(5)}
    batch_fn = augment.make_batch_fn(lambda x: x, pad=2, flip=True)
    chosen = jnp.asarray(rng.integers(0, 5, 400))
    got, labels = jax.jit(batch_fn)(source, chosen, jax.random.key(3))
    assert (labels == chosen).all()
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = np.zeros((5, 5, 2), int)
    for image, index in zip(np.asarray(got), np.asarray(chosen), strict=True):
        matches = [
            (dy, dx, flip)
            for dy in range(5) for dx in range(5) for flip in range(2)
            if np.array_equal(image, padded[index, dy : dy + 6, dx : dx + 7][:, :: 1 - 2 * flip])
        ]  # fmt: skip
        assert len(matches) == 1
        seen[matches[0]] += 1
    assert (seen > 0).all()  # 50 kinds, 8 expected of each
    assert abs(seen[..., 1].sum() / 400 - 0.5) < 5 * 0.5 / 20


def test_without_augmentation_the_batch_is_the_examples():
    source = {"image": jnp.arange(24, dtype=jnp.uint8).reshape(3, 2, 4, 1), "label": jnp.arange(3)}
    got, _ = augment.make_batch_fn(lambda x: x, pad=0, flip=False)(
        source, jnp.array([2, 0]), jax.random.key(0)
    )
    assert (got == source["image"][jnp.array([2, 0])]).all()


def test_normalised_images_have_mean_0_and_deviation_1():
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 5, 3), dtype=np.uint8)
    normal = augment.make_normalize(*augment.channel_statistics(images))(jnp.asarray(images))
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, rtol=1e-5)


def test_cifar10_takes_its_uint8_size_on_every_device_and_no_copy_in_a_step():
    images = np.zeros((50_000, 32, 32, 3), np.uint8)
    placed = devices.replicate({"image": images, "label": np.zeros(50_000, np.int32)}, jax.devices()[:2])
    shards = [shard for array in placed.values() for shard in array.addressable_shards]
    for device in jax.devices()[:2]:
        here = [shard.data.nbytes for shard in shards if shard.device == device]
        assert len(here) == 2
        assert images.nbytes < sum(here) < 1.1 * images.nbytes
    normalize = augment.make_normalize((128.0,) * 3, (64.0,) * 3)
    batch_fn = augment.make_batch_fn(normalize, pad=4, flip=True)
    args = ({name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in placed.items()},
            jax.ShapeDtypeStruct((64,), np.int32), jax.random.key(0))  # fmt: skip
    used = jax.jit(batch_fn).lower(*args).compile().memory_analysis()
    assert used.argument_size_in_bytes == pytest.approx(153.8e6, rel=1e-3)
    assert used.temp_size_in_bytes + used.output_size_in_bytes < 10 * 64 * 32 * 32 * 3 * 4


def test_statistics_and_decoding_take_little_memory_beside_the_images():
    images = np.random.default_rng(0).integers(0, 256, (8000, 32, 32, 3), np.uint8)

    class Records:
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return {"image": images[index].copy(), "label": index % 10}

    tracemalloc.start()
    try:
        mean, std = augment.channel_statistics(images)
        peaks = [tracemalloc.get_traced_memory()[1]]
        tracemalloc.reset_peak()
        loaded = data.load(Records())
        peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peaks[0] < 0.3 * images.nbytes
    assert peaks[1] < 1.2 * images.nbytes
    assert np.array_equal(loaded["image"], images)
    assert loaded["label"].tolist() == [i % 10 for i in range(8000)]
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-9)


def test_digits_are_scikit_learns():
    opened = data.open_data_set("digits", "")
    train, test = data.load(opened.train), data.load(opened.test)
    assert (len(opened.train), len(opened.test)) == (1437, 360)
    assert train["image"].shape == (1437, 8, 8, 1)
    assert train["image"].dtype == np.uint8
    assert train["image"].max() == 255
    assert np.bincount(test["label"]).min() >= 34  # stratified
    both = {x.tobytes() for x in train["image"]} & {x.tobytes() for x in test["image"]}
    assert not both
    assert opened.train[0]["label"] == train["label"][0]


def test_digits_and_their_split_are_bit_for_bit_scikit_learns():
    images, labels = digits.read()
    wanted_images, wanted_labels = load_digits(return_X_y=True)
    every = np.arange(len(wanted_labels))
    parts = train_test_split(every, test_size=0.2, stratify=wanted_labels, random_state=0)
    for got, wanted in zip(
        (images, labels, *digits.split(labels)), (wanted_images, wanted_labels, *parts), strict=True
    ):
        assert got.dtype == wanted.dtype
        assert got.tobytes() == wanted.tobytes()


def test_scikit_learn_itself_is_not_imported_to_read_digits():
    code = "import sys; from ist_jax import data; data.open_data_set('digits', ''); print(*sys.modules)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "numpy" in got.split()
    assert "sklearn" not in got.split()


def test_an_unknown_data_set_is_refused_by_name():
    with pytest.raises(ValueError, match=r"data.name='imagenot' does not exist.*'cifar10'.*'digits'"):
        data.open_data_set("imagenot", "")
