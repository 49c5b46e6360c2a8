"""What several processes of a run do and know together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this one is.

    Every method has to be called by all of them, in the same order. With one process nothing is
    sent.

    Attributes:
        count: How many there are, >= 1.
        rank: Number of this one, from 0; the first one decides and writes.

    Example:
        >>> Processes().same("a value"), Processes().every(7)
        ('a value', [7])
    """

    count: int = 1
    rank: int = 0

    @classmethod
    def all(cls) -> Processes:
        """Those that torch.distributed connects; one if it connects none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_world_size(), dist.get_rank())

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this is the first one."""
        return self.rank == 0

    def same(self, value: T) -> T:
        """The value that the first process has, in all of them."""
        box = [value]
        if self.several:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def every(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.count
        if self.several:
            dist.all_gather_object(values, value)
        return values

    def gathered(self, own: Tensor) -> Tensor:
        """(processes, …): the tensors of all processes, which have one shape; without gradient."""
        own = own.contiguous()  # gloo reads memory as if it were
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own)
        return torch.stack(parts)

    def in_turns(self, own: Iterable[T], total: int) -> Iterator[T]:
        """Results of all processes, which take turns.

        Args:
            own: Results number rank, rank + count, … On the CPU, since they are pickled.
            total: Number of results of all processes.

        Yields:
            All results in order, in every process.

        Raises:
            RuntimeError: If another process failed; without it this one would wait for ever.
        """
        results = iter(own)
        for start in range(0, total, self.count):
            mine: Any = None
            error: Exception | None = None
            try:
                mine = next(results) if start + self.rank < total else None
            except Exception as failure:  # raised below, when all know of it
                error = failure
            turn: list[Any] = self.every((None if error else mine, error and repr(error)))
            if error is not None:
                raise error
            for rank, (_, failed) in enumerate(turn):
                if failed:
                    raise RuntimeError(f"Process {rank} of {self.count} failed: {failed}")
            yield from [value for value, _ in turn[: total - start]]

    @torch.no_grad()
    def add(self, tensor: Tensor) -> Tensor:
        """Sum over processes, equal in all of them to the bit; changes `tensor`."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors by those of the first process, which have the same shapes."""
        if self.several:
            for tensor in tensors:
                tensor.copy_(self.same(tensor.cpu()))  # NCCL takes no tensor of the host

    @torch.no_grad()
    def average_batch_statistics(self, model: nn.Module) -> None:
        """Makes the running statistics of every BatchNorm in training their mean over processes.

        Each process moves its own ones by the batches that it has seen.
        """
        moving = batch_statistics(model) if self.several else []
        if not moving:
            return
        flat = torch.cat([buffer.float().flatten() for buffer in moving])
        mean = self.add(flat) / self.count
        self.copy_from_first([mean])  # bits of a sum could depend on the rank elsewhere
        parts = mean.split([buffer.numel() for buffer in moving])
        for buffer, part in zip(moving, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


ALONE = Processes()


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """Running statistics that a training step of a model moves."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
