"""From bytes to a request, or to one bounded sentence about what is wrong with it.

What `fields` lists as not served is refused; a field that changes nothing here, or that nobody
knows, is reported back by name, never dropped in silence. Everything here may run in any thread.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from threading import Lock
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ruvon.errors import RequestError
from ruvon.server.fields import ECHOED, EMPTY, HARMLESS, INSTEAD, UNSERVED
from ruvon.server.schemas import Fields
from ruvon.server.shape import Bounds, check_shape

MAX_IGNORED = 32  # names reported back
MAX_MESSAGE = 400  # characters of a validation message: a small request must not get a huge answer
SMALL = 2048  # bytes of a body that no count of values, and no tools, can make slow

COLLECTOR = Lock()  # two that turn it off and on again could leave it off

R = TypeVar("R", bound=Fields)


def load(body: bytes, bounds: Bounds) -> dict[str, Any]:
    """A body's JSON object; of equal keys the last counts, as everywhere.

    Raises RequestError for what is no JSON, holds more than ``bounds``, or is no object.
    """
    is_small = len(body) <= SMALL
    if not is_small:
        check_shape(body, bounds)
    try:
        data = orjson.loads(body) if is_small else loads_large(body)
    except orjson.JSONDecodeError as error:
        reason = str(error)[:MAX_MESSAGE]
        raise RequestError(f"The body is not valid JSON: {reason}.", None, "invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.", None, "invalid_type")
    return data


def loads_large(body: bytes) -> Any:
    """As orjson's, without the garbage collector, which would look at the growing whole time and
    again, all in one native call. Nothing else runs meanwhile, so that is nobody's loss."""
    with COLLECTOR:
        collects = gc.isenabled()
        gc.disable()
        try:
            return orjson.loads(body)
        finally:
            if collects:
                gc.enable()


def parse(
    kind: type[R],
    data: dict[str, Any],
    strict: bool = False,
    check_model: Callable[[str], None] = lambda name: None,
) -> tuple[R, list[str]]:
    """A body's JSON → the request, and the names of fields that have no effect.

    Raises what ``check_model`` raises for the model's name, before anything else is looked at;
    RequestError for a wrong field, a field that is not served and, when ``strict``, for an unknown
    one.
    """
    if isinstance(name := data.get("model"), str):
        check_model(name)
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise explain(error, data) from None
    refuse_unserved(request)
    ignored = list(islice(unused(request), MAX_IGNORED))
    refuse_ignored(ignored, strict, kind.HARMLESS)
    return request, ignored


def refuse_ignored(
    names: Iterable[str], strict: bool, harmless: frozenset[str] = frozenset()
) -> None:
    """When ``strict``, raise for a field without effect that is not known to be ``harmless``."""
    for name in names if strict else ():
        if name not in HARMLESS and name not in harmless:
            raise RequestError(f"Unknown parameter: '{name}'.", name, "unknown_parameter")


def refuse_unserved(request: Fields) -> None:
    """Raise for a field that would change the answer and that ruvon does not serve."""
    extra = request.model_extra or {}
    for name, value in extra.items():
        if name in UNSERVED and value not in EMPTY and value not in UNSERVED[name]:
            raise _unsupported(name, f"; use {INSTEAD[name]}" if name in INSTEAD else "")
    for prefix, model in within(request):
        for name in model.UNSERVED.intersection(model.model_extra or ()):
            neutral = UNSERVED.get(name, (False,))
            if (model.model_extra or {})[name] not in (*EMPTY, *neutral):
                raise _unsupported(f"{prefix}{name}")


def _unsupported(name: str, instead: str = "") -> RequestError:
    message = f"'{name}' is not supported by this server{instead}."
    return RequestError(message, name, "unsupported_parameter")


def unused(request: Fields) -> Iterator[str]:
    """Names of given fields that no model declares, such as ``messages[0].weight``."""
    for prefix, model in within(request):
        for name, value in (model.model_extra or {}).items():
            known = (*ECHOED, *model.UNSERVED) if prefix else UNSERVED
            if value not in EMPTY and name not in known:
                yield f"{prefix}{name}"[:100]


def within(model: Fields, prefix: str = "") -> Iterator[tuple[str, Fields]]:
    """A request and all objects in it, each with what comes before the names of its fields."""
    yield prefix, model
    for name in model.model_fields_set:
        value = getattr(model, name, None)
        if isinstance(value, Fields):
            yield from within(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Fields):
            for index, item in enumerate(value):
                yield from within(item, f"{prefix}{name}[{index}].")


def explain(error: ValidationError, data: object) -> RequestError:
    """Pydantic's findings in ``data`` → one bounded sentence that names the first field, in
    OpenAI's words."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    first = details[0]
    message = first["msg"][:MAX_MESSAGE]
    param = field_name(first, data)
    if first["type"] == "missing":
        return RequestError(
            f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
        )
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return RequestError(f"Invalid '{param or 'body'}': {message}{more}.", param, code)


def field_name(detail: ErrorDetails, data: object) -> str | None:
    """``("messages", 0, "role")`` → ``messages[0].role``. What is not in ``data``, or in angle
    brackets, is no field but says which of several models was tried."""
    name = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            if isinstance(data, list) and part < len(data):
                name, data = f"{name}[{part}]", data[part]
        elif isinstance(data, dict) and part in data and not part.startswith("<"):
            name, data = f"{name}.{part}", data[part]
    if detail["type"] == "missing":
        name += f".{detail['loc'][-1]}"
    return name.removeprefix(".")[:100] or None
