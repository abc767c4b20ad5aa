"""Extreme classification: the text format, sparse inputs, many labels, and stopping on a validation split."""

import json
import re
import tracemalloc
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import ROOT, get_config
from rounds import copied, run_turn, whole

from ist_jax import data, evaluate, partition, train
from ist_jax.config import check
from ist_jax.data import batches, extreme_classification, sparse
from ist_jax.exchange.kinds import to_params
from ist_jax.models import sparse as sparse_layer
from ist_jax.models.mlp import MLP
from ist_jax.models.sparse import Sparse
from ist_jax.runtime import inputs, scoring, setup, stopping
from ist_jax.tasks import multi_label
from ist_jax.tasks.task import ACCURACY, Metric
from ist_jax.workdir import checkpoint

SHARED = ROOT.parent / "shared" / "data" / "xc"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data beside the checkout")
NUM_FEATURES, NUM_LABELS = 40, 12


def write(path, text):
    path.write_text(text)
    return path


def write_split(path, points, seed):
    """Points whose labels follow from their features; one in twenty has none."""
    rng = np.random.default_rng(seed)
    lines = [f"{points} {NUM_FEATURES} {NUM_LABELS}"]
    for _ in range(points):
        features = rng.choice(NUM_FEATURES, rng.integers(1, 9), replace=False)
        labels = sorted({int(f) % NUM_LABELS for f in features}) if rng.random() > 0.05 else []
        pairs = " ".join(f"{f}:{rng.uniform(0.5, 1.5):.4f}" for f in features)
        lines.append(",".join(map(str, labels)) + " " + pairs)
    return write(path, "\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("xc")
    write_split(path / "tiny_train.txt", 300, 0)
    write_split(path / "tiny_test.txt", 90, 1)
    return path


def tiny(folder, **overrides):
    """The smoke config on the tiny files."""
    config = get_config(
        "mlp", **{"data.name": "extreme_classification", "data.dir": str(folder), "model.output_norm": False}
    )
    config.update_from_flattened_dict(overrides)
    return config


# --- the text format ------------------------------------------------------------------------------


def test_a_file_is_read_as_it_is_written(tmp_path):
    text = "6 5 4\n2,0 0:1.5 4:-2e-1\n 1:3\n1 \n3:1\r\n\n0,3,3 2:.5 2:1\n\n"
    source = extreme_classification.read(write(tmp_path / "train.txt", text))
    assert len(source) == 3  # the points in lines 3, 5 and 6 have no label
    assert [source[i]["label"].tolist() for i in range(3)] == [[0, 2], [1], [0, 3]]
    assert [source[i]["feature"].tolist() for i in range(3)] == [[0, 4], [], [2, 2]]
    np.testing.assert_allclose(np.concatenate([source[i]["value"] for i in range(3)]), [1.5, -0.2, 0.5, 1])
    assert (source.feature.width, source.label.width) == (5, 4)
    assert (source.feature.longest, source.label.longest) == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: must be 'points features labels'"),
        ("2 5\n", "line 1: must be 'points features labels', three numbers, not '2 5'"),
        ("2 5 x\n", "line 1: must be 'points features labels', three numbers, not '2 5 x'"),
        ("2 5 0\n", "line 1: must be three numbers above 0"),
        ("1 5 99999999999\n", "line 1: must be"),
        ("2 5 4\n0 1:1\n0 1:x\n", "line 3: '1:x' is not feature:value"),
        ("2 5 4\n0 1:1\n0 1:1:2 3\n", "line 3: '1:1:2' is not feature:value"),
        ("2 5 4\n0 1:1\n0 1:1 3\n", "line 3: '3' is not feature:value"),
        ("2 5 4\n0 1:1\n0 1:\n", "line 3: '1:' is not feature:value"),
        ("2 5 4\n0 1:1\n0 -1:1\n", "line 3: '-1:1' is not feature:value"),
        ("2 5 4\n0 1:1\n0 1:nan\n", "line 3: '1:nan' is not feature:value"),
        ("2 5 4\n0 1:1\n0 1:1e99\n", "line 3: has a value that is too large"),
        ("2 5 4\n0 1:1\n0, 1:1\n", "line 3: '0,' is not a list of labels"),
        ("2 5 4\n0 1:1\na 1:1\n", "line 3: 'a' is not a list of labels"),
        ("2 5 4\n0 1:1\n-1 1:1\n", "line 3: '-1' is not a list of labels"),
        ("2 5 4\n0 1:1\n0,4 1:1\n", "line 3: label 4 is not below the 4 of the header"),
        ("2 5 4\n0 1:1\n0 1:1 5:1\n", "line 3: feature 5 is not below the 5 of the header"),
        ("2 5 4\n0 1:1\n0 99999999999999999999:1\n", "line 3: feature 1000"),
        ("2 5 4\n0 1:1\n", "line 2: is the last, but the header promises 2 points"),
        ("2 5 4\n0 1:1\n0 2:1\n\n1 1:1\n", "line 5: is one more than the 2 points of the header"),
        ("2 5 4\n 1:1\n 1:1\n", "has no point with a label"),
        ("2 5 4\n0 1:1\n\xff 1:1\n", "line 3: "),
    ],
)
def test_a_malformed_file_names_itself_and_the_line(text, message, tmp_path):
    (tmp_path / "train.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt") as error:
        extreme_classification.read(tmp_path / "train.txt")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_its_files_says_what_was_looked_for(folder, tmp_path):
    for directory in ("", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(
            ValueError, match=r"no files named train.txt or \*_train.txt; set config.data.dir"
        ):
            data.open_data_set("extreme_classification", directory)
    write(tmp_path / "train.txt", "1 5 4\n0 1:1\n")
    write(tmp_path / "a_test.txt", "1 5 3\n0 1:1\n")
    with pytest.raises(ValueError, match=r"train.txt has \(features, labels\) \(5, 4\) and .* \(5, 3\)"):
        data.open_data_set("extreme_classification", str(tmp_path))
    write(tmp_path / "b_test.txt", "1 5 4\n0 1:1\n")
    with pytest.raises(ValueError, match=r"has 2 files named test.txt"):
        data.open_data_set("extreme_classification", str(tmp_path))


def test_reading_keeps_flat_arrays_only(tmp_path):
    row = "1,2,3 " + " ".join(f"{f}:0.5" for f in range(200)) + "\n"
    path = write(tmp_path / "train.txt", "1000 200 4\n" + row * 1000)
    tracemalloc.start()
    source = extreme_classification.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = sum(x.nbytes for x in jax.tree.leaves((source.feature, source.label)))
    assert kept == 1000 * (200 * 8 + 3 * 4) + 2 * 1001 * 4
    assert peak < 1.5 * kept  # 200,000 Python numbers alone would be 4 times as much


# --- rows, and the layer over them ----------------------------------------------------------------


def make_rows(rng, points, width=7, most=5):
    counts = rng.integers(0, most + 1, points)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    index = rng.integers(0, width, start[-1]).astype(np.int32)
    return sparse.Rows(start, index, rng.normal(size=start[-1]).astype(np.float32), width, most)


def to_dense(rows):
    dense = np.zeros((len(rows), rows.width), np.float32)
    for i in range(len(rows)):
        own = slice(rows.start[i], rows.start[i + 1])
        np.add.at(dense[i], rows.index[own], rows.value[own])
    return dense


@pytest.mark.parametrize("seed", range(3))
def test_rows_taken_and_drawn_are_the_rows(seed):
    rng = np.random.default_rng(seed)
    rows = make_rows(rng, 6)
    numbers = rng.integers(0, 6, (2, 3, 4))
    taken = sparse.take(rows, numbers)
    for lead in np.ndindex(2, 3):
        own = jax.tree.map(lambda x: x[lead], taken)  # noqa: B023
        np.testing.assert_array_equal(to_dense(own), to_dense(rows)[numbers[lead]])
    drawn = jax.device_get(jax.jit(sparse.draw)(rows, numbers[0, 0]))
    dense = np.zeros((4, rows.width + 1), np.float32)
    for i in range(4):
        np.add.at(dense[i], drawn.index[i], drawn.value[i] * (np.arange(5) < drawn.count[i]))
    np.testing.assert_allclose(dense[:, :-1], to_dense(rows)[numbers[0, 0]], rtol=1e-6)
    assert (dense[:, -1] == 0).all()


@pytest.mark.parametrize("chunk", [3, 1024])
def test_the_sparse_product_is_the_dense_one_and_so_is_its_gradient(chunk, monkeypatch):
    monkeypatch.setattr(sparse_layer, "_CHUNK", chunk)
    rng = np.random.default_rng(chunk)
    rows = make_rows(rng, 9)
    x = sparse.draw(jax.tree.map(jnp.asarray, rows), jnp.arange(9))
    x = Sparse(x.index.at[0, 0].set(-1), x.value, x.count, x.width)  # outside: for nothing
    dense = to_dense(rows)
    if rows.start[1] > 0:
        dense[0, rows.index[0]] -= rows.value[0]
    kernel = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)

    def loss(kernel, x):
        return ((x @ kernel) * weight).sum()

    np.testing.assert_allclose(jax.jit(lambda k: x @ k)(kernel), dense @ np.asarray(kernel), atol=1e-5)
    wanted = jax.grad(loss)(kernel, jnp.asarray(dense))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(kernel, x), wanted, atol=1e-5)
    both = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), (kernel, x))
    mapped = jax.jit(jax.vmap(lambda k, x: x @ k))(*both)
    np.testing.assert_allclose(mapped[0], dense @ np.asarray(kernel), atol=1e-5)
    np.testing.assert_allclose(mapped[1], dense[::-1] @ np.asarray(kernel)[::-1], atol=1e-5)


def test_the_sparse_product_never_makes_a_dense_input():
    x = jax.ShapeDtypeStruct((64, 50), jnp.int32)
    x = Sparse(
        x, jax.ShapeDtypeStruct((64, 50), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32), 100_000
    )
    kernel = jax.ShapeDtypeStruct((100_000, 8), jnp.float32)
    compiled = jax.jit(jax.grad(lambda k, x: (x @ k).sum())).lower(kernel, x).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 100_000 * 4 / 10
    assert memory.output_size_in_bytes == 100_000 * 8 * 4


def precisions(logits, labels):
    task = multi_label.make({}, logits.shape[-1])
    return jnp.stack([score(logits, labels) for score in task.scores.values()], axis=-1)


def test_loss_and_precision_by_hand():
    logits = jnp.asarray([[0.0, 3.0, 2.0, 1.0, -1.0, 5.0], [1.0, 0.0, 0.0, 0.0, 0.0, 9.0]])
    labels = jnp.asarray([[1, 2, 0], [0, 6, 6]])  # of 3 labels, and of 1
    scores = precisions(logits, labels)
    # best five of the first: 5, 1, 2, 3, 0, of which the last four hold 1, 2 and 0; of the second: 5, 0, ...
    np.testing.assert_allclose(scores, [[0, 2 / 3, 3 / 5], [0, 1 / 3, 1 / 5]], rtol=1e-6)
    sums = np.log(np.exp(np.asarray(logits, np.float64)).sum(1))
    np.testing.assert_allclose(
        multi_label.softmax_loss(logits, labels), [sums[0] - (3 + 2 + 0) / 3, sums[1] - 1], rtol=1e-6
    )
    few = precisions(jnp.asarray([[2.0, 1.0, 3.0]]), jnp.asarray([[2, 0, 3]]))
    np.testing.assert_allclose(few, [[1, 2 / 3, 2 / 5]], rtol=1e-6)


# --- the engine -----------------------------------------------------------------------------------

CASES = {
    "uneven": {"num_workers": 3, "partition.shares": (3.0, 2.0, 1.0)},
    "two layers, overlap": {"model.hidden": (16, 12), "partition.min_units": 9},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["uneven", "two layers, overlap"])
def test_rounds_on_sparse_data_equal_the_plain_loop_of_masking(case, folder):
    run = setup.set_up(tiny(folder, **CASES[case]))
    stage = run.stages[-1]
    start = params = whole(run, run.state.params)
    axes = partition.resolve_axes(reference.nested(params), run.model.unit_axes())
    loop, state, moments = reference.subnets(stage.recipe, axes), copied(run.state, run), None
    for index in range(2):
        turn = run.turn(stage, index)
        state, told = run_turn(stage, state, turn)
        assert told.healthy.all()
        params, moments, _ = loop(params, moments, reference.of_all_workers(turn))
    got = to_params(run.layout, state.params)
    assert reference.max_difference(params, reference.flat(got)) < 2e-4
    assert reference.max_difference(start, params) > 1e-2
    score, by_hand = train.score(run, state), whole_score(run, got)
    assert score.examples == by_hand.examples == len(run.inputs.test["label"])
    assert score.scores == pytest.approx(by_hand.scores, abs=1e-6)
    assert score.loss == pytest.approx(by_hand.loss, rel=1e-4)


def whole_score(run, params):
    """The score by the whole model on densified inputs, on one device."""
    dealt = inputs.deal_batches(run.inputs.test, run.settings["eval_batch_size"], 1)
    task, scale = run.inputs.task, run.scale

    @reference.plainly
    def score(batch):
        x, labels = task.show(batch)
        weight, dense = batch["weight"], x @ jnp.eye(x.width)
        logits = run.model.apply({"params": params}, dense, scale=scale)
        judged = [judge(logits, labels) for judge in (task.loss, *task.scores.values())]
        return jnp.concatenate([weight @ jnp.stack(judged, -1), weight.sum()[None]])

    sums = [score(jax.tree.map(itemgetter((0, n)), dealt)) for n in range(dealt["weight"].shape[1])]
    return scoring.total_score(task, np.array(sums))


def test_evaluation_moves_activations_and_no_kernel(folder):
    run = setup.set_up(tiny(folder, **{"model.hidden": (512,), "eval_batch_size": 2}), evaluation_only=True)
    text = run.splits["test"].program.as_text()
    shapes = re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:all-gather|all-to-all)\(", text)
    sizes = [int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes]
    assert sizes
    kernels = [np.prod(leaf.shape) for path, leaf in run.layout.leaves.items() if "kernel" in path]
    assert max(sizes) < min(kernels) / 2  # slices of one would be half of it


def test_logits_without_norm_are_scaled_to_the_subnets():
    model = MLP((6,), 3, output_norm=False)
    x = jax.random.normal(jax.random.key(0), (8, 5))
    params = model.init(jax.random.key(1), x)["params"]
    logits = model.apply({"params": params}, x)
    np.testing.assert_allclose(
        model.apply({"params": params}, x, scale={"hidden1": 0.25}), logits / 4, rtol=1e-6
    )
    assert np.abs(np.asarray(logits).mean(0)).max() > 1e-3  # not normalised


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ist", "local_sgd", "data_parallel"])
def test_every_method_learns_and_reports_precisions(method, folder, tmp_path, capsys):
    config = tiny(folder, method=method, rounds=30, local_steps=5, batch_size=16, eval_every=0)
    summary = train.train(config, tmp_path / "run")
    assert summary["test_p1"] == summary["test_accuracy"] > 0.6  # labels are 5 of 12: 0.4 by chance
    assert 0.3 < summary["test_p5"] < summary["test_p3"] < summary["test_p1"]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {key: line[key] for key in ("test_p1", "test_p3", "test_p5")} == {
        key: summary[key] for key in ("test_p1", "test_p3", "test_p5")
    }
    if method != "ist":
        return
    assert evaluate.main(["evaluate", f"--workdir={tmp_path / 'run'}"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"test accuracy {summary['test_p1']:.2%} (p1 {summary['test_p1']:.2%}, p3 " in first
    estimated = float(re.search(r"accuracy ([\d.]+)%", second).group(1))
    assert abs(estimated - 100 * summary["test_p1"]) < 10


@pytest.mark.slow
def test_images_cannot_be_classified_by_such_a_run(folder, tmp_path, capsys):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    train.train(tiny(folder, rounds=1), tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["evaluate", f"--workdir={tmp_path / 'run'}", str(tmp_path / "a.png")])
    assert stop.value.code == 2
    assert "are no images: nothing to classify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.sharing": "skewed"}, "data.sharing='skewed' is not for examples with several labels"),
        ({"data.pad": 1}, "sparse examples are no images; set config.data.pad to 0"),
        ({"data.flip": True}, "sparse examples are no images"),
        ({"patience": 2}, "patience=2 counts evaluations of a validation split; set config.data.validation"),
        ({"patience": 2, "data.validation": 0.1, "eval_every": 0}, "and config.eval_every above 0"),
        ({"data.validation": 1.0}, "set config.data.validation to 0 to 0.9"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(overrides, message, folder):
    with pytest.raises(ValueError, match=re.escape(message)):
        setup.set_up(tiny(folder, **overrides))


@pytest.mark.parametrize("mode", ["delicious", "amazon670k"])
def test_the_configs_hold_what_a_run_needs(mode):
    config = get_config("mlp", mode)
    check(config)
    assert not config.model.output_norm
    if mode == "amazon670k":
        assert (config.model.hidden, config.num_workers) == ((2560,), 8)
        assert config.patience
        assert config.data.validation


# --- stopping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "patience", "stopped"),
    [
        ([], 1, False),
        ([0.1], 1, False),
        ([0.1, 0.2], 1, False),
        ([0.2, 0.2], 1, True),  # not better is not enough
        ([0.3, 0.2], 2, False),
        ([0.3, 0.2, 0.25], 2, True),
        ([0.3, 0.2, 0.31], 2, False),
        ([0.3, None, None], 2, True),
        ([None, 0.3, float("nan")], 2, False),
        ([0.3, 0.2, 0.1, 0.0], 0, False),
    ],
)
def test_patience_counts_evaluations_without_a_better_one(accuracies, patience, stopped):
    records = [{"round": 1}]
    for x in accuracies:
        records += [{"validation_accuracy": x}, {"round": 0}]
    assert stopping.has_stopped(records, patience, ACCURACY) is stopped
    mirrored = [{k: -x if x is not None else x for k, x in record.items()} for record in records]
    assert stopping.has_stopped(mirrored, patience, ACCURACY._replace(higher_is_better=False)) is stopped


@pytest.mark.slow
def test_a_run_stops_by_its_validation_split_and_tests_its_last_state(folder, tmp_path, caplog):
    config = tiny(folder, num_workers=1, rounds=40, patience=2, eval_every=1, **{"data.validation": 0.2})
    config.optimizer.learning_rate = 0.0
    summary = train.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert summary["rounds"] == len(lines) == 3  # the first, and two that are no better
    assert "has not risen for 2 evaluations: stopped" in caplog.text
    assert all("validation_p3" in line for line in lines)
    assert ["test_p1" in line for line in lines] == [False, False, True]
    stops = [stopping.has_stopped(lines[:n], config.patience, ACCURACY) for n in range(1, 4)]
    assert stops == [False, False, True]
    run = setup.set_up(config, params=checkpoint.load_params(tmp_path), evaluation_only=True)
    assert train.score(run, run.state).scores["p1"] == pytest.approx(summary["test_p1"], abs=1e-9)
    (tmp_path / "summary.json").unlink()  # killed just then: it stops at the same round
    assert train.train(config, tmp_path)["rounds"] == 3
    config.patience = 3  # goes on, and counts the evaluations of the earlier sessions
    assert train.train(config, tmp_path)["rounds"] == 4


def test_a_state_is_judged_by_the_validation_split_where_there_is_one():
    assert checkpoint.value_of({"test_accuracy": 0.5, "validation_accuracy": None}, ACCURACY) == 0.5
    assert checkpoint.value_of({"test_accuracy": 0.5, "validation_accuracy": 0.25}, ACCURACY) == 0.25
    assert checkpoint.value_of({"validation_accuracy": 0.25}, ACCURACY) == 0.25
    assert checkpoint.value_of({"round": 1}, ACCURACY) is None
    assert checkpoint.value_of({"test_loss": 0.5, "test_accuracy": 0.25}, Metric("loss")) == -0.5


def test_the_validation_split_is_held_out_by_the_seed(folder):
    source = data.load(data.open_data_set("extreme_classification", str(folder)).train)
    rows = to_dense(source["feature"])
    kept, held = batches.split_validation(3, source, 0.1)
    assert len(held["label"]) == np.ceil(len(rows) / 10)
    both = np.concatenate([to_dense(kept["feature"]), to_dense(held["feature"])])
    assert sorted(map(bytes, both)) == sorted(map(bytes, rows))
    again = batches.split_validation(3, source, 0.1)[1]
    other = batches.split_validation(4, source, 0.1)[1]
    assert np.array_equal(held["feature"].index, again["feature"].index)
    assert not np.array_equal(to_dense(held["feature"]), to_dense(other["feature"]))
    images = {"image": np.arange(10), "label": np.arange(10) % 2}
    kept, held = batches.split_validation(0, images, 0.25)
    assert (len(kept["label"]), len(held["label"])) == (7, 3)
    assert batches.split_validation(0, images, 0.0)[1] is None
    with pytest.raises(ValueError, match=r"data.validation=0.9 leaves none of the 1 examples"):
        batches.split_validation(0, {"label": np.zeros(1)}, 0.9)


# --- real data ----------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_shared
def test_real_files_are_read_and_train(tmp_path):
    config = get_config("mlp", "delicious", **{"data.dir": str(SHARED / "delicious"), "model.hidden": (64,)})
    config.update({"rounds": 12, "eval_every": 0})
    summary = train.train(config, tmp_path)
    assert "500 features and 983 labels" in summary["data"]
    assert summary["test_p1"] > 0.45
    bibtex = data.open_data_set("extreme_classification", str(SHARED / "bibtex"))
    assert (len(bibtex.train), len(bibtex.test), len(bibtex.classes)) == (4880, 2515, 159)
    assert bibtex.train[0]["label"].tolist() == [3, 23, 61, 63, 76]
    assert bibtex.train.feature.longest == 271


def test_training_computes_the_first_score_alone(folder):
    run = setup.set_up(tiny(folder), evaluation_only=True)
    task = run.inputs.task
    loss_fn = scoring.make_loss_fn(run.model, task)
    x, labels = task.batch(jax.tree.map(jnp.asarray, run.inputs.train), jnp.arange(4), None)
    params = reference.flat(to_params(run.layout, run.state.params))
    text = jax.jit(loss_fn).lower(params, x, labels, None, jax.random.key(0)).compile().as_text()
    assert "topk" not in text.lower()
    assert "sort(" not in text
