from services.inference.engine.kv_cache import prefix


def test_shared_length_is_in_tokens() -> None:
    a, b = prefix.pack(0, [1, 2, 3]), prefix.pack(0, [1, 2, 4, 5])
    assert prefix.shared_length(a, b) == 2
    assert prefix.shared_length(a, a) == 3
    assert prefix.shared_length(a, prefix.pack(0, [])) == prefix.shared_length(a, b"") == 0


def test_runs_of_different_modes_share_nothing() -> None:
    for other in (prefix.pack(1, [1, 2]), prefix.pack(0, [1, 2], is_deterministic=True)):
        assert prefix.shared_length(prefix.pack(0, [1, 2]), other) == 0


def test_runs_of_different_tenants_share_nothing() -> None:
    one, other = (prefix.pack(0, [1, 2], tenant=tenant) for tenant in ("ann", "bob"))
    assert prefix.shared_length(one, one) == 2 and prefix.shared_length(one, other) == 0
    assert prefix.is_same_tenant(one, prefix.pack(1, [], tenant="ann"))
    assert not prefix.is_same_tenant(one, prefix.pack(0, [1, 2]))


def test_length_that_can_not_be_shared_is_known_at_once() -> None:
    key, other = (prefix.pack(0, tokens, tenant="ann") for tokens in ([1, 2, 3], [1, 2, 4]))
    assert [prefix.may_share(key, other, length) for length in (0, 2, 3)] == [True, True, False]
    assert prefix.may_share(key, key, 3) and not prefix.may_share(key, prefix.truncate(key, 2), 3)
    assert not prefix.may_share(key, bytearray(other), 3)


def test_tenants_may_share_what_is_public() -> None:
    key, other = (prefix.pack(0, [1, 2], tenant=tenant) for tenant in ("ann", "bob"))
    assert prefix.may_share(key, other, 2)


def test_run_is_extended_and_truncated_by_tokens() -> None:
    key = bytearray(prefix.pack(3, [1, 2]))
    prefix.extend(key, [3, 4])
    assert bytes(key) == prefix.pack(3, [1, 2, 3, 4]) and prefix.length(key) == 4
    assert prefix.truncate(key, 1) == prefix.pack(3, [1])
    assert prefix.length(b"") == 0


def test_adapter_of_empty_run_is_known() -> None:
    assert [prefix.adapter_of(prefix.pack(adapter, [])) for adapter in (0, 1, 70_000)] == [
        0,
        1,
        70_000,
    ]
    assert prefix.adapter_of(prefix.truncate(prefix.pack(3, [1, 2], is_deterministic=True), 0)) == 3
