import threading

import pytest

from services.inference.engine.threads import DeepStackThreads


def test_threads_start_before_work_and_others_keep_default_stack() -> None:
    usual, before = threading.stack_size(), threading.active_count()
    threads = DeepStackThreads("test", 3, 1_000_001)
    assert threading.active_count() == before + 3
    assert threading.stack_size() == usual
    for _ in range(20):
        threads.submit(lambda: None).result()
    assert threading.active_count() == before + 3
    threads.close()
    assert threading.active_count() == before


def test_submitted_work_returns_its_result_or_error() -> None:
    threads = DeepStackThreads("test", 1)
    assert threads.submit(lambda: 7).result() == 7
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result()
    threads.close()


def test_close_finishes_running_work_and_cancels_the_rest() -> None:
    threads = DeepStackThreads("test", 1)
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> bool:
        begun.set()
        return go_on.wait(10)

    first, second = threads.submit(wait), threads.submit(wait)
    begun.wait(10)
    closing = threading.Thread(target=threads.close)
    closing.start()
    while not second.cancelled():
        pass
    go_on.set()
    closing.join()
    assert first.result()
