"""Training in several processes (Hugging Face Accelerate; gloo between CPUs, NCCL between GPUs).

Every process has the whole model, draws the same batches and takes its share of each. Sums over
the processes then give what one process would have computed. The first one decides and writes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce
from torch import Tensor, nn

from ..errors import MendkitError
from ..runs import locked

T = TypeVar("T")

# How long a process waits for the others: the first may validate or fetch a model meanwhile.
TIMEOUT = timedelta(hours=1)


class Team:
    """The processes that train together. `device` is the hyperparameter."""

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.size = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun, accelerate launch
            on_cpu = device == "cpu" or not torch.cuda.is_available()
            self._state = PartialState(cpu=on_cpu, timeout=TIMEOUT)
            self.rank, self.size = self._state.process_index, self._state.num_processes

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every `size`-th item."""
        return items[self.rank :: self.size]

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the processes."""
        if self.size == 1:
            return x
        return reduce(x.to(self._state.device), reduction="sum").to(x.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, in one exchange."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        whole = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = whole.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def align(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers, bit for bit."""
        if self.size > 1:
            for value in module.state_dict().values():
                value.copy_(broadcast(value.to(self._state.device)))

    def first(self, act: Callable[[], T]) -> T:
        """What `act()` returns in the first process; its error is a MendkitError in the others."""
        if self.size == 1:
            return act()
        said: list[Any] = [None, None]  # result, error
        if self.rank == 0:
            try:
                said[0] = act()
            except Exception as error:
                broadcast_object_list([None, f"{type(error).__name__}: {error}"])
                raise
        broadcast_object_list(said)
        if said[1] is not None:
            raise MendkitError(f"the first process stopped with {said[1]}")
        return said[0]

    @contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Within the context no other run may use the folder (`runs.locked`)."""
        with ExitStack() as stack:
            self.first(lambda: stack.enter_context(locked(folder)))
            yield

    def leave(self) -> None:
        """Close the connections; call it when all is done."""
        if self.size > 1:
            self._state.destroy_process_group()
