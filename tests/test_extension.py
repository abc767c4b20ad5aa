"""Things of the user's own, FILE.py:NAME."""

import hashlib

import pytest

from ist_jax.extension import digest, digests, load

TABLE = {"random": 1, "strided": 2}
TEXT = "import math\nCALLS = []\ndef deal():\n    return math.pi\n_hidden = 0\n"


def test_a_name_of_the_table_or_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(TEXT)
    assert load("strided", TABLE) == 2
    assert load("own.py:deal", TABLE)() == pytest.approx(3.14159, abs=1e-5)
    assert load(f"{tmp_path}/own.py:deal", {}) is load("own.py:deal", TABLE)  # executed once
    (tmp_path / "own.py").write_text(TEXT + "deal = 5\n")
    assert load("own.py:deal", TABLE) == 5


def test_files_of_one_name_are_two_modules(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(f"x = {value}\n")
    assert [load(f"{tmp_path}/{folder}/own.py:x", {}) for folder in "ab"] == [1, 2]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("randon", "'randon' is not there; did you mean 'random'? give one of 'random', 'strided', or"),
        ("own.py", "'own.py' is not there; give one of"),
        ("nowhere.py:deal", "cannot read nowhere.py of 'nowhere.py:deal': No such file or directory"),
        ("own.py:deel", "own.py has no name 'deel'; did you mean 'deal'? names there: CALLS, deal"),
        ("empty.py:x", "empty.py has no name 'x'; names there: none"),
        ("broken.py:x", "broken.py fails: name 'undefined' is not defined"),
        ("silent.py:x", "silent.py fails: NotImplementedError"),
        ("syntax.py:x", "syntax.py fails: "),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(reference, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"own": TEXT, "empty": "", "broken": "x = undefined\n", "silent": "raise NotImplementedError\n",
             "syntax": "def x(:\n"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    for _ in range(2):  # a file that fails is not remembered
        with pytest.raises(ValueError) as error:
            load(reference, TABLE)
        assert message in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_the_digest_is_of_the_files_bytes(tmp_path):
    file = tmp_path / "own.py"
    file.write_bytes(b"x = 1\n")
    wanted = hashlib.sha256(b"x = 1\n").hexdigest()[:16]
    assert digest(f"{file}:x") == wanted
    assert digest("random") is None
    settings = {"method": f"{file}:x", "partition.deal": "random", "seed": 3, "data.words": ("a.py:b",)}
    assert digests(settings) == {"method": wanted}
    with pytest.raises(ValueError, match=r"cannot read nowhere.py"):
        digests({"exchange.codec": "nowhere.py:x"})
