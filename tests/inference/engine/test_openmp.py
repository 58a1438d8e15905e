import os
import subprocess
import sys

import pytest

PROGRAM = "import os, services.inference.engine.llama; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["by default", "count chosen", "policy chosen"],
)
def test_threads_sleep_soon_unless_the_operator_says_otherwise(
    chosen: dict[str, str], expected: str
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environ | chosen, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
