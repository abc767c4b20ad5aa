"""What a config will cost, for all methods side by side: without its data, its devices or a step.

python -m ist_jax.plan --config=configs/resnet.py:cifar100 [--json] [--bandwidth=1e8@10ms,1e9@1ms]
                       [--flops=1e13] [--config.num_workers=8 ...]

Only shapes are traced, so the largest nets fit a laptop. The costs of a round are those after a warm-up, of
`local_steps` steps; those of a run have the warm-up in them. `--json` prints an object: by method, the fields
of `Cost`; beside the methods, 'seconds_per_round', 'utilisation' and 'overlap_saves_per_round' (by method,
one per link: `costs.link.Modelled`), 'run' (by method, the fields of `Total`; of a config with stages each
stage by number and name, such as '1 data_parallel', and 'stages', all of them; null where its length is not
known), 'setting', and 'notes', on settings that make no sense.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from absl import flags
from ml_collections import config_dict, config_flags

from ist_jax import cli
from ist_jax.costs.link import LINKS, Link, Modelled, modelled, parse
from ist_jax.key import FILE

if TYPE_CHECKING:
    import flax.linen as nn

    from ist_jax import data, tasks
    from ist_jax.exchange.layout import Layout
    from ist_jax.methods.optimizers import Given
    from ist_jax.runtime.schedule import Segment
    from ist_jax.runtime.setup import Looked
    from ist_jax.runtime.stages import Made
    from ist_jax.workdir.files import Json

Shown: TypeAlias = "tuple[tasks.Task, data.Split]"
USAGE = (
    "python -m ist_jax.plan --config=FILE[:MODE] [--json] [--bandwidth=LIST] [--flops=NUMBER] "
    "[--example=SHAPE --classes=N] [--config.KEY=VALUE ...]"
)
_FEW = 5  # rounds, in which hardly anything is dealt anew
_FLOPS = 1e13  # per second: about what a large accelerator sustains in float32


class Cost(NamedTuple):
    """What one method costs.

    Attributes:
      params_per_worker: parameters of the largest subnet that a worker can be dealt.
      exchanged_bytes_per_worker_per_round: by the papers' count, a mean over the workers.
      paper_gigabytes_per_round: the same of all workers together, in 10^9 bytes.
      wire_bytes_per_worker_per_round: bytes that leave a device, shared out among its workers; as many
        arrive. Empty slots and padding included, evaluation not.
      state_bytes_per_worker: parameters and optimizer state that a device keeps while its workers train,
        shared out among them: `formula.Memory`.
      flops_per_worker_per_step: of the largest subnet, as `flops` counts.
      messages_per_device_per_round: that a device sends one after another, as `traced.messages` counts.
    """

    params_per_worker: int
    exchanged_bytes_per_worker_per_round: float
    paper_gigabytes_per_round: float
    wire_bytes_per_worker_per_round: float
    state_bytes_per_worker: float
    flops_per_worker_per_step: float
    messages_per_device_per_round: float


class Total(NamedTuple):
    """What one method costs in a whole run.

    Attributes:
      exchanged_bytes_per_worker: by the papers' count, a mean over the workers.
      paper_gigabytes: the same of all workers together, in 10^9 bytes.
      wire_bytes_per_worker: bytes that leave a device, shared out among its workers.
      hours: one per link; without start and evaluation.
    """

    exchanged_bytes_per_worker: float
    paper_gigabytes: float
    wire_bytes_per_worker: float
    hours: list[float]


def predict(
    config: config_dict.ConfigDict,
    facts: "data.Facts",
    model: "nn.Module | None" = None,
    task: "tasks.Own | None" = None,
    given: "Given | None" = None,
) -> Cost:
    """The costs of a config's method.

    Args:
      config: as from `configs/`; with num_devices=0 every worker has a device of its own.
      facts: of the data set.
      model: as for `train.train`.
      task: the same.
      given: its optimizer, as for `train.train`, in place of the config's.

    Raises:
      ValueError: a setting that cannot work, or facts that lack; the message names the key.
    """
    shown = _shown(config, facts, task)
    *_, made = _make(config, facts, shown, model, given)
    return _cost(config, shown, made, config.local_steps)


def _make(
    config: config_dict.ConfigDict,
    facts: "data.Facts",
    shown: "Shown",
    model: "nn.Module | None",
    given: "Given | None",
    looked: "Looked | None" = None,
) -> "tuple[Made, ...]":
    """What the parts of a run are trained by; shapes alone are looked at."""
    from ist_jax.config import build_model, check
    from ist_jax.runtime import setup

    check(config)
    model, task = model or build_model(config, facts.num_classes or 0), shown[0]
    devices, optimizer = config.num_devices or config.num_workers, given and given.optimizer
    return setup.make_all(config, model, task, devices, optimizer, looked)


def _cost(config: config_dict.ConfigDict, shown: "Shown", made: "Made", local_steps: int) -> Cost:
    from ist_jax.costs import formula, traffic
    from ist_jax.models.conv import by_definition
    from ist_jax.runtime import stages

    recipe, data = made.recipe, shown[1]
    with by_definition():
        phases = stages.trace_round(made.entry, recipe, data, local_steps, config.batch_size)
        flops = formula.step_flops(recipe, data, config.batch_size)
    moved, workers = traffic.round_traffic(phases, recipe.layout), recipe.layout.workers_per_device
    paper = sum(moved.paper.values())
    return Cost(
        params_per_worker=formula.largest_subnet(recipe.layout),
        exchanged_bytes_per_worker_per_round=paper / config.num_workers,
        paper_gigabytes_per_round=paper / 1e9,
        wire_bytes_per_worker_per_round=sum(moved.sent.values()) / workers,
        state_bytes_per_worker=sum(formula.memory(recipe, phases)) / workers,
        flops_per_worker_per_step=flops,
        messages_per_device_per_round=moved.messages,
    )


def _shown(config: config_dict.ConfigDict, facts: "data.Facts", task: "tasks.Own | None") -> "Shown":
    """What is learned from a data set, and a training set of a few examples of it."""
    import numpy as np

    from ist_jax.data.sparse import Rows
    from ist_jax.runtime import inputs, setup

    if facts.split is None and (facts.example is None or facts.num_classes is None):
        raise ValueError(f"what data.name={config.data.name!r} holds is not known before it is opened")
    shape, label, split = facts.example or (), np.zeros(1, np.int32), facts.split
    if split is None and facts.sparse:
        start, value = np.zeros(2, np.int32), np.zeros(1, np.float32)
        several = Rows(start, label, None, facts.num_classes or 0, longest=1)
        split = {"feature": Rows(start, label, value, shape[0], longest=1), "label": several}
    elif split is None:
        split = {"image": np.zeros((1, *shape), np.uint8), "label": label}
    wanted = setup.wanted_data(config)
    return inputs.make_task(wanted, split, facts.num_classes or 0, task), split


def plan(
    config: config_dict.ConfigDict,
    facts: "data.Facts",
    *,
    links: Sequence[Link],
    flops: float,
    model: "nn.Module | None" = None,
    task: "tasks.Own | None" = None,
    given: "Given | None" = None,
) -> "dict[str, Json]":
    """What `--json` prints.

    Args:
      config: of any of the methods.
      facts: of its data set.
      links: of a device.
      flops: that a device sustains per second.
      model: as for `train.train`.
      task: the same.
      given: its optimizer, as for `train.train`, in place of the config's.

    Raises:
      ValueError: a setting that cannot work; the message names the key.
    """
    from ist_jax.config import build_model, check, methods_of
    from ist_jax.data import batches
    from ist_jax.methods import METHODS, policy_of
    from ist_jax.runtime import setup, stages

    check(config)
    looked: Looked = {}
    model = model or build_model(config, facts.num_classes or 0)  # one for all methods
    workers, num_train = config.num_workers, facts.num_train
    devices, shown = config.num_devices or workers, _shown(config, facts, task)
    here = workers // devices
    if num_train is not None:
        num_train -= batches.count_held_out(num_train, config.data.validation)
    known = num_train is not None or not (config.rounds is None or config.partition.warmup_epochs)

    def on_device(cost: Cost, link: Link, steps: int = config.local_steps) -> Modelled:
        computing = here * steps * cost.flops_per_worker_per_step / flops
        sent = here * cost.wire_bytes_per_worker_per_round
        return modelled(computing, sent, cost.messages_per_device_per_round, link)

    def of_rounds(count: int, cost: Cost, steps: int) -> Total:
        return Total(
            exchanged_bytes_per_worker=count * cost.exchanged_bytes_per_worker_per_round,
            paper_gigabytes=count * cost.paper_gigabytes_per_round,
            wire_bytes_per_worker=count * cost.wire_bytes_per_worker_per_round,
            hours=[count * on_device(cost, link, steps).seconds / 3600 for link in links],
        )

    def of_entrance(before: "Made", after: "Made") -> Total:
        moved = stages.entrance_traffic(before, after)
        sent = sum(moved.sent.values())
        hours = [modelled(0.0, sent, moved.messages, link).seconds / 3600 for link in links]
        return Total(0.0, 0.0, sent / here, hours)

    priced: dict[tuple[str, bool, int], Cost] = {}

    def price(made: "Made", steps: int) -> Cost:
        key = made.part.method, made.part.whole, steps
        if key not in priced:
            priced[key] = _cost(config, shown, made, steps)
        return priced[key]

    def by_part(made: "Sequence[Made]", segments: "Sequence[Segment]") -> dict[str, list[Total]]:
        found: dict[str, list[Total]] = {}
        before, first = made[0], 0
        for part, steps, until in segments:
            own = made[part]
            parts = found.setdefault(f"{part + 1} {own.part.name}", [])
            parts += [of_entrance(before, own), of_rounds(until - first, price(own, steps), steps)]
            before, first = own, until
        return found

    costs, notes, policies, rounds = {}, [], {}, config.rounds
    totals: dict[str, Total] = {}
    names = dict.fromkeys([*METHODS, *methods_of(config)])
    rows = {method: setup.for_method(config, method) for method in names}
    chosen = "stages" if config.stages else config.method
    for name, own in (rows | ({chosen: config} if config.stages else {})).items():
        made, schedule = _make(own, facts, shown, model, given, looked), None
        if known:
            schedule = setup.make_schedule(own, num_train or 1, learning_rate=given and given.schedule)
            parts = by_part(made, schedule.segments)
            totals |= {part: _sum(found) for part, found in parts.items()} if name == "stages" else {}
            totals[name] = _sum([total for found in parts.values() for total in found])
        if name != "stages":
            policies[name] = policy_of(setup.method_of(own), own.optimizer_state)
            costs[name] = price(made[-1], config.local_steps)
        if name == chosen:
            rounds = schedule.rounds if schedule else rounds
            longest = max([steps for _, steps, _ in schedule.segments] if schedule else [config.local_steps])
            layouts = [x.recipe.layout for x in made if not x.part.whole]
            dealt = next((layout for layout in layouts if layout.groups), layouts[-1])
            warmup = schedule.segments[0].until if schedule and made[0].part.whole else 0
            notes = _notes(dealt, rounds, warmup)
    found = {method: [on_device(cost, link) for link in links] for method, cost in costs.items()}
    times = {
        f"{field}_per_round" if field != "utilisation" else field: {
            method: [getattr(each, field) for each in own] for method, own in found.items()
        }
        for field in Modelled._fields
    }
    setting = {"num_workers": workers, "num_devices": devices, "local_steps": config.local_steps}
    setting |= {"most_local_steps": longest, "batch_size": config.batch_size, "rounds": rounds}
    setting |= {"optimizer_state": policies}
    setting |= {"links": [link._asdict() for link in links], "flops_per_second": flops}
    planned = {method: _whole(cost) for method, cost in costs.items()}
    run = {method: _whole(found) for method, found in totals.items()} or None
    return planned | times | {"run": run, "setting": setting, "notes": notes}


def _sum(parts: Sequence[Total]) -> Total:
    exchanged, paper, wire, hours = zip(*parts, strict=True)
    return Total(sum(exchanged), sum(paper), sum(wire), [sum(each) for each in zip(*hours, strict=True)])


def _whole(figures: Cost | Total) -> "dict[str, Json]":
    """The fields by name, whole numbers as such."""
    named = figures._asdict().items()
    return {name: int(x) if isinstance(x, float) and x % 1 == 0 else x for name, x in named}


def _notes(layout: "Layout", rounds: int | None, warmup: int) -> list[str]:
    """What makes no sense in a setting, or leaves units out, a line each; usually there are none.

    Args:
      layout: with the groups of units as the method deals them.
      rounds: of the run; None: not known.
      warmup: of them, in which nothing is dealt.
    """
    from ist_jax.exchange.kinds import kind_of

    found, workers, groups = [], layout.num_workers, layout.groups
    whole = {leaf.groups[0].name for leaf in layout.leaves.values() if len(leaf.unit_axes) == 1}
    for path, leaf in layout.leaves.items():
        share = kind_of(leaf).assigned(leaf, workers) / max(1, math.prod(leaf.shape))
        inside = not whole.issuperset(group.name for group in leaf.groups)  # such as a block's own neurons
        if len(leaf.unit_axes) == 2 and leaf.rest and share < 1 and inside:
            both = " and ".join(group.name for group in leaf.groups)
            found.append(f"of {path}, which is dealt by {both} at once, {share:.0%} is trained in a round")
    for name, group in groups.items():
        least = min(group.counts)
        if workers == 1:
            found.append(f"one worker holds all units of {name}: nothing is dealt; raise num_workers")
        elif least == group.size:
            found.append(
                f"every worker holds all {group.size:,} units of {name}: nothing is dealt; lower min_units"
            )
        elif least == 0:
            idle = sum(count == 0 for count in group.counts)
            found.append(f"{idle:,} of {workers:,} workers get none of the {group.size:,} units of {name}")
        elif workers > group.size:
            held = f"each of them is trained by about {sum(group.counts) / group.size:,.0f} workers at a time"
            found.append(f"{workers:,} workers for the {group.size:,} units of {name}: {held}")
        if group.coverage < 1:
            part = f"about {group.coverage:.0%} of the {group.size:,} units of {name} are trained in a round"
            found.append(f"{part}, for every worker draws by itself")
    if warmup and warmup == rounds:
        found.append("the warm-up is the whole run: nothing is dealt; lower partition.warmup_epochs")
    if rounds is not None and rounds < _FEW:
        length = "one round" if rounds == 1 else f"{rounds} rounds"
        remedy = "take fewer workers or local steps, or more epochs"
        found.append(
            f"the whole run is {length}: units hardly change hands; {remedy}"
            if groups
            else f"the whole run is {length}; {remedy}"
        )
    return found


def table(planned: "dict[str, Json]") -> str:
    """The plan for people, at most 100 columns wide with up to 6 links."""
    setting, times, run = planned["setting"], planned["seconds_per_round"], planned["run"]
    count, steps = setting["rounds"], f"{setting['local_steps']}"
    if setting["most_local_steps"] > setting["local_steps"]:
        steps += f" to {setting['most_local_steps']}"
    rounds = "rounds" if count is None else "one round" if count == 1 else f"{count:,} rounds"
    first = max(14, *(len(name) + 1 for name in [*times, *(run or ())]))
    heads: list[tuple[str, ...]] = [  # of what a round takes
        ("a round", "parameters", "MB exchanged", "MB sent on", "GB exchanged", "MB of state", "GFLOP"),
        ("", "a worker", "a worker", "the wire", "by all", "a worker", "a worker"),
        ("", "(largest)", "", "a worker", "(papers)", "", "and step"),
    ]
    lines = [
        f"{setting['num_workers']:,} workers on {setting['num_devices']:,} devices, "
        f"{rounds} of {steps} local steps on {setting['batch_size']} examples each",
        *(f"note: {note}" for note in planned["notes"]),
        "",
        *(_row(name, first, *cells) for name, *cells in heads),
    ]
    for method in times:
        params, exchanged, paper, wire, state, step, _ = Cost(**planned[method])
        sizes = [f"{params:,}", _size(exchanged, 1e6), _size(wire, 1e6), f"{paper:,.3f}"]
        lines.append(_row(method, first, *sizes, f"{state / 1e6:,.1f}", f"{step / 1e9:,.3f}"))
    if run:
        most = max(total["exchanged_bytes_per_worker"] for total in run.values())
        unit, name = (1e9, "GB") if most >= 1e11 else (1e6, "MB")
        heads = [
            ("the whole run", f"{name} exchanged", f"{name} sent on", "GB exchanged"),
            ("", "a worker", "the wire", "by all"),
            ("", "", "a worker", "(papers)"),
        ]
        lines += ["", *(_row(name, first, *cells) for name, *cells in heads)]
        for method, total in run.items():
            exchanged, paper, wire, _ = Total(**total)
            lines.append(_row(method, first, _size(exchanged, unit), _size(wire, unit), f"{paper:,.3f}"))
    rate = f"{setting['flops_per_second'] / 1e12:g} TFLOP/s"
    links = [Link(**link) for link in setting["links"]]
    heading = [
        _row("", first, *(link.bandwidth_text for link in links)),
        _row("and latency", first, *(link.latency_text for link in links)),
    ]
    blocks = {
        "seconds_per_round": (f"modelled seconds a round, at {rate} a device over a link of", "{:,.3f}"),
        "utilisation": ("share of them in which a device computes", "{:.1%}"),
        "overlap_saves_per_round": (
            "seconds that overlapping exchange and steps would save (modelled)",
            "{:,.3f}",
        ),
    }
    for key, (title, form) in blocks.items():
        lines += ["", title, *(heading if key == "seconds_per_round" else [])]
        lines += [_row(method, first, *map(form.format, own)) for method, own in planned[key].items()]
    if run:
        shortest = min(min(total["hours"]) for total in run.values())
        seconds, name = (1, "hours") if shortest >= 0.05 else (3600, "seconds")
        lines += ["", f"{name} the whole run, without start and evaluation", *heading]
        for method, total in run.items():
            lines.append(_row(method, first, *(f"{hours * seconds:,.3f}" for hours in total["hours"])))
    else:
        lines += ["", "how long the whole run is, the data set tells when it is opened; or set config.rounds"]
    return "\n".join(lines)


def _row(name: str, width: int, *cells: str) -> str:
    return f"{name:{width}}{''.join(f'{cell:>14}' for cell in cells)}".rstrip()


def _size(size: float, unit: float) -> str:
    from ist_jax.costs.traffic import megabytes

    return megabytes(size / unit * 1e6)


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    cli.define_config(values, argv, None)
    flags.DEFINE_boolean("json", False, "print JSON instead of a table", values)
    usual = [f"{link.bits_per_second:g}@{link.latency_text.replace(' ', '')}" for link in LINKS]
    text = "of a device's link, in bits per second each way, with its latency: 1e9@1ms; without one: 1e9"
    flags.DEFINE_list("bandwidth", usual, text, values)
    flags.DEFINE_float("flops", _FLOPS, "that a device sustains, per second", flag_values=values)
    flags.DEFINE_list("example", [], "shape of an example, of a data set that is not known: 32,32,3", values)
    flags.DEFINE_integer("classes", 0, "classes of such a data set", lower_bound=0, flag_values=values)
    cli.parse(values, argv, USAGE, required=["config"])
    with cli.errors():
        links = parse(values.bandwidth)
        (rate,) = _positive("flops", [str(values.flops)])
        sizes = _positive("example", values.example)
        if any(size % 1 for size in sizes):
            raise ValueError(f"--example={','.join(values.example)}: whole numbers are needed")
        facts = _facts(values.config, [int(size) for size in sizes], values.classes)

        import jax

        jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator
        planned = plan(values.config, facts, links=links, flops=rate)
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
    from ist_jax.models import adapter
    from ist_jax.runtime import inputs, setup

    check(config)
    known = data.facts(config.data.name, options(config, data.options()))
    if known.encoded:
        inputs.make_transform(setup.wanted_data(config))  # refuses what training refuses
    if FILE.fullmatch(config.data.name) and not example:
        return _facts_of_own(config)
    shape, num_classes = tuple(example) or known.example, classes or known.num_classes
    if shape is None or num_classes is None:
        flag = "--classes" if shape else "--example and --classes"
        raise ValueError(
            f"what data.name={config.data.name!r} holds is not known before it is opened; give {flag}"
        )
    model = build_model(config, num_classes)
    if adapter.offers(model, "check_example"):
        try:
            model.check_example(shape)
        except ValueError as error:
            raise ValueError(f"{error}; give --example=HEIGHT,WIDTH,CHANNELS") from None
    num_train = None if example or classes else known.num_train
    return known._replace(example=shape, num_classes=num_classes, num_train=num_train)


def _facts_of_own(config: config_dict.ConfigDict) -> "data.Facts":
    """What a data set from a file of the user's own tells when it is opened."""
    from ist_jax import data
    from ist_jax.runtime import inputs, setup

    opened = inputs.open_inputs(setup.wanted_data(config)._replace(validation=0.0))
    facts = data.Facts(num_classes=len(opened.dataset.classes), num_train=inputs.count(opened.train))
    if opened.dataset.encoded:
        assert opened.task.example is not None
        return facts._replace(example=opened.task.example[0].shape[1:], encoded=True)
    return facts._replace(split=opened.train)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
