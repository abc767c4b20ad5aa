"""Options that programs are compiled with, on processors that this one need not be."""

import logging

import jax
import jax.numpy as jnp
import pytest
from conftest import get_config

from ist_jax.runtime import compile_options
from ist_jax.train import train


@pytest.fixture
def wide(monkeypatch):
    """A processor with AVX-512."""
    monkeypatch.setattr(compile_options, "_has_avx512", lambda: True)
    compile_options._choose.cache_clear()
    yield
    compile_options._choose.cache_clear()


def chosen():
    return compile_options._choose("cpu", 4)


def test_this_jaxlib_takes_all_of_them(wide):
    assert chosen() == compile_options._WIDE | compile_options._NO_POOL
    product = jax.jit(lambda x: x @ x).lower(jnp.eye(8))
    assert (compile_options.compile_lowered(product, jax.devices())()(jnp.eye(8)) == jnp.eye(8)).all()


@pytest.mark.parametrize("option", [{"xla_no_such_thing": 1}, {"xla_cpu_prefer_vector_width": "wide"}])
def test_one_that_a_jaxlib_does_not_take_is_left_out_and_said(wide, monkeypatch, caplog, option):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compile_options, "_WIDE", option)
    assert chosen() == compile_options._NO_POOL
    assert f"without {next(iter(option))}" in caplog.text


def test_a_users_own_flags_win(wide, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
    assert "xla_cpu_prefer_vector_width" not in chosen()


def test_the_pool_stays_where_cores_outnumber_devices(wide, monkeypatch):
    monkeypatch.setattr(compile_options.os, "cpu_count", lambda: 5)
    assert chosen() == compile_options._WIDE


def test_accelerators_and_narrow_processors_have_none(wide, monkeypatch):
    assert compile_options._choose("gpu", 4) == {}
    monkeypatch.setattr(compile_options, "_has_avx512", lambda: False)
    compile_options._choose.cache_clear()
    assert chosen() == {}


def test_a_run_that_goes_on_under_others_is_told(wide, monkeypatch, caplog, tmp_path):
    summary = train(get_config("mlp", rounds=1), tmp_path)
    assert summary["compile_options"] == compile_options._WIDE
    monkeypatch.setattr(compile_options, "_has_avx512", lambda: False)
    compile_options._choose.cache_clear()
    assert train(get_config("mlp", rounds=2), tmp_path)["compile_options"] == {}
    assert "not the same last bits" in caplog.text
