"""Images per second that streaming from disk delivers, per core and per process.

    python benchmarks/image_pipeline.py [--images=960] [--size=224] [--processes=1 --processes=2 ...]

Writes JPEGs of 500x375 pixels, cut at random from the two photographs that scikit-learn ships, to a
temporary folder, and reads them as configs/resnet.py:imagenet does: random crops for training, the centre for
evaluation. A core's figure is images / CPU seconds, which a busy machine changes less than images / seconds.
With processes it counts both sides of the transport, but not their start (they import grain, and so JAX).
"""

import io
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from sklearn import datasets

from ist_jax import cli
from ist_jax.data import batches, image_folder, stream
from ist_jax.data.encoded import EvalBatches, TrainBatches
from ist_jax.runtime import inputs, setup

WIDTH, HEIGHT, QUALITY = 500, 375, 95  # about the 110 kB that ImageNet has on average
BATCH = 32
EXTRA = 8  # passes over the folder that a figure with processes is taken from


def write_folder(root: Path, count: int) -> float:
    """Writes so many JPEGs to train/ and a tenth to val/, as one class; returns their mean size in kB."""
    rng, photos = np.random.default_rng(0), [Image.fromarray(x) for x in datasets.load_sample_images().images]
    sizes = []
    for split, number in (("train", count), ("val", max(1, count // 10))):
        (root / split / "photo").mkdir(parents=True)
        for i in range(number):
            photo = photos[i % len(photos)]
            width = rng.uniform(500, 569)  # of 640 x 427: hardly enlarged or made smaller
            height = width * HEIGHT / WIDTH
            left, top = rng.random(2) * (photo.width - width, photo.height - height)
            cut = photo.resize(
                (WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
            )
            file = io.BytesIO()
            cut.save(file, "JPEG", quality=QUALITY)
            (root / split / "photo" / f"{i}.JPEG").write_bytes(file.getvalue())
            sizes.append(file.tell() / 1e3)
    return float(np.mean(sizes))


def cpu_seconds() -> float:
    """Of this process and of those that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def read_all(make, num_batches: int, processes: int) -> tuple[float, float, float]:
    """(images/s of wall time after the first batch, CPU seconds in all, seconds until the first batch)."""
    before, started = cpu_seconds(), time.perf_counter()
    reading = stream.read(make, range(num_batches), processes)
    next(reading)
    first = time.perf_counter()
    for _ in range(num_batches - 1):
        next(reading)
    seconds = time.perf_counter() - first
    reading.close()
    return (num_batches - 1) * BATCH / seconds, cpu_seconds() - before, first - started


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    cli.define_config(values, argv, "configs/resnet.py:imagenet")
    flags.DEFINE_integer("images", 960, "JPEGs to write", flag_values=values)
    flags.DEFINE_integer(
        "size", None, "pixels of both sides of what is delivered; default: the config's", flag_values=values
    )
    flags.DEFINE_multi_integer("processes", [1, 2], "to try, beside none", flag_values=values)
    cli.parse(values, argv, "python benchmarks/image_pipeline.py [--images=N]", required=[])
    with cli.errors():
        transform = inputs.make_transform(setup.wanted_data(values.config))
    if values.size:
        resize = round(values.size * transform.resize / transform.size)
        transform = transform._replace(size=values.size, resize=resize)
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = write_folder(Path(folder), values.images)
        dataset = image_folder.load(folder, {"data.in_memory": 0})
        print(
            f"{values.images} JPEGs of {WIDTH}x{HEIGHT}, {kilobytes:.0f} kB on average; size {transform.size}"
        )
        shards = [np.arange(values.images, dtype=np.int32)]
        num = values.images // BATCH
        train = TrainBatches(dataset.train, shards, [0], transform, seed=0, local_steps=num, batch_size=BATCH)
        plan = batches.eval_batches(len(dataset.train), BATCH, 1)
        test = EvalBatches(dataset.train, plan, [0], transform)
        for name, make in (("training", train), ("evaluation", test)):
            make(0)  # reads the folder's names, warms the file cache
            started = time.process_time()
            for number in range(num):
                make(number)
            core = num * BATCH / (time.process_time() - started)
            print(f"{name:10s}: {core:6.0f} images/s per core")
        for processes in (0, *values.processes):
            _, once, _ = read_all(train, num, processes)
            rate, more, start = read_all(train, (1 + EXTRA) * num, processes)
            core = EXTRA * num * BATCH / (more - once)  # what starting takes cancels out
            text = f"{processes} processes: {core:6.0f} images/s per core, transport included"
            print(f"{text}; {rate:5.0f} images/s, {start:.1f} s until the first")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
