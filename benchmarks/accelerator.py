"""What one accelerator does with a config: examples per second, share of its peak, accuracy on the way.

    python benchmarks/accelerator.py --dir=DIR --peak=989e12 [--config=configs/resnet.py:cifar10]
        [--rounds=100] [--workdir=runs/accelerator] [--config.KEY=VALUE ...]

Trains by the ordinary command, all workers on one device, layers computing in bfloat16 unless a --config flag
says otherwise; the schedule is that of a run of so many rounds. --peak is what the device's data sheet says
for that dtype, in FLOP/s without sparsity (989e12: NVIDIA H100 SXM). The share of it counts the products and
convolutions of the local steps (ledger.json) in the time of the local steps, and of whole rounds.
"""

import json
import statistics
import sys
from pathlib import Path

import runs
from absl import flags
from ml_collections import config_flags

from ist_jax import cli, errors
from ist_jax.config import restore
from ist_jax.workdir import files

USAGE = "python benchmarks/accelerator.py --dir=DIR --peak=FLOPS [--config=FILE] [--rounds=N]"


def measure(workdir: Path, peak: float) -> str:
    """What the files of a finished run say, as markdown."""
    config, summary = restore(files.read_config(workdir)), files.read_summary(workdir)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = json.loads((workdir / "ledger.json").read_text())["rows"]
    flops = next(row["expected"] for row in rows if row["cause"] == "training step")
    flops *= config.num_workers * config.local_steps
    steady = records[2:] or records  # the first rounds warm the device up
    local = statistics.median(r["seconds_local"] for r in steady)
    whole = statistics.median(r["seconds_round"] - r["seconds_evaluate"] for r in steady)
    examples = config.num_workers * config.local_steps * config.batch_size
    curve = [r for r in records if r.get("test_accuracy") is not None]
    share = f"{flops / local / peak:.1%} | {flops / whole / peak:.1%}"
    return "\n".join(
        [
            f"{summary['device_kind']}, JAX {summary['versions']['jax']}, {summary['finished'][:10]}: "
            f"{config.method}, {config.num_workers} workers on {summary['num_devices']} device(s), "
            f"{config.compute_dtype}, {summary['rounds']} rounds",
            "",
            "| | local steps | whole round |",
            "|---|---|---|",
            f"| seconds (median) | {local:.3f} | {whole:.3f} |",
            f"| examples/s | {examples / local:,.0f} | {examples / whole:,.0f} |",
            f"| TFLOP/s | {flops / local / 1e12:.1f} | {flops / whole / 1e12:.1f} |",
            f"| share of {peak / 1e12:,.0f} TFLOP/s | {share} |",
            "",
            "| examples | test accuracy % |",
            "|---|---|",
            *(f"| {r['examples']:,} | {100 * r['test_accuracy']:.2f} |" for r in curve),
        ]
    )


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    cli.define_config(values, argv, "configs/resnet.py:cifar10")
    flags.DEFINE_string("dir", "", "of the data; embedded sets need none", flag_values=values)
    flags.DEFINE_float("peak", None, "FLOP/s of the device", lower_bound=1.0, flag_values=values)
    flags.DEFINE_integer("rounds", 100, "to train", lower_bound=1, flag_values=values)
    flags.DEFINE_string("workdir", "runs/accelerator", "folder for the run", flag_values=values)
    cli.parse(values, argv, USAGE, required=["peak"])
    if any(arg.startswith("--config.") and "=" not in arg for arg in argv):
        raise errors.fail("write --config.KEY=VALUE, with =")
    own = [arg.removeprefix("--config.") for arg in argv if arg.startswith("--config.")]
    first = [f"data.dir={values.dir}", f"rounds={values.rounds}", "num_devices=1", "compute_dtype=bfloat16"]
    first += ["partition.warmup_epochs=0.0"]  # the FLOPs are those of a subnet
    workdir = Path(values.workdir)
    runs.run(config_flags.get_config_filename(values["config"]), workdir, [*first, *own])
    print(measure(workdir, values.peak))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
