"""The same model without a ring: transformers unsharded, in a process that has all processors, and vLLM for CPUs."""

import asyncio
import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from transformers import AutoModelForCausalLM

from bench.engine.real import RealEngine
from bench.ring import served
from bench.ring.ranks import processors
from e2e.cluster.progress import Progress

BLOCK_TOKENS: Final = 32
_PRODUCT: Final = 2048
"""Rows and columns of the matrices."""
_PRODUCTS: Final = 9


@dataclass(frozen=True)
class Whole:
    """A prefill."""

    seconds: float
    token: int
    """The likeliest next one."""


@dataclass(frozen=True)
class _Failure:
    text: str


def _serve(model: Path, pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        pipe.send(None)
        while True:
            order, tokens, count = pipe.recv()
            with torch.inference_mode():
                pipe.send(_prefill(loaded, tokens) if order == "prefill" else _greedy(loaded, tokens, count))
    except EOFError:
        pass  # dismissed
    except Exception:  # noqa: BLE001  (the other end raises it)
        pipe.send(_Failure(traceback.format_exc()))


def _prefill(model: Any, tokens: Sequence[int]) -> Whole:
    began = time.perf_counter()
    logits = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1).logits
    return Whole(time.perf_counter() - began, int(logits[0, -1].argmax()))


def _greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([tokens]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in out[0, len(tokens) :]]


class Unsharded:
    """transformers' own model, as long as the context lasts."""

    def __init__(self, model: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, its = context.Pipe()
        self._process = context.Process(target=_serve, args=(model, its, len(processors())), daemon=True)
        self._process.start()
        its.close()

    def __enter__(self) -> Self:
        self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()

    def prefill(self, tokens: Sequence[int]) -> Whole:
        """Computes the prompt; the time is that in the model's process."""
        self._pipe.send(("prefill", list(tokens), 0))
        found = self._answer()
        assert isinstance(found, Whole)
        return found

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The tokens that follow."""
        self._pipe.send(("greedy", list(tokens), count))
        return list(self._answer())

    def _answer(self) -> Any:
        found = self._pipe.recv()
        match found:
            case _Failure():
                raise RuntimeError(f"The unsharded model failed:\n{found.text}")
        return found


def matrix_products(threads: int) -> dict[str, float]:
    """GFLOP/s of a square matrix product in fp32: as torch computes it, and so the ring and transformers do, and by oneDNN, which
    uses the widest vectors of any processor.
    """
    torch.set_num_threads(threads)
    left, right = torch.rand(_PRODUCT, _PRODUCT), torch.rand(_PRODUCT, _PRODUCT)
    libraries: dict[str, Callable[[], Any]] = {
        "torch": lambda: left @ right.t(),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""),
    }
    found = {}
    with torch.inference_mode():
        for library, product in libraries.items():
            seconds = []
            for _ in range(_PRODUCTS):
                began = time.perf_counter()
                product()
                seconds.append(time.perf_counter() - began)
            found[library] = 2e-9 * _PRODUCT**3 / statistics.median(seconds)
    return found


def vllm(*, tokens: int, positions: int, progress: Progress) -> RealEngine:
    """vLLM with the demo's model, its context stretched to ``positions``, set for one prompt of ``tokens`` in one step.

    It computes on all processors, as the ring does; :mod:`bench.engine.environment` leaves one to whoever asks.
    """
    most = -(-(tokens + BLOCK_TOKENS) // BLOCK_TOKENS) * BLOCK_TOKENS
    return RealEngine(
        blocks=most // BLOCK_TOKENS + 2,
        block_size=BLOCK_TOKENS,
        max_num_seqs=1,
        max_model_len=most,
        extra_args=(
            *("--max-num-batched-tokens", str(most)),
            "--no-enable-prefix-caching",
            *("--hf-overrides", json.dumps({"max_position_embeddings": positions})),
        ),
        extra_environment={"OMP_NUM_THREADS": str(len(processors()))},
        progress=progress,
    )


async def first_token_seconds(url: str, model: str, tokens: Sequence[int]) -> float:
    """From the request to the first token of its stream, at an engine with OpenAI's API."""
    async with asyncio.timeout(300):
        answer = await served.ask(url, model, tokens, count=1)
    if answer.first_seconds is None:
        raise RuntimeError(f"{url} gave no token: {answer.error}.")
    return answer.first_seconds
