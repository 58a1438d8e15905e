"""Templates are parsed once: the tests load each of them with several vocabularies."""

from collections.abc import Iterator
from functools import cache

import pytest

from services.inference.engine.prompt import chat_template
from services.inference.engine.prompt.template_renderer import variables_of


@pytest.fixture(scope="package", autouse=True)
def parsed_templates() -> Iterator[None]:
    """Keep the variables of each template, which a worker finds out once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "variables_of", cache(variables_of))
        yield
