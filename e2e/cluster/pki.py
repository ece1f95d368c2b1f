"""One certificate authority, a client certificate per component, and the kubeconfigs made of them.

Real certificates even in a test cluster: the Node and RBAC authorizers then decide as on a production cluster, and an
operator that lacks a permission fails here first. Keys are EC P-256, which openssl makes in milliseconds.
"""

import base64
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.errors import CommandError

CA = "ca"
API_SERVER = "apiserver"
ADMIN = "admin"
FRONT_PROXY = "front-proxy"
KUBELET_CLIENT = "kubelet-client"
SERVICE_ACCOUNTS = "sa"
COMPONENT_USERS = ("kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns")
DAYS = 3650


@dataclass(frozen=True)
class Certificate:
    """A key and a certificate, files NAME.key and NAME.crt; the subject is the user (CN) and the group (O)."""

    name: str
    user: str
    group: str = ""
    names: tuple[str, ...] = ()
    """Subject alternative names as openssl writes them: "DNS:kubernetes", "IP:10.0.0.1"."""

    def openssl_config(self) -> str:
        authority = self.name == CA
        usage = "digitalSignature,keyCertSign,cRLSign" if authority else "digitalSignature"
        lines = [
            "[req]",
            "distinguished_name = subject",
            "[subject]",
            "[extensions]",
            f"basicConstraints = critical,CA:{'TRUE' if authority else 'FALSE'}",
            f"keyUsage = critical,{usage}",
        ]
        if not authority:
            lines.append("extendedKeyUsage = serverAuth,clientAuth")
        if self.names:
            lines.append(f"subjectAltName = {','.join(self.names)}")
        return "\n".join(lines) + "\n"

    def subject(self) -> str:
        return (f"/O={self.group}" if self.group else "") + f"/CN={self.user}"


def control_plane(addresses: Sequence[str]) -> tuple[Certificate, ...]:
    """What a control plane needs; its API server answers on `addresses` (IP addresses)."""
    services = ("", ".default", ".default.svc", ".default.svc.cluster.local")
    names = (*(f"DNS:kubernetes{suffix}" for suffix in services), "DNS:localhost", *(f"IP:{ip}" for ip in addresses))
    return (
        Certificate(API_SERVER, "kube-apiserver", names=names),
        Certificate(ADMIN, "admin", group="system:masters"),
        Certificate(FRONT_PROXY, "front-proxy-client"),
        Certificate(KUBELET_CLIENT, "kube-apiserver-kubelet-client"),
        # Signs service account tokens. A certificate, although only its key is used: the API server refuses the
        # PKCS#8 EC key itself as a public key file.
        Certificate(SERVICE_ACCOUNTS, "service-accounts"),
        *(Certificate(user, f"system:{user}") for user in COMPONENT_USERS),
    )


def node(name: str, address: str) -> Certificate:
    """The certificate of a kubelet, both as a server and as the user whom the Node authorizer knows."""
    return Certificate(name, f"system:node:{name}", group="system:nodes", names=(f"DNS:{name}", f"IP:{address}"))


def issue(folder: Path, authority: str, certificates: Sequence[Certificate]) -> None:
    """Make a new authority and these certificates in `folder`, which must not hold older ones.

    Raises:
        CommandError: openssl failed.
    """
    folder.mkdir(parents=True, mode=0o700)
    _finish(_start(folder, Certificate(CA, authority)))
    for started in [_start(folder, certificate) for certificate in certificates]:
        _finish(started)


def _start(folder: Path, certificate: Certificate) -> subprocess.Popen[str]:
    stem = folder / certificate.name
    config = stem.with_suffix(".cnf")
    config.write_text(certificate.openssl_config())
    signer: list[str] = []
    if certificate.name != CA:
        signer = ["-CA", f"{folder}/{CA}.crt", "-CAkey", f"{folder}/{CA}.key"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", str(DAYS), "-config", str(config), "-extensions", "extensions"]
    command += ["-subj", certificate.subject(), *signer, "-keyout", f"{stem}.key", "-out", f"{stem}.crt"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(started: subprocess.Popen[str]) -> None:
    _, errors = started.communicate()
    if started.returncode:
        raise CommandError("openssl could not make a certificate (openssl 3.0 or newer is needed).", errors)


def kubeconfig(folder: Path, user: str, *, name: str, server: str) -> str:
    """A kubeconfig (JSON, which is YAML) of one of the certificates in `folder`, with everything embedded."""

    def embedded(file: str) -> str:
        return base64.b64encode((folder / file).read_bytes()).decode()

    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [
                {"name": name, "cluster": {"server": server, "certificate-authority-data": embedded(f"{CA}.crt")}}
            ],
            "users": [
                {
                    "name": user,
                    "user": {
                        "client-certificate-data": embedded(f"{user}.crt"),
                        "client-key-data": embedded(f"{user}.key"),
                    },
                }
            ],
            "contexts": [{"name": name, "context": {"cluster": name, "user": user}}],
        },
        indent=1,
    )


def write_kubeconfig(path: Path, folder: Path, user: str, *, name: str, server: str) -> None:
    """Write `kubeconfig()` to `path`, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(kubeconfig(folder, user, name=name, server=server))
