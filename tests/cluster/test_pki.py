import base64
import json
import stat
from pathlib import Path

import pytest

from e2e.cluster import pki
from e2e.cluster.commands import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki") / "pki"
    pki.issue(folder, "test-ca", [*pki.control_plane(["127.0.0.1", "10.0.0.1"]), pki.node("node-1", "10.0.0.2")])
    return folder


def text(folder: Path, name: str) -> str:
    return run("openssl", "x509", "-in", folder / f"{name}.crt", "-noout", "-text")


def test_all_certificates_are_signed_by_the_authority(folder: Path) -> None:
    certificates = [path for path in folder.glob("*.crt") if path.stem != pki.CA]
    assert len(certificates) == 10
    run("openssl", "verify", "-CAfile", folder / "ca.crt", *certificates)


def test_the_api_server_is_named_as_pods_and_people_call_it(folder: Path) -> None:
    shown = text(folder, pki.API_SERVER)
    for name in ("DNS:kubernetes.default.svc", "DNS:localhost", "IP Address:127.0.0.1", "IP Address:10.0.0.1"):
        assert name in shown


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("admin", "O = system:masters, CN = admin"),
        ("node-1", "O = system:nodes, CN = system:node:node-1"),
        ("kube-scheduler", "CN = system:kube-scheduler"),
    ],
)
def test_users_and_groups_are_those_that_the_authorizers_know(folder: Path, name: str, subject: str) -> None:
    assert f"Subject: {subject}\n" in text(folder, name)


def test_only_the_authority_may_sign(folder: Path) -> None:
    assert "CA:TRUE" in text(folder, pki.CA)
    assert "CA:FALSE" in text(folder, pki.ADMIN)


def test_kubeconfigs_carry_everything_and_are_private(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "kubeconfig"
    pki.write_kubeconfig(path, folder, pki.ADMIN, name="here", server="https://10.0.0.1:6443")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    config = json.loads(path.read_text())
    (cluster,), (user,) = config["clusters"], config["users"]
    assert cluster["cluster"]["server"] == "https://10.0.0.1:6443"
    assert base64.b64decode(user["user"]["client-key-data"]) == (folder / "admin.key").read_bytes()


def test_keys_lie_where_nobody_else_looks(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
