"""Datasets in the packages that train on them. Only where the group `training` is installed."""

import string
from pathlib import Path
from typing import Any

import pytest

from services.contract.codec import encode
from services.contract.conversation import Function, FunctionCall, Tool, ToolCall, ToolResult
from services.contract.history import Exchange, Feedback
from services.edge.datasets import (
    AnswerFilter,
    Conversation,
    Origin,
    PreferenceConversation,
    SftConversation,
)
from tests.edge.test_datasets import said

datasets = pytest.importorskip("datasets", reason="`just test-training` installs it")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from gguf import GGUFReader  # noqa: E402

from model.training.adapt import load_encoder  # noqa: E402
from model.training.dataset import read_rows  # noqa: E402
from model.training.export import TARGET as DEMO  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages about each other

TEMPLATES = Path(".data/llama.cpp/models/templates")
QWEN = TEMPLATES / "Qwen-Qwen3-0.6B.jinja"
TOOLS = (
    Tool(Function("weather", "Looks.", {"type": "object", "properties": {"city": {}}})),
    Tool(Function("sum", "Adds.", {"type": "object", "properties": {"of": {"type": "array"}}})),
)


def calling(name: str, arguments: str) -> ToolCall:
    return ToolCall(f"c {name}", FunctionCall(name, arguments))


SESSIONS: dict[str, list[Exchange]] = {
    "plain": [said(1), said(2, reasoning="Let me think.")],
    "corrected": [said(1, Feedback("down", correction="right"))],
    "retried": [said(1), said(2, Feedback("up"), prompt="p1", retry_of="m1")],
    "tools": [
        said(
            1,
            response="",
            tool_calls=(calling("weather", '{"city":"Rome"}'),),
            finish_reason="tool_calls",
            tools=TOOLS,
        ),
        said(2, prompt="", tool_results=(ToolResult("c weather", "sunny"),), tools=TOOLS),
        said(
            3,
            response="",
            tool_calls=(calling("sum", '{"of":[1,"two"]}'),),
            finish_reason="tool_calls",
            tools=TOOLS,
        ),
        said(
            4,
            Feedback("down", correction="three"),
            prompt="",
            tool_results=(ToolResult("c sum", "3"),),
            tools=TOOLS,
        ),
    ],
}


async def written(path: Path, kind: type[Conversation]) -> Path:
    with path.open("wb") as file:
        for name, exchanges in SESSIONS.items():
            conversation = kind(Origin(name, "Be kind."), AnswerFilter())
            for exchange in exchanges:
                async for line in conversation.push(exchange):
                    file.write(encode(line) + b"\n")
            async for line in conversation.end():
                file.write(encode(line) + b"\n")
    return path


def loaded(path: Path) -> Any:
    return datasets.load_dataset("json", data_files=str(path), cache_dir=path.parent, split="train")


def tokenizer() -> Any:
    """Return a tokenizer of characters with the chat template of Qwen3."""
    words = {text: number for number, text in enumerate(["<pad>", "<unk>", *string.printable])}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = QWEN.read_text(encoding="utf-8")
    return fast


async def test_sft_lines_load_and_render(tmp_path: Path) -> None:
    rows = list(loaded(await written(tmp_path / "sft.jsonl", SftConversation)))
    assert [row["session_id"] for row in rows] == list(SESSIONS)
    assert all(trl.is_conversational(row) for row in rows)
    texts = [rendered(row) for row in rows]
    assert "<think>\nLet me think.\n</think>\n\nr2" in texts[0]
    assert "assistant\n<think>\n\n</think>\n\nright<|im_end|>" in texts[1]
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in texts[3]
    assert '{"name": "sum", "arguments": {"of": [1, "two"]}}' in texts[3]
    assert "<tools>" in texts[3] and "<tools>" not in texts[0]
    assert texts[3].rstrip().endswith("three<|im_end|>")


def rendered(row: dict[str, Any]) -> str:
    shown = {"messages": row["messages"]}
    text: str = trl.apply_chat_template(shown, tokenizer(), row["tools"])["text"]
    return text


def row_texts(path: Path, *lines: bytes, max_tokens: int = 1000) -> list[tuple[str, str]]:
    """Return the text of each row that the demo model is trained on, and the part it learns."""
    path.write_bytes(b"".join(lines))
    encoder = load_encoder(GGUFReader(DEMO))
    ids = encoder._tokenizer
    return [
        (
            ids.decode(row.ids),
            ids.decode([i for i, weight in zip(row.ids, row.weights, strict=True) if weight >= 1]),
        )
        for row in read_rows(path, encoder, max_tokens)
    ]


async def test_demo_model_learns_the_selected_answers(tmp_path: Path) -> None:
    conversation = SftConversation(Origin("s", "Be kind."), AnswerFilter(rating="up"))
    lines = []
    for exchange in (said(1), said(2, Feedback("up"), response="a\u2028b\x85c")):
        lines += [encode(line) + b"\n" async for line in conversation.push(exchange)]
    lines += [encode(line) + b"\n" async for line in conversation.end()]
    ((text, learned),) = row_texts(tmp_path / "train.jsonl", *lines)
    assert "r1" in text and "r1" not in learned
    assert "a\u2028b\x85c" in learned


async def test_demo_model_does_not_learn_what_it_can_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = await written(tmp_path / "train.jsonl", SftConversation)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(row_texts(path, *lines)) == 3
    assert "1 conversation left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no conversation without tools"):
        row_texts(path, *lines, max_tokens=10)


async def test_preference_lines_load_and_render(tmp_path: Path) -> None:
    rows = list(loaded(await written(tmp_path / "pairs.jsonl", PreferenceConversation)))
    assert [(row["session_id"], row["source"]) for row in rows] == [
        ("corrected", "correction"),
        ("retried", "retry"),
        ("tools", "correction"),
    ]
    for row in rows:
        assert trl.is_conversational(row)
        pair = {name: row[name] for name in ("prompt", "chosen", "rejected")}
        texts = trl.apply_chat_template(pair, tokenizer(), row["tools"])
        assert texts["prompt"].endswith("<|im_start|>assistant\n")
        assert row["chosen"][0]["content"] in texts["chosen"]
        assert row["rejected"][0]["content"] in texts["rejected"]


@pytest.mark.parametrize(
    ("kind", "trainer"),
    [(SftConversation, "SFT"), (PreferenceConversation, "DPO")],
)
async def test_trainers_of_trl_learn_from_the_file(
    tmp_path: Path, kind: type[Conversation], trainer: str
) -> None:
    path = await written(tmp_path / "train.jsonl", kind)
    words = tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    options = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    # else TRL loads the reference model by its name, which this one lacks
    reference = {"ref_model": transformers.Qwen2ForCausalLM(config)} if trainer == "DPO" else {}
    made = getattr(trl, f"{trainer}Trainer")(
        model=transformers.Qwen2ForCausalLM(config),
        args=options,
        train_dataset=loaded(path),
        processing_class=words,
        **reference,
    )
    assert made.train().training_loss > 0
