"""What runs in the child process, here in this one: transformers' renderings, within limits."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qlorachat.templates.sandbox import OUTPUT_LIMIT, answer

DIALOG = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": " 日本 <b>\ud83d"},
    {"role": "assistant", "content": "x"},
]


def ask(source: str, dialogs: int = 1, **variables: Any) -> list[dict[str, str]]:
    request = {"source": source, "dialogs": [DIALOG] * dialogs, "variables": variables}
    return list(answer(request))


def each(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}" + each("{{ m['role'] ~ m.content }}") + "{{ eos_token }}",
        each("\n  {% if loop.first %}\n  {{- m.content }}\n  {% endif %}\n"),
        each("{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}"),
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{{ messages[1] | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
        "{% set ns = namespace(n=0) %}" + each("{% set ns.n = ns.n + 1 %}") + "{{ ns.n }}",
        "{{ dict(a=1, **messages[0]) | tojson }}{{ namespace({'a': 2}).a }}",
        each("{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}"),
        "{{ strftime_now('%Y-%m') }}{{ add_generation_prompt }}{{ tools is none }}{{ documents }}",
        "{% macro end(m) %}{{ m.content | trim ~ eos_token }}{% endmacro %}{{ end(messages[1]) }}",
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renderings_equal_transformers_own(source: str, add_generation_prompt: bool) -> None:
    variables: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_generation_prompt": add_generation_prompt,
    }
    expected, _ = render_jinja_template([DIALOG], chat_template=source, **variables)
    assert ask(source, **variables, tools=None, documents=None) == [{"text": expected[0]}]


def test_all_dialogs_of_a_request_see_one_moment() -> None:
    first, *others = ask("{{ strftime_now('%f') }}", dialogs=5)
    assert others == [first] * 4


def test_the_templates_own_refusal_is_told_from_its_failures() -> None:
    assert ask("{{ raise_exception('a\n b') }}") == [{"refused": "a b"}]
    assert ask("{{ 1 // 0 }}") == [
        {"failed": "ZeroDivisionError integer division or modulo by zero"}
    ]
    (long,) = ask("{{ raise_exception('a' * 10**6) }}")
    assert len(long["refused"]) < 1000


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ strftime_now.__self__.year }}",
        "{% set n = namespace(__init__=1) %}",
        "{% set n = namespace() %}{% set n.__call__ = 1 %}",
    ],
)
def test_what_leads_out_of_the_sandbox_is_refused(source: str) -> None:
    (rendering,) = ask(source)
    assert rendering["failed"].startswith("SecurityError")


def test_the_output_is_limited_while_it_grows() -> None:
    just_enough = f"{{{{ 'a' * {OUTPUT_LIMIT} }}}}"
    assert len(ask(just_enough)[0]["text"]) == OUTPUT_LIMIT
    (rendering,) = ask(just_enough + "{{ messages[0].content }}")
    assert rendering == {
        "failed": f"OverflowError the prompt is longer than {OUTPUT_LIMIT} characters"
    }
