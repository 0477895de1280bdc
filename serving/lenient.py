"""Bodies of coding agents: an unknown field is reported, and a misspelt one is refused.

Their clients name unfinished features in every request, and take a 400 for final. A field that
cannot change the answer is silent; a wish that the answer may do without is reported; one that
would change it is refused, and so is what looks like a misspelling, or like another server's
sampling field.
"""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from engine import ChatModel, InvalidInput, Prompt
from serving.fields import TemplateKwargs, check_json, reject_lone_surrogates
from serving.inner_request import InnerRequest
from serving.request_model import SamplingFields
from serving.unknown_fields import (
    IGNORED,
    MAX_NAME,
    NEUTRAL,
    IgnoredFields,
    asks_for_nothing,
    is_reported,
    printable,
    refusal_of,
)

T = TypeVar("T")


def _check_near(name: str, known: Iterable[str], path: str = "") -> None:
    """Raise InvalidInput for a field that looks like one of the known ones, misspelt."""
    near = get_close_matches(name[:MAX_NAME], known, n=1, cutoff=0.75)
    if near:
        where = f" in {path}" if path else ""
        raise InvalidInput(
            f"there is no field {printable(name)!r}{where}; did you mean {near[0]!r}?",
            re.split(r"[.\[]", path)[0] or printable(name),
        )


class LenientRequest(SamplingFields):
    """A body of which some fields are reported instead of being refused."""

    inert: ClassVar[frozenset[str]] = frozenset()  # beside what unknown_fields.py ignores
    reported: ClassVar[frozenset[str]] = frozenset()  # though they look like a known one
    refused: ClassVar[dict[str, str]] = {}  # unless empty; what to do instead

    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="variables of the model's chat template"
    )

    @classmethod
    def check_unknown(cls, name: str, value: Any, ignored: IgnoredFields) -> None:
        if name in cls.refused and value not in (None, [], {}, False, ""):
            raise InvalidInput(f"{name} is not supported; {cls.refused[name]}", name)
        if name in cls.inert | cls.refused.keys() or asks_for_nothing(name, value):
            return
        if name in NEUTRAL and name not in cls.reported and not is_reported(name, value):
            raise refusal_of(name, cls.names())
        if name not in cls.reported | IGNORED and not ignored.has(name):
            _check_near(name, cls.names())
        ignored.add(name)

    reasoning_budget: int | None = Field(
        None, ge=-1, description="most tokens of a thought, -1 is no limit"
    )

    def thinking_budget(self, wished: int = -1) -> int | None:
        """Most tokens of a thought, by this field or another of the dialect's."""
        most = self.reasoning_budget if self.reasoning_budget is not None else wished
        return None if most < 0 else most

    def inner(self) -> InnerRequest:
        """The request in no dialect."""
        raise NotImplementedError

    def tokenize(self, model: ChatModel) -> list[Prompt]:
        inner = self.inner()
        for name in inner.unmet_hints(model):
            self._ignored.add(name)
        return [inner.prepare(model)]


class ObjectReader:
    """An object inside a lenient body: its fields are taken by name, and the rest is reported.

    `path` says where it is. All methods raise InvalidInput with it.
    """

    def __init__(self, value: Any, path: str, ignored: IgnoredFields):
        self.path, self.ignored = path, ignored
        if not isinstance(value, dict):
            raise self.error("must be an object")
        self.known: list[str] = []
        self.fields = {name: each for name, each in value.items() if each is not None}

    def error(self, problem: str, name: str = "") -> InvalidInput:
        at = f"{self.path}.{name}" if name else self.path
        return InvalidInput(f"{at} {problem}", re.split(r"[.\[]", self.path)[0])

    def take(self, name: str, default: Any = None) -> Any:
        """A field of any type; null is absent."""
        self.known.append(name)
        return self.fields.pop(name, default)

    def text(self, name: str, default: str | None = None) -> str:
        """A field that is a text; without a default it must be there."""
        return self.checked(name, self.take(name, default), str, "a text", reject_lone_surrogates)

    def flag(self, name: str, default: bool = False) -> bool:
        return self.checked(name, self.take(name, default), bool, "true or false")

    def number(self, name: str, default: int) -> int:
        value = self.take(name, default)
        if isinstance(value, bool):
            raise self.error("must be a whole number", name)
        return self.checked(name, value, int, "a whole number")

    def json_object(self, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
        """A field that is an object of no certain fields."""
        return self.checked(name, self.take(name, default), dict, "an object", check_json)

    def items(self, name: str, most: int) -> list[Any]:
        """A field that is a list, empty by default."""
        found = self.checked(name, self.take(name, []), list, "a list")
        if len(found) > most:
            raise self.error(f"must have at most {most} items, not {len(found)}", name)
        return found

    def child(self, name: str) -> "ObjectReader | None":
        """A field that is an object with fields of its own; None if it is not there."""
        value = self.take(name)
        at = f"{self.path}.{name}"
        return None if value is None else ObjectReader(value, at, self.ignored)

    def checked(
        self,
        name: str,
        value: Any,
        kind: type[T],
        called: str,
        check: Callable[[T], T] | None = None,
    ) -> T:
        """A field's value, if it has a type and passes a check, which raises ValueError."""
        if value is None:
            raise self.error("is missing", name)
        if not isinstance(value, kind):
            raise self.error(f"must be {called}", name)
        try:
            return check(value) if check else value
        except ValueError as error:
            raise self.error(str(error), name) from None

    def report(self, name: str = "") -> None:
        """Note that a field, or the object itself, is left out."""
        at = f"{self.path}.{name}" if name else self.path
        self.ignored.add(re.sub(r"\[\d+\]", "", at))

    def done(self, *inert: str) -> None:
        """Report the fields that nobody took, but for those that cannot change an answer."""
        for name in self.fields:
            if name in inert:
                continue
            at = re.sub(r"\[\d+\]", "", f"{self.path}.{name}")
            if not self.ignored.has(at):
                _check_near(name, self.known, self.path)
            self.ignored.add(at)
