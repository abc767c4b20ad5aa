"""The transformer: GPT-2's form, its units, and what stays of it when it is cut; text, and samples."""

import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, get_config
from flax import traverse_util

from ist_jax import data, evaluate, masking, partition, plan, train
from ist_jax.config import build_model
from ist_jax.deals import DEALS
from ist_jax.methods import optimizers
from ist_jax.models.transformer import Transformer
from ist_jax.tasks import language_modelling
from ist_jax.tasks.task import with_example
from ist_jax.workdir import files

slow = pytest.mark.slow
TOKENS = jnp.arange(14).reshape(2, 7) * 5 % 11
SMALL = Transformer(vocabulary=11, layers=5, width=8, heads=4, head_width=2, neurons=6)


def init(model):
    """Parameters that are all far from zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.5, x.shape), x.dtype), shapes)


def apply(model, params, tokens=TOKENS, **options):
    return jax.jit(lambda p: model.apply({"params": p}, tokens, **options))(params)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_gpt2_small_has_the_parameters_of_gpt2():
    model = build_model(get_config("transformer", "gpt2_small"), 256)
    tokens = jax.ShapeDtypeStruct((1, 1024), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert count(shapes) == 124_439_808
    untied = jax.eval_shape(model.clone(tied=False).init, jax.random.key(0), tokens)["params"]
    assert count(untied) == 124_439_808 + 50_257 * 768


def test_it_computes_what_it_should():
    """Against plain NumPy."""
    params = init(SMALL)
    flat = {path: np.asarray(x, float) for path, x in traverse_util.flatten_dict(params, sep="/").items()}

    def norm(x, scale, bias):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias

    def dense(x, own, name):
        return x @ own[f"{name}/kernel"] + own[f"{name}/bias"]

    x = flat["embed/embedding"][np.asarray(TOKENS)] + flat["position"]
    hidden = np.triu(np.ones((7, 7), bool), 1)
    for stack, layers in (("first", 1), ("middle", 3), ("last", 1)):
        for layer in range(layers):
            own = {p.removeprefix(f"{stack}/"): v[layer] for p, v in flat.items() if p.startswith(stack)}
            y = norm(x, own["norm1/scale"], own["norm1/bias"])
            query, key, value = np.moveaxis(dense(y, own, "qkv").reshape(2, 7, 3, 4, 2), 2, 0)
            scores = np.einsum("bthc,bshc->bhts", query, key) / np.sqrt(2)
            weights = np.exp(np.where(hidden, -np.inf, scores))
            weights /= weights.sum(-1, keepdims=True)
            x = x + dense(np.einsum("bhts,bshc->bthc", weights, value).reshape(2, 7, 8), own, "out")
            y = dense(norm(x, own["norm2/scale"], own["norm2/bias"]), own, "up")
            y = y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2
            x = x + dense(y, own, "down")
    wanted = norm(x, flat["norm/scale"], flat["norm/bias"]) @ flat["embed/embedding"].T
    got = apply(SMALL, params)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)


def test_a_token_knows_nothing_of_what_follows():
    params = init(SMALL)
    logits, changed = apply(SMALL, params), apply(SMALL, params, TOKENS.at[:, 4:].set(0))
    np.testing.assert_allclose(changed[:, :4], logits[:, :4], rtol=1e-6)
    shorter = apply(SMALL, params, TOKENS[:, :4])
    np.testing.assert_allclose(shorter, logits[:, :4], rtol=1e-4, atol=1e-5)
    assert (np.abs(changed - logits).max((0, 2)) > 0.01)[4:].all()


KINDS = {
    "heads": {"middle_head"},
    "neurons": {"middle_neuron"},
    "width": {"middle_head", "middle_neuron"},
    "blocks": {"middle_block"},
    "all": {"middle_block", "first_head", "first_neuron", "last_head", "last_neuron"},
}


@pytest.mark.parametrize(
    "units", [pytest.param(units, marks=[slow] * (units != "all")) for units in KINDS]
)  # 'all' has what the others have
def test_a_subnet_is_the_whole_with_the_other_units_switched_off(units):
    model = SMALL.clone(units=units)
    params = init(model)
    axes = partition.resolve_axes(params, model.unit_axes())
    groups = partition.make_groups(params, axes, 2)
    assert groups.keys() == KINDS[units]
    drawn = partition.draw(0, 0, groups, DEALS["random"])
    masks = masking.masks(params, axes, drawn, 1)
    off = jax.tree.map(lambda x, mask: jnp.where(mask, x, 0), params, masks)
    wanted = apply(model, off)
    small = model.subnet({name: group.slots for name, group in groups.items()})
    cut = masking.gather(params, axes, drawn, 1)
    gates = {name: jnp.asarray(own.gates[1]) for name, own in drawn.items() if not groups[name].even}
    got = apply(small, cut, gates=gates)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - apply(model, params)).max() > 0.1


@pytest.mark.parametrize("group", ["middle_head", "middle_neuron", "middle_block"])
def test_scale_multiplies_what_the_units_add_and_no_bias_of_all(group):
    params = init(SMALL)
    middle = params["middle"]
    kernels = {"middle_head": ["out"], "middle_neuron": ["down"], "middle_block": ["out", "down"]}[group]
    scaled = {**middle}
    for name in kernels:
        own = {"kernel": middle[name]["kernel"] / 2}
        scaled[name] = middle[name] | own | ({"bias": middle[name]["bias"] / 2} if "block" in group else {})
    wanted = apply(SMALL, params | {"middle": scaled})
    got = apply(SMALL, params, scale={group: 0.5})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_is_of_training_alone():
    model, params = SMALL.clone(dropout=0.5), init(SMALL)
    plain = apply(SMALL, params)
    np.testing.assert_array_equal(apply(model, params), plain)
    drawn = jax.jit(lambda key: model.apply({"params": params}, TOKENS, train=True, rngs={"dropout": key}))
    first, second = (drawn(jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(first - plain).max() > 0.1 < np.abs(first - second).max()


@slow
def test_bfloat16_is_of_the_layers_and_not_of_sums_and_logits():
    narrow = SMALL.clone(dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda p: narrow.apply({"params": p}, TOKENS))(init(SMALL)))
    kinds = re.findall(r":(\w+)\[\S* = dot_general\[", text)
    assert kinds.count("bf16") >= 5  # 4 of a block, and logits; in attention, sums are of float32
    logits, wanted = apply(narrow, init(SMALL)), apply(SMALL, init(SMALL))
    assert logits.dtype == np.float32
    assert 1e-4 < np.abs(logits - wanted).max() / np.abs(wanted).max() < 0.05


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"partition.shared_layers": 2}, "shared_layers=2 at each end leaves none of model.layers=3"),
        ({"model.heads": 3}, "model.heads=3 does not divide model.d_model=16"),
        ({"model.vocabulary": 100}, "model.vocabulary=100 is less than the 256 tokens of the data set"),
        ({"partition.units": "all", "partition.shared_layers": 0}, "no blocks whose heads and neurons"),
        ({"partition.units": "columns"}, "partition.units='columns'; set config.partition.units to one of"),
        ({"data.name": "digits"}, r"an example is \[8, 8, 1\], and a transformer reads sequences"),
        ({"data.length": 10**7}, "no sequence of data.length=10000000 tokens and the next one to train on"),
        ({"data.path": "no.txt"}, "data.path='no.txt': cannot read no.txt: No such file"),
        ({"data.path": "setup.cfg", "data.tokenizer": "no.json"}, "data.tokenizer='no.json' is no file"),
        ({"data.path": "tests/flags.json", "data.length": 10**4}, "to test on"),
    ],
)
def test_what_cannot_work_is_said(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        train.train(get_config("transformer", **overrides), tmp_path)


# --- text -------------------------------------------------------------------------------------------------


def test_the_library_is_read_everywhere():
    opened = data.open_data_set("text", "", {"data.length": 100})
    tokens = opened.train["tokens"]
    assert tokens.dtype == np.uint8 and tokens.shape[1] == 101
    assert 1.5e6 < opened.train["tokens"].size + opened.test["tokens"].size < 3e6
    np.testing.assert_array_equal(tokens[1:, 0], tokens[:-1, -1])
    assert b"import os" in tokens.tobytes()
    version = "{}.{}".format(*sys.version_info[:2])
    assert opened.description == f"text: sequences of 100 bytes of Python {version}'s standard library"
    assert data.facts("text", {"data.length": 100})[:3] == ((100,), 256, len(tokens))


def test_the_last_tenth_of_every_file_is_to_test_on(tmp_path):
    texts = {"a.txt": "ä" + "a" * 99, "b.txt": "b" * 50}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    opened = data.open_data_set("text", str(tmp_path), {"data.path": "a.txt,b.txt", "data.length": 2})
    sequences = {name: split["tokens"] for name, split in (("train", opened.train), ("test", opened.test))}
    whole = {name: bytes([*x[:, :-1].ravel(), x[-1, -1]]) for name, x in sequences.items()}
    assert whole["train"] == "ä".encode() + b"a" * 89 + b"b" * 44  # 136 bytes: 67 sequences and one left
    assert whole["test"] == b"a" * 10 + b"b" * 5
    assert opened.vocabulary.decode(opened.vocabulary.encode("ä€")[0].tolist()) == "ä€"


class Words:
    """What is used of a `tokenizers.Tokenizer`: words are tokens by their lengths, spaces are of none."""

    @classmethod
    def from_file(cls, path):
        if "broken" in path:
            raise Exception("expected value at line 1 column 1")
        return cls()

    def get_vocab_size(self):
        return 300

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        words = [*re.finditer(r"\S+", text)]
        return SimpleNamespace(ids=[len(w[0]) for w in words], offsets=[w.span() for w in words])

    def decode(self, ids):
        return " ".join("x" * n for n in ids)


@pytest.fixture
def words(monkeypatch, tmp_path):
    """Keys of a data set of 20 words to train on and 3 to test on."""
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=Words))
    for name in ("tokenizer.json", "broken.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "text.txt").write_text("aäa " * 9 + "aa" + "\n" * 3)
    return {
        "data.path": "text.txt",
        "data.length": 4,
        "data.tokenizer": str(tmp_path / "tokenizer.json"),
    }


def test_bytes_are_counted_of_tokens(words, tmp_path):
    (tmp_path / "text.txt").write_text("aäa b " * 9 + "c d  ef")
    options = words | {"data.length": 2}
    opened = data.open_data_set("text", str(tmp_path), options)
    assert opened.train["tokens"].dtype == np.uint16
    assert opened.train["tokens"][0].tolist() == [3, 1, 3]
    assert opened.train["bytes"].tolist()[:2] == [7, 7]  # ' b aäa'
    assert opened.test["tokens"].tolist() == [[1, 1, 2]] and opened.test["bytes"].tolist() == [6]
    task = with_example(language_modelling.make(opened.train, 300), opened.train)
    inputs, labels = task.show(opened.test)
    logits = jnp.zeros((1, 2, 300))
    assert inputs.tolist() == [[1, 1]] and labels[0].tolist() == [[1, 2]]
    means = {name: float(judge(logits, labels)[0]) for name, judge in task.scores.items()}
    figures = task.figures(means | {"loss": float(task.loss(logits, labels, None)[0])})
    assert figures["bits_per_byte"] == pytest.approx(np.log2(300) * 2 / 6)
    assert figures["bits_per_token"] == pytest.approx(np.log2(300))
    assert figures["bytes_per_token"] == 3
    assert task.metric.name == "bits_per_byte"
    facts = data.facts("text", options)
    assert facts.num_classes == 300 and facts.num_train is None
    assert {name: (x.dtype, x.shape[1:]) for name, x in facts.split.items()} == {
        name: (x.dtype, x.shape[1:]) for name, x in opened.train.items()
    }


def test_a_tokenizer_that_cannot_be_used(words, monkeypatch, tmp_path):
    broken = words | {"data.tokenizer": words["data.tokenizer"].replace("tokenizer.", "broken.")}
    with pytest.raises(ValueError, match="is no file of `tokenizers`: expected value"):
        data.open_data_set("text", str(tmp_path), broken)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the library `tokenizers`: pip install 'ist_jax\[text\]'"):
        data.open_data_set("text", str(tmp_path), words)
    (tmp_path / "text.txt").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        data.open_data_set("text", str(tmp_path), {"data.path": "text.txt"})


# --- optimizer, samples, commands ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(x, marks=slow) for x in ("sgd", "lion"))])
def test_norms_biases_and_embeddings_do_not_decay(name):
    config = get_config("transformer", **{"optimizer.name": name, "optimizer.weight_decay": 0.5})
    params = traverse_util.flatten_dict(init(SMALL), sep="/")
    kernels = {path for path in params if path.endswith("/kernel")}
    for decayed, wanted in (("kernels", kernels), ("all", params.keys())):
        config.optimizer.decayed = decayed
        tx = optimizers.make(config.optimizer.to_dict())
        still = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(lambda p, tx=tx, g=still: tx.update(g, tx.init(p), p))(params)
        assert {path for path, x in updates.items() if np.any(x)} == wanted
    assert len(kernels) == 12


def test_samples_are_greedy_or_drawn():
    def logits_of(tokens):  # of each token, the next number is likeliest, and the one after it half as likely
        following = np.log(np.array([0.01, 2.0, 1.0, 0.01]))
        return np.stack([[np.roll(following, token) for token in row] for row in tokens])

    greedy = language_modelling.sample(logits_of, [1, 2], 5, length=3, temperature=0.0, seed=0)
    assert greedy == [3, 0, 1, 2, 3]
    cold = language_modelling.sample(logits_of, [1], 50, length=3, temperature=0.05, seed=0)
    assert cold == language_modelling.sample(logits_of, [1], 50, length=3, temperature=0.0, seed=0)
    drawn = [
        language_modelling.sample(logits_of, [0], 600, length=3, temperature=1.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    steps = np.diff([0, *drawn[0]]) % 4
    assert 1.5 < np.mean(steps == 1) / np.mean(steps == 2) < 2.7


@slow
def test_it_trains_is_evaluated_and_goes_on_with_a_prompt(tmp_path, capsys):
    settings = {"rounds": 4, "local_steps": 10, "model.dropout": 0.1, "eval_every": 0, "data.length": 32}
    summary = train.train(get_config("transformer", **settings, **{"partition.units": "all"}), tmp_path)
    records = files.read_records(tmp_path)
    assert records[-1]["train_loss"] < 0.9 * records[0]["train_loss"]
    assert summary["test_bits_per_byte"] < 7 and "test_accuracy" not in summary
    rows = {row["cause"]: row for row in files.read_json(tmp_path / "ledger.json")["rows"]}
    assert rows["round"]["expected"] == rows["round"]["hlo"] > 0
    assert rows["evaluation"]["hlo"] <= rows["evaluation"]["expected"]
    command = ["evaluate", f"--workdir={tmp_path}"]
    assert evaluate.main([*command, "--prompt=def f(", "--tokens=5"]) == 0
    out = capsys.readouterr().out
    assert f"bits_per_byte {summary['test_bits_per_byte']:.4g}" in out and "BatchNorm" not in out
    assert "batch statistics" not in out
    assert len(out.split("def f(")[1].removesuffix("\n")) <= 5
    with pytest.raises(SystemExit):
        evaluate.main([*command, "--prompt="])
    assert "--prompt is empty" in capsys.readouterr().err


@slow
def test_a_plan_needs_no_text(capsys):
    config = get_config("transformer", "gpt2_small", **{"data.path": "not-there.txt"})
    cost = plan.predict(config, data.facts("text", {"data.path": "not-there.txt", "data.length": 1024}))
    assert cost.params_per_worker < 0.7 * 124_439_808
    whole = plan.predict(
        get_config("transformer", "gpt2_small", method="local_sgd"), data.facts("text", {"data.length": 1024})
    )
    assert whole.params_per_worker == 124_439_808
