"""ist_jax: one network trained as many small, independent subnets (IST and ResIST) in JAX/Flax."""

__version__ = "0.2.0"
