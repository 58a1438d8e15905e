"""
The three classes of /v1 fields (docs/openai-api.md): honoured, accepted without effect, and
rejected because the caller's result depends on them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from msgspec import Struct

from services.contract.conversation import ChatMessage, Function, FunctionCall, Tool, ToolCall
from services.contract.messages import JsonSchema
from services.edge.api.openai_requests import (
    ChatCompletionBody,
    CompletionBody,
    EmbeddingBody,
    ReasoningOptions,
    RerankBody,
    StreamOptions,
)


class Fields(NamedTuple):
    """
    The classes of one kind of object. `harmless` fields are known and have no effect; `rejected`
    fields map to what to do instead; all others are unknown.
    """

    honoured: frozenset[str]
    harmless: frozenset[str] = frozenset()
    rejected: Mapping[str, str] = MappingProxyType({})


def honoured(kind: type[Struct], *more: str) -> frozenset[str]:
    """Return the fields of a type, and `more` fields that are translated to them."""
    return frozenset((*kind.__struct_fields__, *more))


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BUDGET_SYNONYMS = {
    name: "reasoning_budget_tokens"
    for name in (
        "thinking_budget_tokens",
        "thinking_token_budget",
        "thinking_budget",
        "reasoning_budget",
    )
}
"""Of llama-server, vLLM and Qwen."""
SYNONYMS = {
    "repetition_penalty": "repeat_penalty",
    "random_seed": "seed",
    "n_predict": "max_tokens",
    "typ_p": "typical_p",
    "typical": "typical_p",
    "nsigma": "top_n_sigma",
    "mirostat_mode": "mirostat",
    **BUDGET_SYNONYMS,
}
"""Names of other servers. Our own name wins if both are sent."""
REASONING_SWITCHES = ("reasoning", "thinking", "think")
"""Fields of other servers for reasoning: a boolean, an effort, or an object."""
FORMAT_FIELDS = {
    "json_schema": "json",
    "guided_json": "json",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Fields of llama-server and vLLM for the format of an answer, and the constraint in each."""

_HARMLESS = names("""
    store metadata reasoning_effort verbosity safety_identifier service_tier prediction
    web_search_options prompt_cache_retention
    cache_prompt id_slot samplers timings_per_token return_progress return_tokens reasoning_format
    reasoning_in_content thinking_budget_tokens thinking_forced_open parse_tool_calls
    n_keep n_probs t_max_predict_ms
    reasoning_budget_tokens reasoning_budget thinking_token_budget reasoning_control
    reasoning_budget_message separate_reasoning stream_reasoning
    chat_template_kwargs chat_template enable_thinking add_generation_prompt add_special_tokens
    continue_final_message include_reasoning priority request_id echo
    skip_special_tokens spaces_between_special_tokens include_stop_str_in_output use_beam_search
    length_penalty early_stopping stop_token_ids truncate_prompt_tokens cache_salt documents
    guided_decoding_backend bad_words prompt_logprobs kv_transfer_params
    return_token_ids return_tokens_as_token_ids vllm_xargs mm_processor_kwargs
    reasoning provider transforms usage route models plugins options keep_alive think thinking
    thinking_budget num_ctx raw template format context
    chat_id session_id conversation_id message_id id title features background_tasks language
    files tool_ids tool_servers params variables filter_ids citations safe_prompt prompt_mode
    cache_control extra_body extra_headers timeout top_a prompt
""")
_REJECTED = MappingProxyType({
    "guided_regex": "use response_format or grammar",
    "audio": "the model generates text only",
    "lora": "name the adapter as model, `<model>:<adapter>`",
})  # fmt: skip

CHAT = Fields(
    honoured(
        ChatCompletionBody,
        *SYNONYMS,
        *REASONING_SWITCHES,
        *FORMAT_FIELDS,
        "structured_outputs",
        "function_call",
    ),
    _HARMLESS,
    _REJECTED,
)
TEXT = Fields(
    honoured(CompletionBody, *SYNONYMS, *FORMAT_FIELDS, "structured_outputs")
    - {"reasoning_budget_tokens", *BUDGET_SYNONYMS},
    _HARMLESS,
    _REJECTED | {"suffix": "the model can only continue a text"},
)
EMBEDDING = Fields(
    honoured(EmbeddingBody),
    names("""
        user truncate truncate_prompt_tokens input_type task prompt_name priority
        add_special_tokens extra_body extra_headers timeout
    """),
    {
        name: "use encoding_format and dimensions"
        for name in ("output_dtype", "output_dimension", "embedding_type", "embedding_types")
    },
)
RERANK = Fields(
    honoured(RerankBody),
    names("""
        user truncate truncation truncation_direction truncate_prompt_tokens max_tokens_per_doc
        max_chunks_per_doc rank_fields priority extra_body extra_headers timeout
    """),
    {"raw_scores": "scores are from 0 to 1", "top_k": "use top_n"},
)
DOCUMENT = Fields(names("text"), names("id title url metadata"))
STREAM_OPTIONS = Fields(
    honoured(StreamOptions), names("include_obfuscation continuous_usage_stats")
)
REASONING = Fields(
    honoured(ReasoningOptions), names("summary generate_summary display clear_thinking")
)
"""Of the object in REASONING_SWITCHES."""
REASONING_FIELDS = (
    "reasoning_content",
    "reasoning",
    "reasoning_text",
    "thinking",
    "reasoning_details",
    "thinking_blocks",
)
"""Of a message: the reasoning before its content. The first one with a text counts."""
REASONING_TEXTS = ("text", "thinking", "reasoning", "content", "summary")
"""The fields of objects in REASONING_FIELDS, and of REASONING_PARTS, that may have the text."""
MESSAGE = Fields(
    honoured(ChatMessage, "function_call", "refusal", "prefix", *REASONING_FIELDS),
    names("""
        id cache_control annotations audio reasoning_opaque provider_specific_fields timestamp
        is_error status phase metadata extra extra_content images files parsed model created
    """),
)
PART = Fields(
    names("type text refusal"), names("cache_control annotations prompt_cache_breakpoint id index")
)
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The types of parts that are text, and the field that has it."""
REASONING_PARTS = names("thinking reasoning reasoning_text redacted_thinking")
"""The types of parts that are reasoning."""
NOT_TEXT = "the model reads text only; remove the part"
CALL = Fields(
    honoured(ToolCall, "custom"),
    names("index extra_content thought_signature provider_specific_fields cache_control status"),
)
CALLED_FUNCTION = Fields(honoured(FunctionCall), names("parsed_arguments description"))
TOOL = Fields(
    honoured(Tool, *Function.__struct_fields__), names("cache_control title defer_loading")
)
FUNCTION = Fields(
    honoured(Function), names("title cache_control input_examples response returns annotations")
)
RESPONSE_FORMAT = Fields(names("type json_schema schema"), names("name strict description"))
STRUCTURED_OUTPUTS = Fields(
    names("json choice grammar json_object"),
    names("backend disable_fallback disable_any_whitespace whitespace_pattern"),
    {name: _REJECTED["guided_regex"] for name in ("regex", "structural_tag")},
)
JSON_SCHEMA = Fields(honoured(JsonSchema), names("description title"))
