import json
from datetime import datetime

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from services.inference.engine.prompt.template_renderer import compile_template


def test_a_generation_block_is_rendered_as_what_is_in_it() -> None:
    assert compile_template("a{% generation %}{{ b }}{% endgeneration %}c").render(b="b") == "abc"


def test_json_is_written_as_it_is_spoken_not_as_html_wants_it() -> None:
    value = {"é": ["<b>", 1, None]}
    assert compile_template("{{ value | tojson }}").render(value=value) == '{"é": ["<b>", 1, null]}'
    assert (
        json.loads(compile_template("{{ value | tojson(indent=2) }}").render(value=value)) == value
    )
    source = "{{ value | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    assert compile_template(source).render(value={"b": "é", "a": 1}) == '{"a":1,"b":"\\u00e9"}'


def test_loops_can_be_left_and_skipped() -> None:
    source = (
        "{% for i in x %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}"
    )
    assert compile_template(source).render(x=[1, 2, 3]) == "2"


def test_blocks_leave_no_blank_lines() -> None:
    assert compile_template("a\n  {% if true %}\nb\n  {% endif %}\nc").render() == "a\nb\nc"


def test_a_template_can_refuse_and_tell_the_date() -> None:
    with pytest.raises(jinja2.TemplateError, match="no tools here"):
        compile_template("{{ raise_exception('no tools here') }}").render()
    assert compile_template("{{ strftime_now('%Y') }}").render() == str(datetime.now().year)


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ raise_exception.__globals__ }}", "{{ x.append(1) }}"],
)
def test_a_template_gets_at_nothing_and_changes_nothing(source: str) -> None:
    x: list[int] = []
    try:
        assert compile_template(source).render(x=x) == ""
    except SecurityError:
        pass
    assert x == []
