"""Puts msgspec's messages about invalid input in plain words."""

import re

_TYPES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_LIMITS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_FORMS = {
    "retry_of": "the request id of an exchange",
    "before": "the `next` of an earlier page",
    "after": "the `next` of an earlier page",
}
_EXPECTED = re.compile(
    r"Expected `(?P<types>[\w |]+)`(?:, got `\w+`)?"
    r"(?:(?P<length> of length)? (?P<relation>[<>]=?) (?P<limit>\S+))?"
    r"(?P<regex> matching regex \S+)?"
    r" - at (?P<key>`key` in )?`\$\.(?P<path>[^`]+)`"
)
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"Invalid (?:enum )?value (.+?) - at `\$\.([^`]+)`", r"The {noun} `\2` can't be \1"),
    (
        r"(?:Invalid RFC3339 encoded datetime|Expected `datetime` with a timezone component)"
        r" - at `\$\.([^`]+)`",
        r"The {noun} `\1` must be a time such as 2026-11-28T09:30:00Z",
    ),
    (r"Number out of range - at `\$\.([^`]+)`", r"The {noun} `\1` is out of range"),
    (r"Object missing required field `(\w+)`(?! - at)", r"The {noun} `\1` is missing"),
    (r"Expected `object`, got `\w+`(?! - at)", "The JSON must be an object"),
    (r"Input data was truncated", "The JSON is incomplete"),
)


def in_plain_words(message: str, noun: str = "field") -> str:
    """Return the message with the parts that are msgspec's replaced. `noun` is what it is about."""
    message = _EXPECTED.sub(lambda found: _requirement(found, noun), message)
    for pattern, plain in _OTHERS:
        message = re.sub(pattern, plain.format(noun=noun), message)
    return message


def _requirement(found: re.Match[str], noun: str) -> str:
    path, limit = found["path"], found["limit"]
    subject = f"The {noun} `{path}`"
    if found["key"]:
        return f"The keys of the {noun} `{path}` must be token ids"
    if found["regex"]:
        return f"{subject} must be {_FORMS.get(path, 'of another form')}"
    if found["length"] and (found["relation"], limit) == (">=", "1"):
        return f"{subject} must not be empty"
    if found["length"]:
        unit = "characters" if found["types"] == "str" else "items"
        return f"{subject} must have {_LIMITS[found['relation']]} {limit} {unit}"
    if limit:
        return f"{subject} must be {_LIMITS[found['relation']]} {limit}"
    types = [_TYPES.get(each, each) for each in found["types"].split(" | ")]
    return f"{subject} must be {' or '.join(types)}"
