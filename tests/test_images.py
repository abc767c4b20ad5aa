"""The image sets: TFDS's own readers and writers on tiny files, and Debian's Fashion-MNIST."""

import gzip
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from scipy import io
from tensorflow_datasets.datasets.svhn_cropped import svhn_cropped_dataset_builder
from tensorflow_datasets.image_classification import cifar, mnist

from ist_jax import data
from ist_jax.data import idx, prepare, tfds_images

SHAPES = {"cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "svhn_cropped": (32, 32, 3),
          "mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1)}  # fmt: skip


def write_idx(path, array, magic=b"\x00\x00\x08"):
    header = magic + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Tiny files under the names of the package, and no network."""
    folder = tmp_path / "debian"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, size in (("train", 12), ("t10k", 5)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (size, 28, 28), np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(size, dtype=np.uint8) % 10)
    monkeypatch.setattr(tfds_images, "DEBIAN_FASHION_MNIST", folder)
    return folder


def test_fashion_mnist_of_debian_is_read_where_tfds_has_none(debian, tmp_path):
    dataset = data.open_data_set("fashion_mnist", str(tmp_path))
    assert dataset.description == f"fashion_mnist: Debian's package dataset-fashion-mnist in {debian}"
    assert dataset.classes[:3] == ("T-shirt/top", "Trouser", "Pullover")
    train, test = data.load(dataset.train), data.load(dataset.test)
    wanted = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    assert np.array_equal(train["image"][..., 0], wanted)
    assert train["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert test["image"].shape == (5, 28, 28, 1)
    assert test["image"].dtype == np.uint8
    assert test["label"].dtype == np.int32


def test_the_prepared_fashion_mnist_of_tfds_comes_first(debian, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", {"train": None, "test": None})
    with tfds.testing.mock_data(num_examples=3):
        dataset = data.open_data_set("fashion_mnist", str(tmp_path))
    assert dataset.description.startswith("fashion_mnist: tensorflow-datasets 3.")
    assert len(dataset.train) == 3


def test_other_sets_do_not_look_at_fashion_mnist(debian, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no mnist in .*, which holds debian; .*prepare mnist"):
        data.open_data_set("mnist", str(tmp_path))
    monkeypatch.setattr(tfds_images, "DEBIAN_FASHION_MNIST", tmp_path / "not-installed")
    with pytest.raises(ValueError, match=r"no fashion_mnist in .*install Debian's dataset"):
        data.open_data_set("fashion_mnist", str(tmp_path))


@pytest.mark.skipif(not tfds_images.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's package is not installed")
def test_the_real_package_holds_70000_images(tmp_path):
    dataset = data.open_data_set("fashion_mnist", str(tmp_path))
    train, test = data.load(dataset.train), data.load(dataset.test)
    assert train["image"].shape == (60_000, 28, 28, 1)
    assert test["image"].shape == (10_000, 28, 28, 1)
    assert np.bincount(train["label"]).tolist() == [6000] * 10
    assert np.bincount(test["label"]).tolist() == [1000] * 10
    assert train["image"].mean() == pytest.approx(72.94, abs=0.01)


def test_a_bad_idx_file_is_named(tmp_path):
    path, labels = tmp_path / "images.gz", tmp_path / "labels.gz"
    with pytest.raises(ValueError, match=r"cannot read .*images.gz"):
        idx.read(path, 3)
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"cannot read .*images.gz"):
        idx.read(path, 3)
    write_idx(path, np.zeros((4, 2, 2), np.uint8))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"cannot read .*images.gz"):
        idx.read(path, 3)
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x03" + np.array([4, 2, 2], ">u4").tobytes() + b"123"))
    with pytest.raises(ValueError, match=r"images.gz is cut off or too long: 3 of 16 bytes"):
        idx.read(path, 3)
    write_idx(path, np.zeros((4, 2, 2), np.uint8), magic=b"\x00\x00\x0d")
    with pytest.raises(ValueError, match=r"images.gz is no idx file of bytes with 3 axes"):
        idx.read(path, 3)
    write_idx(path, np.zeros((4, 2, 2), np.uint8))
    write_idx(labels, np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match=r"images.gz holds 4 images, but .*labels.gz 5 labels"):
        idx.load(path, labels)


@pytest.mark.parametrize("name", SHAPES)
def test_every_tfds_set_is_read_without_tensorflow(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", {"train": None, "test": None})
    with tfds.testing.mock_data(num_examples=7):
        dataset = data.open_data_set(name, str(tmp_path))
        train, test = data.load(dataset.train), data.load(dataset.test)
    assert train["image"].shape == test["image"].shape == (7, *SHAPES[name])
    assert train["image"].dtype == np.uint8
    assert len(dataset.classes) == (100 if name == "cifar100" else 10)
    assert train["label"].max() < len(dataset.classes)
    assert "tensorflow" not in sys.modules


def prepared(name, extracted, monkeypatch, tmp_path):
    """The set as TFDS itself prepares it, from tiny raw files instead of downloaded ones, read back."""
    manager, folder = tfds.download.DownloadManager, str(tmp_path / "tfds")
    monkeypatch.setattr(manager, "download_and_extract", lambda *_: extracted)
    monkeypatch.setattr(manager, "download", lambda _, urls: {key: extracted[key] for key in urls})
    for module in (mnist, cifar, svhn_cropped_dataset_builder):  # what the command changes in its process
        monkeypatch.setattr(module, "tf", module.tf)
    assert prepare.main(["prepare", name, f"--dir={folder}"]) == 0
    return data.open_data_set(name, folder)


def test_cifar100_is_prepared_and_found_again(tmp_path, monkeypatch, capsys):
    raw = tmp_path / "cifar-100-binary"
    raw.mkdir()
    for kind, classes in (("coarse", 20), ("fine", 100)):
        (raw / f"{kind}_label_names.txt").write_text("".join(f"{kind}{i}\n" for i in range(classes)))
    records = np.random.default_rng(0).integers(0, 256, (9, 2 + 3 * 32 * 32), np.uint8)
    records[:, 0], records[:, 1] = 0, np.arange(9)  # coarse and fine label, then the planes
    records.tofile(raw / "train.bin")
    records[:4].tofile(raw / "test.bin")
    beside = ""
    for _ in range(2):  # the second time it is there already
        dataset = prepared("cifar100", str(tmp_path), monkeypatch, tmp_path)
        assert capsys.readouterr().err.splitlines() == [f"preparing cifar100 in {tmp_path / 'tfds'}" + beside]
        beside = ", beside cifar100, downloads"
        assert dataset.classes[:2] == ("fine0", "fine1")
        train, test = data.load(dataset.train), data.load(dataset.test)
        order = np.argsort(train["label"])  # TFDS shuffles when it writes
        planes = records[:, 2:].reshape(9, 3, 32, 32).transpose(0, 2, 3, 1)
        assert np.array_equal(train["image"][order], planes)
        assert sorted(test["label"]) == [0, 1, 2, 3]
    assert "tensorflow" not in sys.modules


def test_svhn_is_prepared_and_read_back(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 6), np.uint8)
    labels = np.array([[1], [2], [3], [4], [5], [10]], np.uint8)  # 10 stands for the digit 0
    files = {split: str(tmp_path / f"{split}.mat") for split in ("train", "test", "extra")}
    for file in files.values():
        io.savemat(file, {"X": images, "y": labels})
    train = data.load(prepared("svhn_cropped", files, monkeypatch, tmp_path).train)
    assert sorted(train["label"]) == [0, 1, 2, 3, 4, 5]
    for image, label in zip(train["image"], train["label"], strict=True):
        assert np.array_equal(image, images[..., label - 1])


def test_mnist_is_prepared_and_read_back(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    files = {f"{split}_{kind}": tmp_path / f"{split}-{kind}" for split in ("train", "test")
             for kind in ("data", "labels")}  # fmt: skip
    for key, file in files.items():
        body, header = (images.tobytes(), 16) if "data" in key else (bytes(range(7)), 8)
        file.write_bytes(bytes(header) + body)
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 7)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 7)
    train = data.load(prepared("mnist", files, monkeypatch, tmp_path).train)
    assert np.array_equal(train["image"][np.argsort(train["label"])][..., 0], images)


def test_preparation_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    monkeypatch.setattr(mnist, "tf", mnist.tf)
    assert prepare.main(["prepare", "mnist", f"--dir={tmp_path}"]) == 1
    first, line = capsys.readouterr().err.splitlines()
    assert first == f"preparing mnist in {tmp_path}"
    assert re.fullmatch(r"error: mnist cannot .*\(ConnectionError: no route to host\)", line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "NAME is missing; usage: python -m ist_jax.data.prepare NAME [--dir=DIR]; NAME is one of "),
        (["digits"], "'digits' is no set that can be prepared; usage: "),
        (["cifar"], "'cifar' is no set that can be prepared; did you mean 'cifar10'? "),
        (["mnist", "cifar10"], "'mnist cifar10' is no set"),
        (["mnist", "--folder=x"], "folder"),
    ],
)  # fmt: skip
def test_bad_arguments_of_preparation_are_one_line_and_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["prepare", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert message in line
