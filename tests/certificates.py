"""Certificates for 127.0.0.1, and a nats-server that uses them."""

from pathlib import Path

import trustme

from tests.servers import Server


def make_certificates(folder: Path) -> Path:
    """
    Write ca.pem; cert.pem and key.pem of a server; client.pem and client-key.pem of a client; all
    signed by that authority, but stranger.pem and stranger-key.pem by another one. Return `folder`.
    """
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    for authority, name in ((ca, "cert"), (ca, "client"), (trustme.CA(), "stranger")):
        issued = authority.issue_cert("127.0.0.1", common_name=name)
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        key = "key.pem" if name == "cert" else f"{name}-key.pem"
        issued.private_key_pem.write_to_path(folder / key)
    return folder


def with_tls(server: Server, certificates: Path, is_mutual: bool = False) -> Server:
    """Have the server require TLS; with `is_mutual`, also a certificate of its clients."""
    server.command += ["-tls", "-tlscert", str(certificates / "cert.pem")]
    server.command += ["-tlskey", str(certificates / "key.pem")]
    if is_mutual:
        server.command += ["-tlsverify", "-tlscacert", str(certificates / "ca.pem")]
    return server
