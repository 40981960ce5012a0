"""Templates in the style of model families, and small vocabularies with their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from texts import trained

from ruvon.models.chat import ChatFormat, load_chat
from ruvon.models.formats.tools import Tool
from ruvon.models.tokenizer import Tokenizer

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HERMES = """
{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n<tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls %}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

THINKING = (
    HERMES
    + """
{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
)

OPENED = HERMES + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"

SMOLLM = HERMES.replace(
    '<tool_call>\\n{"name": ..., "arguments": ...}\\n', '<tool_call>[{"name": ...}, ...]'
)

CODER = HERMES.replace(
    '{"name": ..., "arguments": ...}',
    "<function=name>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>",
)

LLAMA = """{{- bos_token }}
{%- if tools is defined and tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary}.' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls and message.tool_calls | length != 1 %}
        {{- raise_exception('This model only supports single tool-calls at once!') }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls %}
        {{- '{"name": "' + call.function.name + '", "parameters": ' }}
        {{- call.function.arguments | tojson + '}' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
{#- builtin tools go after <|python_tag|> #}"""

MISTRAL = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if loop.last and tools %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}
            {{- call.function | tojson + call.id }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + message.content + message.tool_call_id + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

MISTRAL_NAMED = MISTRAL.replace("'[TOOL_CALLS] ['", "'[TOOL_CALLS]name[ARGS]{}'")

TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


@dataclass(frozen=True)
class Family:
    """A model: its template, and its tokens beside those of ChatML."""

    template: str
    specials: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return trained(self.specials, self.added, bos_id=0, eos_ids=(1,))

    @cached_property
    def chat(self) -> ChatFormat:
        return load_chat(self.tokenizer, self.template)


FAMILIES = {
    "hermes": Family(HERMES, added=TAGS[:2]),
    "hermes in words": Family(HERMES),
    "smollm": Family(SMOLLM),
    "thinking": Family(THINKING, added=TAGS),
    "opened": Family(OPENED, added=TAGS),
    "coder": Family(CODER, added=TAGS[:2]),
    "llama": Family(
        LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
    ),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]")),
    "mistral named": Family(MISTRAL_NAMED, ("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]")),
    "untaught": Family(CHATML),
}

WEATHER = Tool(
    "weather",
    "How warm it is",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
)
ANYTHING = Tool("anything")
PATCH = Tool("patch", "Changes files", custom=True)
TOOLS = (WEATHER, ANYTHING, PATCH)
