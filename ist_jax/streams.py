"""Random numbers of the host: every use has a stream of its own, so that draws are independent."""

import enum

import numpy as np


class Use(enum.IntEnum):
    """What a stream is for, and the numbers that tell its streams apart.

    The values are part of every draw: a new use takes a new one, and none is ever used again.
    """

    PARTITION = 1  # round: who holds which units
    PRESENCE = 2  # round: who takes part
    VALIDATION = 3  # which examples are held out
    SHARING = 4  # which worker has which examples
    EXAMPLES = 5  # worker, epoch: in which order
    CROPS = 6  # worker, batch
    EVALUATION = 7  # which examples make up a batch
    CALIBRATION = 8  # which training examples
    CONTINUATION = 9  # of a prompt, which tokens


def rng(seed: int, use: Use, *numbers: int) -> np.random.Generator:
    """The generator of a use: a function of its arguments alone.

    NumPy pads a seed with zeros, so that the seeds (s, 3) and (s, 3, 0) are one; a key behind the seed is set
    apart, and its length counts.

    Args:
      seed: of the run; 0 for what is to be the same in all runs.
      use: what for.
      numbers: whatever else the draw depends on, as `Use` lists them; none negative.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(use, *numbers)))
