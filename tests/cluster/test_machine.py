"""The parts of a machine that can be looked at without making one."""

import pytest

from e2e.cluster import mounts
from e2e.cluster.errors import ClusterStateError
from e2e.cluster.faults import container_id, send
from e2e.cluster.mounts import Mount
from e2e.cluster.pid1 import MachineSpec, foreign
from e2e.cluster.supervise import Daemon, Plan

KEEP = ("/root/.cache/kvplane/clusters/a/node-1/disk",)


def test_mountinfo_is_read_with_its_escapes() -> None:
    line = r"36 35 98:0 /a\040b /mnt/c\040d rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue"
    assert mounts.parse(line) == Mount(root="/a b", at="/mnt/c d", kind="ext3")
    assert mounts.parse("29 1 254:0 / / rw - ext4 /dev/vda rw") == Mount(root="/", at="/", kind="ext4")


def test_the_mounts_of_this_process_can_be_read() -> None:
    assert any(mount.at == "/" for mount in mounts.mounted())


@pytest.mark.parametrize(
    ("mount", "let_go"),
    [
        (Mount("/", "/", "ext4"), False),
        (Mount("/", "/", "overlay"), False),
        (Mount("/", "/var/lib/docker/overlay2/x/merged", "overlay"), True),
        (Mount("/", "/root/.cache/kvplane/containers/overlay/x/merged", "overlay"), True),
        (Mount("net:[1]", "/run/netns/x", "nsfs"), True),
        (Mount("/", "/var/lib", "ext4"), False),
        (Mount("/", "/home", "ext4"), False),
        (Mount("/", "/sys/fs/cgroup", "cgroup2"), False),
        (Mount("/", "/root/.cache", "overlay"), False),
    ],
)
def test_a_machine_lets_go_of_what_is_other_peoples(mount: Mount, let_go: bool) -> None:
    assert foreign(mount, KEEP) is let_go


def test_a_kept_folder_may_lie_below_a_private_one() -> None:
    assert not foreign(Mount("/", "/var/lib/cache", "ext4"), ("/var/lib/cache/kvplane/disk",))
    assert foreign(Mount("/", "/var/lib/cache2", "ext4"), ("/var/lib/cache/kvplane/disk",))


def test_machine_specs_survive_being_written_down() -> None:
    plan = Plan((Daemon("etcd", ("etcd",)),), "/var/lib/control", "/var/log", {"PATH": "/bin"})
    spec = MachineSpec(
        hostname="cp",
        cgroup="/sys/fs/cgroup/x",
        disk="/d",
        programs="/p",
        layers=(("/golden/1", "containerd/1"),),
        addresses=("link set lo up",),
        sysctls={"net/ipv4/ip_forward": "1"},
        plan=plan,
    )
    assert MachineSpec.from_json(spec.to_json()) == spec


POD = {
    "metadata": {"namespace": "default", "name": "web"},
    "spec": {"containers": [{"name": "engine"}, {"name": "other"}]},
    "status": {
        "initContainerStatuses": [
            {"name": "sidecar", "containerID": "containerd://5", "state": {"running": {"startedAt": "now"}}}
        ],
        "containerStatuses": [
            {"name": "other", "containerID": "containerd://7", "state": {"terminated": {}}},
            {"name": "engine", "containerID": "containerd://6", "state": {"running": {}}},
        ],
    },
}


def test_containers_are_found_by_name_and_the_first_without() -> None:
    assert container_id(POD, None) == "6"
    assert container_id(POD, "sidecar") == "5"


@pytest.mark.parametrize(
    ("container", "message"),
    [("none", "has no container 'none'; it has engine, other, sidecar"), ("other", "does not run .terminated.")],
)
def test_a_container_that_cannot_be_hit_is_an_error(container: str, message: str) -> None:
    with pytest.raises(ClusterStateError, match=message):
        container_id(POD, container)


def test_only_faults_can_be_sent_and_only_to_something() -> None:
    with pytest.raises(ClusterStateError, match="signal is 'HUP'; give one of KILL, STOP, CONT"):
        send([], "HUP")
    with pytest.raises(ClusterStateError, match="no process"):
        send([], "KILL")
