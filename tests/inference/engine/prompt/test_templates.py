"""The templates of MODEL_CHAT_TEMPLATE match the formats of their model families."""

from pathlib import Path

import pytest

from services.contract.messages import Turn
from services.inference.engine.prompt import templates
from services.inference.engine.prompt.chat_template import ChatTemplate
from tests.inference.fake_backend import FakeBackend
from tests.inference.vocabulary import LLAMA_CPP

OWN_TEMPLATES = {  # shipped with llama.cpp
    "gemma": "google-gemma-2-2b-it",
    "phi3": "microsoft-Phi-3.5-mini-instruct",
}
TURNS = (Turn("1", "first", "one"),)
EXPECTED = {
    "chatml": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nfirst<|im_end|>\n"
    "<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nbe kind\n\nfirst<end_of_turn>\n<start_of_turn>model\n"
    "one<end_of_turn>\n<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nfirst [/INST] one </s><s>[INST] hi [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nfirst<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\none<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] be kind\n\nfirst[/INST] one</s>[INST] hi[/INST]",
    "phi3": "<|system|>\nbe kind<|end|>\n<|user|>\nfirst<|end|>\n<|assistant|>\none<|end|>\n"
    "<|user|>\nhi<|end|>\n<|assistant|>\n",
    "vicuna": "<s>be kind\n\nUSER: first\nASSISTANT: one</s>\nUSER: hi\nASSISTANT:",
    "zephyr": "<|system|>\nbe kind</s>\n<|user|>\nfirst</s>\n<|assistant|>\none</s>\n"
    "<|user|>\nhi</s>\n<|assistant|>\n",
}


def render(source: str, system: str) -> str:
    template = ChatTemplate(source, FakeBackend({}), bos="<s>", eos="</s>", adds_bos=False)
    return bytes(template.session_prompt(system, TURNS, "hi", 10).tokens).decode()


@pytest.mark.parametrize("name", templates.NAMES.split(", "))
def test_named_template_has_the_format_of_its_family(name: str) -> None:
    assert render(templates.read(name), "be kind") == EXPECTED[name]


@pytest.mark.parametrize("name", ["gemma", "phi3"])
def test_named_template_equals_the_model_s_own(name: str) -> None:
    own = (LLAMA_CPP / f"models/templates/{OWN_TEMPLATES[name]}.jinja").read_text()
    for system in ("", "be kind"):
        assert render(templates.read(name), system) == render(own, system)


def test_template_file_is_read_and_a_missing_one_fails(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert templates.read(str(tmp_path / "mine.jinja")) == "{{ messages }}"
    with pytest.raises(OSError):
        templates.read("chatmll")
