"""What people think of an answer, on all services with the demo model."""

from typing import Any

from playwright.async_api import Page, expect

from tests.e2e.stack import Stack
from tests.page.conftest import ask, import_session, until_answered

ONE = {"prompt": "capital of Italy?", "response": "Milan."}


async def open_session(page: Page, session: str) -> None:
    await page.goto(f"/#/s/{session}")
    await page.locator(".answer").first.wait_for()


def feedback(stack: Stack, session: str) -> list[dict[str, Any] | None]:
    """Return the feedback on each answer that has some, without its time."""
    given = [each["feedback"] for each in stack.messages(session)]
    return [{k: v for k, v in each.items() if k != "given_at"} if each else None for each in given]


async def test_answer_is_rated_and_the_rating_withdrawn(page: Page, stack: Stack) -> None:
    session = import_session(stack, ONE)
    await open_session(page, session)
    good = page.get_by_role("button", name="Good answer")
    await good.click()
    await expect(good).to_have_attribute("aria-pressed", "true")
    assert feedback(stack, session) == [{"rating": "up"}]
    await good.click()
    await expect(good).to_have_attribute("aria-pressed", "false")
    assert feedback(stack, session) == [None]


async def test_bad_answer_has_a_reason_and_is_corrected(page: Page, stack: Stack) -> None:
    session = import_session(stack, ONE)
    await open_session(page, session)
    await page.get_by_role("button", name="Bad answer").click()
    await page.get_by_label("What is wrong with it?").fill("wrong city")
    await page.get_by_label("Write what it should have said").check()
    await page.get_by_label("Corrected answer").fill("Rome.")
    await page.get_by_role("button", name="Save").click()
    await expect(page.locator(".answer > .markdown")).to_have_text("Rome.")
    await page.locator(".original summary").click()
    await expect(page.locator(".original .markdown")).to_have_text("Milan.")
    given = {"rating": "down", "reason": "wrong city", "correction": "Rome."}
    assert feedback(stack, session) == [given]
    await page.reload()
    await expect(page.locator(".answer > .markdown")).to_have_text("Rome.")


async def test_better_of_two_answers_is_chosen(page: Page, stack: Stack) -> None:
    await page.get_by_label("Model", exact=True).select_option("demo")
    await page.get_by_role("button", name="Compare two models").click()
    await page.get_by_label("Second model").select_option("demo:pirate")
    await ask(page, "my name is Ada")
    await expect(page.locator(".column .facts")).to_have_count(2)
    session = page.url.partition("#/s/")[2]
    first, second = stack.messages(session)
    await page.get_by_role("button", name="This one is better").last.click()
    await expect(page.get_by_role("button", name="Chosen")).to_be_visible()
    assert feedback(stack, session) == [None, {"preferred_to": first["id"]}]
    assert not stack.messages(session)[1]["retried"] and second["model"] == "demo:pirate"
    await page.get_by_role("button", name="Show one answer").click()
    await until_answered(page)
