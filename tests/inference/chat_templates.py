"""Chat templates for tests."""

from services.inference.engine.backend import SpecialToken
from services.inference.engine.prompt.chat_template import ChatTemplate
from tests.inference.fake_backend import FakeBackend

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
)
SHOWN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
START, END = SpecialToken("<|im_start|>", True), SpecialToken("<|im_end|>", True)


def template(source: str = CHATML, context: int = 1000, adds_bos: bool = False) -> ChatTemplate:
    """Return the template on a vocabulary of bytes."""
    backend = FakeBackend({}, context)
    return ChatTemplate(source, backend, bos="<s>", eos="</s>", adds_bos=adds_bos)
