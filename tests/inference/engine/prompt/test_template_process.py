"""Templates of strangers: what they use is limited, whatever they try."""

import marshal
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from services.contract.conversation import ChatMessage
from services.contract.errors import ServiceError
from services.inference.engine.prompt import template_process
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.engine.prompt.template_process import (
    RenderFailure,
    TemplateLimitError,
    TemplateLimits,
)
from services.inference.engine.prompt.template_renderer import TemplateError
from tests.inference.chat_templates import CHATML
from tests.inference.fake_backend import FakeBackend

LIMITS = TemplateLimits(cpu_seconds=0.05, trying_seconds=1, max_bytes=2**28, max_chars=10**6)
UNHURRIED = replace(LIMITS, cpu_seconds=10)  # what fails by itself may take its time
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NESTED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
ENDLESS = {
    "loops": LOOP,
    "loop in a macro": "{% macro f(n) %}{% for i in range(99999) %}{{ f(n - 1) if n }}{% endfor %}"
    "{% endmacro %}{{ f(9) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of powers": "{{ (7 ** 99999) ** 99999 }}",
    "large number as text": "{{ (10 ** 4000) | string | length }}" + LOOP,
    "shared lists as JSON": NESTED + "{% endfor %}{{ ns.x | tojson }}",
    "shared lists as text": NESTED + "{% endfor %}{{ ns.x }}",
    "shared lists compared": NESTED
    + "{% endfor %}{{ ns.x == ns.x[0] }}{{ [ns.x] * 2 == [ns.x[0]] * 2 }}"
    + LOOP,
    "replace": "{% set x = 'a' * 10**6 %}{{ x.replace('a', x) | length }}" + LOOP,
    "search": "{% set x = 'ab' * 10**7 %}{% for i in range(9999) %}{{ x.count('ba') }}{% endfor %}",
    "sorted": "{% for i in range(9999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "urlize": "{{ ('www.' + '((((' * 10**5) | urlize }}" + LOOP,
    "striptags": "{{ ('<!--' * 10**5) | striptags }}" + LOOP,
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) if loop.depth < 9 }}"
    + LOOP
    + "{% endfor %}",
    "append to the own list": "{% set x = [1] %}{% for i in x %}{{ x.append(1) or '' }}"
    "{% set _ = x.pop() %}{% set _ = x.append(1) %}{% endfor %}" + LOOP,
    "generated": "{{ range(99999) | map('string') | join | length }}" + LOOP,
    "lipsum": "{{ lipsum(n=10**7) | length }}",
    "loops over text": "{% set x = 'a' * 10**7 %}"
    "{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
}
TOO_LARGE = {
    "text times": "{{ 'a' * 10**12 }}",
    "list times": "{{ ([0] * 10**12) | length }}",
    "doubled": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by plus": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled list": "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled block": "{% set x = 'a' * 10**8 %}{% set x %}{{ x }}{{ x }}{% endset %}{{ x }}",
    "join": "{{ (['a' * 10**5] * 10**5) | join('b' * 10**5) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format filter": "{{ '%9999999999s' | format('a') }}",
    "format": "{{ '{:>9999999999}'.format('a') }}",
    "expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "indent": "{{ 'a\nb' | indent(10**10) }}",
    "replace": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
    "output": "{{ 'a' * 10**7 }}",
    "many outputs": "{% for i in range(99) %}{{ 'a' * 10**5 }}{% endfor %}",
}
FAILS = {
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless recursion": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "nested list": "{% set ns = namespace(x=[]) %}{% for i in range(9000) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep list": "{{ " + "[" * 500 + "]" * 500 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "own nested list": "{% set ns = namespace(x=[]) %}{% for i in range(9000) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ raise_exception(ns.x) }}",
    "own number": "{{ raise_exception(1) }}",
    "own text": "{{ raise_exception('a' * 10**5) }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "format attribute": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "format map": "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}",
    "attr": "{{ (lipsum | attr('__globals__'))['os'].popen('id').read() }}",
    "self": "{{ self.__init__.__globals__.sys.exit() }}",
    "list in itself": "{{ messages.append(messages) }}{{ messages | tojson }}",
}


def render(source: str, limits: TemplateLimits = LIMITS, **variables: Any) -> str:
    return template_process.render(source, variables, limits)


def loaded(source: str) -> ChatTemplate:
    limits = TemplateLimits(cpu_seconds=0.2, trying_seconds=1)
    return ChatTemplate(source, FakeBackend({}), bos="", eos="", adds_bos=False, limits=limits)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_endless_template_is_stopped(source: str) -> None:
    with pytest.raises(TemplateLimitError, match=r"runs for more than 0\.05 seconds|memory"):
        render(source)
    assert render("{{ a }}", a="next") == "next"


@pytest.mark.parametrize("source", TOO_LARGE.values(), ids=TOO_LARGE)
def test_template_that_writes_too_much_is_stopped(source: str) -> None:
    with pytest.raises(TemplateLimitError, match=r"memory|characters|seconds"):
        render(source)
    assert render("{{ a }}", a="next") == "next"


@pytest.mark.parametrize("source", FAILS.values(), ids=FAILS)
def test_failure_of_a_template_is_a_short_clause(source: str) -> None:
    with pytest.raises(RenderFailure) as error:
        render(source, UNHURRIED, messages=[])
    assert 0 < len(str(error.value)) <= 501 and "\n  File" not in str(error.value)
    assert render("{{ a }}", UNHURRIED, a="next") == "next"


def test_variables_and_text_are_passed_unchanged() -> None:
    value: dict[str, Any] = {"é\ud800": [1.5, None, True, -(10**30), "\x00\ue000", {}, [[]]]}
    assert render("{{ x | tojson(ensure_ascii=True) }}{{ x.keys() | first }}", x=value) == (
        '{"\\u00e9\\ud800": [1.5, null, true, -1000000000000000000000000000000,'
        ' "\\u0000\\ue000", {}, [[]]]}é\ud800'
    )


def test_process_has_no_secrets_files_or_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGODB_URI", "mongodb://secret")
    process = template_process._Process(TemplateLimits(max_chars=77))
    try:
        pid = process._popen.pid
        assert process.ask(_request("{{ 1 }}"))[1] == b"1"
        with open(f"/proc/{pid}/environ") as file:
            assert "PYTHONPATH" in (environ := file.read()) and "secret" not in environ
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
        with open(f"/proc/{pid}/limits") as file:
            limits = dict(line.rsplit(None, 3)[:2] for line in file.readlines()[1:])
        assert limits["Max open files"] == "3" and limits["Max processes"] == "0"
    finally:
        process.close()


def test_process_that_died_while_idle_is_replaced() -> None:
    limits = TemplateLimits(max_chars=78)
    render("{{ 1 }}", limits)
    (process,) = template_process._processes(limits)._idle
    process._popen.kill()
    process._popen.wait()
    assert render("{{ 2 }}", limits) == "2"


@pytest.mark.parametrize(("kills", "survives"), [(1, True), (2, False)])
def test_rendering_whose_process_was_killed_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, kills: int, survives: bool
) -> None:
    ask, asked = template_process._Process.ask, list[int]()

    def ask_killed(process: template_process._Process, request: bytes) -> tuple[int, bytes]:
        asked.append(process._popen.pid)
        if len(asked) <= kills:
            process._popen.kill()
        return ask(process, request)

    monkeypatch.setattr(template_process._Process, "ask", ask_killed)
    if survives:
        assert render("{{ a }}", a="text") == "text"
    else:
        with pytest.raises(TemplateLimitError, match="ended with SIGKILL"):
            render("{{ a }}", a="text")
    assert len(set(asked)) == 2


def test_other_threads_run_while_a_template_renders() -> None:
    limits = TemplateLimits(cpu_seconds=0.3, max_chars=79)
    failures: list[Exception] = []

    def run() -> None:
        try:
            render("{{ 9 ** (9 ** 9) }}", limits)
        except TemplateLimitError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    longest, before = 0.0, time.monotonic()
    while thread.is_alive():
        time.sleep(0.001)
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
    assert failures and longest < 0.25


@pytest.mark.parametrize("source", [LOOP + CHATML, "{{ 'a' * 10**12 }}" + CHATML])
def test_costly_template_is_not_loaded(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError, match="it runs for more than 0.2 seconds|memory"):
        loaded(source)
    assert time.monotonic() - began < 5


def test_slow_template_is_not_tried_for_long() -> None:
    slow = "{% for a in range(99999) %}{% endfor %}" * 20 + CHATML
    with pytest.raises(TemplateError, match="more than 1 seconds to try it|0.2 seconds"):
        loaded(slow)


def test_template_that_content_triggers_fails_that_request() -> None:
    source = "{% if 'xyzzy' in messages[-1].content %}" + LOOP + "{% endif %}" + CHATML
    made = loaded(source)

    def tokens(text: str) -> list[int]:
        return made.tokenize_conversation([ChatMessage("user", text)], ())

    ordinary = tokens("hello")
    with pytest.raises(ServiceError, match="chat template was stopped: it runs for") as error:
        tokens("say xyzzy")
    assert error.value.code == "model_unavailable" and len(error.value.message) < 300
    assert tokens("hello") == ordinary


def _request(source: str, variables: Mapping[str, Any] | None = None) -> bytes:
    return marshal.dumps((source, dict(variables or {}), 100, 1.0))
