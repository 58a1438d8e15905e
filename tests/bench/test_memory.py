from pathlib import Path

from bench.memory import find_problems


def test_errors_and_tracebacks_in_logs_are_found(tmp_path: Path) -> None:
    log = tmp_path / "services.inference.log"
    log.write_text(
        "2026-11-28T12:00:00.000Z INFO    inference [-] ready\n"
        "2026-11-28T12:00:01.000Z WARNING inference [-] MongoDB can't be reached\n"
        "2026-11-28T12:00:02.000Z ERROR   inference [-] the engine died\n"
        "Traceback (most recent call last):\n"
    )
    assert [problem.split(": ", 1)[0] for problem in find_problems([log])] == [log.name] * 2
