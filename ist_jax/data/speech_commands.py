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
from pathlib import Path

import numpy as np
from scipy import signal
from scipy.io import wavfile
from tqdm import tqdm

from ist_jax.data import ArraySource, DataSet

log = logging.getLogger(__name__)

RATE = 16_000  # samples per second, and per clip
BANDS = 128
_FFT = 2048  # samples per frame
_HOP = 512  # samples between frames: 32 frames a clip
_FLOOR = 1e-10  # power below which the logarithm is cut off
_TEST_FRACTION = 0.2
_WHICH_SET_BITS = 27  # of the hash, used by the data set's own split


def load(directory: str) -> DataSet:
    """All words found in a folder, split by speaker: the same speaker is never on both sides.

    The features are computed once and cached in the folder, where it can be written.

    Args:
      directory: holds a folder of WAV files per word; names that begin with '_' are not words.

    Raises:
      ValueError: there is no such folder, or no readable clip in it.
    """
    root = Path(directory)
    there = sorted(root.iterdir()) if directory and root.is_dir() else []
    words = [p.name for p in there if p.is_dir() and p.name[0] not in "_."]
    files = [
        (path, label) for label, word in enumerate(words) for path in sorted((root / word).glob("*.wav"))
    ]
    if not files:
        raise ValueError(
            f"data.dir={directory!r} has no folder of WAV files per word; set config.data.dir to the "
            "unpacked Speech Commands archive"
        )
    features, readable = _cached_features(root, [path for path, _ in files])
    if not readable.any():
        raise ValueError(f"data.dir={directory!r} holds no readable clip")
    if not readable.all():
        bad = [str(path) for (path, _), good in zip(files, readable, strict=True) if not good]
        log.warning("%d of %d clips could not be read: %s", len(bad), len(files), ", ".join(bad[:10]))
    labels = np.array([label for _, label in files], np.int32)
    test = np.array([is_test(path.name) for path, _ in files])
    kept = int(readable.sum())
    return DataSet(
        description=f"speech_commands: {kept:,} clips of {len(words)} words in {directory}, split by speaker",
        train=ArraySource(features[readable & ~test], labels[readable & ~test]),
        test=ArraySource(features[readable & test], labels[readable & test]),
        classes=tuple(words),
    )


def _cached_features(root: Path, files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, 128, 32, 1], readable [N]), from the cache if it is of these very files."""
    stamps = "".join(f"{path.relative_to(root)} {path.stat().st_size}\n" for path in files)
    cache = root / f"_log_mel_{hashlib.sha256(stamps.encode()).hexdigest()[:16]}.npz"
    if cache.is_file():
        with np.load(cache) as stored:
            return stored["features"], stored["readable"]
    clips = (read_clip(path) for path in tqdm(files, desc="log-mel features", unit="clip", disable=None))
    features = [None if clip is None else log_mel(clip) for clip in clips]
    readable = np.array([x is not None for x in features])
    empty = np.zeros((BANDS, 1 + RATE // _HOP), np.float32)
    stacked = np.stack([empty if x is None else x for x in features])[..., None]
    if os.access(root, os.W_OK):
        part = cache.with_suffix(".part.npz")
        np.savez(part, features=stacked, readable=readable)
        part.replace(cache)
    else:
        log.info("%s cannot be written, so its features are computed in every run", root)
    return stacked, readable


def read_clip(path: Path) -> np.ndarray | None:
    """One second of sound, float32 [16000] in -1 to 1, padded or cut; None if the file cannot be read."""
    try:
        rate, samples = wavfile.read(path)
    except (ValueError, OSError, EOFError):
        return None
    if rate != RATE or samples.ndim != 1 or samples.dtype != np.int16 or not len(samples):
        return None
    clip = samples[:RATE].astype(np.float32) / 2**15
    return np.pad(clip, (0, RATE - len(clip)))


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
    window = signal.get_window("hann", _FFT)
    padded = np.pad(clip, _FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    return np.log(np.maximum(mel_filters() @ power.T, _FLOOR)).astype(np.float32)


@functools.cache
def mel_filters() -> np.ndarray:
    """Triangular filters [128, 1025] of equal area, evenly spaced on Slaney's mel scale from 0 to 8 kHz."""
    edges = _mel_to_hertz(np.linspace(0.0, _hertz_to_mel(RATE / 2), BANDS + 2))
    bins = np.linspace(0.0, RATE / 2, _FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))[:, None]


# Slaney's scale: linear below 1 kHz (15 mel), logarithmic above.
_STEP = np.log(6.4) / 27.0


def _hertz_to_mel(hertz: float) -> float:
    return 15.0 + np.log(hertz / 1000.0) / _STEP if hertz >= 1000.0 else hertz * 3.0 / 200.0


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp(_STEP * (mel - 15.0)))
