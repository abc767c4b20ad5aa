"""The `params_sha256` of small runs of every method: what a restructuring must not change.

python benchmarks/smoke_hashes.py [--only=TEXT]

Prints a line per run: its name, the hash of its final parameters, and its test accuracy. Compare the output
before and after a change. CPU, a second or a few per run after the start.
"""

import importlib.util
import logging
import sys
import tempfile
from pathlib import Path

from ist_jax import train

ROOT = Path(__file__).parent.parent
FOUR = {"num_workers": 4, "rounds": 2}
SEVERAL = {**FOUR, "num_devices": 2}
RUNS = {
    **{
        f"{config} {method}": (config, {"method": method})
        for config in ("resnet", "mlp")
        for method in ("ist", "local_sgd", "data_parallel")
    },
    "resnet ist, overlap": ("resnet", {"partition.min_units": 2}),
    "resnet ist, warm-up": ("resnet", {"partition.warmup_epochs": 0.02, "optimizer_state": "carry"}),
    "mlp ist, overlap and participation": ("mlp", {**FOUR, "partition.min_units": 12, "participation": 0.5}),
    "mlp ist, carried": ("mlp", {"optimizer_state": "carry"}),
    "mlp ist, uneven shares": ("mlp", {"partition.shares": (1.0, 2.5)}),
    "mlp local_sgd, reset": ("mlp", {"method": "local_sgd", "optimizer_state": "reset"}),
    "mlp local_sgd, outer Nesterov": ("mlp", {"method": "local_sgd", "outer.name": "nesterov"}),
    "mlp local_sgd, carried": ("mlp", {**FOUR, "method": "local_sgd", "optimizer_state": "carry"}),
    "mlp ist, several workers a device": ("mlp", SEVERAL),
    "mlp ist, vmap": ("mlp", {**SEVERAL, "workers_on_device": "vmap"}),
    "mlp ist, vmap on one device": ("mlp", {**FOUR, "num_devices": 1, "workers_on_device": "vmap"}),
    "mlp data_parallel, several workers a device": ("mlp", {**SEVERAL, "method": "data_parallel"}),
    "mlp ist, validation and skewed data": ("mlp", {"data.validation": 0.1, "data.sharing": "skewed"}),
}


def get_config(name: str, overrides: dict):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke").lock()
    config.update_from_flattened_dict(overrides)
    return config


def main(only: str) -> None:
    logging.disable(logging.INFO)
    # the run with the most devices first: JAX shows as many as the first run of a process asks for
    for name in sorted((n for n in RUNS if only in n), key=lambda n: -RUNS[n][1].get("num_workers", 2)):
        with tempfile.TemporaryDirectory() as folder:
            summary = train.train(get_config(*RUNS[name]), folder)
        print(f"{name:45} {summary['params_sha256'][:16]} {summary['test_accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main(next((a.removeprefix("--only=") for a in sys.argv[1:]), ""))
