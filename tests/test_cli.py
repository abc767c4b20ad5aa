"""The commands as a user meets them: mistakes are one line and exit code 2."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, get_config
from PIL import Image

from ist_jax import compare, evaluate, main, plan, train
from ist_jax.config import keys_of
from ist_jax.workdir import files

RESNET = f"--config={ROOT}/configs/resnet.py:smoke"
MLP = f"--config={ROOT}/configs/mlp.py:smoke"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing"),
        ([MLP, "--wrokdir=x"], "wrokdir"),
        ([MLP, "stray"], "unexpected argument 'stray'"),
        ([MLP, "--config.num_wrokers=4"], "config.num_wrokers; did you mean 'num_workers'? keys there: "),
        ([MLP, "--config.optimizer.lr=1"], "config.optimizer.lr; keys there: b1, b2, decayed, eps, learn"),
        ([MLP, "--config.seed.x=1"], "unknown key config.seed.x; keys there: none"),
        ([MLP, "--config.num_workers=four"], "num_workers=four: a whole number is needed, not 'four'"),
        ([MLP, "--config.rounds=ten"], "a whole number is needed, not 'ten'"),
        ([MLP, "--config.epochs=much"], "a number is needed, not 'much'"),
        ([MLP, "--config.model.hidden=abc"], "model.hidden"),
        ([MLP, "--config.model.hidden=(32.5,32)"], "(32.5, 32); set config.model.hidden to a tuple of ints"),
        ([MLP, "--config.partition.shares=('a','b')"], "config.partition.shares to a tuple of floats"),
        ([MLP, "--config.partition.shares=(1000.0,1.0)"], "leaves a worker without a neuron"),
        ([MLP, "--config.optimizer.step_at=('a',)"], "config.optimizer.step_at to a tuple"),
        ([MLP, "--config.optimizer.warmup=2.0"], "config.optimizer.warmup to 0 to 1"),
        ([MLP, "--config.seed=-1"], "config.seed to 0 to 2147483647"),
        ([MLP, "--config.seed=12345678901234567890123"], "config.seed to 0 to 2147483647"),
        ([f"--config={ROOT}/configs/mlp.py", "--config.epochs=inf"], "config.epochs to a number above 0"),
        ([MLP, "--config.model.name=resnet"], "no key 'model.sections'; keys beside it: hidden, name"),
        (["--config", f"{ROOT}/configs/nothing.py"], "nothing.py: there is no such file"),
        ([f"--config={ROOT}/README.md"], "--config="),
        ([f"--config={ROOT}/configs/nothing.py"], "nothing.py"),
        ([f"--config={ROOT}/configs/mlp.py:huge"], "no mode 'huge'; it has digits, smoke"),
        ([MLP, "--config.method=sgd"], "config.method to one of 'ist', 'local_sgd', 'data_parallel'"),
        ([MLP, "--config.workers_on_device=scan"], "'map', 'vmap'"),
        ([MLP, "--config.compute_dtype=float16"], "config.compute_dtype to one of 'float32', 'bfloat16'"),
        ([MLP, "--config.optimizer_state=kept"], "'', 'reset', 'keep', 'carry'"),
        ([MLP, "--config.optimizer.name=adam"], "config.optimizer.name to one of 'sgd', 'adamw', 'lion'"),
        ([MLP, "--config.outer.momentum=1.0"], "config.outer.momentum to 0 to 0.999"),
        ([MLP, "--config.outer.name=sgd", "--config.method=data_parallel"], "config.outer.name to 'none'"),
        ([MLP, "--config.power_sgd.rank=0"], "set config.power_sgd.rank to 1 or more"),
        ([MLP, "--config.exchange.keep=0"], "set config.exchange.keep to a number above 0, 1 at most"),
        ([MLP, "--config.optimizer.schedule=linear"], "'constant', 'cosine', 'step'"),
        ([MLP, "--config.num_workers=0"], "num_workers=0; set config.num_workers to 1 or more"),
        ([MLP, "--config.local_steps=0"], "config.local_steps to 1"),
        ([MLP, "--config.rounds=0"], "rounds=0"),
        ([MLP, "--config.epochs=-1.0", "--config.rounds=0"], "rounds=0"),
        ([MLP, "--config.num_workers=64"], "leaves a worker without a neuron"),
        ([MLP, "--config.num_workers=4", "--config.num_devices=3"], "to 0 (automatic) or one of [1, 2, 4]"),
        ([MLP, "--config.data.name=cifar"], "data.name='cifar' does not exist"),
        ([MLP, "--config.data.words=(1,2)"], "config.data.words to a tuple of strings, such as"),
        ([MLP, "--config.data.clip_length=cut"], "config.data.clip_length to one of 'pad', 'drop'"),
        ([MLP, "--config.data.words=('yes',)", "--config.data.name=speech_commands"], "config.data.dir"),
        ([MLP, "--config.model.name=vit"], "one of 'resnet', 'mlp', 'transformer', 'vgg', or FILE.py:NAME"),
        ([MLP, "--config.model.hidden=()"], "model.hidden=()"),
        ([MLP, "--config.partition.min_units=33"], "partition.min_units=33 must lie between 0 and the 32"),
        ([MLP, "--config.partition.shares=(1.0,)"], "partition.shares"),
        ([MLP, "--config.lost_after=inf"], "config.lost_after to 1 or more (a finite number)"),
        (
            [RESNET, "--config.partition.deal_strided=True", "--config.partition.min_units=1"],
            "set config.partition.min_units to 0",
        ),
        ([MLP, "--config.checkpoint.keep=0"], "config.checkpoint.keep to 1 or more"),
        ([MLP, "--config.participation=1.5"], "config.participation to 0 to 1"),
        ([MLP, "--process_id=0"], "--coordinator, --num_processes and --process_id go together"),
        ([MLP, "--coordinator=here", "--num_processes=2", "--process_id=0"], "host:port is needed"),
        ([MLP, "--distributed"], "several processes need a --workdir"),
        ([MLP, "--distributed", "--workdir=run"], "--distributed found no other processes"),
        ([MLP, "--workdir=/proc/nowhere/run"], "cannot write to --workdir=/proc/nowhere/run"),
        ([MLP, f"--workdir={ROOT}/README.md"], "README.md is a file; a folder is needed"),
        ([MLP, f"--workdir={ROOT}/configs"], "but no run; choose a new or empty --workdir"),
        ([RESNET, "--config.model.sections=(1,1)"], "no partitionable block"),
        ([RESNET, "--config.partition.sections=(4,)"], "section 4"),
        ([RESNET, "--config.partition.sections=()"], "partition.sections"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_2(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main.main(["main", *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_config_file_that_fails_without_a_word(tmp_path, capsys):
    (tmp_path / "own.py").write_text("def get_config():\n    raise NotImplementedError\n")
    with pytest.raises(SystemExit):
        main.main(["main", f"--config={tmp_path}/own.py"])
    assert capsys.readouterr().err.endswith("own.py: NotImplementedError\n")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a run, of a run of a model of one's own, and of a broken one."""
    folder = tmp_path_factory.mktemp("folders")
    train.train(get_config("mlp", rounds=1), folder / "run")
    shutil.copytree(folder / "run", folder / "own")
    summary = files.read_summary(folder / "run") | {"custom_model": "Own()"}
    files.write_json(folder / "own" / "summary.json", summary)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"seed": ')
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=nowhere"], "holds no config.json, so no run; it is empty or not there"),
        (["--workdir=run/config.json"], "so no run; it is a file"),
        (["--workdir=."], "so no run; it holds broken, own, run"),
        (["--workdir=run", "nothing.png"], "cannot read nothing.png as an image"),
        (["--workdir=run", "run/config.json"], "cannot read run/config.json as an image"),
        (["--workdir=own"], "holds a model of your own, Own"),
        (["--workdir=broken"], "cannot read broken/config.json"),
    ],
)
def test_mistakes_at_evaluation(flags, message, folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["evaluate", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_trains_and_says_its_result_last(tmp_path):
    command = [sys.executable, "-m", "ist_jax.main", MLP, f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("data: digits: 1,797 real 8x8 images")
    assert "2 workers on 2 cpu device(s)" in lines[1]
    assert lines[-1].startswith("ist: test accuracy ")
    assert ", 42.7% of the 0.0845 MB of local SGD; " in lines[-1]
    assert lines[-2] == f"report: {tmp_path}/run/report.html"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert "finished already" in again.stderr
    assert again.stderr.splitlines()[-2:] == lines[-2:]


def test_settings_that_differ_are_told_one_a_line(folders, capsys):
    before = [f"--workdir={folders}/run", "--config.rounds=1", "--config.local_steps=7", "--config.seed=3"]
    with pytest.raises(SystemExit) as stop:
        main.main(["main", MLP, *before])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-3:] == [
        f"error: {folders}/run holds a run with other settings; choose another --workdir",
        "  config.local_steps is 2 there and 7 here",
        "  config.seed is 0 there and 3 here",
    ]


def test_a_picture_of_dark_ink_is_told_where_the_set_has_bright_ink(folders, tmp_path, capsys):
    ink = np.zeros((40, 40), np.uint8)
    ink[:, 15:25] = 255  # it reaches the border
    Image.fromarray(ink).save(tmp_path / "bright.png")
    Image.fromarray(255 - ink).save(tmp_path / "dark.png")
    clear = np.stack([0 * ink, 0 * ink, 0 * ink, ink], -1)  # black on nothing
    Image.fromarray(clear).save(tmp_path / "clear.png")
    files = [str(tmp_path / f"{name}.png") for name in ("bright", "dark", "clear")]
    assert evaluate.main(["evaluate", f"--workdir={folders}/run", *files]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "invert it" in line]
    told = "it has bright borders, and digits has bright ink on dark: invert it"
    assert lines == [f"{file}: {told}" for file in files[1:]]
    colours = np.zeros((3, 32, 32, 3), np.uint8)  # of a set in colour nothing is known
    assert not evaluate.is_inverted(Image.fromarray(255 - ink), colours)


def test_what_pip_says_is_shown_where_it_fails_alone(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.cfg", "pyproject.toml"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for code in (0, 3):
        python.write_text(f"#!/bin/sh\necho a warning of pip >&2\nexit {code}\n")
        python.chmod(0o755)
        (tmp_path / ".venv" / ".installed").unlink(missing_ok=True)
        done = subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode > 0) == (code > 0)
        assert ("a warning of pip" in done.stdout + done.stderr) == (code > 0)


@pytest.mark.parametrize("command", [main, plan, compare])
def test_help_lists_the_keys_of_the_config_it_is_given(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["command", "--help", MLP])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("  --config.num_workers: workers S")
    assert lines[place + 1] == "    (default: 2; 1 or more; may change on resume)"
    assert "  --config.model.hidden: neurons of each hidden layer" in lines
    listed = {line.split(":")[0].removeprefix("  --config.") for line in lines if "  --config." in line}
    assert listed == keys_of(get_config("mlp")).keys()
    assert max(map(len, lines[place:])) <= 100


def test_help_is_quick_to_say_and_names_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["main", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--config" in out
    assert "--workdir" in out


@pytest.mark.parametrize("module", ["main", "evaluate", "plan", "compare"])
def test_help_waits_for_no_library(module):
    command = [sys.executable, "-X", "importtime", "-m", f"ist_jax.{module}", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "--workdir" in done.stdout or "--config" in done.stdout
    assert " jax" not in done.stderr and " numpy" not in done.stderr  # imported
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # seconds of a core


def test_the_package_is_imported_in_less_than_two_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import ist_jax"], cwd=ROOT, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_new_folder_is_made_where_none_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["main", MLP]) == 0
    assert [p.name for p in Path("runs").glob("mlp-*/*") if p.name == "summary.json"] == ["summary.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return undefined\n", "name 'undefined' is not defined"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return {'a': 1}\n", "must return an ml_collections.ConfigDict"),
        ("import ml_collections as m\ndef get_config():\n    return m.ConfigDict({})\n", "no key 'model."),
    ],
)  # fmt: skip
def test_a_config_file_that_fails_says_how(text, message, tmp_path, capsys, monkeypatch):
    # config_flags executes every file into the same module; a fresh process would have none
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main.main(["main", f"--config={path}", f"--workdir={tmp_path}/run"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
