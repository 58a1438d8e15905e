"""What people do in a conversation, on all services with the demo model."""

import asyncio
import signal

from playwright.async_api import Browser, Page, Route, expect

from tests.deploy.test_proxy import proxy_errors
from tests.e2e.stack import Stack
from tests.page.conftest import ask, open_page, session_of, until_answered
from tests.page.proxy import proxy_of

LONG_PROMPT = "count to 30"


async def count_aloud(page: Page) -> str:
    """Ask for a long answer and wait for its begin. Return the text that is there."""
    await ask(page, LONG_PROMPT)
    live = page.locator(".live .markdown")
    await expect(live).to_contain_text("3, 4")
    return await live.inner_text()


async def test_answer_streams_and_the_session_is_remembered(page: Page, stack: Stack) -> None:
    await ask(page, "my name is Ada")
    await until_answered(page)
    await ask(page, "what is my name?")
    await until_answered(page, 2)
    await expect(page.locator(".answer .markdown").last).to_contain_text("Ada")
    await expect(page.locator(".facts").last).to_contain_text("tokens/s")
    used = page.get_by_label("tokens of the context are used")
    await expect(used).to_be_visible()
    stored = stack.messages(session_of(page))
    assert [each["user_prompt"] for each in stored] == ["my name is Ada", "what is my name?"]


async def test_reload_in_mid_answer_loses_no_character(page: Page, stack: Stack) -> None:
    seen = await count_aloud(page)
    await page.reload()
    await until_answered(page)
    text = await page.locator(".answer .markdown").inner_text()
    (stored,) = stack.messages(session_of(page))
    assert text.startswith(seen) and text == stored["model_response"]
    assert stored["finish_reason"] == "stop"


async def test_lost_connection_in_mid_answer_loses_no_character(
    browser: Browser, stack: Stack
) -> None:
    async with proxy_of(stack.edge.port) as proxy, open_page(browser, proxy.url) as page:
        await page.goto("/")
        await count_aloud(page)
        proxy.cut()
        await expect(page.locator(".waiting")).to_contain_text("Reconnecting")
        proxy.mend()
        await until_answered(page)
        (stored,) = stack.messages(session_of(page))
        assert await page.locator(".answer .markdown").inner_text() == stored["model_response"]
        assert stored["finish_reason"] == "stop"


async def test_errors_of_the_proxy_are_tried_again(page: Page, stack: Stack) -> None:
    """They are those of deploy/compose/haproxy.cfg, while an edge is replaced."""
    errors = iter([(502, proxy_errors()[502]), (503, proxy_errors()[503])])

    async def fail_twice(route: Route) -> None:
        status, body = next(errors, (200, None))
        if body:
            await route.fulfill(status=status, json=body)
        else:
            await route.continue_()

    await page.route("**/chat?*", fail_twice)
    await ask(page, "my name is Ada")
    await until_answered(page)
    assert next(errors, None) is None
    assert len(stack.messages(session_of(page))) == 1


async def test_connection_lost_at_the_end_is_no_error(browser: Browser, stack: Stack) -> None:
    """The answer is complete, but the page can't load what the server has stored."""
    async with proxy_of(stack.edge.port) as proxy, open_page(browser, proxy.url) as page:
        await page.goto("/")
        await page.route("**/messages*", lambda route: route.abort())
        await ask(page, "my name is Ada")
        await expect(page.locator(".live .markdown")).to_contain_text("Ada")
        await page.unroute("**/messages*")
        await until_answered(page)
        await expect(page.get_by_role("alert")).to_have_count(0)


async def test_killed_worker_in_mid_answer_loses_no_character(page: Page, stack: Stack) -> None:
    await count_aloud(page)
    stack.inference.stop(signal.SIGKILL)
    stack.inference.start()
    await until_answered(page)
    (stored,) = stack.messages(session_of(page))
    assert await page.locator(".answer .markdown").inner_text() == stored["model_response"]
    assert stored["model_response"].count("30") == 1


async def test_restarted_edge_in_mid_answer_loses_no_character(page: Page, stack: Stack) -> None:
    await count_aloud(page)
    stack.edge.stop(signal.SIGKILL)
    stack.edge.start()
    await until_answered(page)
    (stored,) = stack.messages(session_of(page))
    assert await page.locator(".answer .markdown").inner_text() == stored["model_response"]


async def test_answer_that_ended_before_a_reload_is_shown_once(page: Page, stack: Stack) -> None:
    """The page was closed after the end, before it had seen what was stored."""
    await ask(page, "my name is Ada")
    name = await page.evaluate("Object.keys(localStorage).find((key) => key.includes('running'))")
    record = await page.evaluate("(key) => localStorage.getItem(key)", name)
    await until_answered(page)
    await page.evaluate("([key, value]) => localStorage.setItem(key, value)", [name, record])
    await page.reload()
    await until_answered(page)
    gone = "(key) => localStorage.getItem(key) === null"
    await page.wait_for_function(gone, arg=name)
    await expect(page.locator(".bubble")).to_have_count(1)
    assert len(stack.messages(session_of(page))) == 1


async def test_slow_tab_leaves_the_next_answer_alone(page: Page, stack: Stack) -> None:
    """Another tab sees the end of an answer while the next one runs, which a reload must find."""
    await ask(page, "my name is Ada")
    await until_answered(page)
    other = await page.context.new_page()
    await other.goto(page.url)
    await until_answered(other)
    release = asyncio.Event()

    async def delay(route: Route) -> None:
        await release.wait()
        await route.continue_()

    await other.route("**/messages?*", delay)
    await ask(page, "my name is Bob")
    await until_answered(page, 2)
    await ask(page, LONG_PROMPT)
    await expect(page.locator(".live .markdown")).to_contain_text("3, 4")
    async with other.expect_response("**/messages?*"):
        release.set()
    await other.close()
    await page.reload()
    await expect(page.locator(".live .markdown")).to_contain_text("4, 5")
    await until_answered(page, 3)
