# /// script
# dependencies = ["instructor==1.17.0"]
# ///
"""Instructor, in its modes for OpenAI-compatible servers."""

import instructor
from harness import KEY, MODEL, URL, run
from openai import OpenAI
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "hello"}]


class Person(BaseModel):
    name: str
    age: int


def ask(mode: instructor.Mode) -> None:
    openai = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
    client = instructor.from_openai(openai, mode=mode)
    got = client.create(model=MODEL, response_model=Person, messages=HELLO)
    assert (got.name, got.age) == ("Ada", 36)


def json_schema() -> None:
    ask(instructor.Mode.JSON_SCHEMA)


def tools() -> None:
    ask(instructor.Mode.TOOLS)


def json_mode() -> None:
    ask(instructor.Mode.JSON)


run(json_schema, tools, json_mode)
