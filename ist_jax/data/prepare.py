"""Downloads and prepares an image set of tensorflow-datasets, without TensorFlow.

python -m ist_jax.data.prepare NAME [--dir=DIR]

DIR is what `--config.data.dir` will be; without it, TFDS's own folder. Progress bars are TFDS's.
"""

import importlib.util
import io
import sys
from collections.abc import Iterator
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
      OSError: the set could not be downloaded or prepared; nothing else is changed.
    """
    builder = tfds_images.make_builder(name, directory)
    _do_without_tensorflow(builder)
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever a download can fail by: no network, a mirror's error, a full disk
        text = f"{type(error).__name__}: {errors.one_line(error)}"
        raise OSError(f"{name} cannot be prepared in {builder.data_dir} ({text})") from error
    return str(builder.data_dir)


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
    try:
        folder = prepare(names[0], values.dir)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{names[0]} is prepared in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
