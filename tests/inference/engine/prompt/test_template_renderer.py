import json
from datetime import datetime

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from services.inference.engine.prompt.template_renderer import compile_template


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


def test_templates_have_raise_exception_and_strftime_now() -> None:
    with pytest.raises(jinja2.TemplateError, match="no tools here"):
        compile_template("{{ raise_exception('no tools here') }}").render()
    assert compile_template("{{ strftime_now('%Y') }}").render() == str(datetime.now().year)


def test_templates_do_not_reach_python_internals() -> None:
    assert compile_template("{{ raise_exception.__globals__ }}").render() == ""
    with pytest.raises(SecurityError):
        compile_template("{{ ''.__class__.__mro__ }}").render()


def test_values_can_not_be_changed() -> None:
    x: list[int] = []
    with pytest.raises(SecurityError):
        compile_template("{{ x.append(1) }}").render(x=x)
    assert x == []
