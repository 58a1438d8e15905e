"""
Chromium, driven by Playwright, for tests of the page. All tests share one browser; each gets a
profile of its own. A page must not load anything from elsewhere, and must not log an error.
"""

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import (
    Browser,
    ConsoleMessage,
    Page,
    ViewportSize,
    async_playwright,
    expect,
)

from tests.e2e.stack import Stack, running_stack

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",  # as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
TIMEOUT_MILLISECONDS = 40_000
# what Chromium logs of a response with an error, or of a lost connection, which some tests want
EXPECTED_LOGS = ("Failed to load resource",)


def find_chromium() -> str:
    """Return the path of a Chromium. Raises RuntimeError that says what to install."""
    for name in (*NAMES, MAC):
        if path := shutil.which(name):
            return path
    raise RuntimeError(
        f"No browser was found ({', '.join(NAMES)}). On Debian: apt install chromium."
    )


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    expect.set_options(timeout=TIMEOUT_MILLISECONDS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=find_chromium(), args=ARGUMENTS, headless=True
        )
        yield browser
        await browser.close()


@asynccontextmanager
async def open_page(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    """
    Yield a page in a profile of its own, on the server `url`. At the end, it must have loaded
    nothing from elsewhere and logged no error. `options` are Playwright's, as for dark colours.
    """
    context = await browser.new_context(
        base_url=url, **{"viewport": DESKTOP, "accept_downloads": True, **options}
    )
    context.set_default_timeout(TIMEOUT_MILLISECONDS)
    logged: list[str] = []
    loaded: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(EXPECTED_LOGS):
            logged.append(message.text)

    context.on("console", on_console)
    context.on("weberror", lambda error: logged.append(str(error.error)))
    context.on("request", lambda request: loaded.append(request.url))
    try:
        yield await context.new_page()
        assert logged == []
        assert [each for each in loaded if not each.startswith((url, "data:", "blob:"))] == []
        assert loaded, "requests are seen"
    finally:
        await context.close()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """
    All services with the demo model, which takes 30 ms for a token. Shared: every test leaves all
    parts running.
    """
    with running_stack(tmp_path_factory.mktemp("page"), slow=True) as stack:
        yield stack


def url_of(stack: Stack) -> str:
    return str(stack.http.base_url).rstrip("/")


@pytest.fixture
async def page(browser: Browser, stack: Stack) -> AsyncIterator[Page]:
    """A new chat on the stack."""
    async with open_page(browser, url_of(stack)) as page:
        await page.goto("/")
        yield page


async def ask(page: Page, prompt: str) -> None:
    """Send a prompt, without waiting for the answer."""
    await page.get_by_label("Message", exact=True).fill(prompt)
    await page.keyboard.press("Enter")


async def until_answered(page: Page, count: int = 1) -> None:
    """Wait until no answer runs, and this number of answers is shown."""
    await page.locator(".live").wait_for(state="detached")
    await page.locator(".answer .actions").nth(count - 1).wait_for()


def session_of(page: Page) -> str:
    """Return the id of the open session."""
    return page.url.partition("#/s/")[2]


def import_session(stack: Stack, *exchanges: dict[str, Any]) -> str:
    """Store exchanges as a session of their own; return its id."""
    session = uuid4().hex
    lines = "\n".join(json.dumps({"prompt": "hi"} | each) for each in exchanges)
    stack.http.post(f"/sessions/{session}/messages", content=lines).raise_for_status()
    return session
