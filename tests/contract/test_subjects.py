import pytest

from services.contract import subjects
from services.contract.errors import ServiceError


def test_request_subject_names_every_tenant_but_the_open_one() -> None:
    assert subjects.request(subjects.OPEN_TENANT) == "chat.request"
    assert subjects.request("acme") == "chat.request.acme"
    for tenant in (subjects.OPEN_TENANT, "acme"):
        assert subjects.tenant_of_request(subjects.request(tenant)) == tenant


@pytest.mark.parametrize("session", ["default", "a.b*>c d", "\0", "é🙂" * 60, "/" * 128])
def test_session_key_encodes_any_session_id(session: str) -> None:
    key = subjects.session_key("acme", session)
    assert subjects.session_of_key(key) == ("acme", session)
    assert subjects.key_of_log(subjects.log(key)) == key
    tenant, token = key.split(".")
    assert tenant == "acme" and subjects.is_id(token[:64])


def test_cancel_subject_names_its_target() -> None:
    assert subjects.target_of(subjects.cancel("acme", "r1")) == ("acme", "r1")


def test_replay_subjects_name_their_target() -> None:
    for subject in (subjects.replay("acme", "r1"), subjects.worker_replay("w", "acme", "r1")):
        assert subjects.target_of(subject) == ("acme", "r1")


def test_undelivered_subject_names_the_event() -> None:
    subject = subjects.undelivered("w", "acme.r1", admission=3, number=12)
    assert subjects.undelivered_event(subject) == ("acme.r1", 3, 12)


@pytest.mark.parametrize(
    "subject", ["_INBOX.x.y", "_INBOX_alice.x", "_INBOX.é", "chat.reply._.r.a"]
)
def test_inboxes_and_reply_subjects_are_accepted(subject: str) -> None:
    assert subjects.is_reply(subject)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "$JS.API.STREAM.PURGE.HISTORY",
        "history.log._.x",
        "chat.reply",
        "chat.reply.>",
        "chat.reply_x.y",
        "_INBOX",
        "_INBOX.",
        "_INBOX.*",
        "_INBOX-x.y",
        "_INBOX_x.a..b",
        "_INBOX.a b",
        "_INBOX.a\x0bb",
        "_INBOX." + "x" * 512,
    ],
)
def test_other_reply_subjects_are_rejected(subject: str) -> None:
    assert not subjects.is_reply(subject)


@pytest.mark.parametrize("end", ["x.1", "1.x", "-1.2", "1.2_0"])
def test_malformed_undelivered_subject_is_rejected(end: str) -> None:
    with pytest.raises(ServiceError, match="must be digits") as error:
        subjects.undelivered_event(f"chat.worker.w.unheard.acme.r1.{end}")
    assert error.value.code == "invalid_request"


@pytest.mark.parametrize("tenant", ["any", "acme"])
def test_history_subject_and_its_retry_name_the_tenant(tenant: str) -> None:
    subject = subjects.history("context", tenant)
    for asked in (subject, subjects.retry(subject)):
        assert subjects.tenant_of_history(asked) == tenant


def test_invalid_tenant_is_rejected() -> None:
    with pytest.raises(ServiceError, match="not a valid tenant"):
        subjects.tenant_of_history("history.context.ä")
    with pytest.raises(ValueError, match="not a valid tenant"):
        subjects.session_of_key("ä.eA")


@pytest.mark.parametrize(
    ("pattern", "subject", "is_one"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        ("a.*.c", "a.b.c", True),
    ],
)
def test_wildcards_match_as_in_nats(pattern: str, subject: str, is_one: bool) -> None:
    assert subjects.matches(pattern, subject) == is_one


@pytest.mark.parametrize(
    ("subject", "may"),
    [
        ("chat.reply.ann.r.1", True),
        ("chat.reply.bob.r.1", False),
        ("chat.reply._.r.1", False),
        ("chat.reply.bob.r", False),
        ("chat.reply.bob.r.1.2", False),
        ("_INBOX.tenant.ann.x.y", True),
        ("_INBOX.tenant.bob.x", False),
        ("_INBOX.tenant", True),
        ("_INBOX.x.y", True),
        ("_INBOX_ann.x", True),
        ("$JS.API.STREAM.PURGE.HISTORY", False),
    ],
)
def test_answers_go_to_no_subject_of_another_tenant(subject: str, may: bool) -> None:
    assert subjects.may_reply("ann", subject) == may


@pytest.mark.parametrize(
    "subject",
    [
        subjects.request("ann"),
        subjects.replay("ann", "bob"),
        subjects.worker_request("w", "ann"),
        subjects.worker_replay("w", "ann", "bob"),
        subjects.tokenize("w", "ann"),
        subjects.count("w", "ann"),
        subjects.history("context", "ann"),
        subjects.retry(subjects.history("context", "ann")),
        subjects.agent("prompt", "ann", "bob"),
        subjects.embed("w", "ann"),
        subjects.embed_request("ann"),
        subjects.rerank_request("ann"),
    ],
)
def test_subject_of_a_request_names_its_tenant(subject: str) -> None:
    assert subjects.asking_tenant(subject) == "ann"


def test_subject_without_a_tenant_names_the_open_one_or_none() -> None:
    for request in (subjects.request, subjects.embed_request, subjects.rerank_request):
        assert subjects.asking_tenant(request(subjects.OPEN_TENANT)) == subjects.OPEN_TENANT
    assert subjects.asking_tenant("$SRV.PING") is None
