"""A nats-server with the users and permissions of an installation, in a test's folder."""

import signal
from pathlib import Path

from deploy.nats.secrets import Secrets
from services.runtime.access import NatsAccess
from services.runtime.settings import ServiceSettings
from tests.servers import ROOT, NatsVersion, Server, nats_server


class SecuredServer(Server):
    """
    nats-server with deploy/nats/secure.conf and `more` of configuration. The keys of its users are
    in `.data/secrets` of the folder.
    """

    def __init__(self, folder: Path, version: NatsVersion = "pinned", more: str = "") -> None:
        plain = nats_server(folder, version=version)
        super().__init__(plain.name, plain.command, plain.port, plain.log)
        if not (folder / "deploy").exists():
            (folder / "deploy").symlink_to(ROOT / "deploy")
        self.secrets = Secrets(folder / ".data/secrets")
        self.secrets.ensure()
        config = folder / "secured.conf"
        config.write_text(f"include deploy/nats/secure.conf\n{more}\n")
        self.command[self.command.index("-c") + 1] = str(config)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def settings(self, user: str) -> dict[str, str]:
        """Return the environment of a process that connects as this user."""
        return {"NATS_URL": self.url, **self.secrets.settings(user)}

    def access(self, user: str) -> NatsAccess:
        settings = {name.lower(): value for name, value in self.settings(user).items()}
        return NatsAccess.of(ServiceSettings(**settings))  # type: ignore[arg-type]

    def reload(self) -> None:
        """Have it read the users again."""
        self.signal(signal.SIGHUP)

    def violations(self) -> list[str]:
        """Return the log lines about what users were refused."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if "Violation" in line]
