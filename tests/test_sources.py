"""The data sets on tiny files made here, and on real data where it lies beside the checkout."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, get_config
from scipy.io import wavfile

from ist_jax import data, train
from ist_jax.data import batches, prepare, speech_commands
from ist_jax.runtime import inputs
from ist_jax.runtime.setup import wanted_data

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data beside the checkout")


def write_clip(path, samples, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, samples.astype(np.int16))


def open_speech(folder, words=(), clip_length="pad"):
    given = {"data.words": words, "data.clip_length": clip_length}
    return data.open_data_set("speech_commands", str(folder), given)


@pytest.fixture
def speech_folder(tmp_path):
    rng = np.random.default_rng(0)
    for word in ("yes", "no"):
        for speaker in range(40):
            write_clip(tmp_path / word / f"{speaker:08x}_nohash_0.wav", rng.normal(size=16_000) * 1000)
    write_clip(tmp_path / "_background_noise_" / "hum.wav", rng.normal(size=50_000))
    return tmp_path


def test_speech_is_split_by_speaker_and_noise_is_no_word(speech_folder):
    dataset = open_speech(speech_folder)
    assert dataset.classes == ("no", "yes")
    train_set, test_set = data.load(dataset.train), data.load(dataset.test)
    assert train_set["image"].shape[1:] == (128, 32, 1)
    assert train_set["image"].dtype == np.float32
    assert len(train_set["label"]) + len(test_set["label"]) == 80
    # both clips of a speaker fall on the same side, so the sides hold as many of each word
    assert np.bincount(test_set["label"]).tolist() == [len(test_set["label"]) // 2] * 2
    assert 0 < len(test_set["label"]) < 40


def test_speech_features_are_cached_and_renewed_when_files_change(speech_folder, monkeypatch):
    first = open_speech(speech_folder).train
    calls = []
    real = speech_commands.log_mel
    monkeypatch.setattr(speech_commands, "log_mel", lambda clip: calls.append(1) or real(clip))
    again = open_speech(speech_folder).train
    assert not calls
    assert np.array_equal(first.image, again.image)
    write_clip(speech_folder / "yes" / "ffff_nohash_0.wav", np.ones(16_000))
    open_speech(speech_folder)
    assert len(calls) == 41  # of the word that changed


def test_a_damaged_cache_of_features_is_made_anew(speech_folder, caplog):
    wanted = open_speech(speech_folder).train.image
    (cache, *_) = speech_folder.glob("_log_mel_*.npz")
    cache.write_bytes(cache.read_bytes()[:100])
    assert np.array_equal(open_speech(speech_folder).train.image, wanted)
    assert f"{cache} is damaged and is made anew" in caplog.text
    assert not list(speech_folder.glob("*.part"))


def test_a_folder_without_a_speaker_to_test_on_is_refused(speech_folder, monkeypatch):
    for is_test, side in ((lambda name: False, "test on"), (lambda name: True, "train on")):
        monkeypatch.setattr(speech_commands, "is_test", is_test)
        with pytest.raises(ValueError, match=f"has no speaker to {side}"):
            open_speech(speech_folder)


def test_unreadable_clips_are_counted_and_named(speech_folder, caplog):
    (speech_folder / "yes" / "broken_nohash_0.wav").write_bytes(b"RIFF....WAVE")
    write_clip(speech_folder / "yes" / "slow_nohash_0.wav", np.zeros(8000), rate=8000)
    with caplog.at_level(logging.WARNING):
        dataset = open_speech(speech_folder)
    assert len(dataset.train) + len(dataset.test) == 80
    assert "2 of 82 clips could not be read" in caplog.text
    assert "broken_nohash_0.wav" in caplog.text


def test_short_clips_are_padded_and_long_ones_cut(tmp_path):
    write_clip(tmp_path / "short.wav", np.full(5000, 2**14))
    write_clip(tmp_path / "long.wav", np.full(20_000, 2**14))
    sounds = [speech_commands.read_clip(tmp_path / f"{name}.wav") for name in ("short", "long")]
    assert [len(sound) for sound in sounds] == [5000, 20_000]
    short, long = map(speech_commands.to_one_second, sounds)
    assert short.shape == long.shape == (16_000,)
    assert short.sum() == short[:5000].sum() == 5000 * 0.5
    assert long.min() == 0.5


def test_clips_of_another_length_are_kept_or_left_out_and_counted(speech_folder, caplog):
    for name, samples in (("short", 15_999), ("long", 16_001), ("exact", 16_000)):
        write_clip(speech_folder / "yes" / f"{name}_nohash_0.wav", np.ones(samples))
    sizes = {}
    for clip_length in ("pad", "drop", "pad"):  # the features are cached once for both
        caplog.clear()
        with caplog.at_level(logging.INFO):
            dataset = open_speech(speech_folder, clip_length=clip_length)
        sizes[clip_length] = len(dataset.train) + len(dataset.test)
        done = {"pad": "padded or cut", "drop": "left out"}[clip_length]
        assert f"2 of 83 clips are not one second long and are {done}" in caplog.text
    assert sizes == {"pad": 83, "drop": 81}


def test_words_are_chosen_and_unknown_ones_named(speech_folder):
    write_clip(speech_folder / "up" / "00ff_nohash_0.wav", np.ones(16_000))
    (speech_folder / "empty").mkdir()
    assert open_speech(speech_folder).classes == ("no", "up", "yes")
    dataset = open_speech(speech_folder, words=("yes", "no"))
    assert dataset.classes == ("no", "yes")
    assert len(dataset.train) + len(dataset.test) == 80
    assert set(dataset.train.label) == {0, 1}
    with pytest.raises(ValueError, match=r"data.words names left, right, but .* has no, up, yes; set config"):
        open_speech(speech_folder, words=("right", "yes", "left"))


def test_settings_reach_the_speech_folder(speech_folder, tmp_path):
    write_clip(speech_folder / "up" / "00ff_nohash_0.wav", np.ones(16_000))
    write_clip(speech_folder / "no" / "00ff_nohash_0.wav", np.ones(15_000))
    overrides = {"data.dir": str(speech_folder), "data.words": ("no", "yes"), "model.hidden": (8,)}
    config = get_config("mlp", "speech2", **overrides)
    opened = inputs.open_inputs(wanted_data(config))
    assert opened.dataset.classes == ("no", "yes")
    assert len(opened.train["label"]) + len(opened.test["label"]) == 80  # 'drop', as in the papers' code


def test_log_mel_is_librosas():
    # librosa 0.11.0: np.log(np.maximum(librosa.feature.melspectrogram(y=y, sr=16000), 1e-10))
    time = np.arange(16_000) / 16_000
    y = np.sin(2 * np.pi * 440 * time).astype(np.float32) * 0.5
    y += (
        np.sin(2 * np.pi * 3000 * time).astype(np.float32) * 0.1 * np.linspace(0, 1, 16_000, dtype=np.float32)
    )
    got = speech_commands.log_mel(y)
    wanted = {
        (0, 0): 0.07121572, (13, 5): -9.44930363, (14, 16): -7.95207357, (15, 31): 2.64208031,
        (40, 10): -18.84254265, (76, 20): -23.02585030, (127, 31): -7.92803574,
    }  # fmt: skip
    assert got.shape == (128, 32)
    for place, value in wanted.items():
        assert got[place] == pytest.approx(value, abs=1e-4)


def test_all_clips_of_a_speaker_are_on_one_side():
    names = [f"{speaker:08x}_nohash_{take}.wav" for speaker in range(500) for take in range(3)]
    sides = np.array([speech_commands.is_test(name) for name in names]).reshape(500, 3)
    assert (sides == sides[:, :1]).all()
    assert abs(sides[:, 0].mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 500)


def test_a_missing_speech_folder_is_one_clear_error(tmp_path):
    for directory in ("", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"config.data.dir"):
            open_speech(directory)


@pytest.mark.parametrize("name", ["mnist", "imagenet2012"])
def test_an_unprepared_set_says_what_to_run_and_downloads_nothing(name, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def prepare(*_, **__):
        raise AssertionError("a set is being prepared")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    command = re.escape(f"python -m ist_jax.data.prepare {name} --dir={tmp_path} fetches it")
    with pytest.raises(ValueError, match=f"no {name} in {tmp_path}; {command}"):
        data.open_data_set(name, str(tmp_path))
    assert not list(tmp_path.iterdir())
    for other in ("delicious", "bibtex", ".hidden"):
        (tmp_path / other).mkdir()
    with pytest.raises(
        ValueError, match=f"no {name} in {tmp_path}, which holds bibtex, delicious; {command}"
    ):
        data.open_data_set(name, str(tmp_path))
    with pytest.raises(ValueError, match=r"no files named train.txt .*, but holds bibtex, delicious; set"):
        data.open_data_set("delicious", str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("failure", [ConnectionError("no network"), KeyboardInterrupt()])
def test_a_download_that_fails_leaves_the_folder_as_it_was(failure, tmp_path, monkeypatch, capfd):
    import tensorflow_datasets as tfds

    for name in ("bibtex/train.txt", "tfds/downloads/manual/mine.tar", "tfds/cifar10/1.0.0/old"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    before = set(tmp_path.rglob("*"))

    def fail(builder, *_, **__):
        print("Downloading and preparing dataset")
        made = Path(builder.data_dir)
        for path in (made, *(made.parents[1] / "downloads" / name for name in ("a", "extracted/b"))):
            path.mkdir(parents=True)
            (path / "part.tmp").touch()
        raise failure

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    for folder, beside in (("tfds", ", beside cifar10, downloads"), ("new/tfds", "")):
        code = prepare.main(["prepare", "cifar10", f"--dir={tmp_path / folder}"])
        out, err = capfd.readouterr()
        first, last = err.splitlines()
        assert out == ""
        assert first == f"preparing cifar10 in {tmp_path / folder}{beside}"
        if isinstance(failure, KeyboardInterrupt):
            assert (code, last) == (130, "stopped; nothing is left of it")
        else:
            assert code == 1
            assert last.startswith("error: cifar10 cannot be prepared in")
            assert last.endswith("(ConnectionError: no network)")
        assert set(tmp_path.rglob("*")) == before


@needs_shared
def test_cifar10_is_read_by_index():
    dataset = data.open_data_set("cifar10", str(SHARED / "tfds"))
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (50_000, 10_000, 10)
    assert dataset.train[7]["image"].shape == (32, 32, 3)
    assert dataset.train[7]["image"].dtype == np.uint8
    labels = [dataset.test[i]["label"] for i in range(200)]
    assert set(labels) == set(range(10))


@needs_shared
def test_speech_of_real_clips_trains_above_chance(tmp_path):
    words = tmp_path / "words"  # the cache is written here, not beside the shared data
    words.mkdir()
    for word in (SHARED / "speech_commands").iterdir():
        (words / word.name).symlink_to(word)
    config = get_config("mlp", "speech2", **{"data.dir": str(words), "model.hidden": (64,)})
    config.update({"rounds": 20, "eval_every": 0})
    config.data.words = ("go", "no", "stop", "yes")
    config.optimizer.learning_rate = 0.05
    summary = train.train(config, tmp_path / "run")
    assert "600 clips of 4 words" in summary["data"]
    assert summary["test_accuracy"] > 0.45  # chance: 0.25


def test_disjoint_shards_cover_everything_once():
    labels = np.arange(103) % 10
    shards = batches.share_examples(0, labels, 4, "disjoint", 1.0)
    assert sorted(np.concatenate(shards)) == list(range(103))
    assert sorted(map(len, shards)) == [25, 26, 26, 26]


@pytest.mark.parametrize("concentration", [0.01, 0.5, 100.0])
def test_skewed_shards_cover_everything_once_and_are_skewed(concentration):
    labels = np.arange(5000) % 10
    shards = batches.share_examples(0, labels, 8, "skewed", concentration)
    assert sorted(np.concatenate(shards)) == list(range(5000))
    counts = np.array([np.bincount(labels[shard], minlength=10) for shard in shards])
    largest = (counts / counts.sum(0)).max(0).mean()  # of a class, with the worker that has most of it
    assert {0.01: largest > 0.9, 0.5: 0.3 < largest < 0.8, 100.0: largest < 0.2}[concentration]
    assert min(map(len, shards)) >= 1


def test_workers_draw_from_their_shards_alone():
    shards = batches.share_examples(0, np.arange(100) % 10, 4, "disjoint", 1.0)
    drawn = batches.train_indices(0, 2, shards, local_steps=5, batch_size=7)
    for shard, own in zip(shards, drawn, strict=True):
        assert set(own.ravel()) <= set(shard)
