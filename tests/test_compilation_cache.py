"""Compiled programs on disk: found again, with the same bits; damaged ones are compiled again."""

import contextlib
import json
from collections import Counter

import jax
import numpy as np
import pytest
from conftest import get_config
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from rounds import set_up

from ist_jax import train
from ist_jax.runtime import compilation_cache, programs
from ist_jax.runtime.compilation_cache import kept


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs are kept, of a user who has told JAX nothing."""
    settings = ["jax_compilation_cache_dir", "jax_enable_compilation_cache", *compilation_cache._SETTINGS]
    before = {name: getattr(jax.config, name) for name in settings}
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(compilation_cache._SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    yield compilation_cache.default_folder()
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture
def seen():
    """How often JAX found a program on disk, 'cache_hits', and wrote one, 'cache_misses'."""
    seen = Counter()
    jax.monitoring.register_event_listener(lambda name, **_: seen.update([name.rpartition("/")[2]]))
    yield seen
    jax.monitoring.clear_event_listeners()


@contextlib.contextmanager
def next_process(wanted=True):
    """JAX as at the start of a process, but for the programs of `jit`."""
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    with kept(wanted):
        yield


def entries(folder):
    return sorted(folder.glob("*-cache"))


def test_a_second_run_compiles_nothing_and_has_the_same_bits(folder, seen, tmp_path):
    left, counts = {}, {}
    for name in ("without", "first", "second"):
        jax.clear_caches()
        seen.clear()
        with next_process(wanted=name != "without"):
            summary = train.train(get_config("mlp"), tmp_path / name)
        ledger = json.loads((tmp_path / name / "ledger.json").read_text())
        left[name], counts[name] = (summary["params_sha256"], ledger), dict(seen)
        assert folder.exists() == (name != "without")
    assert left["without"] == left["first"] == left["second"]
    assert counts["first"]["cache_misses"] == len(entries(folder)) >= 4  # three phases, the evaluation, ...
    assert counts["second"]["cache_hits"] >= len(entries(folder))
    assert "cache_misses" not in counts["second"]


SIZES = range(1, 7)


def results():
    """Of six little programs, one for each size."""
    return [float(jax.jit(lambda x: x @ x).lower(np.ones(n)).compile()(np.ones(n))) for n in SIZES]


def test_damaged_entries_are_compiled_again(folder, seen):
    with next_process():
        assert results() == list(SIZES)
    flipped, cut, unsealed, unused, *whole = entries(folder)
    assert len(whole) == 2
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:100])
    for path, end in ((unsealed, "-sha256"), (unused, "-atime")):
        path.with_name(path.name.removesuffix("-cache") + end).unlink()
    for wanted in ({"cache_hits": 2, "cache_misses": 4}, {"cache_hits": 6}):
        seen.clear()
        with next_process():
            assert results() == list(SIZES)
        assert {
            name: count for name, count in seen.items() if name in ("cache_hits", "cache_misses")
        } == wanted


def test_the_folder_has_a_limit(folder, monkeypatch):
    with next_process():
        results()
    limit = sum(path.stat().st_size for path in entries(folder)) // 2
    monkeypatch.setitem(compilation_cache._SETTINGS, "jax_compilation_cache_max_size", limit)
    with next_process():
        jax.jit(lambda x: x + 1).lower(np.ones(3)).compile()
    assert 0 < sum(path.stat().st_size for path in entries(folder)) <= limit
    with next_process():  # what JAX has dropped leaves nothing behind
        assert len([*folder.glob("*-sha256")]) == len(entries(folder)) < len(SIZES)


def test_the_users_own_settings_win(folder, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with kept(True):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not folder.exists()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    with kept(True):
        assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1000")
    jax.config.update("jax_compilation_cache_max_size", 1000)
    with kept(True):
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert jax.config.jax_compilation_cache_max_size == 1000


def test_without_a_folder_it_goes_on_and_says_so(folder, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    with kept(True):
        assert jax.config.jax_compilation_cache_dir is None
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "compiled programs are not kept for the next run"
    ]


def test_an_error_of_a_compiler_reaches_who_asks_for_the_program():
    def fail():
        raise RuntimeError("out of registers")

    with programs.Builder() as builder:
        started = {"good": builder.start("good", lambda: 1), "bad": builder.start("bad", fail)}
        assert started["good"].result() == 1
        with pytest.raises(RuntimeError, match="out of registers"):
            programs.finish(started)


def test_each_phase_is_traced_once_and_local_steps_compile_first(monkeypatch):
    traced, started, start = [], [], programs.Builder.start

    def change(recipe):
        def loss_fn(*args):
            traced.append("loss")
            return recipe.loss_fn(*args)

        def score_fn(*args):
            traced.append("score")
            return recipe.score_fn(*args)

        return recipe._replace(loss_fn=loss_fn, score_fn=score_fn)

    def noted(self, name, lowered):
        started.append(name)
        return start(self, name, lowered)

    monkeypatch.setattr(programs.Builder, "start", noted)
    run = set_up("mlp", change)
    assert traced == ["loss", "score"]
    assert started == ["local", "gather", "merge", "evaluation (test)"]
    assert [*run.stages[0].programs] == ["gather", "local", "merge"]
