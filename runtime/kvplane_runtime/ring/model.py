"""One rank's model: loads it, runs steps, and keeps the KV of this rank's share of every sequence.

Every rank runs the same steps on the same tables of layouts. A table changes only when a pass is over, so a step that
breaks half way (RingBrokenError) has changed nothing but slots that nobody counts: after :meth:`RingModel.bind` to a new
ring the work goes on with all that was held.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kvplane_runtime.ring import architectures, attention, trial
from kvplane_runtime.ring.attention import DecodePass, Pass, Row, WindowPass, positions
from kvplane_runtime.ring.cache import RingCache, Shard
from kvplane_runtime.ring.communicator import CPU, Ring
from kvplane_runtime.ring.layout import Layout, slots
from kvplane_runtime.ring.messages import Decode, Step, Window
from kvplane_runtime.ring.ranges import Range, Run

Progress = Callable[[int, int], None]
"""Called with the bytes of weights loaded so far and in all."""

_LOGITS_TAG = 4


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave this rank."""

    logits: Tensor | None
    """On rank 0, fp32 [n, vocabulary]: a row for each decode, and one for the window if it was asked for. None elsewhere."""
    held_tokens: int
    """KV tokens that this rank holds now."""
    seconds: float
    waited_seconds: float
    """Of these, how long the model stood still for communication."""
    sent_bytes: int


class RingModel:
    """The model of one process. Bound to one ring at a time; not safe for use by several threads."""

    def __init__(self, model: Any, architecture: architectures.Architecture) -> None:
        """For a model in memory; :meth:`load` makes one from files."""
        self.architecture = architecture
        self.config = model.config
        self._model = model
        self._device = next(model.parameters()).device
        """Of weights, KV and all that is computed; what is planned is on the CPU."""
        self._ring: Ring | None = None
        self._layouts: dict[int, Layout] = {}
        self._shards: dict[int, Shard] = {}
        self.kv_bytes_per_token = architecture.kv_bytes_per_token(model.dtype.itemsize)
        self.keys_per_query = architecture.keys_per_query(model.dtype.itemsize)

    @classmethod
    def load(
        cls, source: Path, *, dtype: torch.dtype, device: torch.device = CPU, progress: Progress | None = None
    ) -> "RingModel":
        """The model in the folder ``source``, in the layout of a Hugging Face repository.

        Raises UnsupportedArchitectureError before the weights are read where the configuration tells, else after.
        """
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        architecture = architectures.examine(config)
        architectures.examine_device(architecture, device.type)
        attention.register()
        total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        with _reporting(progress, total):
            model = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, attn_implementation=attention.NAME, local_files_only=True
            )
        return cls.of(model.to(device), architecture)

    @classmethod
    def of(cls, model: Any, architecture: architectures.Architecture | None = None) -> "RingModel":
        """For a model in memory; raises UnsupportedArchitectureError."""
        architecture = architecture or architectures.examine(model.config)
        attention.register()
        model.eval().requires_grad_(False)
        trial.prove(model, architecture)
        return cls(model, architecture)

    # Tables.

    def held(self) -> dict[int, tuple[Run, ...]]:
        """The positions of each sequence that this rank holds, in slot order."""
        rank = self._ring.rank if self._ring is not None else 0
        return {sequence: layout.runs(rank) for sequence, layout in self._layouts.items()}

    def layouts(self) -> Mapping[int, Layout]:
        """Who holds what of each sequence; not to be changed."""
        return self._layouts

    def held_tokens(self) -> int:
        """KV tokens that this rank holds."""
        rank = self._ring.rank if self._ring is not None else 0
        return sum(layout.tokens(rank) for layout in self._layouts.values())

    def bind(self, ring: Ring, layouts: Mapping[int, Layout] | None = None) -> None:
        """Goes on with another ring. This rank keeps the KV of what ``layouts`` gives it and drops all else.

        Without ``layouts`` everything stays as it is, which needs a ring of the same size and rank. Raises ValueError
        where a layout gives this rank positions that it does not hold, or in another order than that of its slots.
        """
        held = self.held()
        if layouts is None:
            if (
                self._ring is not None
                and self._layouts
                and (ring.rank, ring.size) != (self._ring.rank, self._ring.size)
            ):
                raise ValueError(
                    f"The layouts are of rank {self._ring.rank} of {self._ring.size} and the ring has this process as "
                    f"rank {ring.rank} of {ring.size}: they have to be given anew."
                )
        else:
            kept = {
                sequence: _locate(held.get(sequence, ()), layout.runs(ring.rank), sequence)
                for sequence, layout in layouts.items()
            }
            for sequence in set(self._shards) - set(kept):
                del self._shards[sequence]
            for sequence, wanted in kept.items():
                self._shard(sequence).keep(wanted)
            self._layouts = {sequence: layout.copy() for sequence, layout in layouts.items()}
        self._ring = ring

    def _shard(self, sequence: int) -> Shard:
        if sequence not in self._shards:
            self._shards[sequence] = Shard(self.architecture.layers)
        return self._shards[sequence]

    # Steps.

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Does a step: releases, truncations, forks, the decode batch, the window. Raises RingBrokenError.

        A step of another epoch than the ring's is a mistake of the caller, who fences: ValueError.
        """
        ring = self._bound()
        if step.epoch != ring.epoch:
            raise ValueError(f"Step {step.number} is of epoch {step.epoch} and the ring of epoch {ring.epoch}.")
        begin, waited, sent = time.perf_counter(), ring.traffic.waited_seconds, ring.traffic.sent_bytes
        for sequence in step.release:
            self._layouts.pop(sequence, None)
            self._shards.pop(sequence, None)
        for cut in step.truncate:
            self._truncate(cut.sequence, cut.length)
        for fork in step.fork:
            self._fork(fork.parent, fork.child, fork.length)
        rows = [self._decode(ring, step.decode)] if step.decode else []
        if step.window is not None:
            rows.append(self._window(ring, step.window))
        found = [row for row in rows if row is not None]
        return StepResult(
            logits=torch.cat(found) if found else None,
            held_tokens=self.held_tokens(),
            seconds=time.perf_counter() - begin,
            waited_seconds=ring.traffic.waited_seconds - waited,
            sent_bytes=ring.traffic.sent_bytes - sent,
        )

    def _bound(self) -> Ring:
        if self._ring is None:
            raise ValueError("The model is bound to no ring yet.")
        return self._ring

    def _truncate(self, sequence: int, length: int) -> None:
        layout = self._layouts[sequence]
        self._shard(sequence).keep(slots(layout.runs(self._bound().rank), 0, length))
        layout.truncate(length)

    def _fork(self, parent: int, child: int, length: int) -> None:
        layout = self._layouts[parent].copy()
        self._shards[child] = self._shard(parent).copy(slots(layout.runs(self._bound().rank), 0, length))
        layout.truncate(length)
        self._layouts[child] = layout

    def _decode(self, ring: Ring, batch: Sequence[Decode]) -> Tensor | None:
        rows = [Row(self._layouts[one.sequence], self._shard(one.sequence), one.position) for one in batch]
        for row in rows:
            if row.position != row.layout.length:
                raise ValueError(f"The next token's position is {row.layout.length}; it is given as {row.position}.")
        run = DecodePass(ring=ring, rows=rows)
        logits = self._forward(
            torch.tensor([[one.token] for one in batch]),
            torch.tensor([[one.position] for one in batch]),
            run,
            logits=ring.rank == 0,
        )
        ring.settle()
        for row in rows:
            row.layout.append_token(row.position)
        return logits if ring.rank == 0 else None

    def _window(self, ring: Ring, window: Window) -> Tensor | None:
        layout = self._layouts.get(window.sequence) or Layout(ring.size)
        pieces = layout.pieces(window.start, len(window.tokens), window.placement)
        source = 0 if window.placement == "zigzag" else window.placement
        whole = window.placement != "zigzag"
        if whole and any(layout.tokens(rank) for rank in range(ring.size) if rank != source):
            raise ValueError(
                f"A window of sequence {window.sequence} is to lie whole on rank {source}, and other ranks hold some of its KV."
            )
        shard = self._shard(window.sequence)
        logits = None
        if not whole or source == ring.rank:
            run = WindowPass(ring=ring, layout=layout, pieces=pieces, shard=shard, alone=whole)
            where = positions(run.runs(), CPU)
            if not run.rows:  # layers want a token; nothing of it is kept or used
                where = torch.tensor([window.start])
            tokens = torch.tensor(window.tokens)[where - window.start]
            wanted = window.logits and source == ring.rank
            logits = self._forward(tokens[None], where[None], run, logits=wanted)
        if window.logits and source != 0:
            logits = self._bring(ring, source, logits)
        ring.settle()
        layout.append(pieces)
        self._layouts[window.sequence] = layout
        return logits if window.logits and ring.rank == 0 else None

    def _bring(self, ring: Ring, source: int, logits: Tensor | None) -> Tensor | None:
        """Logits from where the last token lies to rank 0."""
        if ring.rank == source and logits is not None:
            ring.post(sends=[(logits.contiguous(), 0)], tag=_LOGITS_TAG).wait()
        elif ring.rank == 0:
            vocabulary = self.config.get_text_config().vocab_size
            logits = torch.empty((1, vocabulary), dtype=torch.float32, device=self._device)
            ring.post(receives=[(logits, source)], tag=_LOGITS_TAG, patient=True).wait()
        return logits

    def _forward(self, tokens: Tensor, where: Tensor, run: Pass, *, logits: bool) -> Tensor:
        """One pass through the layers: logits [B, vocabulary] of each row's last token, or [B, 0]-like where not wanted."""
        keep: int | Tensor = 1 if logits else torch.empty(0, dtype=torch.long, device=self._device)
        out = self._model(
            input_ids=tokens.to(self._device),
            position_ids=where.to(self._device),
            past_key_values=RingCache(self.architecture.layers, run.store),
            use_cache=True,
            logits_to_keep=keep,
            ring=run,
        ).logits
        last: Tensor = out[:, -1].float() if logits else out
        return last


def _locate(held: Sequence[Run], wanted: Sequence[Run], sequence: int) -> tuple[Range, ...]:
    """The slots of the ``wanted`` positions among those ``held`` in slot order."""
    if list(held[: len(wanted)]) == list(wanted):
        total = sum(run.count for run in wanted)
        return (Range(0, total),) if total else ()
    have, want = positions(held, CPU), positions(wanted, CPU)
    order = have.argsort()
    ascending = have[order]
    at = torch.searchsorted(ascending, want).clamp_max(max(0, have.numel() - 1))
    if not have.numel() or not torch.equal(ascending[at], want):
        raise ValueError(f"Sequence {sequence}: this rank is to keep KV of positions that it does not hold.")
    found = order[at]
    steps = found.diff()
    if bool((steps <= 0).any()):
        raise ValueError(f"Sequence {sequence}: this rank is to keep its KV in another order than that of its slots.")
    holes = steps != 1
    begins, lasts = torch.cat([found[:1], found[1:][holes]]), torch.cat([found[:-1][holes], found[-1:]])
    return tuple(Range(begin, last + 1) for begin, last in zip(begins.tolist(), lasts.tolist(), strict=True))


@contextmanager
def _reporting(progress: Progress | None, total: int) -> Iterator[None]:
    """Turns transformers' progress bars into calls of ``progress``; bytes in proportion to the weights that are there."""

    def hook(_factory: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Iterable[Any]:
        items = list(arguments[0] if arguments else options["iterable"])
        for count, item in enumerate(items):
            if progress is not None:
                progress(total * count // len(items), total)
            yield item

    before = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)
    if progress is not None:
        progress(total, total)
