"""What is built when: keys follow the sources, and the plan does no more than the keys ask for."""

import shutil
from pathlib import Path

import pytest

from images import debian
from images.plan import Plan, Request, make_plan, stale_images
from images.recipes import CONTROL, ENGINE_CPU, content_key, with_bases
from images.storage import Storage
from images.tools import Commands, Tool

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "registry.example/python:3.11"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what the image builds read, to change at will."""
    copy = tmp_path / "repository"
    for name in (*CONTROL.inputs, "images", *ENGINE_CPU.inputs):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy / name)
    return copy


def commands(tool: Tool, *, plain_http: bool = False) -> Commands:
    storage = Storage(root=Path("/store"), runroot=Path("/run/store"))
    return Commands(tool=tool, storage=storage, mount_certificates=True, plain_http=plain_http)


def plan(
    repository: Path,
    *names: str,
    have: dict[str, str] | None = None,
    tool: Tool = Tool.BUILDAH,
    base: str | None = BASE,
    push: str | None = None,
) -> Plan:
    request = Request(names=names, tag="dev", base=base, push=push)
    return make_plan(
        request,
        repository=repository,
        scratch=Path("/scratch"),
        commands=commands(tool),
        have=have or {},
    )


def titles(made: Plan) -> list[str]:
    return [step.title for step in made.steps]


def images_after(made: Plan, have: dict[str, str] | None = None) -> dict[str, str]:
    """The store once the plan has run: each build makes a new image, each tag names an old one."""
    store = dict(have or {})
    for number, step in enumerate(made.steps):
        names = [argument.removeprefix("--tag=") for argument in step.command if argument.startswith("--tag=")]
        if names:
            store |= dict.fromkeys(names, f"image-{len(store)}-{number}")
        elif "tag" in step.command:
            store[step.command[-1]] = store[step.command[-2]]
    return store


def test_an_empty_store_gets_each_image_after_the_one_below_it(repository: Path) -> None:
    made = plan(repository, "demo-model", "control")
    assert titles(made) == ["image engine-cpu: build", "image demo-model: build", "image control: build"]
    assert made.images == ("localhost/kvplane/demo-model:dev", "localhost/kvplane/control:dev")


def test_a_second_run_does_nothing(repository: Path) -> None:
    store = images_after(plan(repository, "control", "demo-model", base=None))
    assert plan(repository, "control", "demo-model", base=None, have=store).steps == ()


def test_changed_code_rebuilds_the_control_image_only(repository: Path) -> None:
    store = images_after(plan(repository, "control", "demo-model"))
    with (repository / "operator/kvplane_api/__init__.py").open("a") as file:
        file.write("CHANGED = True\n")
    made = plan(repository, "control", "demo-model", have=store)
    assert titles(made) == ["image control: build"]


def test_code_changed_back_only_moves_the_tag(repository: Path) -> None:
    store = images_after(plan(repository, "control"))
    changed = repository / "operator/kvplane_api/__init__.py"
    before = changed.read_text()
    changed.write_text("CHANGED = True\n")
    store = images_after(plan(repository, "control", have=store), store)
    changed.write_text(before)
    made = plan(repository, "control", have=store)
    assert titles(made) == ["image control: tag dev"]
    assert plan(repository, "control", have=images_after(made, store)).steps == ()


def test_a_changed_engine_lock_rebuilds_what_stands_on_it(repository: Path) -> None:
    store = images_after(plan(repository, "control", "demo-model"))
    with (repository / "requirements/engine-cpu.lock").open("a") as file:
        file.write("# changed\n")
    made = plan(repository, "control", "demo-model", have=store)
    assert titles(made) == ["image engine-cpu: build", "image demo-model: build"]


def test_an_image_of_two_comes_after_both_and_names_them(repository: Path) -> None:
    made = plan(repository, "ring-cpu")
    assert titles(made) == ["image engine-cpu: build", "image control: build", "image ring-cpu: build"]
    assert made.images == ("localhost/kvplane/ring-cpu:dev",)
    engine, control, ring = made.steps
    for argument, below in (("ENGINE", engine), ("CONTROL", control)):
        keyed = next(word.removeprefix("--tag=") for word in below.command if word.startswith("--tag="))
        assert f"--build-arg={argument}={keyed}" in ring.command
    assert plan(repository, "ring-cpu", have=images_after(made)).steps == ()


def test_changed_code_changes_the_ring_engine_and_leaves_torch_alone(repository: Path) -> None:
    store = images_after(plan(repository, "ring-cpu", "demo-model"))
    with (repository / "runtime/kvplane_runtime/__init__.py").open("a") as file:
        file.write("CHANGED = True\n")
    made = plan(repository, "ring-cpu", "demo-model", have=store)
    assert titles(made) == ["image control: build", "image ring-cpu: build"]


def test_compiled_python_does_not_change_a_key(repository: Path) -> None:
    before = content_key(CONTROL, repository, BASE)
    cache = repository / "operator/kvplane_api/__pycache__"
    cache.mkdir()
    (cache / "names.cpython-311.pyc").write_bytes(b"compiled")
    assert content_key(CONTROL, repository, BASE) == before


def test_mode_name_and_base_change_a_key(repository: Path) -> None:
    before = content_key(CONTROL, repository, BASE)
    assert content_key(CONTROL, repository, "registry.example/python:3.12") != before
    file = repository / "operator/kvplane_api/names.py"
    file.chmod(0o755)
    executable = content_key(CONTROL, repository, BASE)
    assert executable != before
    file.rename(file.with_name("renamed.py"))
    assert content_key(CONTROL, repository, BASE) not in {before, executable}


def test_every_input_of_a_recipe_exists() -> None:
    for recipe in with_bases(("control", "demo-model", "ring-cpu")):
        assert [name for name in (recipe.containerfile, *recipe.inputs) if not (REPOSITORY / name).exists()] == []


def test_inputs_are_what_the_containerfile_copies() -> None:
    for recipe in with_bases(("control", "demo-model", "ring-cpu")):
        lines = (REPOSITORY / recipe.containerfile).read_text().splitlines()
        copied = {
            source
            for line in lines
            if line.startswith("COPY ") and "--from=" not in line
            for source in line.split()[1:-1]
        }
        assert copied == set(recipe.inputs)


def test_the_debian_base_is_made_first_and_only_when_something_is_built(repository: Path) -> None:
    made = plan(repository, "control", base=None)
    programs = [step.command[0] for step in made.steps]
    assert programs[:6] == ["rm", "debootstrap", "find", "tar", "rm", "buildah"]
    base = f"localhost/kvplane/base:{debian.base_key(repository)}"
    assert f"--build-arg=BASE={base}" in made.steps[-1].command
    store = images_after(made)
    del store[base]
    assert plan(repository, "control", base=None, have=store).steps == ()


def test_docker_gets_its_own_spelling(repository: Path) -> None:
    (build,) = plan(repository, "control", tool=Tool.DOCKER).steps
    assert build.command[:2] == ("docker", "build")
    assert not [argument for argument in build.command if argument.startswith(("--layers", "--volume"))]
    assert "--tag=kvplane/control:dev" in build.command
    assert build.command[-1] == str(repository)


def test_podman_keeps_layers_and_sees_the_certificates(repository: Path) -> None:
    (build,) = plan(repository, "control", tool=Tool.PODMAN).steps
    assert "--layers" in build.command
    assert "--volume=/etc/ssl/certs:/etc/ssl/certs:ro" in build.command


def test_a_push_sends_what_was_asked_for(repository: Path) -> None:
    store = images_after(plan(repository, "demo-model"))
    made = plan(repository, "demo-model", have=store, push="registry.example/team/")
    (push,) = made.steps
    assert push.command[-2:] == ("localhost/kvplane/demo-model:dev", "docker://registry.example/team/demo-model:dev")
    made = plan(repository, "control", tool=Tool.DOCKER, push="registry.example/team")
    assert [step.command[1] for step in made.steps] == ["build", "tag", "push"]


def test_plain_http_is_said_to_the_tools_that_ask() -> None:
    (push,) = commands(Tool.PODMAN, plain_http=True).push("a", "127.0.0.1:5000/a")
    assert push == ("podman", "push", "--tls-verify=false", "a", "docker://127.0.0.1:5000/a")


def test_pruning_removes_older_keys_and_nothing_else(repository: Path) -> None:
    older = f"localhost/kvplane/control:{'0' * 16}"
    store = images_after(plan(repository, "control"))
    current = set(store)
    others = {
        f"localhost/kvplane/engine-cpu:{'0' * 16}": "1",
        "localhost/kvplane/control:v1": "2",
        f"other/control:{'0' * 16}": "3",
    }
    store |= {older: "0", **others}
    assert stale_images(store, keep=current, prefix="localhost/kvplane") == (older,)


def test_pruning_keeps_docker_images_of_others() -> None:
    assert commands(Tool.DOCKER).remove(("a:1",)) == (("docker", "rmi", "a:1"),)
    assert commands(Tool.BUILDAH).remove(("a:1",))[1][-2:] == ("rmi", "--prune")
