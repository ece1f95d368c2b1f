"""Builds what the end-to-end tests stand on, before pytest: programs and images, with progress that can be seen."""

import sys

from e2e.cluster import binaries
from e2e.cluster.errors import ClusterError
from e2e.cluster.progress import Progress
from e2e.stack import prepare_images, prepare_machine
from images.build import ImageBuildError


def main() -> int:
    """Everything that is not up to date; nothing in a second where all is."""
    progress = Progress()
    try:
        prepare_machine(progress)
        binaries.build([binaries.PROMETHEUS], progress=progress)
        prepare_images(progress)
    except (ClusterError, ImageBuildError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
