import json
from collections.abc import Sequence
from datetime import datetime

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from services.contract.messages import Turn
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.engine.prompt.template_renderer import TemplateError
from services.inference.engine.prompt.template_sandbox import compile_template
from tests.inference.chat_templates import CHATML, template

TURNS = (Turn("1", "first", "one"), Turn("2", "second", "two"))
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"
)


def text(template: ChatTemplate, system: str, turns: Sequence[Turn], question: str) -> str:
    return bytes(template.session_prompt(system, turns, question, 10).tokens).decode()


def test_generation_block_is_rendered_unchanged() -> None:
    assert compile_template("a{% generation %}{{ b }}{% endgeneration %}c").render(b="b") == "abc"


def test_tojson_escapes_nothing_for_html() -> None:
    value = {"é": ["<b>", 1, None]}
    assert compile_template("{{ value | tojson }}").render(value=value) == '{"é": ["<b>", 1, null]}'
    assert (
        json.loads(compile_template("{{ value | tojson(indent=2) }}").render(value=value)) == value
    )
    source = "{{ value | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    assert compile_template(source).render(value={"b": "é", "a": 1}) == '{"a":1,"b":"\\u00e9"}'


def test_loops_have_break_and_continue() -> None:
    source = (
        "{% for i in x %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}"
    )
    assert compile_template(source).render(x=[1, 2, 3]) == "2"


def test_blocks_leave_no_blank_lines() -> None:
    assert compile_template("a\n  {% if true %}\nb\n  {% endif %}\nc").render() == "a\nb\nc"


def test_raise_exception_and_strftime_now() -> None:
    with pytest.raises(jinja2.TemplateError, match="no tools here"):
        compile_template("{{ raise_exception('no tools here') }}").render()
    assert compile_template("{{ strftime_now('%Y') }}").render() == str(datetime.now().year)


def test_templates_do_not_reach_python_internals() -> None:
    assert compile_template("{{ raise_exception.__globals__ }}").render() == ""
    with pytest.raises(SecurityError):
        compile_template("{{ ''.__class__.__mro__ }}").render()


def test_values_can_not_be_changed() -> None:
    x, y = [1], {"a": 1}
    for change in ("x.insert(0, 1)", "x.clear()", "x.extend([2])", "y.update({})", "y.pop('a')"):
        with pytest.raises(SecurityError):
            compile_template(f"{{{{ {change} }}}}").render(x=x, y=y)
    assert (x, y) == ([1], {"a": 1})


def test_template_may_append_but_not_to_the_caller_s_lists() -> None:
    made = template(
        "{% set seen = [] %}{% for m in messages %}{{ seen.append(m) or '' }}"
        "{{ m.extra.append(1) or '' if m.extra else '' }}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi", "extra": [0]}]
    assert made._renderer.render(messages) == "hi" and messages[0]["extra"] == [0]


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ messages[0].content }}", "always the same", "{{ 1 / 0 }}" + CHATML],
)
def test_template_that_renders_no_conversation_is_rejected(source: str) -> None:
    with pytest.raises(TemplateError):
        template(source)


def test_template_is_sandboxed() -> None:
    with pytest.raises(TemplateError):
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML)


@pytest.mark.parametrize(
    "source",
    [
        PARTS,
        "{% for m in messages %}{{ m.role }}:{{ m.content[0]['text'] }};{% endfor %}",
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' %}{{ m.content[0].text + '' }}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}",
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{{ m.content[0].text }}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}",
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}"
        "{% else %}{{ m.content[0].text }}{% endif %};{% endfor %}",
    ],
)
def test_content_is_a_list_of_parts_if_needed(source: str) -> None:
    shown = text(template(source), "be kind", TURNS[:1], "hi")
    assert shown == "system:be kind;user:first;assistant:one;user:hi;"


@pytest.mark.parametrize(
    "condition",
    [
        "tools is not none and tools | length",
        "documents is not none and documents | length",
        "tools is defined and tools is not none and tools[0]",
        "tools is defined and tools | length",  # only an undefined variable passes this
    ],
)
def test_missing_tools_are_none_or_undefined_as_needed(
    condition: str,
) -> None:
    source = f"{{% if {condition} %}}{{{{ raise_exception('tools') }}}}{{% endif %}}{CHATML}"
    assert text(template(source), "", (), "hi") == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
