"""Well-known chat formats as Jinja templates, by the names that recipes use for them.

Written for the way in which transformers renders templates: a newline after a block is dropped, and
so are blanks before one.
"""

from __future__ import annotations

AUTO = "auto"
"""Takes the template that most models have."""

_CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""

_LLAMA3 = """\
{{- bos_token -}}
{% for message in messages %}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' -}}
{{- message.content | trim ~ '<|eot_id|>' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{% endif %}
"""

_MISTRAL = """\
{% if messages[0].role == 'system' %}
{% set preface = messages[0].content ~ '\\n\\n' %}
{% set turns = messages[1:] %}
{% else %}
{% set preface = '' %}
{% set turns = messages %}
{% endif %}
{{- bos_token -}}
{% for message in turns %}
{% if message.role != ('user' if loop.index0 is even else 'assistant') %}
{{- raise_exception('After a system message, user and assistant take turns.') -}}
{% endif %}
{% if message.role == 'user' %}
{{- ' [INST] ' ~ (preface if loop.first else '') ~ message.content ~ ' [/INST]' -}}
{% else %}
{{- ' ' ~ message.content ~ eos_token -}}
{% endif %}
{% endfor %}
"""

_ALPACA = """\
{% set headings = {'user': '### Instruction:\\n', 'user_context': '### Input:\\n'} %}
{% for message in messages %}
{% if message.role == 'assistant' %}
{{- '### Response:\\n' -}}
{% else %}
{{- headings.get(message.role, '') -}}
{% endif %}
{{- message.content | trim ~ '\\n\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '### Response:\\n' -}}
{% endif %}
"""

_EXAONE = """\
{% if messages[0].role != 'system' %}
{{- '[|system|][|endofturn|]\\n' -}}
{% endif %}
{% for message in messages %}
{{- '[|' ~ message.role ~ '|]' ~ message.content -}}
{{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '[|assistant|]' -}}
{% endif %}
"""

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Templates by name."""


def is_template(text: str) -> bool:
    """Whether a text is a template rather than the name of one."""
    return "{{" in text or "{%" in text
