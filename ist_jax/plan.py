"""What a config will cost, for all methods side by side: without its data, its devices or a step.

python -m ist_jax.plan --config=configs/resnet.py:cifar100 [--json] [--bandwidth=1e8,1e9,1e10] [--flops=1e13]
                       [--config.num_workers=8 ...]

Only shapes are traced, so the largest nets fit a laptop. The costs are those of a round after a warm-up.
`--json` prints an object: by method, the fields of `Cost`; beside the methods, 'seconds_per_round' (by
method, one per bandwidth) and 'setting'.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from absl import flags
from ml_collections import config_dict, config_flags

from ist_jax import BANDWIDTHS, cli

if TYPE_CHECKING:
    from ist_jax import data, task
    from ist_jax.workdir.files import Json

USAGE = (
    "python -m ist_jax.plan --config=FILE[:MODE] [--json] [--bandwidth=LIST] [--flops=NUMBER] "
    "[--example=SHAPE --classes=N] [--config.KEY=VALUE ...]"
)
_FLOPS = 1e13  # per second: about what a large accelerator sustains in float32


class Cost(NamedTuple):
    """What one method costs.

    Attributes:
      params_per_worker: parameters of the largest subnet that a worker can be dealt.
      paper_gigabytes_per_round: by the papers' count, of all workers together, in 10^9 bytes.
      wire_bytes_per_worker_per_round: bytes that leave a device, shared out among its workers; as many
        arrive. Empty slots and padding included, evaluation not.
      state_bytes_per_worker: parameters and optimizer state that a device keeps while its workers train,
        shared out among them: `formula.Memory`.
      flops_per_worker_per_step: of the largest subnet, as `flops` counts.
    """

    params_per_worker: int
    paper_gigabytes_per_round: float
    wire_bytes_per_worker_per_round: float
    state_bytes_per_worker: float
    flops_per_worker_per_step: float


def predict(config: config_dict.ConfigDict, facts: "data.Facts") -> Cost:
    """The costs of a config's method.

    Args:
      config: as from `configs/`; with num_devices=0 every worker has a device of its own.
      facts: of the data set.

    Raises:
      ValueError: a setting that cannot work, or facts that lack; the message names the key.
    """
    from ist_jax.config import build_model, check
    from ist_jax.costs import formula, traffic
    from ist_jax.runtime import setup

    check(config)
    if facts.example is None or facts.num_classes is None:
        raise ValueError(f"what data.name={config.data.name!r} holds is not known before it is opened")
    (shown, data), entry = _shown(facts), setup.method_of(config)
    model = build_model(config, facts.num_classes)
    recipe = setup.make_recipe(config, model, shown, config.num_devices or config.num_workers)
    phases = setup.trace_round(entry, recipe, data, config.local_steps, config.batch_size)
    moved, workers = traffic.round_traffic(phases, recipe.layout), recipe.layout.workers_per_device
    return Cost(
        params_per_worker=formula.largest_subnet(recipe.layout),
        paper_gigabytes_per_round=sum(moved.paper.values()) / 1e9,
        wire_bytes_per_worker_per_round=sum(moved.sent.values()) / workers,
        state_bytes_per_worker=sum(formula.memory(recipe, phases)) / workers,
        flops_per_worker_per_step=formula.step_flops(recipe, shown.example, config.batch_size),
    )


def _shown(facts: "data.Facts") -> "tuple[task.Task, data.Split]":
    """What is learned from a data set, and a training set of one example of it."""
    import numpy as np

    from ist_jax import task
    from ist_jax.data.sparse import Rows

    shape, label = facts.example or (), np.zeros(1, np.int32)
    if not facts.sparse:
        one = {"image": np.zeros((1, *shape), np.uint8), "label": label}
        return task.classification(lambda x: x.astype("float32"), shape, pad=0, flip=False), one  # type: ignore[return-value]
    start, value = np.zeros(2, np.int32), np.zeros(1, np.float32)
    feature = Rows(start, label, value, shape[0], longest=1)
    several = Rows(start, label, None, facts.num_classes or 0, longest=1)
    return task.multi_label(shape[0]), {"feature": feature, "label": several}


def plan(
    config: config_dict.ConfigDict, facts: "data.Facts", *, bandwidths: Sequence[float], flops: float
) -> "dict[str, Json]":
    """What `--json` prints.

    Args:
      config: of any of the methods.
      facts: of its data set.
      bandwidths: of a device's link, in bits per second each way.
      flops: that a device sustains per second.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    from ist_jax.data import batches
    from ist_jax.methods import METHODS
    from ist_jax.runtime import setup

    costs = {}
    for method in dict.fromkeys([*METHODS, config.method]):
        own = config.copy_and_resolve_references()
        own.method = method
        if not setup.method_of(own).exchanges:
            own.exchange.codec = "none"
        costs[method] = predict(own, facts)
    workers, rounds = config.num_workers, config.rounds
    devices = config.num_devices or workers
    if facts.num_train is not None:
        held_out = batches.count_held_out(facts.num_train, config.data.validation)
        rounds = setup.make_schedule(config, facts.num_train - held_out).rounds

    def seconds(cost: Cost, bandwidth: float) -> float:
        computing = config.local_steps * cost.flops_per_worker_per_step / flops
        sending = 8 * cost.wire_bytes_per_worker_per_round / bandwidth
        return workers // devices * (computing + sending)

    times = {method: [seconds(cost, b) for b in bandwidths] for method, cost in costs.items()}
    setting = {"num_workers": workers, "num_devices": devices, "local_steps": config.local_steps}
    setting |= {"batch_size": config.batch_size, "rounds": rounds}
    setting |= {"bits_per_second": list(bandwidths), "flops_per_second": flops}
    planned = {method: _whole(cost) for method, cost in costs.items()}
    return planned | {"seconds_per_round": times, "setting": setting}


def _whole(cost: Cost) -> dict[str, float]:
    """The fields by name, whole numbers as such."""
    return {name: int(x) if x % 1 == 0 else x for name, x in cost._asdict().items()}


def table(planned: "dict[str, Json]") -> str:
    """The plan for people, at most 100 columns wide with up to 6 bandwidths."""
    setting, times = planned["setting"], planned["seconds_per_round"]
    rounds = f"{setting['rounds']:,} rounds" if setting["rounds"] else "rounds"
    lines = [
        f"{setting['num_workers']} workers on {setting['num_devices']} devices, "
        f"{rounds} of {setting['local_steps']} local steps on {setting['batch_size']} examples each",
        "",
        f"{'':14}{'parameters':>16}{'GB of all':>14}{'MB sent':>14}{'MB of state':>14}{'GFLOP':>14}",
        f"{'':14}{'a worker':>16}{'a round':>14}{'a worker':>14}{'a worker':>14}{'a worker':>14}",
        f"{'':14}{'(largest)':>16}{'(papers)':>14}{'and round':>14}{'':>14}{'and step':>14}",
    ]
    for method in times:
        params, paper, wire, state, step = Cost(**planned[method])
        sizes = f"{params:16,}{paper:14,.3f}{wire / 1e6:14,.2f}{state / 1e6:14,.1f}{step / 1e9:14,.3f}"
        lines.append(f"{method:14}{sizes}")
    rate = f"{setting['flops_per_second'] / 1e12:g} TFLOP/s"
    lines += ["", f"seconds a round of a device that computes at {rate} and whose link carries"]
    lines.append(f"{'':14}" + "".join(f"{b / 1e9:9g} Gb/s" for b in setting["bits_per_second"]))
    lines += [f"{method:14}" + "".join(f"{s:14,.3f}" for s in times[method]) for method in times]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    cli.define_config(values, argv, None)
    flags.DEFINE_boolean("json", False, "print JSON instead of a table", values)
    usual = [f"{b:g}" for b in BANDWIDTHS]
    flags.DEFINE_list("bandwidth", usual, "of a device's link, in bits per second each way", values)
    flags.DEFINE_float("flops", _FLOPS, "that a device sustains, per second", flag_values=values)
    flags.DEFINE_list("example", [], "shape of an example, of a data set that is not known: 32,32,3", values)
    flags.DEFINE_integer("classes", 0, "classes of such a data set", lower_bound=0, flag_values=values)
    cli.parse(values, argv, USAGE, required=["config"])
    with cli.errors():
        bandwidths = _positive("bandwidth", values.bandwidth)
        (rate,) = _positive("flops", [str(values.flops)])
        sizes = _positive("example", values.example)
        if any(size % 1 for size in sizes):
            raise ValueError(f"--example={','.join(values.example)}: whole numbers are needed")
        facts = _facts(values.config, [int(size) for size in sizes], values.classes)

        import jax

        jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator
        planned = plan(values.config, facts, bandwidths=bandwidths, flops=rate)
    if values.json:
        print(json.dumps(planned, indent=2))
    else:
        print(config_flags.get_config_filename(values["config"]), table(planned), sep="\n")
    return 0


def _positive(flag: str, texts: Sequence[str]) -> list[float]:
    said = f"--{flag}={','.join(texts)}"
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"{said}: numbers are needed, separated by commas") from None
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{said}: numbers above 0 are needed")
    return numbers


def _facts(config: config_dict.ConfigDict, example: Sequence[int], classes: int) -> "data.Facts":
    """What is known of the config's data set; what the flags say comes first."""
    from ist_jax import data
    from ist_jax.config import build_model, check, options
    from ist_jax.runtime import inputs, setup

    check(config)
    known = data.facts(config.data.name, options(config, data.options()))
    if known.encoded:
        inputs.make_transform(setup.wanted_data(config))  # refuses what training refuses
    shape, num_classes = tuple(example) or known.example, classes or known.num_classes
    if shape is None or num_classes is None:
        flag = "--classes" if shape else "--example and --classes"
        raise ValueError(
            f"what data.name={config.data.name!r} holds is not known before it is opened; give {flag}"
        )
    if check_example := getattr(build_model(config, num_classes), "check_example", None):
        try:
            check_example(shape)
        except ValueError as error:
            raise ValueError(f"{error}; give --example=HEIGHT,WIDTH,CHANNELS") from None
    num_train = None if example or classes else known.num_train
    return known._replace(example=shape, num_classes=num_classes, num_train=num_train)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
