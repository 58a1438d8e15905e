from services.inference.engine import runs


def test_the_common_beginning_is_counted_in_tokens() -> None:
    a, b = runs.pack(0, [1, 2, 3]), runs.pack(0, [1, 2, 4, 5])
    assert runs.shared(a, b) == 2
    assert runs.shared(a, a) == 3
    assert runs.shared(a, runs.pack(0, [])) == runs.shared(a, b"") == 0


def test_runs_of_different_adapters_have_nothing_in_common_nor_exact_ones_with_others() -> None:
    for other in (runs.pack(1, [1, 2]), runs.pack(0, [1, 2], is_exact=True)):
        assert runs.shared(runs.pack(0, [1, 2]), other) == 0


def test_runs_of_different_tenants_have_nothing_in_common() -> None:
    one, other = (runs.pack(0, [1, 2], tenant=tenant) for tenant in ("ann", "bob"))
    assert runs.shared(one, one) == 2 and runs.shared(one, other) == 0
    assert runs.is_same_tenant(one, runs.pack(1, [], tenant="ann"))
    assert not runs.is_same_tenant(one, runs.pack(0, [1, 2]))


def test_a_run_grows_and_is_cut_by_tokens() -> None:
    run = bytearray(runs.pack(3, [1, 2]))
    runs.extend(run, [3, 4])
    assert bytes(run) == runs.pack(3, [1, 2, 3, 4]) and runs.length(run) == 4
    assert runs.cut(run, 1) == runs.pack(3, [1])
    assert runs.length(b"") == 0


def test_a_run_tells_its_adapter_however_short_it_is() -> None:
    assert [runs.adapter(runs.pack(adapter, [])) for adapter in (0, 1, 70_000)] == [0, 1, 70_000]
    assert runs.adapter(runs.cut(runs.pack(3, [1, 2], is_exact=True), 0)) == 3
