"""What the page shows while it waits, and when something fails, with a scripted worker."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from playwright.async_api import Browser, Page, expect

from services.contract.messages import (
    Accepted,
    Failed,
    Progress,
    Started,
    WorkerReport,
)
from services.runtime.bus import Bus
from tests.e2e.stack import Process, plain_environment
from tests.edge.conftest import edge_on, until
from tests.fakes import (
    DONE,
    Hold,
    ScriptedWorker,
    Step,
    answer_events,
    answer_script,
    report,
    reporting,
    scripted_worker,
)
from tests.page.conftest import ask, open_page
from tests.servers import running

CALL = '{"city": "Rome"}'


class Scripted(NamedTuple):
    page: Page
    worker: ScriptedWorker


@pytest.fixture(scope="module")
def history(nats_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The history service, on the NATS server of all tests."""
    environ = plain_environment() | {"NATS_URL": nats_url, "MONGODB_URI": "mongodb://127.0.0.1:9/"}
    folder = tmp_path_factory.mktemp("history")
    with running(Process("services.history", 0, environ, folder)):
        yield


@asynccontextmanager
async def scripted(
    browser: Browser, nats_url: str, *script: Step, keys: str = ""
) -> AsyncIterator[Scripted]:
    """Yield a page on an edge whose worker sends the script."""
    async with (
        Bus.connect(nats_url, "edge") as bus,
        edge_on(bus, keys) as http,
        scripted_worker(nats_url, script) as worker,
        reporting(bus, report("w1")),
    ):
        async with open_page(browser, str(http.base_url)) as page:
            await page.goto("/")
            yield Scripted(page, worker)


async def test_queue_and_prefill_are_shown(browser: Browser, nats_url: str, history: None) -> None:
    queued, following = Hold(Progress(3, 0, 0)), Hold(Progress(1, 0, 0))
    reading, about = Hold(Progress(0, 4000, 1000)), Hold(Progress(0, 4000, 4000))
    begin = (Accepted("r1", "w1"), queued, following, Started(4000, 0, 0, 0), reading, about)
    async with scripted(browser, nats_url, *begin, *answer_script(("content", "Hi"))) as (page, _):
        await ask(page, "hello")
        for hold, text in (
            (queued, "Number 3 in the queue"),
            (following, "Next in the queue"),
            (reading, "Reading the prompt: 1,000 of 4,000 tokens"),
            (about, "About to answer"),
        ):
            await expect(page.locator(".waiting")).to_contain_text(text)
            if hold is reading:
                await expect(page.locator("progress")).to_have_js_property("value", 0.25)
            hold.end.set()
        await expect(page.locator(".markdown")).to_contain_text("Hi")


async def test_reasoning_is_folded_with_its_time(
    browser: Browser, nats_url: str, history: None
) -> None:
    thought, answer = answer_events(("reasoning", "Let me *think*."), ("content", "Four."))
    # The page counts from when it receives the thought, which may be late on a slow machine.
    thinking = Hold()
    script = (Accepted("r1", "w1"), thought, thinking, 1.1, answer, Hold())
    async with scripted(browser, nats_url, *script) as (page, _):
        await ask(page, "2 + 2?")
        summary = page.locator(".reasoning summary")
        await expect(summary).to_have_text("Reasoning…")
        thinking.end.set()
        await expect(page.locator(".reasoning em")).to_be_hidden()
        await summary.click()
        await expect(page.locator(".reasoning em")).to_have_text("think")
        await expect(summary).to_have_text(re.compile(r"Reasoned for [1-9]\.\d s"))


async def test_tool_calls_are_shown(browser: Browser, nats_url: str, history: None) -> None:
    script = answer_script(
        ("content", "Let me look."), ("call", "get_weather"), ("arguments", CALL)
    )
    async with scripted(browser, nats_url, *script) as (page, _):
        await ask(page, "weather?")
        await page.locator(".tool summary", has_text="get_weather").click()
        await expect(page.locator(".tool pre")).to_have_text('{\n  "city": "Rome"\n}')


NO_STORAGE = {
    "full": """Storage.prototype.setItem = () => {
        throw new DOMException("full", "QuotaExceededError");
    }""",
    "forbidden": """for (const name of ["localStorage", "sessionStorage"])
        Object.defineProperty(window, name, {
            get() { throw new DOMException("forbidden", "SecurityError"); },
        })""",
}


@pytest.mark.parametrize("script", NO_STORAGE.values(), ids=NO_STORAGE)
async def test_page_works_without_storage(
    browser: Browser, nats_url: str, history: None, script: str
) -> None:
    async with scripted(browser, nats_url, *answer_script(("content", "Hi"))) as (page, _):
        await page.add_init_script(script)
        await page.reload()
        await ask(page, "hello")
        await expect(page.locator(".markdown")).to_have_text("Hi")


async def test_failure_is_a_sentence_and_a_way_on(
    browser: Browser, nats_url: str, history: None
) -> None:
    failed = Failed("context_length_exceeded", "The prompt is too long: shorten it.")
    async with scripted(browser, nats_url, Accepted("r1", "w1"), failed) as (page, worker):
        await ask(page, "a very long prompt")
        alert = page.get_by_role("alert")
        await expect(alert).to_contain_text("The prompt is too long: shorten it.")
        await alert.get_by_role("button", name="Try again").click()
        await until(lambda: len(worker.requests) == 2)
        await expect(alert).to_contain_text("The prompt is too long")
        await alert.get_by_role("button", name="Back to the prompt").click()
        await expect(page.get_by_label("Message", exact=True)).to_have_value("a very long prompt")


async def test_next_prompt_replaces_a_failure(
    browser: Browser, nats_url: str, history: None
) -> None:
    failed = Failed("context_length_exceeded", "The prompt is too long: shorten it.")
    async with scripted(browser, nats_url, Accepted("r1", "w1"), failed) as (page, worker):
        await ask(page, "a very long prompt")
        await expect(page.get_by_role("alert")).to_contain_text("too long")
        await ask(page, "a shorter one")
        await expect(page.locator(".bubble")).to_have_text("a shorter one")
        await expect(page.get_by_role("alert")).to_contain_text("too long")
        assert [request.prompt for _, request in worker.requests] == [
            "a very long prompt",
            "a shorter one",
        ]


async def test_text_before_a_failure_stays(browser: Browser, nats_url: str, history: None) -> None:
    begin = answer_events(("content", "Once upon a time"))
    failed = Failed("internal", "The model failed.")
    async with scripted(browser, nats_url, Accepted("r1", "w1"), *begin, 0.1, failed) as (page, _):
        await ask(page, "a tale")
        await expect(page.get_by_role("alert")).to_contain_text("The model failed.")
        await expect(page.locator(".markdown")).to_have_text("Once upon a time")


async def test_stop_before_the_answer_begins(
    browser: Browser, nats_url: str, history: None
) -> None:
    script = (Accepted("r1", "w1"), Hold(Progress(2, 0, 0)), DONE)
    async with scripted(browser, nats_url, *script) as (page, worker):
        await ask(page, "hello")
        await expect(page.locator(".waiting")).to_contain_text("Number 2 in the queue")
        await page.get_by_role("button", name="Stop").click()
        async with asyncio.timeout(30):
            await worker.cancelled.get()
        await expect(page.get_by_label("Message", exact=True)).to_have_value("hello")
        await expect(page.get_by_role("alert")).to_have_count(0)


async def test_stop_keeps_what_was_written_meanwhile(
    browser: Browser, nats_url: str, history: None
) -> None:
    script = (Accepted("r1", "w1"), Hold(Progress(2, 0, 0)), DONE)
    async with scripted(browser, nats_url, *script) as (page, _):
        await ask(page, "hello")
        await expect(page.locator(".waiting")).to_contain_text("Number 2 in the queue")
        message = page.get_by_label("Message", exact=True)
        await message.fill("the next one")
        await page.get_by_role("button", name="Stop").click()
        await expect(message).to_have_value("hello\n\nthe next one")


async def test_another_tab_follows_a_second_try(
    browser: Browser, nats_url: str, history: None
) -> None:
    failed = Failed("context_length_exceeded", "The prompt is too long: shorten it.")
    async with scripted(browser, nats_url, Accepted("r1", "w1"), failed) as (page, worker):
        other = await page.context.new_page()
        await other.goto("/")
        await expect(other.get_by_text("Your conversations will be here.")).to_be_visible()
        await ask(page, "a very long prompt")
        await other.get_by_role("link", name="a very long prompt").click()
        for tab in (page, other):
            await expect(tab.get_by_role("alert")).to_contain_text("too long")
        worker.script = answer_script(("content", "Hi"))
        await page.get_by_role("button", name="Try again").click()
        for tab in (page, other):
            await expect(tab.locator(".markdown")).to_have_text("Hi")


async def test_time_of_reasoning_survives_a_reload(
    browser: Browser, nats_url: str, history: None
) -> None:
    thought, answer = answer_events(("reasoning", "Hm."), ("content", "Four."))
    script = (Accepted("r1", "w1"), thought, answer, Hold())
    async with scripted(browser, nats_url, *script) as (page, _):
        await ask(page, "2 + 2?")
        summary = page.locator(".reasoning summary")
        await expect(summary).to_contain_text("Reasoned for")
        time = await summary.inner_text()
        await page.wait_for_timeout(1000)
        await page.reload()
        await expect(summary).to_have_text(time)


async def test_key_is_asked_for_and_kept_only_if_wanted(
    browser: Browser, nats_url: str, history: None
) -> None:
    async with scripted(browser, nats_url, 1.0, keys="ann:secret-of-ann") as (page, _):
        dialog = page.get_by_role("dialog", name="API key")
        await expect(dialog).to_contain_text("This server needs a key")
        await dialog.get_by_label("Key", exact=True).fill("wrong")
        await dialog.get_by_role("button", name="Use this key").click()
        await expect(dialog).to_contain_text("The server does not know the key")
        await dialog.get_by_label("Key", exact=True).fill("secret-of-ann")
        await dialog.get_by_role("button", name="Use this key").click()
        await expect(page.get_by_text("Your conversations will be here.")).to_be_visible()
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}])"
        local, _, session = (await page.evaluate(kept)).partition("},{")
        assert "secret-of-ann" not in local and "secret-of-ann" in session


async def test_prompt_outlives_the_question_for_a_key(
    browser: Browser, nats_url: str, history: None
) -> None:
    script = answer_script(("content", "Hi"))
    async with scripted(browser, nats_url, *script, keys="ann:secret-of-ann") as (page, _):
        dialog = page.get_by_role("dialog", name="API key")
        await dialog.get_by_role("button", name="Cancel").click()
        await ask(page, "a long thought")
        await dialog.get_by_label("Key", exact=True).fill("ключ")
        await dialog.get_by_role("button", name="Use this key").click()
        await expect(dialog).to_be_visible()  # no header can contain it
        await dialog.get_by_label("Key", exact=True).fill("secret-of-ann")
        await dialog.get_by_role("button", name="Use this key").click()
        await expect(page.locator(".bubble")).to_have_text("a long thought")
        await expect(page.locator(".markdown")).to_have_text("Hi")


async def test_unreachable_server_is_said_in_words(browser: Browser, nats_url: str) -> None:
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus) as http:
        async with open_page(browser, str(http.base_url)) as page:
            await page.route(re.compile(r"/sessions\?"), lambda route: route.abort())
            await page.goto("/")
            await expect(page.get_by_role("alert")).to_contain_text("can’t be reached")


async def test_model_that_loads_is_named(browser: Browser, nats_url: str, history: None) -> None:
    loading = WorkerReport("w9", "loading", 8, 0, 0, progress=0.42, name="big")
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus) as http, reporting(bus, loading):
        async with open_page(browser, str(http.base_url)) as page:
            await page.goto("/")
            await expect(page.get_by_text("Loading big: 42 %")).to_be_visible()
