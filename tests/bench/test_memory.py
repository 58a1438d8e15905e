from pathlib import Path

from bench.memory import find_problems


def test_errors_and_tracebacks_in_logs_are_found(tmp_path: Path) -> None:
    log = tmp_path / "services.inference.log"
    log.write_text(
        "12:00:00 INFO    inference [-] ready\n"
        "12:00:01 WARNING inference [-] MongoDB can't be reached\n"
        "12:00:02 ERROR   inference [-] the engine died\n"
        "Traceback (most recent call last):\n"
    )
    assert [problem.split(": ", 1)[0] for problem in find_problems([log])] == [log.name] * 2
