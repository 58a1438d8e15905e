# /// script
# dependencies = ["llm==0.36"]
# ///
"""The `llm` command line, with a model in its `extra-openai-models.yaml`."""

import os
import subprocess
import tempfile
from pathlib import Path

from harness import KEY, MODEL, URL, run

folder = Path(tempfile.mkdtemp())
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: mine\n  model_name: {MODEL}\n  api_base: {URL}/v1\n  api_key_name: mine\n"
    "  supports_tools: true\n  supports_schema: true\n"
)


def llm(*arguments: str) -> str:
    environment = os.environ | {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": KEY}
    command = ["llm", "-m", "mine", "--key", KEY, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def chat() -> None:
    assert llm("hello") == "Hello, Ada."


def without_stream() -> None:
    assert llm("--no-stream", "hello") == "Hello, Ada."


def structured_output() -> None:
    assert llm("--schema", "name, age int", "hello") == '{"name": "Ada", "age": 36}'


def continued() -> None:
    assert llm("-c", "hello") == "Hello, Ada."


run(chat, without_stream, structured_output, continued)
