import os
import subprocess
from pathlib import Path

import pytest

from deploy.lock import locked
from services.runtime.settings import InvalidSetting


def test_lock_lasts_as_long_as_any_process_that_inherited_it(
    tmp_path: Path,
) -> None:
    server_pid = tmp_path / "nats.pid"
    with locked(tmp_path, server_pid) as fd:
        server = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
    server_pid.write_text(f"{server.pid}\n")
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "up.lock").write_text(str(gone.pid))  # as if `just up` had been killed
    try:
        with (
            pytest.raises(InvalidSetting, match=f"`kill {server.pid}`"),
            locked(tmp_path, server_pid, deadline=0.2),
        ):
            pass
    finally:
        server.kill()
        server.wait()
    with locked(tmp_path, server_pid):
        assert (tmp_path / "up.lock").read_text() == str(os.getpid())
