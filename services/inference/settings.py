"""What the inference service can be told by environment variables (docs: README, settings)."""

import os
from typing import Annotated, Any

from msgspec import Meta

from services.contract import prompts
from services.contract.messages import (
    ChatRequest,
    MaxTokens,
    RepeatPenalty,
    Sampling,
    Stops,
    Temperature,
    TextFormat,
    TopK,
    TopP,
)
from services.runtime.settings import ServiceSettings

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


class InferenceSettings(ServiceSettings, frozen=True, kw_only=True):
    model_path: str = ""
    model_chat_template: str = ""
    model_context: Annotated[int, Meta(ge=64)] = 2048
    model_parallel: Annotated[int, Meta(ge=1, le=64)] = 8
    model_queue: Annotated[int, Meta(ge=0)] = 64
    model_queue_bytes: Annotated[int, Meta(ge=0)] = 2**20
    model_cache: Annotated[int, Meta(ge=0)] = 4096  # MiB
    model_threads: Annotated[int, Meta(ge=1)] = 4
    model_gpu_layers: Annotated[int, Meta(ge=-1)] = -1
    chat_system_prompt: str = "You are a helpful, friendly assistant. Answer briefly and clearly."
    chat_temperature: Temperature = 0.5
    chat_top_p: TopP = 0.9
    chat_top_k: TopK = 40
    chat_repeat_penalty: RepeatPenalty = 1.1
    chat_max_tokens: MaxTokens = 150
    chat_stop: Stops = STOPS

    @property
    def threads(self) -> int:
        """Never more than the CPUs that this process may use."""
        has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
        cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        return min(self.model_threads, cpus or 1)

    def fill_in(self, request: ChatRequest) -> Sampling:
        """
        Return the request's own parameters, with the CHAT_… settings as defaults. CHAT_STOP and
        CHAT_REPEAT_PENALTY do not apply to answers with a grammar or JSON format, which would be
        cut and have to repeat brackets and names. They and CHAT_MAX_TOKENS do not apply to
        stateless requests, whose callers set their own limits.
        """
        given = {
            name: value
            for name in Sampling.__struct_fields__
            if (value := getattr(request, name)) is not None
        }
        has_form = request.grammar or not isinstance(request.response_format, TextFormat | None)
        is_stateless = prompts.is_stateless(request)
        no_talk = {"stop": (), "repeat_penalty": 1.0} if has_form or is_stateless else {}
        no_end = {"max_tokens": None} if is_stateless else {}
        return Sampling(**(self._defaults | no_talk | no_end | given))

    @property
    def _defaults(self) -> dict[str, Any]:
        names = Sampling.__struct_fields__
        settings = {name: getattr(self, f"chat_{name}", None) for name in names}
        return {name: value for name, value in settings.items() if value is not None}
