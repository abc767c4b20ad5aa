"""CIFAR-10 as a folder of JPEGs of 256 pixels, to try streaming with real images but without ImageNet.

    python benchmarks/cifar_folder.py --data_dir=DIR --out=FOLDER [--train=3000] [--val=500]
    python -m ist_jax.main --config=configs/resnet.py:imagenet \
        --config.data.name=image_folder --config.data.dir=FOLDER ...

DIR is tensorflow-datasets' data_dir. FOLDER gets train/<class>/*.JPEG and val/<class>/*.JPEG.
"""

import sys
from pathlib import Path

from absl import flags
from PIL import Image

from ist_jax import cli, data

SIDE = 256  # pixels


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("data_dir", None, "tensorflow-datasets' data_dir", flag_values=values)
    flags.DEFINE_string("out", None, "the folder to make", flag_values=values)
    flags.DEFINE_integer("train", 3000, "images to train on", flag_values=values)
    flags.DEFINE_integer("val", 500, "images to test on", flag_values=values)
    cli.parse(values, argv, "python benchmarks/cifar_folder.py --data_dir=DIR --out=FOLDER", required=["out"])
    with cli.errors():
        cifar = data.open_data_set("cifar10", values.data_dir or "")
        for split, source, count in (("train", cifar.train, values.train), ("val", cifar.test, values.val)):
            for i in range(count):
                example = source[i]
                folder = Path(values.out) / split / cifar.classes[example["label"]]
                folder.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(example["image"]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                image.save(folder / f"{i}.JPEG", quality=90)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
