"""ist_jax: one network trained as many small, independent subnets (IST and ResIST) in JAX/Flax."""

__version__ = "0.2.0"
BANDWIDTHS = (1e8, 1e9, 1e10)  # of a link, bits per second: 0.1, 1 and 10 Gb/s
