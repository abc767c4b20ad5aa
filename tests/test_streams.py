"""Random streams: no two of them are the same, and every draw has its own."""

import itertools
import re

import numpy as np
import pytest
from conftest import ROOT, get_config

from ist_jax import deals, partition, streams
from ist_jax.data import batches, encoded
from ist_jax.data.images import Transform
from ist_jax.runtime import inputs
from ist_jax.runtime.setup import wanted_data
from ist_jax.streams import Use
from ist_jax.tasks import language_modelling


def test_the_streams_of_small_numbers_are_all_different():
    numbers = [n for length in range(4) for n in itertools.product(range(4), repeat=length)]
    seeds = [0, 1, 2, 2**32, 2**32 + 1]  # of two words, too
    first = [streams.rng(seed, use, *n).integers(2**63) for seed in seeds for use in Use for n in numbers]
    assert len(set(first)) == len(first) == 5 * 9 * 85


def test_a_stream_is_a_function_of_its_numbers():
    # NumPy's own child: of seed 7 the 5th, of that the 2nd, counted from 0
    child = np.random.SeedSequence(7).spawn(6)[Use.EXAMPLES].spawn(3)[2]
    wanted = np.random.default_rng(child).random(3)
    assert (streams.rng(7, Use.EXAMPLES, 2).random(3) == wanted).all()


def draw_partition():
    groups = {"unit": partition.Group("unit", 8, 2)}
    partition.draw(0, 3, groups, deals.random)


def draw_crops():
    transform = Transform(size=2, resize=2, area=(0.5, 1.0), aspect=(1.0, 1.0), flip=True)
    make = encoded.TrainBatches([], [np.arange(4)] * 2, [0, 1], transform, 0, local_steps=1, batch_size=1)
    with pytest.raises(IndexError):  # there is no image; the crops are drawn before one is read
        make(1)


DRAWS = {
    Use.PARTITION: draw_partition,
    Use.PRESENCE: lambda: partition.draw_present(0, 3, 2, 0.5),
    Use.VALIDATION: lambda: batches.split_validation(0, {"label": np.arange(9)}, 0.5),
    Use.SHARING: lambda: [
        batches.share_examples(0, np.arange(9) % 2, 2, sharing, 1.0) for sharing in ("disjoint", "skewed")
    ],
    Use.EXAMPLES: lambda: batches._epoch_order.__wrapped__(0, 1, 2, 9),
    Use.CROPS: draw_crops,
    Use.EVALUATION: lambda: batches.eval_batches(9, 2, 1),
    Use.CALIBRATION: lambda: inputs.calibration_batches(
        inputs.open_inputs(wanted_data(get_config("mlp"))), 1
    ),
    Use.CONTINUATION: lambda: language_modelling.sample(
        lambda tokens: np.zeros((1, 1, 2)), [0], 1, length=1, temperature=1.0, seed=0
    ),
}


@pytest.mark.parametrize("use", Use, ids=lambda use: use.name)
def test_every_draw_takes_the_stream_of_its_use(use, monkeypatch):
    taken = set()

    def recorded(seed, use, *numbers):
        taken.add((use, len(numbers)))
        return streams.rng(seed, use, *numbers)

    for module in (partition, batches, encoded, inputs, language_modelling):
        monkeypatch.setattr(module, "rng", recorded)
    DRAWS[use]()
    lengths = {Use.PARTITION: 1, Use.PRESENCE: 1, Use.EXAMPLES: 2, Use.CROPS: 2}
    own = taken - {(Use.EXAMPLES, 2)} if use is Use.CROPS else taken  # the batch that is cropped
    assert own == {(use, lengths.get(use, 0))}


def test_nothing_makes_a_generator_beside_them():
    making = re.compile(r"default_rng\(|\bnp\.random\.[a-z]")
    found = {path.name for path in (ROOT / "ist_jax").rglob("*.py") if making.search(path.read_text())}
    assert found == {"streams.py"}
