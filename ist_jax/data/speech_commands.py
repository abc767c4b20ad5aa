"""Google's Speech Commands: a folder of WAV files per word, as log-mel features.

References:
  Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, arXiv:1804.03209, 2018.
  Yuan et al., arXiv:1910.02120, 2019: 128 mel bands of one-second clips, flattened to 4,096 features.
"""

import functools
import hashlib
import logging
import os
import re
import uuid
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ist_jax.data.source import ArraySource, DataSet, Entry, Facts
from ist_jax.key import Key, Options

log = logging.getLogger(__name__)

RATE = 16_000  # samples per second, and per clip
BANDS = 128
_FFT = 2048  # samples per frame
_HOP = 512  # samples between frames: 32 frames a clip
_FLOOR = 1e-10  # power below which the logarithm is cut off
_TEST_FRACTION = 0.2
_WHICH_SET_BITS = 27  # of the hash, used by the data set's own split
OPTIONS = {
    "data.words": Key((), "of Speech Commands: words to tell apart; (): all that are there", kind=str),
    "data.clip_length": Key(
        "pad",
        "of Speech Commands: clips that are not 1 s long; 'pad': are padded or cut, 'drop': left out",
        choices=("pad", "drop"),
    ),
}


def facts(options: Options) -> Facts:
    """Of the whole archive; how many clips there are of some words, or of 1 s exactly, is not known."""
    words, whole = set(options["data.words"]), options["data.clip_length"] == "pad"
    num_train = 84_663 if whole and not words else None  # about four fifths of the archive's 105,829 clips
    return Facts((BANDS, 1 + RATE // _HOP, 1), len(words) or 35, num_train)


def load(directory: str, options: Options) -> DataSet:
    """The words of a folder, split by speaker: the same speaker is never on both sides.

    The features are computed once and cached in the folder, where it can be written.

    Args:
      directory: holds a folder of WAV files per word; names that begin with '_' are not words.
      options: values of `OPTIONS`. Labels follow the alphabet. 'pad': short clips are padded with silence,
        long ones cut; 'drop': they are left out, as in the released code of IST.

    Raises:
      ValueError: there is no such folder, a word is not in it, or it has no clip to use.
    """
    words, clip_length = options["data.words"], options["data.clip_length"]
    root = Path(directory)
    there = sorted(root.iterdir()) if directory and root.is_dir() else []
    found = [p.name for p in there if p.is_dir() and p.name[0] not in "_." and any(p.glob("*.wav"))]
    if not found:
        raise ValueError(
            f"data.dir={directory!r} has no folder of WAV files per word; set config.data.dir to the "
            "unpacked Speech Commands archive"
        )
    if unknown := sorted(set(words) - set(found)):
        raise ValueError(
            f"data.words names {', '.join(unknown)}, but {directory} has {', '.join(found)}; set "
            "config.data.words to some of them, or to () for all"
        )
    chosen = sorted(set(words)) or found
    files = [sorted((root / word).glob("*.wav")) for word in chosen]
    paths = [path for own in files for path in own]
    with tqdm(total=len(paths), desc="log-mel features", unit="clip", disable=None) as bar:
        parts = [_cached_features(root, own, bar) for own in files]
    features, samples = map(np.concatenate, zip(*parts, strict=True))
    used = samples > 0 if clip_length == "pad" else samples == RATE
    _report_left_out(paths, samples, clip_length)
    if not used.any():
        raise ValueError(f"data.dir={directory!r} holds no clip that can be used")
    labels = np.repeat(np.arange(len(chosen), dtype=np.int32), list(map(len, files)))
    held_out = np.array([is_test(path.name) for path in paths])
    train, test = used & ~held_out, used & held_out
    if not train.any() or not test.any():
        lacking = "test on" if train.any() else "train on"
        raise ValueError(
            f"data.dir={directory!r} has no speaker to {lacking}: a fifth of the speakers, by the hash of "
            "their names, are for testing; add clips of further speakers"
        )
    clips = f"{int(used.sum()):,} clips of {len(chosen)} words in {directory}"
    sources = [ArraySource(features[side], labels[side]) for side in (train, test)]
    return DataSet(f"speech_commands: {clips}, split by speaker", sources[0], sources[1], tuple(chosen))


def _report_left_out(paths: list[Path], samples: np.ndarray, clip_length: str) -> None:
    bad = [str(path) for path, count in zip(paths, samples, strict=True) if not count]
    if bad:
        log.warning("%d of %d clips could not be read: %s", len(bad), len(paths), ", ".join(bad[:10]))
    other = int(((samples > 0) & (samples != RATE)).sum())
    if other:
        done = "padded or cut" if clip_length == "pad" else "left out"
        log.info("%d of %d clips are not one second long and are %s", other, len(paths), done)


def _cached_features(root: Path, files: list[Path], bar: tqdm) -> tuple[np.ndarray, np.ndarray]:
    """A word's features [N, 128, 32, 1] and samples [N], from the cache if it is of these very files."""
    stamps = "".join(f"{path.relative_to(root)} {path.stat().st_size}\n" for path in files)
    stamp = hashlib.sha256(stamps.encode()).hexdigest()[:16]
    cache = root / f"_log_mel_{files[0].parent.name}_{stamp}.npz"
    if (stored := _read_cache(cache)) is not None:
        bar.update(len(files))
        return stored
    features = np.zeros((len(files), BANDS, 1 + RATE // _HOP, 1), np.float32)
    samples = np.zeros(len(files), np.int32)
    for i, path in enumerate(files):
        if (sound := read_clip(path)) is not None:
            features[i, ..., 0], samples[i] = log_mel(to_one_second(sound)), len(sound)
        bar.update()
    if os.access(root, os.W_OK):
        part = cache.with_suffix(f".{uuid.uuid4().hex}.part")  # other processes may write theirs
        with part.open("wb") as file:
            np.savez(file, features=features, samples=samples)
        part.replace(cache)
    else:
        log.info("%s cannot be written, so its features are computed in every run", root)
    return features, samples


def _read_cache(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return stored["features"], stored["samples"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged and is made anew: %s", path, error)
        return None


def read_clip(path: Path) -> np.ndarray | None:
    """A recording, float32 [samples] in -1 to 1; None if the file cannot be read or is of another kind."""
    from scipy.io import wavfile  # slow to import

    try:
        rate, samples = wavfile.read(path)
    except (ValueError, OSError, EOFError):
        return None
    if rate != RATE or samples.ndim != 1 or samples.dtype != np.int16 or not len(samples):
        return None
    return samples.astype(np.float32) / 2**15


def to_one_second(sound: np.ndarray) -> np.ndarray:
    """float32 [16000]: cut, or padded with silence at its end."""
    return np.pad(sound[:RATE], (0, max(0, RATE - len(sound))))


def is_test(name: str) -> bool:
    """Whether a clip is held out: one speaker in five, named before `_nohash_`.

    The rule is the data set's own `which_set` (SHA-1 of the speaker), but on further bits of the hash, so
    that it splits any part of the archive, its official test set included.
    """
    speaker = re.sub(r"_nohash_.*$", "", name)
    digest = int(hashlib.sha1(speaker.encode()).hexdigest(), 16)
    return (digest >> _WHICH_SET_BITS) % 2**_WHICH_SET_BITS < _TEST_FRACTION * 2**_WHICH_SET_BITS


def log_mel(clip: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram.

    Args:
      clip: float32 [16000].

    Returns:
      float32 [128, 32], natural logarithm of power: bands x frames.
    """
    from scipy import signal  # slow to import

    window = signal.get_window("hann", _FFT)
    padded = np.pad(clip, _FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    return np.log(np.maximum(mel_filters() @ power.T, _FLOOR)).astype(np.float32)


@functools.cache
def mel_filters() -> np.ndarray:
    """Triangular filters [128, 1025] of equal area, evenly spaced on Slaney's mel scale from 0 to 8 kHz.

    It is linear below 1 kHz, which is 15 mel, and logarithmic above.
    """
    step = np.log(6.4) / 27.0
    mel = np.linspace(0.0, 15.0 + np.log(RATE / 2 / 1000.0) / step, BANDS + 2)
    edges = np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp(step * (mel - 15.0)))
    bins = np.linspace(0.0, RATE / 2, _FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))[:, None]


SPEECH_COMMANDS = Entry(load, facts, OPTIONS)
