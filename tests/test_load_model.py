"""A finished run's model as a function of plain inputs."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config

from ist_jax import config as configs
from ist_jax import data, train
from ist_jax.data import augment, batches
from ist_jax.models.mlp import MLP
from ist_jax.workdir import checkpoint, files

RUNS = {
    "mlp": {"num_workers": 4, "rounds": 4, "local_steps": 5, "model.output_norm": False},
    "resnet": {"num_workers": 2, "rounds": 2},
}


@pytest.fixture(scope="module", params=["mlp", pytest.param("resnet", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory):
    """(folder, config, summary) of a run."""
    workdir = tmp_path_factory.mktemp(request.param)
    config = get_config("resnet" if request.param == "resnet" else "mlp", **RUNS[request.param])
    return workdir, config, train.train(config, workdir)


def test_the_loaded_model_has_the_accuracy_of_the_summary(finished):
    workdir, config, summary = finished
    digits, predict = data.open_data_set("digits", "").test, checkpoint.load_model(workdir)
    plan = batches.eval_batches(len(digits), config.eval_batch_size, 1)  # whose statistics BatchNorm uses
    right = 0
    for numbers, weights in zip(plan.indices[0], plan.weights[0], strict=True):
        logits = predict(digits.image[numbers])
        right += (weights * (logits.argmax(-1) == digits.label[numbers])).sum()
    assert right / len(digits) == summary["test_accuracy"]


def test_plain_apply_needs_no_more_than_the_summary(finished):
    workdir, config, _ = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert all(0 < factor < 1 for factor in summary["scale"].values()) and summary["scale"]
    images = data.open_data_set("digits", "").test.image[:50]
    shown = (images - np.float32(summary["normalization"]["mean"])) / np.float32(
        summary["normalization"]["std"]
    )
    model = configs.build_model(config, summary["num_classes"])
    variables = {"params": checkpoint.load_params(workdir)}
    logits = model.apply(variables, shown, scale=summary["scale"])
    np.testing.assert_allclose(logits, checkpoint.load_model(workdir)(images), atol=1e-4)
    assert not np.allclose(model.apply(variables, shown), logits, atol=1e-3)


def test_with_calibration_an_image_has_the_same_logits_alone_as_among_others(finished):
    workdir, _, summary = finished
    digits = data.open_data_set("digits", "")
    images = digits.test.image
    alone = checkpoint.load_model(workdir)
    if summary["scale"].keys() == {"hidden1", "hidden2"}:  # an MLP: all that is left is the biases
        np.testing.assert_allclose(alone(images[:1]), alone(images[1:2]), atol=1e-5)
    calibrated = checkpoint.load_model(workdir, calibration=np.split(digits.train.image[:1280], 10))
    among = calibrated(images)
    for number in range(3):
        np.testing.assert_allclose(calibrated(images[number : number + 1])[0], among[number], atol=1e-4)
    assert abs((among.argmax(-1) == digits.test.label).mean() - summary["test_accuracy"]) < 0.1


class Own(nn.Module):
    """A linear net, without units."""

    @nn.compact
    def __call__(self, x, gates=None, scale=None):
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_a_model_of_ones_own_is_given(tmp_path, monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    own = data.ArraySource(x, y)
    monkeypatch.setitem(
        data.SETS, "mine", data.Entry(lambda *_: data.DataSet("mine", own, own, tuple("abc")))
    )
    config = get_config("mlp", **{"data.name": "mine", "method": "local_sgd"})
    summary = train.train(config, tmp_path, model=Own())
    predict = checkpoint.load_model(tmp_path, model=Own())
    assert (predict(x).argmax(-1) == y).mean() == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert summary["scale"] == {} and summary["num_classes"] == 3
    dense = checkpoint.load_params(tmp_path)["Dense_0"]
    wanted = (
        augment.make_normalize(*augment.channel_statistics(x))(jnp.asarray(x)) @ dense["kernel"]
        + dense["bias"]
    )
    np.testing.assert_allclose(predict(x), wanted, atol=1e-5)
    np.testing.assert_allclose(predict(x[:1]), wanted[:1], atol=1e-5)
    with pytest.raises(ValueError, match=r"holds a model of your own, Own: give it as `model`"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(ValueError, match=r"holds the model Own\(.*, and `model` is MLP\("):
        checkpoint.load_model(tmp_path, model=MLP((8,), 3))


def test_a_model_that_is_given_must_be_the_one_that_the_config_names(finished):
    workdir, config, summary = finished
    images = data.open_data_set("digits", "").test.image[:5]
    own = configs.build_model(config, summary["num_classes"])
    assert np.array_equal(
        checkpoint.load_model(workdir, model=own)(images), checkpoint.load_model(workdir)(images)
    )
    with pytest.raises(ValueError, match=r"holds the model .*, and `model` is Own"):
        checkpoint.load_model(workdir, model=Own())


def test_a_model_from_a_file_is_found_again(tmp_path):
    text = "from ist_jax.models.mlp import MLP\n\n\ndef model(num_classes): return MLP((16,), num_classes)\n"
    (tmp_path / "own.py").write_text(text)
    config = get_config("mlp", **{"model.name": f"{tmp_path}/own.py:model", "eval_batch_size": 360})
    summary = train.train(config, tmp_path / "run")
    test = data.open_data_set("digits", "").test
    right = checkpoint.load_model(tmp_path / "run")(test.image).argmax(-1) == test.label
    assert right.mean() == pytest.approx(summary["test_accuracy"], abs=1e-6)
    (tmp_path / "own.py").write_text(text + "# changed\n")
    with pytest.raises(ValueError, match="the file is not the one that the run was made with"):
        checkpoint.load_model(tmp_path / "run")


def test_grey_images_without_an_axis_of_channels_are_taken(finished):
    predict, images = checkpoint.load_model(finished[0]), data.open_data_set("digits", "").test.image[:9]
    assert np.array_equal(predict(images[..., 0]), predict(images))
    assert isinstance(predict(jax.device_put(images)), jax.Array)


def test_a_folder_of_an_earlier_version_or_without_an_end_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"holds no summary.json, so no finished run"):
        checkpoint.load_model(tmp_path)
    (tmp_path / "checkpoints").symlink_to(finished[0] / "checkpoints")
    old = {key: x for key, x in files.read_summary(finished[0]).items() if key != "normalization"}
    files.write_json(tmp_path / "summary.json", old)
    with pytest.raises(ValueError, match=r"is of an earlier version, whose summary.json lacks"):
        checkpoint.load_model(tmp_path)
