"""`make images PUSH=…`, as a user with a registry runs it."""

from pathlib import Path

from e2e import registry
from e2e.stack import Images
from images.build import build_images
from images.tools import Tool


def test_push_brings_an_image_into_a_registry(images: Images, tmp_path: Path) -> None:
    with registry.serve(tmp_path) as address:
        pushed = f"{address}/acme"
        build_images(("demo-model",), tool=Tool.BUILDAH, push=pushed, plain_http=True)
        assert registry.Store(tmp_path).resolve("acme/demo-model", "dev") is not None
