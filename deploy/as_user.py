"""
Run a program as a user of the NATS that `just up` starts: `python -m deploy.as_user USER MODULE …`.

If NATS_URL names another server, the program gets the settings as they are.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports prints no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys

from deploy.nats.secrets import Secrets
from services.runtime.settings import InvalidSetting, environment


def main(user: str, module: str, *arguments: str) -> None:
    """Replace this process by the program. Raises InvalidSetting."""
    environ, secrets = environment(), Secrets()
    if not environ.get("NATS_URL", "").strip() and user in secrets.users():
        given = {name: value for name, value in environ.items() if value}
        environ = secrets.settings(user) | given
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environ)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InvalidSetting as error:
        sys.exit(str(error))
