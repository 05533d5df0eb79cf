"""Chat templates by name, for models that have none: `model.chat_template=chatml`.

Each is short: no tools, no dates, no system message of its own. What it writes of control tokens the vocabulary has to
have, each as one token; `alpaca` and `plain` write none but those that begin and end a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tuner.errors import ModelError, nearest
from tuner.tokenizers import small_templates
from tuner.tokenizers.tiny import CHATML
from tuner.types import ChatTemplateName

NAMES: tuple[str, ...] = get_args(ChatTemplateName)


@dataclass(frozen=True)
class BuiltInTemplate:
    """One of them.

    Attributes:
        source: Jinja.
        control: the control tokens that it writes by their text.
        roles: those that it writes by their role, as `eos_token`, and cannot do without.
    """

    source: str
    control: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()


ONLY_THREE_SPEAK = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('only system, user and assistant speak') }}{% endif %}{% endfor %}"
)

ALPACA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
"""The headings of https://github.com/tatsu-lab/stanford_alpaca around each turn."""

PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)

BUILT_IN = {
    "alpaca": BuiltInTemplate(ONLY_THREE_SPEAK + ALPACA, roles=("eos_token",)),
    "chatml": BuiltInTemplate(CHATML, ("<|im_start|>", "<|im_end|>")),
    "gemma": BuiltInTemplate(
        ONLY_THREE_SPEAK + small_templates.GEMMA, ("<start_of_turn>", "<end_of_turn>"), ("bos_token",)
    ),
    "llama2": BuiltInTemplate(ONLY_THREE_SPEAK + small_templates.LLAMA2, roles=("bos_token", "eos_token")),
    "llama3": BuiltInTemplate(
        small_templates.LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("bos_token",)
    ),
    "mistral": BuiltInTemplate(small_templates.MISTRAL, roles=("bos_token", "eos_token")),
    "phi3": BuiltInTemplate(
        ONLY_THREE_SPEAK + small_templates.PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    ),
    "plain": BuiltInTemplate(ONLY_THREE_SPEAK + PLAIN, roles=("eos_token",)),
}


def control_tokens_of(chosen: str | None) -> tuple[str, ...]:
    """The control tokens that `model.chat_template` needs of a vocabulary; of a file they are not known."""
    return BUILT_IN[chosen].control if chosen in BUILT_IN else ()


def template_source(chosen: str) -> str:
    """The Jinja text of `model.chat_template`: of a built-in one, or of a file.

    Raises:
        ModelError: neither, or a file that cannot be read.
    """
    if chosen in BUILT_IN:
        return BUILT_IN[chosen].source
    if not chosen.endswith(".jinja"):
        raise ModelError(f"model.chat_template={chosen}: {nearest(chosen, NAMES)}, or a .jinja file")
    try:
        return Path(chosen).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"model.chat_template={chosen}: cannot be read: {error}") from error
