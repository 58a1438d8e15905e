"""Accessibility, the keyboard, the size of the first view, and installing the page."""

import json
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Page, Response, expect

from deploy.vendor import TESTS
from tests.e2e.stack import Stack
from tests.page.conftest import PHONE, ask, import_session, open_page, until_answered, url_of

MAX_SCRIPT_BYTES = 150_000
RICH = """# Title

A [link](https://example.com), `code`, $x^2$, and a table:

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x): return [x, "text", 12]  # comment
```

- [ ] to do
"""
AXE = (TESTS / "axe.js").read_text()


async def findings(page: Page) -> list[str]:
    """Return what axe-core finds serious or critical, with where it is."""
    await page.evaluate(AXE)
    found = await page.evaluate(
        """async () => {
            const { violations } = await axe.run();
            return violations
                .filter(({ impact }) => ["serious", "critical"].includes(impact))
                .flatMap(({ id, nodes }) => nodes.map(({ target, failureSummary }) =>
                    `${id} ${target}: ${failureSummary}`));
        }"""
    )
    return list(found)


@pytest.fixture(params=["light", "dark"])
async def themed(
    request: pytest.FixtureRequest, browser: Browser, stack: Stack
) -> AsyncIterator[Page]:
    """A page in one of the two appearances, without animations."""
    options = {"color_scheme": request.param, "reduced_motion": "reduce", "bypass_csp": True}
    async with open_page(browser, url_of(stack), **options) as page:
        yield page


async def test_axe_finds_nothing_serious(themed: Page, stack: Stack) -> None:
    page = themed
    exchange = {"response": RICH, "reasoning": "Hm.", "finish_reason": "length"}
    session = import_session(stack, exchange, exchange)
    await page.goto("/")
    await expect(page.locator(".session").first).to_be_visible()
    assert await findings(page) == [], "a new chat"
    await page.goto(f"/#/s/{session}")
    await expect(page.locator(".hljs-keyword").first).to_be_visible()
    await page.locator(".reasoning summary").first.click()
    assert await findings(page) == [], "a conversation"
    await page.get_by_role("button", name="More for this conversation").click()
    assert await findings(page) == [], "a menu"
    await page.keyboard.press("Escape")
    for button in ("System prompt and sampling", "Appearance and key", "Keyboard shortcuts"):
        await page.get_by_role("button", name=button).click()
        assert await findings(page) == [], button
        await page.keyboard.press("Escape")


async def test_axe_finds_what_is_wrong(themed: Page) -> None:
    """The positive control of the test above."""
    await themed.goto("/")
    await themed.locator("#prompt").evaluate(
        "each => { each.removeAttribute('aria-label'); each.removeAttribute('placeholder') }"
    )
    assert any(finding.startswith("label #prompt") for finding in await findings(themed))


async def test_first_view_is_small(browser: Browser, stack: Stack) -> None:
    responses: list[Response] = []
    async with open_page(browser, url_of(stack)) as page:
        page.on("response", lambda response: responses.append(response))
        await page.goto("/")
        await expect(page.locator("#prompt")).to_be_visible()
        await expect(page.locator(".sessions")).not_to_have_attribute("aria-busy", "true")
        sizes = {
            each.url: (await each.request.sizes())["responseBodySize"]
            for each in responses
            if each.url.endswith(".js")
        }
        listed = await page.locator("link[rel=modulepreload]").evaluate_all(
            "links => links.map((link) => link.href)"
        )
    assert len(sizes) > 10 and 20_000 < sum(sizes.values()) < MAX_SCRIPT_BYTES
    # so that the browser need not read one module to learn of the next
    assert {*listed} == {url for url in sizes if not url.endswith("/main.js")}
    late = ("highlight.js", "katex.js", "uplot.js", "fleet/view.js")
    assert [url for url in sizes if url.endswith(late)] == []


async def test_keyboard_is_enough(page: Page) -> None:
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await page.keyboard.type("my name is")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("Ada")
    await page.keyboard.press("Enter")
    await until_answered(page)
    await expect(page.locator(".bubble")).to_have_text("my name is\nAda")
    await page.keyboard.press("Control+Shift+o")
    await expect(page.get_by_role("heading", name="New chat")).to_be_visible()
    await page.keyboard.press("Control+k")
    await expect(page.get_by_label("Search conversations")).to_be_focused()
    toggle = page.get_by_role("button", name="Show or hide conversations")
    await expect(toggle).to_have_attribute("aria-expanded", "true")
    await page.keyboard.press("Control+b")
    await expect(page.get_by_role("navigation")).to_be_hidden()
    await expect(toggle).to_have_attribute("aria-expanded", "false")
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await page.locator(".messages").focus()
    await page.keyboard.press("/")
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await page.locator(".messages").focus()
    await page.keyboard.press("?")
    await expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)


async def test_screen_reader_hears_begin_and_end_only(page: Page) -> None:
    """Tokens that stream are no news: the live region says that the answer is there."""
    await page.evaluate(
        """() => {
            window.said = [];
            const region = document.querySelector("[aria-live]");
            new MutationObserver(() => window.said.push(region.textContent))
                .observe(region, { childList: true, characterData: true, subtree: true });
        }"""
    )
    await ask(page, "count to 30")
    await until_answered(page)
    said = await page.evaluate("window.said")
    assert said == ["Waiting for the answer.", "The answer is complete."]
    assert await page.locator("[aria-live]").count() == 1


async def test_page_can_be_installed(page: Page) -> None:
    cdp = await page.context.new_cdp_session(page)
    manifest = await cdp.send("Page.getAppManifest")
    assert manifest["errors"] == []
    errors = await cdp.send("Page.getInstallabilityErrors")
    assert [
        each for each in errors["installabilityErrors"] if "in-incognito" not in each["errorId"]
    ] == []
    assert json.loads(manifest["data"])["display"] == "standalone"


async def test_phone_has_the_list_in_a_drawer(browser: Browser, stack: Stack) -> None:
    session = import_session(stack, {"response": RICH})
    options = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    async with open_page(browser, url_of(stack), **options) as page:
        await page.goto(f"/#/s/{session}")
        await expect(page.locator(".answer")).to_be_visible()
        await expect(page.get_by_role("navigation")).to_be_hidden()
        await page.get_by_role("button", name="Show or hide conversations").tap()
        await page.get_by_role("button", name="New chat").tap()
        await expect(page.get_by_role("navigation")).to_be_hidden()
        await expect(page.get_by_role("heading", name="New chat")).to_be_visible()
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"]


async def test_appearance_is_chosen_and_kept(page: Page) -> None:
    async def background() -> str:
        return str(await page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = await background()
    await page.get_by_role("button", name="Appearance and key").click()
    await page.get_by_label("Dark").check()
    dark = await background()
    await page.reload()
    assert await background() == dark != light
