"""Answers as Markdown: what is shown, that nothing in them runs, and how little renders again."""

import pytest
from playwright.async_api import Browser, Page, ViewportSize, expect

from tests.e2e.stack import Stack
from tests.page.conftest import DESKTOP, PHONE, import_session, url_of

HOSTILE = """
<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2">
<svg onload="window.hacked = 3"><a href="javascript:window.hacked = 4">svg</a></svg>
<iframe srcdoc="<script>parent.hacked = 5</script>"></iframe>
<style>body { display: none }</style>
<form action="https://evil.example/"><button>Send</button></form>
<base href="https://evil.example/"><meta http-equiv="refresh" content="0;url=https://evil.example">

[a](javascript:window.hacked=6) [b](JaVaScRiPt:window.hacked=7)
[c](data:text/html,<script>1</script>)
[d](vbscript:x) [e](&#106;avascript:window.hacked=8) <a href="javascript:window.hacked=9">f</a>

![tracker](https://evil.example/pixel.png) ![x](javascript:window.hacked=10)

```html"><script>window.hacked=11</script>
<script>window.hacked = 12</script>
```

$\\href{javascript:window.hacked=13}{x}$ $\\htmlStyle{position:fixed}{y}$
$\\includegraphics{https://evil.example}$

<b onclick="window.hacked = 14" style="position:fixed">bold</b>
<x-y id="prompt" class="send">z</x-y>
"""


async def show(page: Page, stack: Stack, *answers: str) -> None:
    """Open a session with these answers."""
    session = import_session(stack, *({"response": answer} for answer in answers))
    await page.goto(f"/#/s/{session}")
    await expect(page.locator(".answer")).to_have_count(len(answers))


async def test_nothing_in_an_answer_runs_or_loads(page: Page, stack: Stack) -> None:
    """That nothing was loaded from elsewhere is checked at the end of each test."""
    await show(page, stack, HOSTILE, "done")
    await expect(page.locator(".markdown").last).to_have_text("done")
    for name in ("a", "b", "c", "d", "e"):
        await expect(page.locator(".markdown a", has_text=name).first).not_to_have_attribute(
            "href", "javascript:"
        )
    await expect(page.locator(".markdown .katex").first).to_be_visible()
    markdown = page.locator(".markdown").first
    found = await markdown.evaluate(
        """(root) => ({
            tags: [...new Set([...root.querySelectorAll("*")].map((each) => each.localName))],
            handlers: [...root.querySelectorAll("*")].flatMap((each) =>
                [...each.attributes].map((attribute) => attribute.name).filter((name) =>
                    name.startsWith("on") || name === "id")),
            links: [...root.querySelectorAll("a")].map((link) => link.getAttribute("href")),
            hacked: window.hacked ?? null,
        })"""
    )
    assert found["hacked"] is None and found["handlers"] == []
    forbidden = {"script", "iframe", "style", "form", "base", "meta", "object", "img", "x-y"}
    assert not forbidden & set(found["tags"])
    assert [link for link in found["links"] if link and not link.startswith("http")] == []
    await expect(markdown).to_contain_text("<script>window.hacked = 1</script>")
    await expect(page.locator("#prompt")).to_have_count(1)


async def test_injected_script_is_stopped_by_the_policy(browser: Browser, stack: Stack) -> None:
    """The positive control of the test above: a script that gets past the cleaning can't run."""
    page = await browser.new_page()
    await page.goto(url_of(stack))
    refused = await page.evaluate(
        """() => {
            const script = document.createElement("script");
            try { script.textContent = "window.hacked = 1" } catch (error) { return error.name }
            document.body.append(script);
            return window.hacked ? "ran" : "blocked";
        }"""
    )
    await page.close()
    assert refused == "TypeError"  # of trusted types


async def test_links_open_elsewhere_without_a_referrer(page: Page, stack: Stack) -> None:
    await show(page, stack, "[site](https://example.com) and https://example.org")
    for link in await page.locator(".markdown a").all():
        assert await link.get_attribute("rel") == "noopener noreferrer"
        assert await link.get_attribute("target") == "_blank"
    await expect(page.locator(".markdown a")).to_have_count(2)


async def test_code_has_colours_and_is_copied(page: Page, stack: Stack) -> None:
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await show(page, stack, "Look:\n\n```python\ndef f(x):\n    return '<b>'\n```\n\n`x < 1`")
    code = page.locator(".code")
    await expect(code.locator(".hljs-keyword").first).to_have_text("def")
    await code.get_by_role("button", name="Copy python code").click()
    await expect(code.get_by_role("button")).to_have_text("Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return '<b>'"
    await expect(page.locator(".markdown p code")).to_have_text("x < 1")


async def test_tables_and_lists_are_shown(page: Page, stack: Stack) -> None:
    await show(
        page, stack, "| a | b |\n|---|--:|\n| 1 | **2** |\n\n- [x] done\n- [ ] to do\n\n1. one"
    )
    await expect(page.locator(".table td")).to_have_text(["1", "2"])
    await expect(page.locator(".markdown input[type=checkbox]")).to_have_count(2)
    await expect(page.locator(".markdown ol li")).to_have_text("one")


async def test_latex_is_shown_and_prices_are_not(page: Page, stack: Stack) -> None:
    text = (
        r"It costs $5 or $6. $x^2$ and \(y\), then"
        + "\n\n$$\n\\frac{a}{b}\n$$\n\n"
        + r"\[ \sqrt{2} \]"
    )
    await show(page, stack, text)
    await expect(page.locator(".katex")).to_have_count(4)
    await expect(page.locator(".markdown p").first).to_contain_text("It costs $5 or $6.")
    height = await page.locator(".katex .vlist").first.evaluate("each => each.style.height")
    assert height, "KaTeX's styles are used although the policy forbids them in HTML"


async def test_broken_latex_is_shown_as_it_is(page: Page, stack: Stack) -> None:
    await show(page, stack, r"$\frac{a}{$ and $\undefined$")
    await expect(page.locator(".katex-error, .katex").first).to_be_visible()


ODD = (
    "```\nnever closed",
    "| a | b |\n|---|\n| 1",
    "> > > > > deep\n" * 50,
    "*" * 3000 + "x" + "*" * 3000,
    "[" * 3000,
    "- " * 100 + "x",
    "<" * 3000,
    "$" * 3001,
    "\u202eright to left override\u202c מה שלומך? مرحبا",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \ufffd",
    "x" * 20_000,
    "|" + "head |" * 160 + "\n|" + "---|" * 160 + "\n" + ("| cell " * 160 + "|\n") * 100,
)


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_odd_markdown_neither_hangs_nor_overflows(
    page: Page, stack: Stack, viewport: ViewportSize
) -> None:
    await page.set_viewport_size(viewport)
    await show(page, stack, *ODD)
    messages = page.locator(".messages")
    width, scroll = await messages.evaluate("each => [each.clientWidth, each.scrollWidth]")
    assert scroll <= width, "only tables and code scroll sideways"
    await expect(page.locator(".markdown").nth(8)).to_contain_text("مرحبا")
    await expect(page.locator(".table td").last).to_have_text("cell")


async def test_text_from_right_to_left_is_aligned_right(page: Page, stack: Stack) -> None:
    await show(page, stack, "مرحبا بالعالم\n\nHello")
    arabic, english = [
        await paragraph.evaluate(
            """(element) => {
                const range = document.createRange();
                range.selectNodeContents(element);
                const text = range.getBoundingClientRect();
                const frame = element.getBoundingClientRect();
                return frame.right - text.right < text.left - frame.left ? "right" : "left";
            }"""
        )
        for paragraph in await page.locator(".markdown p").all()
    ]
    assert (arabic, english) == ("right", "left")


async def test_only_the_last_block_renders_again(page: Page, stack: Stack) -> None:
    """An answer that grows by a word keeps the elements of all blocks before the last one."""
    changed = await page.evaluate(
        """async () => {
            const source = document.querySelector("script[type=module]").src;
            const { MarkdownView } = await import(new URL("markdown.js", source));
            const root = document.createElement("div");
            const view = new MarkdownView(root);
            const block = "Some *words*.\\n\\n| a |\\n|---|\\n| 1 |\\n\\n- item\\n\\n";
            let text = "";
            for (let number = 0; number < 300; number++) view.update((text += block), false);
            const before = [...root.children];
            for (let number = 0; number < 100; number++) view.update((text += "word "), false);
            const kept = before.filter((element, at) => root.children[at] === element).length;
            view.update(text, true);
            return { blocks: before.length, kept, text: root.textContent.length };
        }"""
    )
    assert changed["blocks"] == 900 and changed["kept"] >= 899


async def test_long_block_leaves_time_for_scrolling(page: Page, stack: Stack) -> None:
    """A growing table of 2,000 rows takes longer than a frame, so some frames leave it out."""
    drawn = await page.evaluate(
        """async () => {
            const source = document.querySelector("script[type=module]").src;
            const { html, render } = await import(new URL("../vendor/preact.js", source));
            const { Markdown } = await import(new URL("text.js", source));
            const root = document.createElement("div");
            document.body.append(root);
            let renders = 0;
            new MutationObserver(() => renders++).observe(root, { childList: true, subtree: true });
            let text = "| a |\\n|---|\\n" + "| cell |\\n".repeat(2000);
            const show = (more) =>
                render(html`<${Markdown} text=${(text += more)} isComplete=${false} />`, root);
            for (let frame = 0; frame < 60; frame++) {
                show("| x |\\n");
                await new Promise(requestAnimationFrame);
            }
            show("| last |\\n");
            const isShown = () => root.textContent.includes("last");
            while (!isShown()) await new Promise((resolve) => setTimeout(resolve, 20));
            return { renders, rows: root.querySelectorAll("tbody tr").length };
        }"""
    )
    assert drawn["rows"] == 2061 and 1 <= drawn["renders"] <= 40
