"""Sessions, and the versions and branches of an answer, on all services with the demo model."""

import json
from pathlib import Path

from playwright.async_api import Browser, Page, expect

from tests.e2e.stack import Stack
from tests.page.conftest import (
    ask,
    import_session,
    open_page,
    session_of,
    until_answered,
    url_of,
)
from tests.page.proxy import proxy_of

TWO = (
    {"prompt": "my name is Ada", "response": "Nice to meet you, Ada!"},
    {"prompt": "hi", "response": "Hi!"},
)


async def open_session(page: Page, session: str) -> None:
    await page.goto(f"/#/s/{session}")
    await page.locator(".answer").first.wait_for()


async def choose_in_menu(page: Page, item: str) -> None:
    await page.get_by_role("button", name="More for this conversation").click()
    await page.get_by_role("menuitem", name=item).click()


async def test_session_is_renamed_searched_and_deleted(page: Page, stack: Stack) -> None:
    session = import_session(stack, *TWO)
    await open_session(page, session)
    await choose_in_menu(page, "Rename")
    title = f"Holidays {session}"
    await page.get_by_label("Title").fill(title)
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_role("heading", name=title)).to_be_visible()
    await page.keyboard.press("Control+k")
    await page.keyboard.type(f"holidays {session}".upper())
    await expect(page.locator(".session")).to_have_count(1)
    await choose_in_menu(page, "Delete")
    await page.get_by_role("button", name="Delete", exact=True).click()
    await expect(page.get_by_text("No title contains this.")).to_be_visible()
    assert stack.messages(session) == []


async def test_export_is_imported_as_a_new_session(
    page: Page, stack: Stack, tmp_path: Path
) -> None:
    session = import_session(stack, *TWO)
    await open_session(page, session)
    async with page.expect_download() as download:
        await choose_in_menu(page, "Export")
    file = tmp_path / "Talk with Ada.jsonl"
    await (await download.value).save_as(file)
    assert [json.loads(line)["response"] for line in file.read_text().splitlines()] == [
        "Nice to meet you, Ada!",
        "Hi!",
    ]
    await page.locator("#import").set_input_files(file)
    await expect(page.get_by_role("heading", name="Talk with Ada")).to_be_visible()
    await expect(page.locator(".answer .markdown")).to_have_text(["Nice to meet you, Ada!", "Hi!"])
    assert session_of(page) != session


async def test_file_that_is_no_export_is_refused_in_words(
    page: Page, stack: Stack, tmp_path: Path
) -> None:
    file = tmp_path / "photo.jsonl"
    file.write_bytes(b"\x89PNG\r\n\x1a\n")
    await page.locator("#import").set_input_files(file)
    await expect(page.get_by_role("alert")).to_contain_text("Line 1")


async def test_retry_keeps_both_versions(page: Page, stack: Stack) -> None:
    await open_session(page, import_session(stack, *TWO))
    await page.get_by_role("button", name="Try again").click()
    await until_answered(page, 2)
    await expect(page.get_by_label("Version 2 of 2")).to_be_visible()
    await page.get_by_role("button", name="Earlier version").click()
    last = page.locator(".turn").last.locator(".markdown")
    await expect(last).to_have_text("Hi!")
    await page.get_by_role("button", name="Go on with this one").click()
    await expect(page.get_by_label("Version 3 of 3")).to_be_visible()
    await expect(last).to_have_text("Hi!")
    kept = [each for each in stack.messages(session_of(page)) if not each["retried"]]
    assert [each["model_response"] for each in kept] == ["Nice to meet you, Ada!", "Hi!"]


async def test_edit_of_the_last_prompt_replaces_it(page: Page, stack: Stack) -> None:
    await open_session(page, import_session(stack, *TWO))
    await page.get_by_label("Message", exact=True).focus()
    await page.keyboard.press("ArrowUp")
    await page.get_by_label("Prompt", exact=True).fill("what is my name?")
    await page.keyboard.press("Enter")
    await expect(page.locator(".bubble")).to_have_text(["my name is Ada", "what is my name?"])
    await until_answered(page, 2)
    kept = [each for each in stack.messages(session_of(page)) if not each["retried"]]
    assert [each["user_prompt"] for each in kept] == ["my name is Ada", "what is my name?"]


async def test_edit_of_an_earlier_prompt_makes_a_branch(page: Page, stack: Stack) -> None:
    session = import_session(stack, *TWO, {"prompt": "bye", "response": "Bye."})
    await open_session(page, session)
    await page.locator(".turn").nth(1).hover()
    await page.get_by_role("button", name="Edit prompt").nth(1).click()
    await page.get_by_label("Prompt", exact=True).fill("what is my name?")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="(branch)")).to_be_visible()
    await until_answered(page, 2)
    await expect(page.locator(".bubble")).to_have_text(["my name is Ada", "what is my name?"])
    await expect(page.locator(".markdown").last).to_contain_text("Ada")
    assert session_of(page) != session and len(stack.messages(session)) == 3


async def test_branch_copies_the_conversation_up_to_there(page: Page, stack: Stack) -> None:
    session = import_session(stack, *TWO)
    stack.http.patch(f"/sessions/{session}", json={"system_prompt": "Be brief."})
    await open_session(page, session)
    await page.locator(".turn").first.hover()
    await page.get_by_role("button", name="Branch from here").first.click()
    await expect(page.get_by_role("heading", name="(branch)")).to_be_visible()
    await expect(page.locator(".markdown")).to_have_text(["Nice to meet you, Ada!"])
    await expect(page.get_by_text("own system prompt")).to_be_visible()


async def test_stopped_answer_is_continued(page: Page, stack: Stack) -> None:
    await ask(page, "count to 30")
    await expect(page.locator(".live .markdown")).to_contain_text("4, 5")
    await page.keyboard.press("Escape")
    await expect(page.get_by_text("The answer was stopped.")).to_be_visible()
    begin = await page.locator(".markdown").inner_text()
    await page.get_by_role("button", name="Continue").click()
    await until_answered(page)
    await expect(page.get_by_label("Version 2 of 2")).to_be_visible()
    whole = await page.locator(".markdown").inner_text()
    assert whole.startswith(begin) and len(whole) > len(begin)
    assert stack.messages(session_of(page))[-1]["model_response"] == whole


async def test_two_models_answer_side_by_side(page: Page, stack: Stack) -> None:
    await page.get_by_label("Model", exact=True).select_option("demo")
    await page.get_by_role("button", name="Compare two models").click()
    await page.get_by_label("Second model").select_option("demo:pirate")
    await ask(page, "my name is Ada")
    await expect(page.locator(".column .facts")).to_have_count(2)
    columns = page.locator(".column h3")
    await expect(columns).to_have_text(["demo", "demo:pirate"])
    first = await page.locator(".column .markdown").first.inner_text()
    await page.get_by_role("button", name="This one is better").first.click()
    await expect(page.locator(".column .markdown").last).to_have_text(first)
    (kept,) = [each for each in stack.messages(session_of(page)) if not each["retried"]]
    assert (kept["model_response"], kept["model"]) == (first, "demo")


async def test_system_prompt_and_sampling_belong_to_the_session(page: Page, stack: Stack) -> None:
    await page.get_by_role("button", name="System prompt and sampling").click()
    await page.get_by_label("A system prompt of its own").check()
    await page.get_by_label("System prompt", exact=True).fill("You are brief.")
    await page.get_by_label("Longest answer").fill("7")
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_role("dialog")).to_have_count(0)
    await ask(page, "count to 30")
    await expect(page.get_by_text("reached the limit of its length")).to_be_visible()
    session = session_of(page)
    described = {each["id"]: each for each in stack.http.get("/sessions").json()["sessions"]}
    assert described[session]["system_prompt"] == "You are brief."
    assert stack.messages(session)[0]["usage"]["completion_tokens"] == 7


async def test_draft_survives_a_reload(page: Page, stack: Stack) -> None:
    await open_session(page, import_session(stack, *TWO))
    await page.get_by_label("Message", exact=True).fill("half a thou")
    await page.reload()
    await expect(page.get_by_label("Message", exact=True)).to_have_value("half a thou")
    await page.get_by_role("button", name="New chat").click()
    await expect(page.get_by_label("Message", exact=True)).to_have_value("")
    await page.get_by_label("Message", exact=True).fill("another thou")
    await page.reload()
    await expect(page.get_by_label("Message", exact=True)).to_have_value("another thou")


async def test_second_device_sees_the_session(page: Page, browser: Browser, stack: Stack) -> None:
    await ask(page, "my name is Ada")
    await until_answered(page)
    async with open_page(browser, url_of(stack)) as other:
        await other.goto(page.url.replace(url_of(stack), ""))
        await until_answered(other)
        await ask(other, "what is my name?")
        await until_answered(other, 2)
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.locator(".bubble")).to_have_text(["my name is Ada", "what is my name?"])


async def test_long_session_shows_earlier_messages(page: Page, stack: Stack) -> None:
    many = ({"prompt": f"p{n}", "response": f"r{n}"} for n in range(45))
    await open_session(page, import_session(stack, *many))
    await expect(page.locator(".bubble")).to_have_count(40)
    await page.get_by_role("button", name="Show earlier messages").click()
    await expect(page.locator(".bubble")).to_have_count(45)
    await expect(page.locator(".bubble").first).to_have_text("p0")


async def test_old_session_is_found_by_search_and_by_address(page: Page, stack: Stack) -> None:
    """The list has the last 50 sessions; the rest is loaded when it is needed."""
    oldest = import_session(stack, {"prompt": "the oldest of many", "response": "r"})
    for _ in range(51):
        import_session(stack, {"response": "r"})
    await page.reload()
    await expect(page.locator(".session")).to_have_count(50)
    await page.get_by_label("Search conversations").fill("oldest of many")
    await expect(page.locator(".session")).to_have_text(["the oldest of many"])
    await page.reload()
    await open_session(page, oldest)
    await expect(page.get_by_role("heading", name="the oldest of many")).to_be_visible()


async def test_another_tab_follows_the_answer(page: Page, stack: Stack) -> None:
    await open_session(page, import_session(stack, *TWO))
    other = await page.context.new_page()
    await other.goto(page.url)
    await until_answered(other, 2)
    await ask(page, "count to 30")
    await expect(other.locator(".live .markdown")).to_contain_text("4, 5")
    for tab in (page, other):
        await until_answered(tab, 3)
    texts = [await tab.locator(".markdown").last.inner_text() for tab in (page, other)]
    stored = stack.messages(session_of(page))
    assert texts == [stored[-1]["model_response"]] * 2 and len(stored) == 3


async def test_end_of_an_answer_takes_no_focus(page: Page, stack: Stack) -> None:
    await ask(page, "count to 30")
    await expect(page.locator(".live .markdown")).to_contain_text("3, 4")
    search = page.get_by_label("Search conversations")
    await search.fill("hol")
    await until_answered(page)
    await expect(search).to_be_focused()


async def test_earlier_messages_asked_for_twice_come_once(page: Page, stack: Stack) -> None:
    many = ({"prompt": f"p{n}", "response": f"r{n}"} for n in range(45))
    await open_session(page, import_session(stack, *many))
    await expect(page.locator(".bubble")).to_have_count(40)
    button = page.get_by_role("button", name="Show earlier messages")
    await button.evaluate("each => { each.click(); each.click(); }")
    await expect(page.locator(".bubble").first).to_have_text("p0")
    await expect(page.locator(".bubble")).to_have_count(45)


async def test_session_deleted_in_mid_answer_is_gone(page: Page, stack: Stack) -> None:
    await open_session(page, import_session(stack, *TWO))
    session = session_of(page)
    await ask(page, "count to 30")
    await expect(page.locator(".live .markdown")).to_contain_text("3, 4")
    async with page.expect_event("requestfailed") as aborted:
        await choose_in_menu(page, "Delete")
        await page.get_by_role("button", name="Delete", exact=True).click()
    assert "/chat" in (await aborted.value).url, "nothing follows the answer"
    await expect(page.get_by_role("heading", name="New chat")).to_be_visible()
    kept = await page.evaluate("JSON.stringify(localStorage)")
    assert session not in kept and stack.messages(session) == []


async def test_session_deleted_elsewhere_is_said_to_be(page: Page, stack: Stack) -> None:
    session = import_session(stack, *TWO)
    await open_session(page, session)
    stack.http.delete(f"/sessions/{session}").raise_for_status()
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.get_by_text("This conversation was deleted elsewhere.")).to_be_visible()
    await expect(page.locator(".bubble")).to_have_count(0)


async def test_comparison_survives_a_reload(page: Page, stack: Stack) -> None:
    await page.get_by_label("Model", exact=True).select_option("demo")
    await page.get_by_role("button", name="Compare two models").click()
    await page.get_by_label("Second model").select_option("demo:pirate")
    await ask(page, "count to 30")
    await expect(page.locator(".column .live .markdown")).to_contain_text("3, 4")
    await page.reload()
    await expect(page.locator(".column .facts")).to_have_count(2)
    await expect(page.locator(".column h3")).to_have_text(["demo", "demo:pirate"])


async def test_second_device_has_the_settings(page: Page, browser: Browser, stack: Stack) -> None:
    await page.get_by_label("Model", exact=True).select_option("demo:pirate")
    await page.get_by_role("button", name="System prompt and sampling").click()
    await page.get_by_label("Longest answer").fill("7")
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_role("dialog")).to_have_count(0)
    await ask(page, "count to 30")
    await until_answered(page)
    async with open_page(browser, url_of(stack)) as other:
        await other.goto(page.url.replace(url_of(stack), ""))
        await until_answered(other)
        await expect(other.locator(".facts")).to_contain_text("tokens/s")
        await expect(other.get_by_label("Model", exact=True)).to_have_value("demo:pirate")
        await other.get_by_label("Model", exact=True).select_option("demo")
        await other.get_by_role("button", name="System prompt and sampling").click()
        await expect(other.get_by_label("Longest answer")).to_have_value("7")
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.get_by_label("Model", exact=True)).to_have_value("demo")


async def test_system_prompt_alone_makes_a_session(page: Page, stack: Stack) -> None:
    """It has no title before its first prompt, and the next new chat is another one."""
    await page.get_by_role("button", name="System prompt and sampling").click()
    await page.get_by_label("A system prompt of its own").check()
    await page.get_by_label("System prompt", exact=True).fill("You are brief.")
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_text("own system prompt")).to_be_visible()
    await expect(page.get_by_role("heading", name="New chat")).to_be_visible()
    await expect(page.locator(".session").first).to_have_text("New chat")
    session = session_of(page)
    await page.get_by_role("button", name="New chat", exact=True).click()
    await expect(page.get_by_text("own system prompt")).to_have_count(0)
    await page.goto(f"/#/s/{session}")
    await ask(page, "count to 30")
    await expect(page.get_by_role("heading", name="count to 30")).to_be_visible()


async def test_model_is_chosen_without_a_connection(browser: Browser, stack: Stack) -> None:
    """The browser keeps it until the server can be reached."""
    session = import_session(stack, *TWO)
    async with proxy_of(stack.edge.port) as proxy, open_page(browser, proxy.url) as page:
        await open_session(page, session)
        await page.wait_for_load_state("networkidle")  # else a request of the start is cut, too
        proxy.cut()
        model = page.get_by_label("Model", exact=True)
        await model.select_option("demo:pirate")
        await ask(page, "my name is Ada")
        await expect(page.locator(".waiting")).to_contain_text("Reconnecting")
        await expect(page.get_by_role("alert")).to_have_count(0)
        proxy.mend()
        await until_answered(page, 3)
        await expect(page.locator(".facts").last).to_contain_text("demo:pirate")
        (listed,) = [
            each for each in stack.http.get("/sessions").json()["sessions"] if each["id"] == session
        ]
        assert json.loads(listed["metadata"]["chat_page"]) == {"model": "demo:pirate"}


async def test_stop_without_a_connection_gives_the_prompt_back(
    browser: Browser, stack: Stack
) -> None:
    async with proxy_of(stack.edge.port) as proxy, open_page(browser, proxy.url) as page:
        await page.goto("/")
        await expect(page.locator(".session").first).to_be_visible()
        proxy.cut()
        await ask(page, "my name is Ada")
        await expect(page.locator(".waiting")).to_contain_text("Reconnecting")
        await page.get_by_role("button", name="Stop").click()
        await expect(page.get_by_label("Message", exact=True)).to_have_value("my name is Ada")
        await expect(page.get_by_role("alert")).to_have_count(0)
