"""Command lines: a mistake of the user is one line and exit code 2, never a traceback."""

import contextlib
import datetime
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_dict, config_flags

from ist_jax.errors import did_you_mean, fail, last_line
from ist_jax.key import Value

_PLAINLY = {
    "invalid literal for int() with base 10:": "a whole number is needed, not",
    "could not convert string to float:": "a number is needed, not",
}


@contextlib.contextmanager
def errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns a setting, path or file that cannot work into one line; `kinds`: these errors alone."""
    caught = kinds or (ValueError, OSError)
    try:
        yield
    except caught as error:
        raise fail(str(error), getattr(error, "__notes__", ())) from error


def define_config(values: flags.FlagValues, argv: Sequence[str], default: str | None) -> None:
    """Defines --config, checked beforehand: the file, its `get_config`, and the keys of all overrides.

    Raises:
      SystemExit: 2, after a line that names the file or the key.
    """
    if path := _config_path(argv, default):
        config = _load_config(path)
        with errors(ValueError):
            for key in re.findall(r"^--?(?:no)?config\.([\w.]+)", "\n".join(argv[1:]), re.M):
                check_key(config, key)
    text = (
        "experiment, such as configs/resnet.py or configs/resnet.py:smoke; every key of it is a flag "
        "(--config.num_workers=8), listed by --config=FILE --help"
    )
    config_flags.DEFINE_config_file("config", default, text, flag_values=values, sys_argv=list(argv))


def _config_path(argv: Sequence[str], default: str | None) -> str | None:
    given = re.search(r"^--config[=\n](.*)", "\n".join(argv[1:]), re.M)
    return given[1] if given else default


def _load_config(path: str) -> config_dict.ConfigDict:
    name = path.split(":")[0]
    if not Path(name).is_file():
        raise fail(f"--config={name}: there is no such file")
    probe = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=probe, sys_argv=[])
    try:
        probe(["", f"--config={path}"])
    except Exception as error:  # the file is the user's own code; its traceback ends in what went wrong
        raise fail(f"--config={path}: {last_line(error)}") from error
    if not isinstance(probe.config, config_dict.ConfigDict):
        raise fail(f"--config={path}: get_config() must return an ml_collections.ConfigDict")
    return probe.config


def check_key(config: config_dict.ConfigDict, key: str) -> None:
    """Raises ValueError, with the keys there, where a config has no such key."""
    level = config
    for part in key.split("."):
        keys = sorted(level) if isinstance(level, config_dict.ConfigDict) else []
        if part not in keys:
            hint = did_you_mean(part, keys)
            raise ValueError(f"unknown key config.{key}; {hint}keys there: {', '.join(keys) or 'none'}")
        level = level[part] if level.get_type(part) is not type(None) else None


def parse_value(config: config_dict.ConfigDict, key: str, text: str) -> Value:
    """The value of a key in the words of a command line, as of --config.KEY=TEXT.

    Raises:
      ValueError: there is no such key, or it takes no such value.
    """
    check_key(config, key)
    values, argv = flags.FlagValues(), ["", f"--config.{key}={text}"]
    own = config.copy_and_resolve_references()
    *above, last = key.split(".")
    level, kept = (functools.reduce(lambda found, part: found[part], above, x) for x in (own, config))
    if level[last] is None:  # unset; a copy has lost the type
        level[last] = config_dict.placeholder(kept.get_type(last))
    config_flags.DEFINE_config_dict("config", own, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise ValueError(_plainly(error)) from error
    return functools.reduce(lambda level, part: level[part], key.split("."), values.config)


def _plainly(error: Exception) -> str:
    """What absl says of a value, in a line."""
    text = str(error).strip().splitlines()[-1]
    for python, plain in _PLAINLY.items():
        text = text.replace(python, plain)
    return text


def define_compilation_cache(values: flags.FlagValues) -> None:
    """Defines --compilation_cache, for `runtime.compilation_cache.kept`."""
    text = "keep compiled programs in the user's cache folder (~/.cache/ist_jax): the next run starts sooner"
    flags.DEFINE_boolean("compilation_cache", True, text, values)


def parse(
    values: flags.FlagValues, argv: Sequence[str], usage: str, *, required: Sequence[str], more: bool = False
) -> list[str]:
    """Parses flags and returns the other arguments.

    Args:
      values: with the flags defined.
      argv: the command line, the program's name first.
      usage: a line for --help and for mistakes.
      required: names of flags that must be given.
      more: other arguments may be given.

    Raises:
      SystemExit: 0 after --help, 2 after a mistake.
    """
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(f"usage: {usage}\n{values.get_help()}")
        path = _config_path(argv, None)
        config = _load_config(path) if path else values["config"].default if "config" in values else None
        if config is not None:
            from ist_jax.config import help_text  # with JAX

            print(f"\nkeys of the config, and their defaults in it:\n{help_text(config)}")
        raise SystemExit(0)
    try:
        rest = values(list(argv))[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise fail(f"{_plainly(error)} (see --help)") from error
    for name in required:
        if values[name].value is None:
            raise fail(f"--{name} is missing; usage: {usage}")
    if rest and not more:
        raise fail(f"unexpected argument {rest[0]!r}; usage: {usage}")
    return rest


def new_workdir(values: flags.FlagValues, prefix: str, time: str) -> Path:
    """The folder that --workdir names; without it a new one under runs/, by config and time."""
    name = Path(config_flags.get_config_filename(values["config"]).split(":")[0]).stem
    return Path(values.workdir or f"runs/{prefix}{name}-{datetime.datetime.now():{time}}")
