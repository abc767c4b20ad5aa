"""Eight virtual CPU devices, before anything starts JAX; shapes and dtypes in signatures are checked."""

import gc
import importlib.util
import logging
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported, on a machine with a GPU too
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"  # a worker of xdist has the environment of below

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

CHECKED = [  # with what is below them
    "ist_jax.masking",
    "ist_jax.partition",
    "ist_jax.deals",
    "ist_jax.exchange",
    "ist_jax.methods",
]
install_import_hook(CHECKED, "beartype.beartype")  # before any of them is imported

from ist_jax.runtime import devices, record

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # of commands that tests start; this process has read it

ROOT = Path(__file__).parent.parent
REPORTING = {"test_bring_your_own", "test_cli", "test_compare", "test_report", "test_train"}
# Their programs are many and of their own, and are compared by tolerance or with themselves alone.
UNOPTIMISED = {
    "test_adapter",
    "test_bring_your_own",
    "test_compare",
    "test_docs",
    "test_ensemble",
    "test_extreme",
    "test_files",
    "test_load_model",
    "test_report",
    "test_small_models",
    "test_sources",
    "test_transformer",
}

devices.prepare(8)
hypothesis.settings.register_profile("ist_jax", deadline=None)  # the first example compiles
hypothesis.settings.load_profile("ist_jax")
logging.getLogger("ist_jax").setLevel(logging.INFO)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    assert len(jax.devices("cpu")) == 8
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "xla"))  # a second run is faster
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module_at_a_time():
    """Each takes memory maps, of which Linux gives a process 65,530; all of them together are more."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _no_optimisation_where_programs_hardly_run(request):
    """LLVM's passes take a fifth to a third of the time of the tests that compile most."""
    jax.config.update("jax_disable_most_optimizations", request.path.stem in UNOPTIMISED)


@pytest.fixture(scope="module", autouse=True)
def _reports_where_they_are_looked_at(request):
    """Drawing a run's report takes a fifth of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in REPORTING:
            patch.setattr(record, "write_report", lambda workdir: workdir / "report.html")
        yield


def get_config(name, mode="smoke", **overrides):
    """A config of `configs/`, with overrides such as {'model.width': 4}."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(mode)
    config.update_from_flattened_dict(overrides)
    return config
