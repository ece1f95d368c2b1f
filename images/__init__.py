"""Container images: Containerfiles, and the build that makes them with docker, podman or buildah."""
