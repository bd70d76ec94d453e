"""Prompt formats: a dialog becomes segments, then ids; users' text never becomes control tokens."""

from qlorachat.protocols import Template
from qlorachat.templates.chatml import ChatML
from qlorachat.templates.checkpoint import CheckpointTemplate
from qlorachat.templates.choice import TemplateChoice, check_template_name
from qlorachat.templates.llama2 import Elyza, Llama2, check_llama2_tokenizer
from qlorachat.templates.prompt import ChecksTokenizer, Prompt, build_prompt

BUILTIN_TEMPLATES: tuple[Template, ...] = (Llama2(), Elyza(), ChatML())

__all__ = [
    "BUILTIN_TEMPLATES",
    "ChatML",
    "CheckpointTemplate",
    "ChecksTokenizer",
    "Elyza",
    "Llama2",
    "Prompt",
    "TemplateChoice",
    "build_prompt",
    "check_llama2_tokenizer",
    "check_template_name",
]
