"""Downloads and prepares an image set of tensorflow-datasets, without TensorFlow.

python -m ist_jax.data.prepare NAME [--dir=DIR]

DIR is what `--config.data.dir` will be; without it, TFDS's own folder. Progress bars are TFDS's.
"""

import contextlib
import importlib.util
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from ist_jax import cli, errors
from ist_jax.data import tfds_images

USAGE = f"python -m ist_jax.data.prepare NAME [--dir=DIR]; NAME is one of {', '.join(tfds_images.SETS)}"


def prepare(name: str, directory: str) -> str:
    """Downloads and prepares a set; returns the folder in which it then is.

    Args:
      name: one of `tfds_images.SETS`.
      directory: TFDS's data_dir; '' for its default.

    Raises:
      OSError: the set could not be downloaded or prepared; the folder is as it was.
    """
    builder = tfds_images.make_builder(name, directory)
    _do_without_tensorflow(builder)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # every try of a download again
    if not sys.stderr.isatty():
        tfds_images.hide_progress()
    root = Path(builder.data_dir).parents[1]
    try:
        with _undone_on_failure([root / name, root / "downloads"]), contextlib.redirect_stdout(None):
            builder.download_and_prepare()
    except Exception as error:  # whatever a download can fail by: no network, a mirror's error, a full disk
        text = f"{type(error).__name__}: {errors.one_line(error)}"
        raise OSError(f"{name} cannot be prepared in {builder.data_dir} ({text})") from error
    return str(builder.data_dir)


@contextlib.contextmanager
def _undone_on_failure(folders: Sequence[Path]) -> Iterator[None]:
    """Removes what has come to the folders, and those that were made for them, if it ends in an exception."""

    def paths() -> list[Path]:
        """The innermost first."""
        inside = [path for folder in folders for path in (folder, *folder.rglob("*"))]
        around = {path for folder in folders for path in folder.parents}
        return sorted((p for p in {*inside, *around} if p.exists()), key=lambda p: len(p.parts), reverse=True)

    before = set(paths())
    try:
        yield
    except BaseException:
        for path in paths():
            if path not in before:
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _do_without_tensorflow(builder: tfds_images.Builder) -> None:
    """Stands in for what TFDS takes from TensorFlow to prepare these sets: opening files, and writing PNG.

    This process alone is changed. The module of the builder reads its raw files by `tf.io.gfile.GFile`, and
    the builder hands on images as arrays, which TensorFlow would encode: they are handed on as PNG.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        return
    stand_in = SimpleNamespace(io=SimpleNamespace(gfile=SimpleNamespace(GFile=open)))
    for kind in type(builder).__mro__:
        module: Any = sys.modules[kind.__module__]
        if "tensorflow_datasets.core" not in kind.__module__ and hasattr(module, "tf"):
            module.tf = stand_in
    generate = builder._generate_examples

    def generate_encoded(*args: object, **kwargs: object) -> Iterator[tuple]:
        for key, example in generate(*args, **kwargs):
            yield key, example | {"image": _encode(example["image"])}

    builder._generate_examples = generate_encoded


def _encode(image: object) -> object:
    """An array uint8 [H, W, C] as PNG; what is encoded already, as it is."""
    if not isinstance(image, np.ndarray):
        return image
    content = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(content, "PNG")
    return content.getvalue()


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("dir", "", "folder of tensorflow-datasets; default: its own", flag_values=values)
    names = cli.parse(values, argv, USAGE, required=[], more=True)
    if len(names) != 1 or names[0] not in tfds_images.SETS:
        wrong = f"{' '.join(names)!r} is no set that can be prepared" if names else "NAME is missing"
        hint = errors.did_you_mean(names[0], tfds_images.SETS) if names else ""
        raise errors.fail(f"{wrong}; {hint}usage: {USAGE}")
    there = errors.contents(Path(values.dir)) if values.dir else ""
    beside = f", beside {there}" if there else ""
    place = f" in {values.dir}{beside}" if values.dir else ""
    print(f"preparing {names[0]}{place}", file=sys.stderr)
    try:
        folder = prepare(names[0], values.dir)
    except KeyboardInterrupt:
        print("stopped; nothing is left of it", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{names[0]} is prepared in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
