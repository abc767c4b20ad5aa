"""Settings: each stated once, under the name and with the default that it always had."""

import json

import pytest
from conftest import ROOT, get_config
from ml_collections import config_dict

from ist_jax import config, data, models, train
from ist_jax.key import Key

RECORDED = json.loads((ROOT / "tests" / "flags.json").read_text())


def flat(settings, path=""):
    """{'model.width': 4, ...} of a config; tuples are lists, as in JSON."""
    found = {}
    for name in settings:
        value = settings[name]
        if isinstance(value, config_dict.ConfigDict):
            found |= flat(value, f"{path}{name}.")
        else:
            found[path + name] = list(value) if isinstance(value, tuple) else value
    return found


@pytest.mark.parametrize("experiment", RECORDED)
def test_every_flag_of_version_0_1_has_its_name_and_default(experiment):
    name, mode = experiment.split(":")
    now = flat(get_config(name, mode))
    for key, value in RECORDED[experiment].items():
        assert now[key] == value, key
        assert type(now[key]) is type(value), key


@pytest.mark.parametrize("experiment", RECORDED)
def test_every_config_passes_its_own_check_and_builds_its_model(experiment):
    made = get_config(*experiment.split(":"))
    config.check(made)
    assert flat(made).keys() == config.keys_of(made).keys()
    assert config.build_model(made, 10).num_classes == 10


def test_an_unset_number_takes_a_number_alone():
    made = get_config("mlp", "digits")
    assert made.rounds is None
    made.rounds = 7
    with pytest.raises(TypeError):
        made.rounds = "seven"


def test_misspelt_keys_are_refused():
    with pytest.raises(ValueError, match=r"no key 'model.widht'; did you mean 'model.width'\?"):
        config.make("resnet", {"model.widht": 3})
    with pytest.raises(ValueError, match=r"no key 'model.hidden'; did you"):
        config.make("resnet", {"model.hidden": (3,)})  # another model's
    with pytest.raises(KeyError):
        config.make("resnet").update_from_flattened_dict({"model.widht": 3})
    with pytest.raises(ValueError, match=r"has no mode 'huge'; it has small, large"):
        config.choose({"small": {}, "large": {}}, "huge")


@pytest.mark.parametrize(
    "options", [config.COMMON, data.options(), *(m.options for m in models.MODELS.values())]
)
def test_every_key_has_a_line_of_help_and_a_default_that_is_allowed(options):
    for name, key in options.items():
        assert 0 < len(key.help) <= 170, name
        assert "\n" not in key.help, name
        assert (key.kind is not None) == (key.default is None or isinstance(key.default, tuple)), name
        key.check(name, key.default)


@pytest.mark.parametrize(
    ("key", "good", "bad", "message"),
    [
        (Key(1, "", least=1), [1, 9], [0, -1], "set config.x to 1 or more"),
        (Key(1.0, "", least=1), [1.0, 9.5], [0.0], "set config.x to 1 or more"),
        (Key(1.0, "", least=1), [1], [float("inf"), float("nan")], "to 1 or more (a finite number)"),
        (Key(0.5, "", least=0, most=1), [0, 1, 0.3], [-0.1, 1.1, float("nan")], "set config.x to 0 to 1"),
        (Key(0.5, "", least=0, above=True), [1e-9], [0, -1.0, float("inf")], "config.x to a number above 0"),
        (Key(None, "", kind=int, least=1), [None, 3], [0], "config.x to 1 or more, or leave it unset"),
        (Key("a", "", choices=("a", "b")), ["b"], ["c", "f.py:c"], "config.x to one of 'a', 'b'"),
        (Key("a", "", choices=("a",), file=True), ["a", "x/f.py:c"], ["c", "f.py", "f:c", "f.py:2"],
         "x to one of 'a', or FILE.py:NAME"),
        (Key((), "", kind=int), [(), (1, 2), [3]], [(1.5,), (True,), "12", 3, ("a",)],
         "set config.x to a tuple of ints, such as '(1,2)'"),
        (Key((), "", kind=float), [(1, 0.5)], [("a",), (float("inf"),)], "to a tuple of floats, such as"),
        (Key((), "", kind=str), [("yes", "no")], [(1, 2), "yes"], "to a tuple of strings, such as ('yes'"),
        (Key((0.5,), "", kind=float, least=0, most=1), [(0, 1)], [(0.5, 2)], "set config.x to 0 to 1"),
        (Key(True, ""), [True, False], [], ""),
    ],
)  # fmt: skip
def test_values_are_checked_and_refused_by_name(key, good, bad, message):
    for value in good:
        key.check("x", value)
    for value in bad:
        with pytest.raises(ValueError) as error:
            key.check("x", value)
        assert message in str(error.value)
        assert str(error.value).startswith("x=")


def test_rounds_win_over_epochs():
    with pytest.raises(ValueError, match=r"epochs=0.0; set config.epochs to a number above 0"):
        config.check(get_config("mlp", rounds=None, epochs=0.0))
    config.check(get_config("mlp", rounds=3, epochs=0.0))


def test_an_old_folder_lacks_what_was_added_since_and_has_its_default():
    old = json.loads(json.dumps(get_config("resnet").to_dict()))
    now = config.complete(json.loads(json.dumps(old)))
    del old["exchange"], old["partition"]["deal"], old["data"]["size"], old["data"]["mean"]
    assert config.complete(old) == now
    old["seed"] = 5
    assert config.complete(old) == now | {"seed": 5}
    assert "partition" in config.complete({"seed": 5})  # not even a model


def test_a_folder_of_before_a_key_was_added_goes_on_and_refuses_another_value_of_it(tmp_path):
    train.train(get_config("mlp", rounds=1), tmp_path)
    file = tmp_path / "config.json"
    recorded = json.loads(file.read_text())
    del recorded["exchange"], recorded["data"]["size"]
    file.write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match=r"config.data.size is 224 there and 8 here"):
        train.train(get_config("mlp", rounds=2, **{"data.size": 8}), tmp_path)
    assert train.train(get_config("mlp", rounds=2), tmp_path)["rounds"] == 2


def test_what_may_change_when_a_run_goes_on():
    changes = {name for name in config.COMMON | data.options() if config.may_change(name)}
    assert changes == {
        "rounds", "epochs", "num_workers", "num_devices", "workers_on_device", "partition.shares",
        "partition.min_units", "eval_every", "data.dir", "checkpoint.every", "checkpoint.keep",
        "max_rounds_left_out", "lost_after", "stuck_after", "patience", "data.processes",
    }  # fmt: skip
    assert not config.may_change("model.width")
    assert not config.may_change("nothing")
    assert {name for name in config.COMMON if config.extends(name)} == {"rounds", "epochs", "patience"}


def test_a_model_and_a_set_of_ones_own_bring_their_keys(monkeypatch):
    def build(options, num_classes, dtype):
        return options["model.depth"], num_classes, dtype

    monkeypatch.setitem(models.MODELS, "own", models.Entry(build, {"model.depth": Key(3, "layers", least=1)}))
    own = data.Entry(lambda *given: given, lambda options: data.Facts((options["data.side"],)),
                     {"data.side": Key(4, "pixels")})  # fmt: skip
    monkeypatch.setitem(data.SETS, "own", own)
    made = config.make("own", {"data.name": "own", "model.depth": 5})
    config.check(made)
    assert config.build_model(made, 7) == (5, 7, None)
    assert data.facts("own", {"data.side": 2}).example == (2,)
    assert data.open_data_set("own", "folder") == ("folder", {"data.side": 4})
    assert "  --config.model.depth: layers\n    (default: 5; 1 or more)" in config.help_text(made)
    made.model.depth = 0
    with pytest.raises(ValueError, match=r"model.depth=0; set config.model.depth to 1 or more"):
        config.check(made)
