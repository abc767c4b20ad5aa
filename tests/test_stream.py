"""Images streamed from disk: which, how cropped, in what batches; broken files; restart at any round."""

import dataclasses
import io
import itertools
import logging
import re
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from conftest import get_config
from PIL import Image
from rounds import copied, train_and_look

from ist_jax import data, evaluate, main, train
from ist_jax.data import batches, stream
from ist_jax.data.encoded import EvalBatches, TrainBatches, read_batch
from ist_jax.data.images import Transform, cut_out
from ist_jax.runtime import inputs, record, setup

TRANSFORM = Transform(size=8, resize=10, area=(0.2, 1.0), aspect=(0.75, 1.3333), flip=True)
ENDINGS = ("JPEG", "jpg", "JPG", "jpeg", "PNG", "Jpeg")
TRUNCATED = {"train": "cat/3.jpeg", "val": "dog/1.jpg"}


def encode(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def colour(label, number):
    """Every image of a split has a colour of its own, by which it is known after JPEG and crops."""
    return np.array([40 * number + 10, 240 * label, 100], np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, 6 images each to train and 5 to test; a file of each split is truncated."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("val", 5)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                file = root / split / name / f"{number}.{ENDINGS[number]}"
                pixels = np.broadcast_to(colour(label, number), (32, 24 + 8 * number, 3))
                Image.fromarray(pixels).save(file, "PNG" if ENDINGS[number] == "PNG" else "JPEG")
            (root / split / name / "notes.txt").write_text("no image")
        broken = root / split / TRUNCATED[split]
        broken.write_bytes(broken.read_bytes()[:-8])
    return root


def identify(images):
    """(label, number) of images [..., H, W, 3] by their mean colours."""
    mean = np.asarray(images, float).mean((-3, -2))
    return np.round(mean[..., 1] / 240).astype(int), np.round((mean[..., 0] - 10) / 40).astype(int)


def make_batches(source, *, workers=(0, 1), sharing="all", seed=0):
    shards = batches.share_examples(seed, source.labels, 2, sharing, 1.0)
    return TrainBatches(source, shards, workers, TRANSFORM, seed=seed, local_steps=2, batch_size=3)


def make_feed(make, *, rounds=5, processes=0, starts=None):
    starts = starts or range(rounds + 1)
    return stream.StreamingFeed(make, 1, starts, processes=processes, put=lambda chunk: chunk)


class Counting:
    """A source of 12 solid images in memory that notes what is read."""

    def __init__(self, broken=()):
        self.labels = np.arange(12, dtype=np.int32) // 6
        self.broken, self.seen = broken, []

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.seen.append(index)
        label, number = divmod(index, 6)
        image = encode(np.broadcast_to(colour(label, number), (12, 12, 3)))
        return {"image": image[:-8] if index in self.broken else image, "label": label}

    def name(self, index):
        return f"image{index}"


# --- what is read ---------------------------------------------------------------------------------


def test_a_folder_is_read_by_class_whatever_the_ending(folder):
    dataset = data.open_data_set("image_folder", str(folder))
    assert dataset.encoded
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6
    assert dataset.test.labels.tolist() == [0] * 5 + [1] * 5
    assert dataset.train.name(9) == str(folder / "train" / "dog" / "3.jpeg")
    record = dataset.train[9]
    pixels = cut_out(Image.open(io.BytesIO(record["image"])), (0, 0, 32, 32), 8)
    assert (record["label"], *identify(pixels)) == (1, 1, 3)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), "has no folder train/ with a folder of images per class"),
        (("train/cat",), "has no folder test/ or val/ with"),
        (("train/cat", "val/cat"), "has 0 images in train/"),
        (("train/cat", "val/cat", "val/eel"), "has val/eel, a class without a folder in train/"),
    ],
)
def test_a_folder_that_cannot_work_is_one_clear_error(tmp_path, folders, message):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        data.open_data_set("image_folder", str(tmp_path))


def test_prepared_imagenet_is_read_without_decoding(tmp_path):
    import tensorflow_datasets as tfds

    real = tfds.builder("imagenet2012", data_dir=tmp_path, file_format="array_record")
    files = {f"n{i}.JPEG": encode(np.full((20, 30, 3), 20 * i, np.uint8)) for i in range(9)}
    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = real.version

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=real.info.features)

            def _split_generators(self, dl_manager):
                names = sorted(files)
                return {"train": self._generate_examples(names[:6]),
                        "validation": self._generate_examples(names[6:])}  # fmt: skip

            def _generate_examples(self, names):
                for i, name in enumerate(names):
                    yield name, {"image": io.BytesIO(files[name]), "label": 100 + i, "file_name": name}

    Imagenet2012(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    dataset = data.open_data_set("imagenet2012", str(tmp_path))
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (6, 3, 1000)
    for i in range(6):
        assert dataset.train[i]["image"] == files[dataset.train.name(i)]
        assert dataset.train[i]["label"] == dataset.train.labels[i]
    chunk = next(iter(evaluation_of(dataset.test, processes=1)))  # its records are opened anew elsewhere
    levels = np.sort(np.asarray(chunk["image"], int).mean((0, 1, 3, 4, 5)))
    np.testing.assert_allclose(levels, [120, 140, 160], atol=2)


def test_rounds_are_of_the_examples_that_sets_in_memory_draw():
    source = Counting()
    feed = make_feed(make_batches(source, sharing="disjoint"))
    make = make_batches(source, sharing="disjoint")
    for round_index in range(5):
        drawn = batches.train_indices(0, round_index, make.shards, local_steps=2, batch_size=3)
        chunk = feed(round_index)
        assert chunk.indices.shape == (1, 2, 2, 3)
        labels, numbers = identify(chunk.data["image"][0][chunk.indices[0]])
        assert np.array_equal(labels * 6 + numbers, drawn)
        assert np.array_equal(chunk.data["label"][0][chunk.indices[0]], drawn // 6)


def test_a_longer_round_is_of_what_shorter_ones_would_read():
    starts, make = [0, 1, 4, 5], make_batches(Counting())
    feed, short = make_feed(make, starts=starts), make_feed(make_batches(Counting()))
    each = [short(index) for index in range(5)]
    for index, (first, last) in enumerate(itertools.pairwise(starts)):
        chunk = feed(index)
        assert chunk.indices.shape == (1, 2, 2 * (last - first), 3)
        assert feed.spec_of(2 * (last - first))["image"].shape == chunk.data["image"].shape
        for name in ("image", "label"):
            parts = [own.data[name][0][own.indices[0]] for own in each[first:last]]
            assert np.array_equal(chunk.data[name][0][chunk.indices[0]], np.concatenate(parts, axis=1))
    feed.close()


def test_every_position_has_a_crop_of_its_own():
    class OneImage(Counting):
        def __getitem__(self, index):
            pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
            return {"image": encode(np.asarray(image)), "label": 0}

    feed = make_feed(make_batches(OneImage()), rounds=2)
    images = [image.tobytes() for r in range(2) for image in feed(r).data["image"][0]]
    assert len(set(images)) == len(images) == 24


def test_chunks_are_cut_by_device():
    two = stream.StreamingFeed(make_batches(Counting()), 2, range(6), processes=0, put=lambda chunk: chunk)
    one = make_feed(make_batches(Counting()))
    both, all_ = two(0), one(0)
    assert both.indices.shape == (2, 1, 2, 3)
    assert {name: x.shape for name, x in both.data.items()} == {name: x.shape for name, x in two.spec.items()}
    for name in ("image", "label"):
        parts = np.stack([both.data[name][d][both.indices[d]] for d in range(2)])
        assert np.array_equal(parts[:, 0], all_.data[name][0][all_.indices[0]])


def test_a_process_reads_for_its_own_workers_alone():
    source, one = Counting(), make_feed(make_batches(Counting()))(0)
    own = stream.StreamingFeed(
        make_batches(source, workers=[1]), 2, [0, 1], processes=0, put=lambda chunk: chunk
    )
    chunk = own(0)
    assert len(source.seen) == 2 * 3
    assert np.array_equal(chunk.data["image"][1], one.data["image"][0, 6:])
    plan = batches.eval_batches(12, 2, 2)
    whole, part = (EvalBatches(source, plan, devices, TRANSFORM) for devices in ([0, 1], [1]))
    for row, (all_, here) in enumerate(zip(
        *(stream.StreamingEvaluation(make, processes=0, put=lambda chunk: chunk) for make in (whole, part)),
        strict=True,
    )):  # fmt: skip
        assert np.array_equal(here["label"][1], all_["label"][1])
        assert np.array_equal(all_["label"][:, 0], plan.indices[:, row] // 6)


# --- restart --------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [0, 2])
def test_any_round_can_be_the_first_and_processes_change_nothing(folder, processes):
    source = data.open_data_set("image_folder", str(folder), {"data.in_memory": 0}).train
    wanted = [make_feed(make_batches(source))(r).data for r in range(3)]
    feed = make_feed(make_batches(source), processes=processes)
    order = (1, 2, 0, 1) if processes == 0 else (1, 2)
    for round_index in order:
        got = feed(round_index).data
        for name in ("image", "label"):
            assert np.array_equal(got[name], wanted[round_index][name])
    feed.close()
    assert not np.array_equal(wanted[0]["image"], wanted[1]["image"])
    other = make_feed(make_batches(source, seed=1))(0).data
    assert not np.array_equal(other["image"], wanted[0]["image"])


def test_no_more_is_read_than_this_round_and_the_next():
    source = Counting()
    feed = make_feed(make_batches(source), rounds=9)
    wanted = [feed._make.examples(number)[1].tolist() for number in range(4 * 6, 4 * 8)]
    feed(6)
    time.sleep(0.5)  # time enough to read on
    assert source.seen == [index for batch in wanted for index in batch]
    feed.close()
    source.seen.clear()
    feed = make_feed(make_batches(source), rounds=1)
    feed(0)
    time.sleep(0.2)
    assert len(source.seen) == 12  # nothing beyond the last round


def test_memory_holds_the_round_in_use_the_next_and_one_that_is_handed_over():
    source = Counting()
    make = dataclasses.replace(make_batches(source), transform=TRANSFORM._replace(size=128, resize=128))
    chunk = 12 * 128 * 128 * 3
    make_feed(make, rounds=1)(0)  # imports
    tracemalloc.start()
    feed, held = make_feed(make, rounds=12), None
    for round_index in range(12):
        held = feed(round_index)
        time.sleep(0.05)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held.data["image"].nbytes == chunk
    assert 2 * chunk < peak < 4.5 * chunk  # and the batch that is being decoded, a quarter, twice


SCRIPT = """
import os
import signal
import sys
import time
from pathlib import Path
import numpy as np
from ist_jax import data
from ist_jax.runtime import signals
from ist_jax.data import encoded, images, stream
if __name__ == "__main__":
    source = data.open_data_set("image_folder", sys.argv[1]).train
    transform, shards = images.Transform(8, 8, (0.5, 1.0), (1.0, 1.0), True), [np.array([0, 1, 2], np.int32)]
    make = encoded.TrainBatches(source, shards, [0], transform, seed=0, local_steps=2, batch_size=3)
    for rounds in (9, 1):  # stopped early, and read to its end
        feed = stream.StreamingFeed(make, 1, range(rounds + 1), processes=1, put=lambda chunk: chunk)
        print(feed(0).data["image"].shape)
        if sys.argv[2:] == ["left"]:
            os._exit(0)
        with signals.handled(deferred=True) as request:
            os.killpg(0, signal.SIGTERM)
            print(len([feed(index) for index in range(1, rounds)]), request.signum)
        feed.close()
    deadline = time.monotonic() + 60
    while "/dev/shm/psm_" in Path("/proc/self/maps").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)  # a thread of grain's frees the shared memory
    time.sleep(0.5)
"""


def run_script(*arguments):
    """In a process group of its own; waits for all of its processes, which share the output."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)


@pytest.mark.slow
def test_processes_read_on_after_a_signal_to_all_and_leave_nothing_behind(folder):
    done = run_script(folder)
    shape = "(1, 6, 8, 8, 3)"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{shape}\n8 15\n{shape}\n0 15\n", "")


def test_processes_end_with_a_parent_that_does_not_clean_up(folder):
    done = run_script(folder, "left")
    assert done.returncode == 0, done.stderr


def test_a_batch_draws_the_indices_of_its_worker_alone(monkeypatch):
    drawn, real = set(), batches._epoch_order
    monkeypatch.setattr(batches, "_epoch_order", lambda *a: drawn.add(a[1]) or real(*a))
    make = make_batches(Counting())
    _, worker, _ = make.place(0)
    make.examples(0)
    assert drawn == {worker}


# --- broken files ---------------------------------------------------------------------------------


def test_the_next_readable_example_of_the_shard_stands_in():
    shard = np.array([1, 4, 5, 9, 11], np.int32)
    crops = [TRANSFORM.evaluation] * 4
    got = read_batch(Counting(broken=(4, 5, 11)), shard, np.array([4, 5, 11, 1]), crops)
    assert got["skipped"].tolist() == [2, 1, 1, 0]
    labels, numbers = identify(got["image"])
    assert (labels * 6 + numbers).tolist() == [9, 9, 1, 1]  # behind the last one, the first
    assert got["label"].tolist() == [1, 1, 0, 0]
    with pytest.raises(OSError, match="5 images in a row cannot be read, from image9 on"):
        read_batch(Counting(broken=range(12)), shard, np.array([9]), crops[:1])


BLACK = encode(np.zeros((9, 9, 3), np.uint8))


@pytest.mark.parametrize("content", [b"", b"no image", BLACK[:-8], BLACK[:99]])
def test_whatever_is_wrong_with_a_file_it_is_replaced(content, monkeypatch):
    read = Counting.__getitem__
    monkeypatch.setattr(
        Counting, "__getitem__", lambda self, i: {"image": content} if i == 3 else read(self, i)
    )
    got = read_batch(Counting(), np.arange(12), np.array([3]), [TRANSFORM.evaluation])
    assert got["skipped"].tolist() == [1]


def test_unreadable_images_are_named_once_and_counted(folder, caplog):
    source = data.open_data_set("image_folder", str(folder), {"data.in_memory": 0}).train
    feed = make_feed(make_batches(source), rounds=4)  # two epochs for every worker
    with caplog.at_level(logging.WARNING):
        for round_index in range(4):
            feed(round_index)
    assert caplog.messages == [f"cannot read image {folder}/train/{TRUNCATED['train']} (1 so far)"]


def test_a_reader_that_fails_is_heard_of():
    feed = make_feed(make_batches(Counting(broken=range(12))))
    with pytest.raises(OSError, match="12 images in a row cannot be read"):
        feed(0)


# --- evaluation -----------------------------------------------------------------------------------


def evaluation_of(source, *, batch_size=4, devices=1, processes=0):
    plan = batches.eval_batches(len(source), batch_size, devices)
    make = EvalBatches(source, plan, range(devices), TRANSFORM)
    return stream.StreamingEvaluation(make, processes=processes, put=lambda chunk: chunk)


@pytest.mark.parametrize("devices", [1, 2])
def test_evaluation_counts_every_image_once_but_the_unreadable(folder, devices, caplog):
    source = data.open_data_set("image_folder", str(folder), {"data.in_memory": 0}).test
    evaluation = evaluation_of(source, devices=devices)
    with caplog.at_level(logging.WARNING):
        chunks = list(evaluation)
    assert {name: x.shape for name, x in chunks[0].items()} == {
        name: x.shape for name, x in evaluation.spec.items()
    }
    images, labels, weights = (
        np.concatenate([chunk[name].reshape(-1, *chunk[name].shape[3:]) for chunk in chunks])
        for name in ("image", "label", "weight")
    )
    found = [(a, b) for a, b, w in zip(*identify(images), weights, strict=True) if w]
    assert sorted(found) == [(a, b) for a in range(2) for b in range(5) if (a, b) != (1, 1)]
    assert np.array_equal(identify(images)[0], labels)
    first = chunks[0]["label"][0, 0]
    assert 0 < first.sum() < len(first)  # both classes in a batch
    assert caplog.messages == [f"cannot read image {folder}/val/{TRUNCATED['val']} (1 so far)"]


# --- whole runs -----------------------------------------------------------------------------------


def tiny(folder, **overrides):
    config = get_config("resnet", "imagenet", **{
        "data.name": "image_folder", "data.dir": str(folder), "data.size": 8, "data.resize": 10,
        "data.processes": 0, "model.sections": (1, 3), "model.width": 4, "partition.sections": (2,),
        "partition.min_units": 0, "partition.warmup_epochs": 0.0, "model.block": "basic",
        "model.stem": "small",
        "num_workers": 2, "local_steps": 2, "batch_size": 3, "eval_batch_size": 4, "eval_every": 0,
    })  # fmt: skip
    config.update({"rounds": 3})
    config.update_from_flattened_dict(overrides)
    return config


@pytest.mark.slow
def test_a_folder_trains_and_a_run_repeats_from_any_round(folder, tmp_path, capsys, monkeypatch):
    summary, first, start = train_and_look(tiny(folder), tmp_path / "run")
    assert "22 images of 2 classes" in summary["data"]
    assert np.isfinite(summary["train_loss"])

    def fed_anew():
        feed = inputs.feed_rounds(first.inputs, first.devices, first.schedule.starts)
        return first._replace(feed=feed, turn=setup.turn_maker(tiny(folder), feed, first.schedule))

    run, fresh = fed_anew(), fed_anew()
    state, _ = train.train_round(run, start, 0)
    kept = copied(state, run)  # a round uses its state up
    straight, _ = train.train_round(run, state, 1)
    resumed, _ = train.train_round(fresh, kept, 1)
    for path, leaf in straight.params.items():
        assert np.array_equal(leaf, resumed.params[path])
    image = folder / "val" / "dog" / "4.PNG"
    assert evaluate.main(["evaluate", f"--workdir={tmp_path / 'run'}", str(image)]) == 0
    out = capsys.readouterr().out
    assert f"test accuracy {summary['test_accuracy']:.2%}" in out
    assert "(9 examples, batch statistics)" in out  # one of ten cannot be read
    assert re.search(r"4.PNG: (cat|dog) [\d.]+%, (cat|dog) [\d.]+%", out)

    def read(self):
        raise AssertionError("an evaluation set is being read")

    monkeypatch.setattr(stream.StreamingEvaluation, "__iter__", read)
    assert record.make_ledgers(run)["ist"]["rows"]  # the ledger reads no image


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.dir="], "data.dir='' has no folder train/"),
        (["--config.data.size=300"], "data.size=300 and data.resize=256"),
        (["--config.data.crop_area=(0.5,1.5)"], "data.crop_area=(0.5, 1.5); set it to two ascending numbers"),
        (["--config.data.crop_aspect=(1.0,)"], "data.crop_aspect=(1.0,)"),
        (["--config.data.processes=-1"], "data.processes=-1"),
        (["--config.data.pad=4"], "data.pad=4"),
        (["--config.data.validation=0.1"], "data.validation=0.1 is not for streamed images"),
        (["--config.data.std=(0.0,1.0,1.0)"], "data.std=(0.0, 1.0, 1.0)"),
        (["--config.data.processes=1000000", "--config.num_workers=1"], "data.processes=1000000 need"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(flags, message, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = "--config=" + str(get_config.__globals__["ROOT"] / "configs/resnet.py:imagenet")
    fixed = ["--config.data.name=image_folder", f"--config.data.dir={folder}", "--config.model.width=1"]
    with pytest.raises(SystemExit) as stop:
        main.main(["main", config, *fixed, *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.slow
def test_any_config_streams(folder):
    own = {"data.name": "image_folder", "data.dir": str(folder), "data.size": 8, "data.in_memory": 0}
    config = get_config("mlp", **own, **{"data.processes": 0})
    run = setup.set_up(config)
    assert run.inputs.task.example[0].shape == (1, 8, 8, 3)
    assert data.facts("image_folder", own).encoded == run.inputs.dataset.encoded
