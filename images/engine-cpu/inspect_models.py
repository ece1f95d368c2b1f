"""Fill vLLM's cache of what model classes can do: `python inspect_models.py LlamaForCausalLM ...`.

vLLM (0.32) keeps one file per class in `$VLLM_CACHE_ROOT/modelinfos`, and believes it while the hash of the class's
source in it is right. Without the file each start of a server spends seconds on a process that imports vLLM again.
"""

import sys
from pathlib import Path


def main(architectures: list[str]) -> None:
    """Inspect each class as a server would; raises FileNotFoundError where vLLM left nothing in its cache."""
    from vllm import envs  # noqa: PLC0415
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415

    for architecture in architectures:
        ModelRegistry.models[architecture].inspect_model_cls()
    cached = list((Path(envs.VLLM_CACHE_ROOT) / "modelinfos").glob("*.json"))
    if len(cached) < len(architectures):
        raise FileNotFoundError(f"vLLM cached {len(cached)} of {len(architectures)} classes in {envs.VLLM_CACHE_ROOT}.")
    for file in cached:
        file.chmod(0o644)  # vLLM leaves them to their owner, the server runs as someone else


if __name__ == "__main__":
    main(sys.argv[1:])
