"""A setting: its default, what it means, and what is allowed."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

FILE = re.compile(r"(.+\.py):([^\W\d]\w*)")  # FILE.py:NAME, something of the user's own
_EXAMPLES = {
    int: ("ints", "'(1,2)'"),
    float: ("floats", "'(1,2)'"),
    str: ("strings", "('yes','no')"),
    tuple: ("pairs", '\'(("ist",1.0),("local_sgd",2.0))\''),
}

Value: TypeAlias = Any  # of a setting: a bool, a number, a string, a tuple of these; None: unset
Options = Mapping[str, Value]  # by whole names, such as 'model.width'
Settings = dict[str, Value]  # a config as it is recorded, nested or by dotted key


class Key(NamedTuple):
    """What is known of a setting; `OPTIONS` of a model or a data set, and the tables of `config`, hold them.

    Attributes:
      default: a bool, number, string, or tuple; None: unset, of the given kind.
      help: a line about it, with its unit.
      least: the least number that is allowed; of tuples, for every element.
      most: the greatest one; it must be finite in any case.
      above: `least` itself is not allowed.
      choices: the names or numbers that are allowed; (): any.
      file: something of the user's own, FILE.py:NAME, is allowed as well.
      kind: of a tuple's elements, or of what is unset by default.
      resume: a run may go on with another value: what was trained so far does not depend on it.
      extends: with another value a finished run is not finished.
    """

    default: Value
    help: str
    least: float | None = None
    most: float = math.inf
    above: bool = False
    choices: Collection[Value] = ()
    file: bool = False
    kind: type | None = None
    resume: bool = False
    extends: bool = False

    def allowed(self) -> str:
        """What is allowed, in words; '' where anything of the type is."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}" + ", or FILE.py:NAME" * self.file
        if self.least is None:
            return "or FILE.py:NAME" * self.file
        if self.above:
            return f"a number above {self.least}" + f", {self.most} at most" * (self.most < math.inf)
        if self.most < math.inf:
            return f"{self.least} to {self.most}"
        return f"{self.least} or more" + ", or leave it unset" * (self.default is None)

    def check(self, name: str, value: Value) -> None:
        """Raises ValueError, naming the setting and what is allowed, for a value that cannot work.

        Args:
          name: of the setting, such as 'optimizer.warmup'.
          value: of it; a list is as good as a tuple.
        """
        if isinstance(self.default, tuple):
            self._check_elements(name, value)
        elif self.choices and value not in self.choices and not (self.file and FILE.fullmatch(str(value))):
            raise ValueError(f"{name}={value!r}; set config.{name} to {self.allowed()}")
        if self.least is not None and value is not None:
            for number in value if isinstance(value, tuple | list) else (value,):
                right = math.isfinite(number) and self.least <= number <= self.most
                if not right or (self.above and number == self.least):
                    finite = " (a finite number)" * (not math.isfinite(number) and self.most == math.inf)
                    raise ValueError(f"{name}={value}; set config.{name} to {self.allowed()}{finite}")

    def _check_elements(self, name: str, values: Value) -> None:
        kinds: Any = {float: (int, float), tuple: (tuple, list)}.get(self.kind or str, self.kind)

        def fits(value: Value) -> bool:
            right = isinstance(value, kinds) and not isinstance(value, bool)
            return right and (self.kind in (str, tuple) or math.isfinite(value))

        if not isinstance(values, tuple | list) or not all(map(fits, values)):
            plural, example = _EXAMPLES[self.kind or str]
            raise ValueError(
                f"{name}={values!r}; set config.{name} to a tuple of {plural}, such as {example}"
            )
