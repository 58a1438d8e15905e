"""Settings of a worker. docs/settings.md is generated from them."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from services.contract import prompts
from services.contract.messages import (
    ChatRequest,
    MaxTokens,
    ReasoningBudget,
    RepeatPenalty,
    Sampling,
    Stops,
    Temperature,
    TextFormat,
    TopK,
    TopP,
)
from services.inference.engine.backend import FlashAttention, KvType
from services.inference.model_path import split_model_path
from services.runtime.process import usable_cpus
from services.runtime.settings import BackendSettings, Port

STOPS = (
    "</s>",
    "User:",
    "\nUser:",
    "Human:",
    "\nHuman:",
    "Question:",
    "\nQuestion:",
    "\n\n\n",
    "Example:",
    "Here's an",
    "Let me",
)

DEFAULTS = Sampling(temperature=0.5, top_p=0.9, top_k=40, repeat_penalty=1.1)
"""Parameters of requests where neither they, a setting nor the model's file say otherwise."""


class InferenceSettings(BackendSettings, frozen=True, kw_only=True):
    inference_metrics_port: Annotated[
        Port | None,
        Meta(
            description="Port for `GET /metrics` of this process, without API keys; `just up` gives"
            " the workers of several models the ports that follow. Empty: none; `/metrics` of the"
            " edge has the figures of all workers, too."
        ),
    ] = None
    model_path: Annotated[
        str,
        Meta(
            description="GGUF file of a chat model, an embedding model or a reranker, or a folder"
            " that contains one model. Empty: the only model in"
            " `model/` and its subfolders, else `model/demo.gguf`. Several, separated by commas:"
            " `just up` starts a worker for each."
        ),
    ] = ""
    model_default: Annotated[
        str,
        Meta(
            description="Name of the model for requests that name none, where workers serve several"
            " models. Empty: the first of `MODEL_PATH`, or else the model of most workers."
        ),
    ] = ""
    model_chat_template: Annotated[
        str,
        Meta(
            description="Chat template to use instead of the model's own: a Jinja file, or one of"
            " chatml, gemma, llama2, llama3, mistral, phi3, vicuna and zephyr."
        ),
    ] = ""
    model_context: Annotated[
        Annotated[int, Meta(ge=64)] | Literal["auto"],
        Meta(
            description="Context window of each conversation, or the longest text to embed, in"
            " tokens; at most that of the model."
            " The KV cache has `MODEL_CONTEXT` × `MODEL_PARALLEL` tokens. `auto`: the largest of"
            " 2,048, 4,096, 8,192, 16,384 and 32,768 whose KV cache needs at most a quarter of"
            " the memory that is free beside the model, and leaves room for `MODEL_CACHE`; on GPUs,"
            " 80 % of the free GPU memory. The log says what was chosen. Workers of one model on"
            " several machines need the same number."
        ),
    ] = "auto"
    model_kv_type: Annotated[
        KvType,
        Meta(
            description="Type of the KV cache. `q8_0` takes half of the memory of `f16`, with"
            " little loss; smaller ones cost quality. Quantized types use flash attention."
        ),
    ] = "f16"
    model_flash_attention: Annotated[
        FlashAttention,
        Meta(
            description="Flash attention. `auto` has it on GPUs and for a quantized KV cache, which"
            " needs it. On a CPU with AVX-512, `on` generates up to a fifth more tokens per second"
            " in short chats, and the first token of a long conversation takes up to twice as long."
        ),
    ] = "auto"
    model_parallel: Annotated[
        int, Meta(ge=1, le=64, description="Number of slots: requests that are answered at once.")
    ] = 8
    model_queue: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum requests waiting for a slot. Others are rejected with 503, but a"
            " tenant may always have its share of the slots and the queue.",
        ),
    ] = 64
    model_queue_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum total bytes of prompts that wait for prefill. A request that would"
            " exceed it is rejected with 503. One prompt of each tenant may always wait, and more"
            " within the tenant's share.",
        ),
    ] = 2**20
    model_cache: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum size in MiB of the host KV cache, which keeps idle conversations"
            " so that their next turn needs no new prefill. It takes less where the model and its"
            " context leave less memory; the log says so.",
        ),
    ] = 4096
    model_cache_folder: Annotated[
        str,
        Meta(
            description="Folder in which a worker that stops leaves its host KV cache for the next"
            " one of the same model, so that conversations need no new prefill. Workers of one"
            " machine may share it. Its files show what users wrote, and stay until a worker"
            " starts. Empty: the cache ends with the worker, but `just up` uses `.data/kv-cache`."
        ),
    ] = ""
    model_threads: Annotated[
        int, Meta(ge=1, description="Maximum CPU threads; never more than the CPUs available.")
    ] = 4
    model_gpu_layers: Annotated[
        int,
        Meta(ge=-1, description="Layers on the GPU, if llama.cpp was built for one. `-1`: all."),
    ] = -1
    model_main_gpu: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Number of the only GPU to use, from 0. Empty: all GPUs share the model."),
    ] = None
    model_tensor_split: Annotated[
        tuple[Annotated[float, Meta(ge=0)], ...],
        Meta(
            max_length=16,
            description="Shares of the model on each GPU, as in `[3, 1]`. Empty: by free memory.",
        ),
    ] = ()
    chat_system_prompt: Annotated[
        str,
        Meta(description="System prompt of sessions that have none of their own. One space: none."),
    ] = "You are a helpful, friendly assistant. Answer briefly and clearly."
    chat_temperature: Annotated[
        Temperature | None,
        Meta(
            description="Default of the request field `temperature`. Empty: the model's own"
            " (`general.sampling.temp` in its GGUF), else 0.5."
        ),
    ] = None
    chat_top_p: Annotated[
        TopP | None,
        Meta(
            description="Default of the request field `top_p`. Empty: the model's own"
            " (`general.sampling.top_p`), else 0.9."
        ),
    ] = None
    chat_top_k: Annotated[
        TopK | None,
        Meta(
            description="Default of the request field `top_k`. `0`: all tokens. Empty: the model's"
            " own (`general.sampling.top_k`), else 40."
        ),
    ] = None
    chat_repeat_penalty: Annotated[
        RepeatPenalty | None,
        Meta(
            description="Default of the request field `repeat_penalty`. Empty: the model's own"
            " (`general.sampling.penalty_repeat`), else 1.1. It applies to `/chat` only, and not to"
            " answers with a grammar or JSON format."
        ),
    ] = None
    chat_max_tokens: Annotated[
        MaxTokens,
        Meta(
            description="Default of the request field `max_tokens`: tokens of content and tool"
            " calls. Applies to `/chat`, not to `/v1`."
        ),
    ] = 150
    chat_reasoning_tokens: Annotated[
        ReasoningBudget,
        Meta(
            description="Default of the request field `reasoning_budget_tokens`: tokens after"
            " which a model's reasoning is closed, so that it answers. `-1`: no budget; `0`: no"
            " reasoning. Applies to `/chat`, not to `/v1`. In any case half of the tokens that the"
            " context window has left remain for the answer."
        ),
    ] = 2048
    chat_template_kwargs: Annotated[
        dict[str, Any],
        Meta(
            description="Variables for the chat template as a JSON object, such as"
            ' `{"enable_thinking": false}`. The request fields `chat_template_kwargs`,'
            " `enable_thinking` and `reasoning_effort` win over it."
        ),
    ] = {}
    chat_stop: Annotated[
        Stops,
        Meta(
            description="Strings that end an answer in a session and are removed from it, outside"
            " code and reasoning. A label such as `Example:` matches at the start of a line after"
            " a blank line; with a leading newline (`\\nUser:`) at the start of any line. It is"
            " ignored if the prompt contains the word, or the answer announces or uses it. Other"
            " phrases (`Let me`) only remove the line before a label. All other strings (`</s>`)"
            " match anywhere."
        ),
    ] = STOPS

    @property
    def model_paths(self) -> tuple[str, ...]:
        """The models of MODEL_PATH. A worker serves one of them (deploy/up.py)."""
        return split_model_path(self.model_path)

    @property
    def threads(self) -> int:
        """Return the number of threads, at most the CPUs that this process may use."""
        return min(self.model_threads, usable_cpus())

    def fill_in(self, request: ChatRequest, own: Sampling = DEFAULTS) -> Sampling:
        """
        Return the request's own parameters, with the CHAT_… settings as defaults, then the model's
        `own`, then DEFAULTS.

        CHAT_STOP and repeat penalties do not apply to answers with a grammar or JSON format, which
        would be cut and have to repeat brackets and names. They, CHAT_MAX_TOKENS and
        CHAT_REASONING_TOKENS do not apply to stateless requests, whose callers set their own.
        """
        is_constrained = bool(request.grammar) or not isinstance(
            request.response_format, TextFormat | None
        )
        is_stateless = prompts.is_stateless(request)
        defaults = _given(DEFAULTS) | _given(own) | self._defaults
        if is_constrained or is_stateless:
            defaults |= {"stop": (), "repeat_penalty": 1.0}
        if is_stateless:
            defaults |= {"max_tokens": None, "reasoning_budget_tokens": None}
        return Sampling(**(defaults | _given(request)))

    @property
    def _defaults(self) -> dict[str, Any]:
        settings = {name: getattr(self, setting) for name, setting in _SETTINGS.items()}
        return {name: value for name, value in settings.items() if value is not None}


# By sampling parameter, the setting that is its default.
_SETTINGS = {"reasoning_budget_tokens": "chat_reasoning_tokens"} | {
    name: setting
    for name in Sampling.__struct_fields__
    if (setting := f"chat_{name}") in InferenceSettings.__struct_fields__
}


def _given(sampling: Sampling) -> dict[str, Any]:
    """Return the parameters that are not None."""
    names = Sampling.__struct_fields__
    return {name: value for name in names if (value := getattr(sampling, name)) is not None}
