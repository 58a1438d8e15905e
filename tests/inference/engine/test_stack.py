import threading

import pytest

from services.inference.engine.stack import with_stack


def test_its_answer_or_error_is_the_work_s_and_other_threads_have_the_usual_stack() -> None:
    usual = threading.stack_size()
    assert with_stack(1_000_001, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        with_stack(1_000_001, lambda: 1 // 0)
    assert threading.stack_size() == usual
