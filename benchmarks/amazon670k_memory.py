"""Memory per device of IST on Amazon-670k, from programs that are compiled and never run.

    python benchmarks/amazon670k_memory.py [--config.num_workers=8 ...]

No array of the model's size is ever made: the programs are compiled for shapes, on virtual CPU devices. The
data set's numbers are those of its files' headers; how many features and labels a point has is assumed below.
"""

import sys
from typing import Any

import jax
import numpy as np
from absl import flags

from ist_jax import cli, data
from ist_jax.config import build_model, check
from ist_jax.costs import formula
from ist_jax.data.sparse import Rows
from ist_jax.exchange.layout import Layout
from ist_jax.runtime import devices, programs, setup, stages
from ist_jax.tasks import multi_label
from ist_jax.tasks.task import with_example

(FEATURES,), LABELS, POINTS = data.facts("amazon670k")[:3]
TEST_POINTS = 153_025
FEATURES_A_POINT, MOST_FEATURES = 76, 2_000  # assumed
LABELS_A_POINT, MOST_LABELS = 6, 10  # assumed


def shape(*sizes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def points(count: int, *lead: int) -> dict[str, Any]:
    """Shapes of a split, or of the batches of one, with leading axes."""
    start = shape(*lead, count + 1)
    entries = (*lead, count * FEATURES_A_POINT)
    labels = shape(*lead, count * LABELS_A_POINT)
    return {
        "feature": Rows(start, shape(*entries), shape(*entries, dtype=np.float32), FEATURES, MOST_FEATURES),
        "label": Rows(start, labels, None, LABELS, MOST_LABELS),
    }


def compile_for_shapes(config: Any) -> tuple[Layout, int, dict[str, Any]]:
    """The layout of a run on Amazon-670k, bytes of a device's parameters, and the programs."""
    check(config)
    devices.prepare(config.num_devices or config.num_workers)
    chosen = devices.choose(config.num_workers, config.num_devices)
    count = len(chosen)
    task = with_example(multi_label.make({}, LABELS), points(1))
    recipe = setup.make_recipe(config, build_model(config, LABELS), task, count)
    entry = setup.method_of(config)
    method = entry.make(recipe)
    phases = stages.trace_round(entry, recipe, points(POINTS), config.local_steps, config.batch_size)
    compiled = programs.compile_phases(phases, chosen)
    size = config.eval_batch_size
    lead = (count, -(-TEST_POINTS // (size * count)))
    batches = points(size, *lead) | {"weight": shape(*lead, size, dtype=np.float32)}
    first = next(iter(phases.values())).inputs
    _, compile_score = programs.lower_score(method, first[0], batches, chosen)
    compiled["evaluate"] = compile_score()
    params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(first[0].params))
    return recipe.layout, params, compiled


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    cli.define_config(values, argv, "configs/mlp.py:amazon670k")
    cli.parse(values, argv, "python benchmarks/amazon670k_memory.py [--config.KEY=VALUE ...]", required=[])
    config = values.config
    with cli.errors():
        layout, params, compiled = compile_for_shapes(config)
    item, workers = layout.dtype.itemsize, layout.num_workers
    whole = item * formula.model_parameters(layout)
    own = item * formula.subnet_parameters(layout) / workers
    print(f"{config.method}, hidden {config.model.hidden}, {workers} workers on {layout.num_devices} devices")
    print(f"parameters: {formula.model_parameters(layout):,}, {whole / 2**30:.2f} GiB")
    print(f"a worker's subnet: {own / 2**30:.3f} GiB, {own / whole:.4f} of the model")
    print(f"GiB per device, the {params / 2**30:.3f} of the sharded model included")
    print(
        f"{'':16s}"
        + "".join(f"{name:>11s}" for name in ("arguments", "results", "reused", "buffers", "in all"))
    )
    for name, program in compiled.items():
        m = program.memory_analysis()
        sizes = [
            m.argument_size_in_bytes,
            m.output_size_in_bytes,
            m.alias_size_in_bytes,
            m.temp_size_in_bytes,
        ]
        waits = params if name == "local" and "gather" in compiled else 0  # its units were gathered from them
        total = sizes[0] + sizes[1] - sizes[2] + sizes[3] + waits
        print(f"{name:16s}" + "".join(f"{size / 2**30:11.3f}" for size in (*sizes, total)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
