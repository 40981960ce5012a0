"""What a request's ``input`` may hold: items, told apart by their ``type``.

Clients add kinds of items every few weeks, and send back whatever they were sent. So the kinds that
mean something here are checked, and any other is kept as its type alone, to be named in
``X-Ruvon-Ignored`` by whoever reads the items.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import orjson
from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from ruvon.server.schemas import Fields
from ruvon.server.schemas.base import as_parts

MAX_ITEMS = 4096
MAX_PARTS = 1024
TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
"""Types of parts whose ``text`` is read."""
READ = TEXTS | {"refusal", "input_json"}
"""Types of parts that are read; what is no text is refused by whoever reads them."""


def as_items(value: object) -> object:
    """``"x"`` → one message of the user."""
    is_text = isinstance(value, str)
    return [{"type": "message", "role": "user", "content": value}] if is_text else value


class Part(Fields):
    """A piece of content, of any type. What each of `READ` says is in a field of its own."""

    type: str
    text: str | None = None
    refusal: str | None = None
    data: Any = None
    annotations: Any = None  # what we sent ourselves comes back
    logprobs: Any = None

    @property
    def words(self) -> str | None:
        """What it says; None if its field is missing."""
        if self.type == "input_json":
            return None if self.data is None else orjson.dumps(self.data).decode()
        return self.refusal if self.type == "refusal" else self.text


Contents = Annotated[
    list[Part],
    Field(fail_fast=True, max_length=MAX_PARTS),
    BeforeValidator(as_parts, json_schema_input_type=str | list[Part]),
]


class Item(Fields):
    """What all items have: an id, and a status that says nothing to us."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    """What somebody said. ``type`` may be missing."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Contents
    phase: str | None = None


class FunctionCallItem(Item):
    """A function that the model called."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class CustomToolCallItem(Item):
    """A custom tool that the model called, with text of its own."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class CallOutputItem(Item):
    """What a function or a custom tool said."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str | None = None
    output: Contents
    name: str | None = None
    namespace: str | None = None


class ReasoningItem(Item):
    """What the model said to itself, as text or as we encoded it."""

    type: Literal["reasoning"]
    summary: Contents | None = None
    content: Contents | None = None
    encrypted_content: str | None = None


class ReferenceItem(Item):
    """An item of a stored response."""

    type: Literal["item_reference"] | None = None
    id: str


class CompactionItem(Item):
    """What ``/v1/responses/compact`` made of a conversation."""

    type: Literal["compaction", "compaction_summary", "context_compaction"]
    encrypted_content: str
    created_by: str | None = None


class OtherItem(Fields):
    """An item of a kind that means nothing here."""

    model_config = ConfigDict(extra="ignore")

    type: str


ITEM_KINDS = {
    "message": "message",
    "function_call": "function_call",
    "custom_tool_call": "custom_tool_call",
    "function_call_output": "output",
    "custom_tool_call_output": "output",
    "reasoning": "reasoning",
    "item_reference": "reference",
    "compaction": "compaction",
    "compaction_summary": "compaction",
    "context_compaction": "compaction",
}
"""``type`` → which of the models above reads it."""


def kind_of(value: Any) -> str:
    """The tag of an item; without a type it is a message, or a reference if it is but an id."""
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    kind = given.get("type")
    if kind is None:
        is_reference = given.get("role") is None and given.get("id") is not None
        return "<reference>" if is_reference else "<message>"
    return f"<{ITEM_KINDS.get(kind, 'other') if isinstance(kind, str) else 'other'}>"


AnyItem: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[CustomToolCallItem, Tag("<custom_tool_call>")]
    | Annotated[CallOutputItem, Tag("<output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[ReferenceItem, Tag("<reference>")]
    | Annotated[CompactionItem, Tag("<compaction>")]
    | Annotated[OtherItem, Tag("<other>")],
    Discriminator(kind_of),
]
"""One item. Tags are in angle brackets so that errors, which name the field, can leave them out."""

Items = Annotated[
    list[AnyItem],
    Field(fail_fast=True, max_length=MAX_ITEMS),
    BeforeValidator(as_items, json_schema_input_type=str | list[AnyItem]),
]
