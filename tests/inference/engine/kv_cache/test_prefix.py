from services.inference.engine.kv_cache import prefix


def test_the_common_beginning_is_counted_in_tokens() -> None:
    a, b = prefix.pack(0, [1, 2, 3]), prefix.pack(0, [1, 2, 4, 5])
    assert prefix.shared(a, b) == 2
    assert prefix.shared(a, a) == 3
    assert prefix.shared(a, prefix.pack(0, [])) == prefix.shared(a, b"") == 0


def test_runs_of_different_adapters_have_nothing_in_common_nor_exact_ones_with_others() -> None:
    for other in (prefix.pack(1, [1, 2]), prefix.pack(0, [1, 2], is_exact=True)):
        assert prefix.shared(prefix.pack(0, [1, 2]), other) == 0


def test_runs_of_different_tenants_have_nothing_in_common() -> None:
    one, other = (prefix.pack(0, [1, 2], tenant=tenant) for tenant in ("ann", "bob"))
    assert prefix.shared(one, one) == 2 and prefix.shared(one, other) == 0
    assert prefix.is_same_tenant(one, prefix.pack(1, [], tenant="ann"))
    assert not prefix.is_same_tenant(one, prefix.pack(0, [1, 2]))


def test_a_run_grows_and_is_cut_by_tokens() -> None:
    run = bytearray(prefix.pack(3, [1, 2]))
    prefix.extend(run, [3, 4])
    assert bytes(run) == prefix.pack(3, [1, 2, 3, 4]) and prefix.length(run) == 4
    assert prefix.cut(run, 1) == prefix.pack(3, [1])
    assert prefix.length(b"") == 0


def test_a_run_tells_its_adapter_however_short_it_is() -> None:
    assert [prefix.adapter(prefix.pack(adapter, [])) for adapter in (0, 1, 70_000)] == [
        0,
        1,
        70_000,
    ]
    assert prefix.adapter(prefix.cut(prefix.pack(3, [1, 2], is_exact=True), 0)) == 3
