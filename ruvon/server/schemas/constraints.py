"""What the answer must be, under all the names that clients know for it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from ruvon.server.schemas.base import Fields

Schema: TypeAlias = dict[str, Any] | bool
SchemaOrText: TypeAlias = dict[str, Any] | bool | str  # or its JSON
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=8192)]
Source = Annotated[str, Field(min_length=1, max_length=1 << 19)]
SchemaName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchemaFormat(Fields):
    """``response_format.json_schema``."""

    name: SchemaName | None = None
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Fields):
    """``response_format``; a field named like the type says the rest."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None  # of a json_object
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None


class StructuredOutputs(Fields):
    """``structured_outputs``, as vLLM has it. White space is compact in any case."""

    UNSERVED: ClassVar[frozenset[str]] = frozenset(
        {"structural_tag", "whitespace_pattern", "disable_additional_properties"}
    )
    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None
    disable_any_whitespace: bool | None = None  # as it is


class ConstraintFields(Fields):
    """At most one of them may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM's older names
    guided_json: SchemaOrText | None = None
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None
    # SGLang's and llama.cpp's
    json_schema: SchemaOrText | None = None
    regex: Source | None = None
    ebnf: Source | None = None
    grammar: Source | None = None
