"""Text as sequences of tokens: any UTF-8 files, or the source code of Python's own standard library.

Tokens are bytes, or those of a tokenizer's file. Of every file the last tenth is to test on.

The library's code differs a little from one version of Python to another, and with it the figures: compare
those of one version. The modules are single files that every version from 3.11 on has.
"""

import sys
import sysconfig
from pathlib import Path

import numpy as np

from ist_jax.data.source import DataSet, Entry, Facts, Split, Vocabulary, num_examples
from ist_jax.key import Key, Options

OPTIONS = {
    "data.path": Key(
        "", "text files, separated by commas, from data.dir on; '': code of Python's standard library"
    ),
    "data.length": Key(128, "tokens that a model is shown at once", least=1),
    "data.tokenizer": Key("", "tokenizer.json of the library `tokenizers`; '': tokens are bytes"),
}
# 1.9 MB in Python 3.11; none of them is a package in any version, or left out by a distribution.
_MODULES = (
    "argparse", "ast", "calendar", "codecs", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "difflib", "enum", "fractions", "functools", "heapq", "inspect", "ipaddress", "locale", "optparse", "os",
    "pickle", "pprint", "random", "selectors", "shlex", "shutil", "socket", "statistics", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "traceback", "types", "typing", "uuid", "warnings",
    "weakref",
)  # fmt: skip


def load(directory: str, options: Options) -> DataSet:
    """Sequences of data.length + 1 tokens, each of which begins with the last one of that before it.

    'tokens' are uint8 [N, L + 1] where they are bytes. Else they are uint16 or uint32, and beside them
    'bytes', int32 [N], says how many the last L stand for.

    Raises:
      ValueError: a file is missing, no UTF-8 or too short, or there is no such tokenizer.
    """
    length, vocabulary = options["data.length"], _open_vocabulary(options["data.tokenizer"])
    cut = [
        (text[: (at := len(text) * 9 // 10)], text[at:]) for text in _read(directory, options["data.path"])
    ]
    train, test = (_sequences("".join(parts), vocabulary, length) for parts in zip(*cut, strict=True))
    for purpose, split in (("train", train), ("test", test)):
        if not len(split["tokens"]):
            raise ValueError(
                f"data.path={options['data.path']!r} has no sequence of data.length={length} tokens and the "
                f"next one to {purpose} on; give more text, or set config.data.length lower"
            )
    where = options["data.path"] or "Python {}.{}'s standard library".format(*sys.version_info[:2])
    kind = f"{vocabulary.size:,} kinds of tokens" if options["data.tokenizer"] else "bytes"
    classes = tuple(map(str, range(vocabulary.size)))
    description = f"text: sequences of {length} {kind} of {where}"
    return DataSet(description, train, test, classes, vocabulary=vocabulary)


def facts(options: Options) -> Facts:
    """The form of its sequences, and of the standard library how many there are."""
    length, vocabulary = options["data.length"], _open_vocabulary(options["data.tokenizer"])
    known = None if options["data.path"] else num_examples(load("", options).train)  # type: ignore[arg-type]
    one = np.zeros(length + 1, np.int64 if options["data.tokenizer"] else np.uint8)
    return Facts((length,), vocabulary.size, known, split=_cut(one, one, vocabulary.size, length))


def _read(directory: str, names: str) -> list[str]:
    """The text of each file."""
    if names:
        paths = [Path(directory, name) for name in names.split(",")]
    else:
        folder = Path(sysconfig.get_path("stdlib"))
        paths = [folder / f"{name}.py" for name in _MODULES]
    try:
        return [path.read_bytes().decode() for path in paths]
    except OSError as error:
        own = "" if names else ", whose Python has no source code of its standard library"
        raise ValueError(
            f"data.path={names!r}: cannot read {error.filename}{own}: {error.strerror}; set config.data.path "
            "to text files, separated by commas"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path={names!r} is no UTF-8 text: {error}") from None


def _sequences(text: str, vocabulary: Vocabulary, length: int) -> Split:
    return _cut(*vocabulary.encode(text), vocabulary.size, length)


def _cut(tokens: np.ndarray, ends: np.ndarray, size: int, length: int) -> Split:
    """A split of tokens [n], which end at so many bytes [n]; of uint8 they are bytes themselves."""
    count = max(0, len(tokens) - 1) // length
    starts = np.arange(count) * length
    sequences = tokens[starts[:, None] + np.arange(length + 1)]
    if tokens.dtype == np.uint8:
        return {"tokens": sequences}
    kind = np.uint16 if size <= 2**16 else np.uint32
    return {
        "tokens": sequences.astype(kind),
        "bytes": (ends[starts + length] - ends[starts]).astype(np.int32),
    }


def _open_vocabulary(path: str) -> Vocabulary:
    """Of bytes, or of a tokenizer's file."""
    if not path:
        return Vocabulary(256, _encode_bytes, lambda tokens: bytes(tokens).decode(errors="replace"))
    if not Path(path).is_file():
        raise ValueError(f"data.tokenizer={path!r} is no file; set config.data.tokenizer to a tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            f"data.tokenizer={path!r} needs the library `tokenizers`: pip install 'ist_jax[text]', or set "
            "config.data.tokenizer to '', by which tokens are bytes"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # it has no class of its own
        raise ValueError(f"data.tokenizer={path!r} is no file of `tokenizers`: {error}") from None

    def encode(text: str) -> tuple[np.ndarray, np.ndarray]:
        found = tokenizer.encode(text, add_special_tokens=False)
        code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        before = np.concatenate([[0], np.cumsum(1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000))])
        return np.array(found.ids, np.int64), before[[end for _, end in found.offsets]]

    return Vocabulary(tokenizer.get_vocab_size(), encode, lambda tokens: tokenizer.decode(list(tokens)))


def _encode_bytes(text: str) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.frombuffer(text.encode(), np.uint8)
    return tokens, np.arange(1, 1 + len(tokens))


TEXT = Entry(load, facts, OPTIONS)
