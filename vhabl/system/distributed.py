"""The processes that torchrun starts for one command: which of them this is, what they send each
other, and how they end together.

Without torchrun there is one rank, and nothing here changes what a command does.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vhabl.system.errors import Stopped, VhablError, brief, describe_os_error, exit_code, fail

T = TypeVar("T")

# A rank that has little to do waits for those that have days of work. It does not wait for one that
# died: its connection ends, and torchrun stops all.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them; local: its number among those of this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    def device(self, name: str) -> str:
        """The device of this rank: for auto and cuda, one GPU each where there are any."""
        own = self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local}" if own else name

    def everywhere(self, step: Callable[[], T]) -> T:
        """What `step`, in which nothing is sent, gives on this rank once it has ended on all.

        Raises VhablError on rank 0 where the step failed on any rank; the others leave without a
        word and with exit code 0, as torchrun stops all ranks at the first that fails: it has to be
        the one that speaks.
        """
        if self.size == 1:
            return step()
        error: VhablError | OSError | SystemExit | None = None
        try:
            result = step()
        except (VhablError, OSError, SystemExit) as caught:  # the last one is argparse's
            error = caught
        message = describe_os_error(error) if isinstance(error, OSError) else str(error)
        messages = self.gather(message if error is not None else None)
        if all(text is None for text in messages):
            return result
        if self.rank > 0:
            sys.exit(0)
        if error is not None:
            raise error
        raise VhablError(next(text for text in messages if text is not None))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, once all have come here."""
        found = [value] * self.size
        if self.size > 1:
            with self._all_alive():
                dist.all_gather_object(found, value)
        return found

    def part(self, rows: Any) -> Any:
        """This rank's share of the rows of a batch, an array or a tensor: a piece of them, as long
        as those of the others or one longer or shorter.
        """
        begin, end = (len(rows) * number // self.size for number in (self.rank, self.rank + 1))
        return rows[begin:end]

    def counts(self, rows: int) -> list[int]:
        """How many rows of a batch each rank has; rows: this one's."""
        if self.size == 1:
            return [rows]
        found = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        with self._all_alive():
            dist.all_gather(found, torch.tensor(rows))  # on the CPU: no GPU is waited for
        return [int(count) for count in found]

    def whole(self, part: Tensor, counts: list[int]) -> Tensor:
        """All rows [B, ...] of a batch from this rank's share of them. A gradient goes back to the
        rank that has the row, and once: it is of one loss, which every rank computes of all rows.
        """
        if self.size == 1:
            return part
        if part.dtype == torch.bool:  # which not every backend sends
            return self.whole(part.byte(), counts).bool()
        whole: Tensor = _Whole.apply(part, counts, self)
        return whole

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, and of the gradients that come back."""
        total: Tensor = x if self.size == 1 else _Total.apply(x, self)
        return total

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of parameters that each rank has used for its share of a batch."""
        if self.size > 1:
            self._at_once(dist.all_reduce, [p.grad for p in parameters if p.grad is not None])

    def agree(self, module: nn.Module) -> None:
        """Take over the parameters and buffers of rank 0."""
        if self.size > 1:
            tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
            self._at_once(lambda t, async_op: dist.broadcast(t, 0, async_op=async_op), tensors)

    @contextmanager
    def own_stream(self, device: torch.device) -> Iterator[None]:
        """Random numbers of this rank's own; the stream that all ranks share goes on as one."""
        if self.size == 1:
            yield
            return
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield

    def _at_once(self, send: Callable[..., Any], tensors: list[Tensor]) -> None:
        with self._all_alive():
            for work in [send(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    @contextmanager
    def _all_alive(self) -> Iterator[None]:
        """Raises VhablError where a rank died while another one waits for it."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a connection was closed
            do = f"All {self.size} are needed to the end: run the command again"
            fail("processes", f"one died or cannot be reached ({brief(error)})", do)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, counts: list[int], here: Ranks) -> Tensor:
        ctx.begin, ctx.end = sum(counts[: here.rank]), sum(counts[: here.rank + 1])
        own = part.new_zeros(max(counts), *part.shape[1:])  # what all can gather is of one size
        own[: len(part)] = part
        padded = [torch.empty_like(own) for _ in counts]
        with here._all_alive():
            dist.all_gather(padded, own)
        return torch.cat([rows[:count] for rows, count in zip(padded, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.begin : ctx.end], None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, here: Ranks) -> Tensor:
        ctx.here = here
        total = x.clone()
        with here._all_alive():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.here.total(gradients[0]), None


ALONE = Ranks()


class GlobalBatchNorm(_BatchNorm):
    """Batch normalisation by the statistics of the whole batch, of which each rank has a share, on
    any device (torch's own SyncBatchNorm is for GPUs alone).
    """

    ranks: Ranks

    @classmethod
    def convert(cls, module: nn.Module, here: Ranks) -> None:
        """Make every batch normalisation below a module one of these, its tensors as they are."""
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                part.__class__ = cls
                part.ranks = here  # type: ignore[assignment]

    def _check_input_dim(self, input: Tensor) -> None:  # any will do
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        x = wide.transpose(0, 1).flatten(1)  # [C, all else]
        count = self.ranks.total(x.new_full((), x.shape[1]))  # no copy that the host waits for
        mean = self.ranks.total(x.sum(dim=1)) / count
        variance = self.ranks.total((x - mean.unsqueeze(1)).square().sum(dim=1)) / count
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None and self.momentum is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        shape = (1, -1, *[1] * (input.dim() - 2))
        scale = (variance + self.eps).rsqrt()
        y = (wide - mean.view(shape)) * scale.view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started, connected to the others. Only rank 0 prints.

    An error that ends one rank while others wait for what it sends is said by that rank, and those
    that its end reaches leave without a word.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    every_gpu = gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if every_gpu else "gloo",
        store=store, rank=rank, world_size=size, timeout=PATIENCE,
    )  # fmt: skip
    try:
        with _muted(rank > 0):
            yield Ranks(rank, size, int(os.environ["LOCAL_RANK"]))
    except BaseException as error:
        # NCCL takes leave of the others together, while they wait for what this rank sends: it is
        # not asked to, and when all is said the process ends without its destructors.
        known = isinstance(error, VhablError | OSError | Stopped)
        again = known and store.add("ranks that met an error", 1) > 1
        atexit.register(_end, 0 if again else exit_code(error))
        if again:
            sys.exit(0)
        raise
    dist.destroy_process_group()


def _end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody hears it
            stream.flush()
    os._exit(code)


@contextmanager
def _muted(silent: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if silent:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield
