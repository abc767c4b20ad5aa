"""Sets from files: arrays, folders of small images and of parquet, held in memory."""

import io
import json
import logging
import re

import numpy as np
import pyarrow
import pytest
from conftest import ROOT, get_config
from PIL import Image
from pyarrow import parquet

from ist_jax import data, evaluate, main, train
from ist_jax.data import augment
from ist_jax.runtime import inputs, setup
from ist_jax.runtime.setup import wanted_data

CLASSES = ("cat", "dog", "eel")


def examples(count, shape=(8, 8, 3), seed=0):
    """uint8 images whose brightness tells their class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    ground = (80 * labels).reshape(-1, *[1] * len(shape))
    return rng.integers(0, 60, (count, *shape), np.uint8) + ground.astype(np.uint8), labels


def png(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, kind)
    return file.getvalue()


def write_folder(root, train_set, test_set, other="test", ending="png"):
    for split, (images, labels) in (("train", train_set), (other, test_set)):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / CLASSES[label] / f"{number:03}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return root


def write_parquet(path, images, labels, *, names=CLASSES, columns=("img", "label"), **more):
    kind = {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    features = {columns[0]: {"_type": "Image"}, columns[1]: kind}
    rows = {
        columns[0]: [{"bytes": png(x), "path": None} for x in images],
        columns[1]: labels.tolist(),
        **more,
    }
    table = pyarrow.table(rows)
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def open_set(name, folder, **options):
    return data.open_data_set(name, str(folder), {f"data.{key}": value for key, value in options.items()})


def small(name, folder, **overrides):
    """A config of a net of a second, which has the keys of data of cifar10_small."""
    cut = {"model.sections": (1, 3), "model.width": 4, "partition.sections": (2,), "partition.min_units": 0}
    run = {"num_workers": 2, "local_steps": 2, "batch_size": 6, "rounds": 2, "eval_every": 0}
    given = cut | run | {"data.name": name, "data.dir": str(folder)} | overrides
    return get_config("resnet", "cifar10_small", **given)


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (5, 6), (5, 6, 1), (5, 6, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_of_features_and_of_images_are_normalised(shape, dtype, monkeypatch):
    x, y = examples(60, shape)
    mine = data.ArraySource(x.astype(dtype), y)
    monkeypatch.setitem(data.SETS, "mine", data.Entry(lambda *_: data.DataSet("mine", mine, mine, CLASSES)))
    opened = inputs.open_inputs(wanted_data(get_config("mlp", **{"data.name": "mine"})))
    shown, labels = opened.task.show(opened.train)
    assert shown.shape == (60, *shape) + (1,) * (len(shape) == 2)
    assert np.array_equal(labels, y)
    axes = tuple(range(shown.ndim - 1))  # per feature, or per channel
    np.testing.assert_allclose(shown.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(shown.std(axes), 1, rtol=1e-5)


def test_a_feature_that_does_not_vary_stays_finite():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    x[:, 1], x[:, 2] = 0.1, 0
    mean, std = augment.channel_statistics(x)
    assert std[1:] == (1, 1)
    shown = augment.make_normalize(mean, std)(x)
    np.testing.assert_allclose(shown.std(0), [1, 0, 0], atol=1e-6)
    assert augment.channel_statistics(np.full((5, 2), 9, np.uint8)) == ((9, 9), (1, 1))


@pytest.mark.parametrize("shape", [(5,), (5, 2, 2, 2, 1)])
def test_examples_of_other_axes_are_refused(shape):
    with pytest.raises(ValueError, match=r"an array \[5.*\]; images \[N, H, W, C\] or .* are allowed"):
        data.ArraySource(np.zeros(shape), np.zeros(5, int))


def test_features_are_not_cropped_nor_shown_to_a_net_for_images(tmp_path):
    x, y = examples(12, (7,))
    np.savez(tmp_path / "f.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match=r"are no images; set config.data.pad to 0"):
        inputs.open_inputs(wanted_data(small("npz", tmp_path / "f.npz")))
    config = small("npz", tmp_path / "f.npz", **{"data.pad": 0, "data.flip": False})
    with pytest.raises(ValueError, match="an example of shape 7 is no image for a ResNet"):
        setup.set_up(config)


# --- .npz -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_npz_file_trains_from_the_command_line(tmp_path, capsys):
    (x, y), (x_test, y_test) = examples(60, (6, 6)), examples(20, (6, 6), seed=1)
    np.savez(tmp_path / "f.npz", x_train=x, y_train=y[:, None], x_test=x_test, y_test=y_test)
    flags = ["--config.data.name=npz", f"--config.data.dir={tmp_path / 'f.npz'}", "--config.rounds=8"]
    config = f"--config={ROOT}/configs/mlp.py:smoke"
    assert main.main(["main", config, f"--workdir={tmp_path / 'run'}", *flags]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"] == f"npz: 80 examples of 3 classes in {tmp_path / 'f.npz'}"
    assert summary["test_accuracy"] > 0.8
    opened = open_set("npz", tmp_path / "f.npz")
    assert np.array_equal(opened.train.image[..., 0], x)
    assert opened.train.label.tolist() == y.tolist()
    assert opened.classes == ("0", "1", "2")


GOOD = {
    "x_train": np.zeros((4, 3)),
    "y_train": np.arange(4),
    "x_test": np.zeros((2, 3)),
    "y_test": np.arange(2),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x_test": None, "y_test": None}, r"has no x_test, y_test, but x_train, y_train; it must be a .npz"),
        ({"y_train": np.arange(5)}, r"x_train is \[4, 3\] and y_train \[5\]; a label each is needed"),
        ({"x_test": np.zeros((0, 3)), "y_test": np.arange(0)}, r"x_test is \[0, 3\] and y_test"),
        ({"y_test": np.array([0.0, 1.0])}, r"y_test is float64 \[2\]; whole numbers \[N\] or \[N, 1\]"),
        ({"y_test": np.eye(2, dtype=int)}, r"y_test is int64 \[2, 2\]; whole numbers"),
        ({"y_test": np.int64(3)}, r"y_test is int64 \[\]; whole numbers"),
        ({"y_test": np.array([0, -1])}, r"y_test has the label -1; classes are counted from 0"),
        ({"x_test": np.zeros((2, 4))}, r"x_train is \[4, 3\] and x_test \[2, 4\]; examples must be alike"),
        ({"x_test": np.array([[0, np.nan, 1]] * 2)}, r"x_test has values that are not finite"),
        ({"x_test": np.array([["a"], ["b"]])}, r"x_test is of <U1; numbers are needed"),
        ({"x_test": np.array([[None]] * 2)}, r"cannot read .*f.npz: Object arrays"),
        ({"x_train": np.zeros(4)}, r"f.npz: the examples are an array \[4\]"),
        ({"x_train": np.float32(1)}, r"x_train is \[\] and y_train \[4\]"),
    ],
)
def test_a_npz_file_that_cannot_work_is_one_clear_error(wrong, message, tmp_path):
    arrays = {name: x for name, x in (GOOD | wrong).items() if x is not None}
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        open_set("npz", tmp_path / "f.npz")
    assert "\n" not in str(error.value)


def test_what_is_no_npz_file_is_one_clear_error(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros(3))
    for path, message in (
        (tmp_path / "f.npy", "is no .npz file"),
        (tmp_path, "is no file"),
        ("", "is no file"),
    ):
        with pytest.raises(ValueError, match=f"{message}; set config.data.dir to a .npz file of x_train"):
            open_set("npz", path)


# --- folders of images ----------------------------------------------------------------------------


def test_a_folder_of_small_images_is_held_in_memory(tmp_path):
    sets = examples(60), examples(21, seed=1)
    folder = write_folder(tmp_path, *sets)
    opened = open_set("image_folder", folder)
    assert not opened.encoded
    order = np.argsort(sets[0][1], kind="stable")  # by class, and then by name
    assert np.array_equal(opened.train.image, sets[0][0][order])
    assert opened.train.label.tolist() == sets[0][1][order].tolist()
    assert opened.classes == CLASSES
    assert opened.description == f"image_folder: 81 images of 3 classes in {folder}, tested on test/"
    wanted = wanted_data(get_config("resnet", "cifar10_small", **{"data.name": "image_folder"}))
    fed = inputs.open_inputs(wanted._replace(directory=str(folder)))
    assert fed.task.example[0].shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_a_folder_of_small_images_trains_and_its_images_are_classified(tmp_path, capsys):
    folder = write_folder(tmp_path / "images", examples(60), examples(21, seed=1))
    summary = train.train(small("image_folder", folder, rounds=10), tmp_path / "run")
    assert summary["test_accuracy"] > 0.5
    picture = str(folder / "test" / "eel" / "002.png")
    assert evaluate.main(["evaluate", f"--workdir={tmp_path / 'run'}", picture]) == 0
    assert re.search(r"002.png: (cat|dog|eel) [\d.]+%", capsys.readouterr().out)


def test_test_comes_before_val(tmp_path):
    folder = write_folder(tmp_path, examples(6), examples(3), "val")
    assert len(open_set("image_folder", folder).test) == 3
    write_folder(folder, examples(6), examples(6), "test")
    assert len(open_set("image_folder", folder).test) == 6


def test_grey_images_have_one_channel_and_grey_among_coloured_three(tmp_path):
    grey = examples(6, (5, 7, 1))
    folder = write_folder(tmp_path, grey, examples(3, (5, 7, 1)))
    opened = open_set("image_folder", folder)
    assert opened.train.image.shape == (6, 5, 7, 1)
    (folder / "test" / "cat" / "other.png").write_bytes(png(examples(1, (5, 7, 3))[0][0]))
    coloured = open_set("image_folder", folder)
    assert coloured.test.image.shape == (4, 5, 7, 3)
    assert np.array_equal(coloured.train.image, np.repeat(opened.train.image, 3, -1))


def test_images_that_do_not_fit_in_memory_are_streamed_and_it_is_said_why(tmp_path, caplog):
    folder = write_folder(tmp_path, examples(6), examples(3))
    reasons = {
        r"9 images of 8 x 8 pixels take 0.0 MB, more than data.in_memory=0.001": {"in_memory": 0.001},
        r"cat/000.png has 8 x 8 pixels, more than data.size=4": {"size": 4},
    }
    for reason, options in reasons.items():
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert open_set("image_folder", folder, **options).encoded
        assert re.search(f"images are streamed, and cropped at random: .*{reason}", caplog.text)
    caplog.clear()
    assert open_set("image_folder", folder, in_memory=0).encoded
    assert not caplog.messages  # it was asked for
    (folder / "test" / "dog" / "large.png").write_bytes(png(examples(1, (9, 8, 3))[0][0]))
    assert open_set("image_folder", folder).encoded
    assert re.search(r"cat/000.png has 8 x 8 pixels, and .*test/dog/large.png has 8 x 9", caplog.text)
    with pytest.raises(ValueError, match=r"data.pad=4; streamed images are cropped at random, set it to 0"):
        setup.set_up(small("image_folder", folder))


def test_what_is_known_of_a_folder_is_that_it_may_be_streamed():
    assert data.facts("image_folder") == data.Facts()
    assert data.facts("image_folder", {"data.in_memory": 0, "data.size": 8}).example == (8, 8, 3)
    assert data.facts("image_folder", {"data.in_memory": 0}).encoded


def test_unreadable_images_are_named_and_left_out(tmp_path, caplog):
    images, labels = examples(12)
    folder = write_folder(tmp_path, (images, labels), examples(3))
    broken = folder / "train" / "dog" / "004.png"
    broken.write_bytes(broken.read_bytes()[:80])
    (folder / "train" / "eel" / "000.png").write_text("no image")
    opened = open_set("image_folder", folder)
    assert len(opened.train) == 11
    assert np.bincount(opened.train.label).tolist() == [4, 3, 4]
    assert f"2 of 13 images cannot be read: {broken}, {folder}/train/eel/000.png" in caplog.text
    for path in (folder / "test").rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"none of 3 images can be read, such as .*/test/cat/000.png"):
        open_set("image_folder", folder)


def test_images_of_16_bits_are_refused(tmp_path):
    folder = write_folder(tmp_path, examples(6, (8, 8, 1)), examples(3, (8, 8, 1)))
    deep = np.full((8, 8), 40_000, np.uint16)
    (folder / "train" / "cat" / "0.png").write_bytes(png(deep))
    with pytest.raises(ValueError, match=r"cat/0.png has pixels of 'I;16'; 8 bits a channel are needed"):
        open_set("image_folder", folder)


# --- parquet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["data/{}-0000{}-of-00002.parquet", "default/{}/000{}.parquet"])
def test_parquet_files_are_found_by_split(layout, tmp_path):
    sets = {"train": examples(60), "test": examples(21, seed=1), "validation": examples(9, seed=2)}
    for split, (images, labels) in sets.items():
        half = len(images) // 2
        for number, part in enumerate((slice(half), slice(half, None))):
            write_parquet(tmp_path / "set" / layout.format(split, number), images[part], labels[part])
    opened = open_set("parquet", tmp_path / "set")
    for split, found in (("train", opened.train), ("test", opened.test)):
        assert np.array_equal(found.image, sets[split][0])
        assert found.label.tolist() == sets[split][1].tolist()
    assert opened.classes == CLASSES
    assert opened.description == f"parquet: 81 images of 3 classes in {tmp_path / 'set'}, tested on test"


def test_parquet_trains(tmp_path):
    for seed, split in enumerate(("train", "test")):
        write_parquet(tmp_path / "set" / f"{split}.parquet", *examples(60, seed=seed))
    config = get_config("mlp", **{"data.name": "parquet", "data.dir": str(tmp_path / "set"), "rounds": 8})
    assert train.train(config, tmp_path / "run")["test_accuracy"] > 0.8


def test_parquet_of_plain_bytes_of_paths_and_of_numbered_classes(tmp_path):
    images, labels = examples(6)
    (tmp_path / "one.png").write_bytes(png(images[0]))
    rows = [{"bytes": png(x), "path": None} for x in images[1:]]
    rows = [{"bytes": None, "path": "one.png"}, *rows]
    parquet.write_table(pyarrow.table({"image": rows, "y": labels}), tmp_path / "train.parquet")
    table = pyarrow.table({"image": [png(x) for x in images], "y": labels})
    parquet.write_table(table, tmp_path / "val.parquet")
    opened = open_set("parquet", tmp_path)
    assert np.array_equal(opened.train.image, images) and np.array_equal(opened.test.image, images)
    assert opened.classes == ("0", "1", "2")


def test_columns_are_chosen_and_rows_without_an_image_left_out(tmp_path, caplog):
    images, labels = examples(6)
    for split in ("train", "test"):
        path = tmp_path / f"{split}.parquet"
        write_parquet(path, images, labels, names=None, other=(labels + 1).tolist())
    with pytest.raises(
        ValueError, match=r"columns img, label, other, 1 of images and 2 of labels; set config"
    ):
        open_set("parquet", tmp_path)
    assert (
        open_set("parquet", tmp_path, columns=("img", "other")).train.label.tolist() == (labels + 1).tolist()
    )
    with pytest.raises(
        ValueError, match=r"columns img, label, other, and data.columns=\('img', 'no'\); set it"
    ):
        open_set("parquet", tmp_path, columns=("img", "no"))
    table = pyarrow.table({"image": [None, png(images[1])], "label": [0, 1]})
    for split in ("train", "test"):
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    assert open_set("parquet", tmp_path).train.label.tolist() == [1]
    assert "1 of 2 images cannot be read: row 0 of train" in caplog.text


def test_parquet_images_of_different_sizes_are_cut_to_one(tmp_path, caplog):
    images, labels = examples(5)
    for split in ("train", "test"):
        write_parquet(
            tmp_path / f"{split}.parquet", [*images, examples(1, (9, 12, 3))[0][0]], np.r_[labels, 0]
        )
    with caplog.at_level(logging.INFO):
        opened = open_set("parquet", tmp_path, size=8, resize=8)
    assert opened.train.image.shape == (6, 8, 8, 3)
    assert np.array_equal(opened.train.image[:5], images)
    why = r"8 x 8 pixels: row 0 of train has 8 x 8 pixels, and row 5 of train has 12 x 9"
    assert re.search(f"the centre of every image is cut out, {why}", caplog.text)
    with pytest.raises(
        ValueError, match=r"12 images of 8 x 8 pixels take 0.0 MB, more than data.in_memory=0.001; ra"
    ):
        open_set("parquet", tmp_path, size=8, resize=8, in_memory=0.001)


def test_a_parquet_folder_that_cannot_work_is_one_clear_error(tmp_path):
    images, labels = examples(6)

    def refused(message, folder=tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            open_set("parquet", folder)
        assert "\n" not in str(error.value)

    refused(r"has no .parquet file named train; set config.data.dir to a folder with such files", "")
    for split in ("test", "validation"):
        write_parquet(tmp_path / f"{split}.parquet", images, labels)
        refused(r"has no .parquet file named train;")
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    write_parquet(tmp_path / "a" / "train.parquet", images, labels)
    refused(r"has no .parquet file named test or validation;")
    write_parquet(tmp_path / "b" / "train.parquet", images, labels)
    refused(r"train files are in .*/a and in .*/b; set config.data.dir to one set's folder")
    write_parquet(tmp_path / "a" / "test.parquet", images, labels - 1)
    refused(r"test has the label -1; those of 3 classes are needed, from 0", tmp_path / "a")
    write_parquet(tmp_path / "a" / "test.parquet", images, labels + 0.5)
    refused(r"the labels of test are 6 of type double, 0 of them missing; whole numbers", tmp_path / "a")
    (tmp_path / "a" / "test.parquet").write_bytes(b"PAR1 and so on")
    refused(r"cannot read .*test.parquet: ", tmp_path / "a")
    parquet.write_table(pyarrow.table({"text": ["a"], "label": [0]}), tmp_path / "a" / "test.parquet")
    refused(r"test.parquet has the columns text, label, 0 of images and 1 of labels", tmp_path / "a")
