"""OpenAI's requests, as pydantic models.

Types are strict (``"1"`` is not a number, though 1.0 is an integer, as in JSON Schema) and ``null``
means "not given", as OpenAI has it. What is not declared here is kept aside, for `parsing` to
refuse or to report.
"""

from ruvon.server.schemas.base import Fields, SamplingFields, Stops, TokenIds
from ruvon.server.schemas.chat import ChatRequest, TemplateFields
from ruvon.server.schemas.completions import CompletionRequest
from ruvon.server.schemas.constraints import ConstraintFields, ResponseFormat, Schema
from ruvon.server.schemas.generation import GenerationFields
from ruvon.server.schemas.messages import Message
from ruvon.server.schemas.tokens import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from ruvon.server.schemas.tools import ChoiceField, ToolField

__all__ = [
    "ChatRequest",
    "ChoiceField",
    "CompletionRequest",
    "ConstraintFields",
    "DetokenizeRequest",
    "Fields",
    "GenerationFields",
    "Message",
    "ResponseFormat",
    "SamplingFields",
    "Schema",
    "Stops",
    "TemplateFields",
    "TokenIds",
    "TokenizeChatRequest",
    "TokenizeRequest",
    "ToolField",
]
