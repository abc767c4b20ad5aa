"""Tasks: what an example, a label, a loss and a score are, of the package's own and of a user's."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from rounds import assert_same_bits, copied

from ist_jax import compare, data, plan, train
from ist_jax.report import page
from ist_jax.runtime.setup import set_up
from ist_jax.tasks import Metric, Task, language_modelling
from ist_jax.tasks.task import check_fit, with_example
from ist_jax.workdir import checkpoint, files

RNG = np.random.default_rng(0)


def config_of(name, train_split, test_split, monkeypatch, **overrides):
    """A config whose data are these splits."""
    dataset = data.DataSet(name, train_split, test_split)
    monkeypatch.setitem(data.SETS, name, data.Entry(lambda directory, options: dataset))
    return get_config("mlp", **{"data.name": name, "rounds": 4, "eval_every": 1} | overrides)


class Net(nn.Module):
    """Dict inputs; hidden units of one group."""

    width: int = 16
    rate: float = 0.0

    def unit_axes(self):
        return {"in/kernel": (None, "hidden"), "in/bias": ("hidden",), "out/kernel": ("hidden", None)}

    def subnet(self, sizes):
        return self.clone(width=sizes["hidden"])

    @nn.compact
    def __call__(self, inputs, train=False):
        h = nn.relu(nn.Dense(self.width, name="in")(inputs["x"]))
        h = nn.Dropout(self.rate, deterministic=not train)(h)
        return nn.Dense(1, name="out")(h)[:, 0] + inputs["offset"]


def measured(n):
    x = RNG.normal(size=(n, 3))
    return {
        "measured": {"x": x, "offset": np.arange(n) % 2},
        "target": x @ [1.0, -2.0, 0.5] + np.arange(n) % 2,
    }


def noisy(split, numbers, key):
    inputs = jax.tree.map(lambda x: x[numbers], split["measured"])
    if key is not None:
        inputs = inputs | {"x": inputs["x"] + 0.01 * jax.random.normal(key, inputs["x"].shape)}
    return inputs, split["target"][numbers]


REGRESSION = Task(
    name="regression",
    loss=lambda y, target, key: (y - target) ** 2,
    batch=noisy,
    scores={"absolute": lambda y, target: jnp.abs(y - target)},
    figures=lambda means: {"rmse": math.sqrt(means["loss"]), "absolute": means["absolute"]},
    metric=Metric("rmse"),
)


@pytest.fixture
def measurements(monkeypatch):
    return config_of("measured", measured(70), measured(30), monkeypatch, eval_batch_size=8)


@pytest.mark.parametrize("method", ["ist", "data_parallel"])
def test_a_regression_on_a_tree_of_inputs_trains_and_is_scored_once_an_example(
    method, measurements, tmp_path
):
    measurements.method = method
    seen, model = [], Net()
    summary = train.train(measurements, tmp_path, model, task=REGRESSION, progress=seen.append)
    assert summary["metric"] == {"name": "rmse", "higher_is_better": False, "percent": False}
    assert seen[-1]["train_loss"] < seen[0]["train_loss"]
    assert all(0 < r["train_absolute"] < 10 for r in seen)  # a metric in training
    assert not any("accuracy" in key for record in [*seen, summary] for key in record)
    params, test = checkpoint.load_params(tmp_path), data.load(data.SETS["measured"].load("", {}).test)
    scale = set_up(measurements, model, task=REGRESSION, evaluation_only=True).scale
    assert scale == ({"hidden": 0.5} if method == "ist" else {})
    wrong = np.asarray(model.apply({"params": params}, test["measured"])) - test["target"]
    assert summary["test_rmse"] == pytest.approx(np.sqrt((wrong**2).mean()), rel=1e-4)
    assert summary["test_absolute"] == pytest.approx(np.abs(wrong).mean(), rel=1e-4)
    assert summary["test_examples"] == 30
    best = min(seen, key=lambda r: r["test_rmse"])["round"]
    assert_same_bits(checkpoint.load_params(tmp_path, "best"), checkpoint.load_params(tmp_path, best))
    out = tmp_path / "page.html"
    page.write_report([tmp_path], out)
    assert "test rmse" in out.read_text() and "accuracy" not in out.read_text().split("<script")[0]


def test_its_ledger_and_plan_agree(measurements, tmp_path):
    train.train(measurements, tmp_path, Net(), task=REGRESSION)
    rows = {row["cause"]: row for row in json.loads((tmp_path / "ledger.json").read_text())["rows"]}
    facts = data.Facts(num_train=70, split=measured(1))
    cost = plan.predict(measurements, facts, Net(), REGRESSION)
    assert rows["round"]["expected"] == rows["round"]["hlo"] == cost.wire_bytes_per_worker_per_round > 0
    # products of 8 examples with half of 16 units: 3 inputs forward and by the kernel, 1 output by both
    assert rows["training step"]["expected"] == cost.flops_per_worker_per_step == 8 * 8 * 2 * (3 * 2 + 1 * 3)


def test_methods_are_compared_by_its_metric(measurements, tmp_path):
    methods = compare.of_methods(["ist", "local_sgd"])
    measurements.rounds = 2
    result = compare.compare(
        measurements,
        tmp_path,
        variants=methods,
        seeds=1,
        model=Net(),
        task=REGRESSION,
    )
    assert result["variants"]["ist"]["rmse"]["mean"] > 0
    assert "test rmse" in compare.table(result)


def test_another_task_is_refused_on_resume_by_name(measurements, tmp_path):
    measurements.rounds = 1
    train.train(measurements, tmp_path, Net(), task=REGRESSION)
    other = REGRESSION._replace(name="robust regression")
    for rounds in (1, 2):  # finished, and to go on
        measurements.rounds = rounds
        with pytest.raises(ValueError, match="holds a run of the task regression, not of robust regression"):
            train.train(measurements, tmp_path, Net(), task=other)
    assert train.train(measurements, tmp_path, Net(), task=REGRESSION)["rounds"] == 2


def test_dropout_is_a_function_of_seed_round_worker_and_step(measurements, tmp_path):
    run = set_up(measurements, Net(rate=0.5), task=REGRESSION)
    losses = [run_round(run, index) for index in (0, 0, 1)]
    assert losses[0] == losses[1]
    plain = set_up(measurements, Net(), task=REGRESSION)
    assert run_round(plain, 0) != losses[0]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished = train.train(measurements, whole, Net(rate=0.5), task=REGRESSION)
    measurements.rounds = 2
    train.train(measurements, cut, Net(rate=0.5), task=REGRESSION)
    measurements.rounds = 4
    again = train.train(measurements, cut, Net(rate=0.5), task=REGRESSION)
    assert again["params_sha256"] == finished["params_sha256"]


def run_round(run, index):
    _, record = train.train_round(run, copied(run.state, run), index)
    return record["train_loss"]


def test_a_loss_with_a_key_is_random_in_training_alone(measurements):
    def loss(y, target, key):
        return (y - target) ** 2 + (0 if key is None else 1 + jax.random.uniform(key, y.shape))

    random = set_up(measurements, Net(), task=REGRESSION._replace(loss=loss))
    plain = set_up(measurements, Net(), task=REGRESSION)
    assert 1 < run_round(random, 0) - run_round(plain, 0) < 2
    scores = [train.score(run, run.state).loss for run in (random, plain)]
    assert scores[0] == scores[1]


# --- language modelling -------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """Logits of the next token, by the last one."""

    vocabulary: int = 7

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(self.vocabulary, name="out")(nn.one_hot(tokens, self.vocabulary))


def counting(n, dtype=np.int64):
    return {"tokens": ((RNG.integers(0, 7, (n, 1)) + np.arange(6)) % 7).astype(dtype)}


@pytest.mark.parametrize(("dtype", "name"), [(np.int64, "bits_per_token"), (np.uint8, "bits_per_byte")])
def test_language_modelling_by_hand(dtype, name):
    tokens = {"tokens": np.array([[0, 1, 2], [3, 3, 3]], dtype)}
    task = with_example(language_modelling.make(tokens), tokens)
    inputs, labels = task.show(tokens)
    assert inputs.tolist() == [[0, 1], [3, 3]] and labels.tolist() == [[1, 2], [3, 3]]
    np.testing.assert_allclose(task.loss(jnp.zeros((2, 2, 4)), labels, None), np.log([4.0, 4.0]), rtol=1e-6)
    figures = task.figures({"loss": math.log(4)})
    assert figures == pytest.approx({name: 2.0, "perplexity": 4.0})
    assert task.metric == Metric(name)
    assert task.figures({"loss": 1000.0})["perplexity"] == math.inf


def test_a_language_model_learns_to_count(monkeypatch, tmp_path):
    overrides = {"method": "local_sgd", "local_steps": 20, "optimizer.learning_rate": 0.1}
    config = config_of("counting", counting(64), counting(30), monkeypatch, **overrides)
    summary = train.train(config, tmp_path, Bigram())
    assert summary["task"] == "language_modelling"
    first = files.read_records(tmp_path)[0]["test_bits_per_token"]
    assert summary["test_bits_per_token"] < 0.7 * first < 0.7 * 2 * math.log2(7)
    assert summary["test_perplexity"] == pytest.approx(2 ** summary["test_bits_per_token"])


# --- what cannot work is said before anything is compiled ---------------------------------------------------

IMAGES = np.zeros((12, 4, 4, 1), np.uint8)
LABELS = np.arange(12) % 3
BAD_LABELS = {
    "negative": LABELS - 1,
    "beyond": LABELS + 1,
    "float": LABELS.astype(float),
    "lengths": LABELS[:-1],
    "matrix": np.stack([LABELS, LABELS], 1),
}
SAID = {
    "negative": "in the training examples there is a label -1; the data set has 3 classes, so that labels "
    "must be 0 to 2",
    "beyond": "there is a label 3; the data set has 3 classes",
    "float": "the labels are float64; classes are whole numbers",
    "lengths": "the same number of examples, at least one: image has 12, label has 11",
    "matrix": r"the labels are int32 \[N, 2\]; classes are whole numbers, int \[N\]",
}


@pytest.mark.parametrize("fault", BAD_LABELS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_data_that_cannot_be_learned_from(fault, split, monkeypatch):
    labels = {"train": LABELS, "test": LABELS} | {split: BAD_LABELS[fault]}
    splits = {name: data.ArraySource(IMAGES, label) for name, label in labels.items()}
    dataset = data.DataSet("bad", **splits, classes=("a", "b", "c"))
    monkeypatch.setitem(data.SETS, "bad", data.Entry(lambda directory, options: dataset))
    message = SAID[fault] if split == "train" else SAID[fault].replace("training", "test")
    with pytest.raises(ValueError, match=message):
        set_up(get_config("mlp", **{"data.name": "bad"}))


class Flat(nn.Module):
    """Of any number of outputs, for local SGD."""

    outputs: tuple = (10,)

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(math.prod(self.outputs), name="out")(x.reshape(len(x), -1))
        return y.reshape(len(x), *self.outputs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Flat((7,)),
            r"the model returns \[B, 7\], and the data set has 10 classes; logits \[B, 10\] are needed",
        ),
        (Flat((2, 10)), r"the model returns \[B, 2, 10\], and the data set has 10 classes"),
        (Flat(()), r"the model returns \[B\], and the data set has 10 classes"),
    ],
)
def test_outputs_that_do_not_fit_the_classes(model, message):
    with pytest.raises(ValueError, match=message):
        set_up(get_config("mlp", method="local_sgd"), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"loss": lambda y, target, key: (y - target).mean()},
            r"its loss is float32 \[\]; a number per example",
        ),
        ({"loss": lambda y, target, key: y.reshape(3) - target}, "cannot judge outputs"),
        ({"scores": {"error": lambda y, target: (y - target)[:, None]}}, r"its error is float32 \[B, 1\]"),
        ({"metric": Metric("mae")}, "has the metric 'mae'; give one of 'loss', 'rmse', 'absolute'"),
    ],
)
def test_a_task_that_cannot_judge_is_told_so(change, message):
    split = measured(4)
    task = with_example(REGRESSION._replace(**change), split)
    with pytest.raises(ValueError, match=message):
        check_fit(task, jax.ShapeDtypeStruct((1,), np.float32))


def test_examples_that_no_task_is_for(monkeypatch):
    config = config_of(
        "odd", {"x": np.zeros(4), "y": np.zeros(4)}, {"x": np.zeros(4), "y": np.zeros(4)}, monkeypatch
    )
    with pytest.raises(ValueError, match=r"task='auto' is not for examples with 'x', 'y'; set config\.task"):
        set_up(config, Flat())
    with pytest.raises(
        ValueError, match="task 'regression' asks for 'measured', and an example has 'x', 'y'"
    ):
        set_up(config, Flat(), task=REGRESSION)
    config.data.flip = True
    with pytest.raises(ValueError, match=r"augments in its `batch`: set config\.data\.pad to 0"):
        set_up(config, Flat(), task=REGRESSION)


def test_a_run_all_of_whose_rounds_were_left_out_has_failed(measurements, tmp_path):
    task = REGRESSION._replace(loss=lambda y, target, key: (y - target) * jnp.nan)
    for _ in range(2):  # the same command again says the same
        with pytest.raises(train.Diverged, match="all workers were left out of all 4 rounds"):
            train.train(measurements, tmp_path, Net(), task=task)
    assert not (tmp_path / "summary.json").exists()
