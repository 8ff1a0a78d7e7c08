"""What the benchmarks measure with: times in turn, memory, and what a piece of work is made of."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of a call, and of all that it gives a GPU to do."""
    _finish()
    start = clock()
    run()
    _finish()
    return clock() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call after one warm-up."""
    run()
    return statistics.median(seconds(run) for _ in range(repeats))


def fastest(rounds: int, *runs: Callable[[], object]) -> list[float]:
    """The shortest time of each call: they take turns, and what else a machine does only ever
    makes one longer. Where a single thread computes it is the processor's time, without its waits.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    times = [[seconds(run, clock) for run in runs] for _ in range(rounds)]
    return [min(taken) for taken in zip(*times, strict=True)]


def peak_mib(run: Callable[[], object]) -> float | None:
    """How far a call raises the process's peak memory above what is held before it, in MiB."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(key: str) -> float:
        line = next(x for x in status.read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) / 1024

    try:
        reset.write_text("5")  # the peak starts anew from here
    except OSError:
        return None
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def saved_for_backward(model: nn.Module, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """What `run` gives, and the bytes of the tensors that it keeps for its backward pass, each
    storage once and the model's parameters left out. No values are read: the meta device will do.
    """
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(size for storage, size in sizes.items() if storage not in own), result


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # sizes, strides, type


class Watch(TorchDispatchMode):
    """Counts the operations that run in it: in `operations` those that compute, in `waits` those
    for which a host waits until a GPU has finished. `products` has the operands of matrix products.

    A host waits where a value or a shape depends on data, and for a copy between devices that is
    not asked for as non-blocking.
    """

    PRODUCTS = (aten.mm, aten.addmm, aten.bmm)

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits: Counter[str] = Counter()
        self.products: list[tuple[Layout, Layout]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations += not func.is_view
        if _waits(func, args, kwargs, result):
            self.waits[str(func)] += 1
        if func.overloadpacket in self.PRODUCTS:
            self.products.append((_layout(args[-2]), _layout(args[-1])))
        return result


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    packet = func.overloadpacket
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        # Rows by their numbers need no wait; a mask has first to be counted.
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if packet in (aten._to_copy, aten.copy_):
        source = args[0] if packet is aten._to_copy else args[1]
        asked = kwargs.get("non_blocking") or args[2:3] == (True,)
        return bool(result.device != source.device and not asked)
    wanting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(wanting & set(func.tags))


def _layout(x: Tensor) -> Layout:
    return tuple(x.shape), x.stride(), x.dtype


def replay(products: list[tuple[Layout, Layout]], device: torch.device) -> Callable[[], None]:
    """A call that computes matrix products of these operands and nothing else: no memory is taken,
    and operands of one layout are one tensor.
    """
    kept: dict[Any, Tensor] = {}

    def operand(layout: Layout, role: str) -> Tensor:
        shape, stride, dtype = layout
        if (layout, role) not in kept:
            size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            x = torch.randn(size, dtype=dtype, device=device)
            kept[layout, role] = x.as_strided(shape, stride)
        return kept[layout, role]

    tasks = []
    for a, b in products:
        x, y = operand(a, "left"), operand(b, "right")
        shape = (*x.shape[:-1], y.shape[-1])
        out = kept.setdefault((shape, x.dtype), torch.empty(shape, dtype=x.dtype, device=device))
        tasks.append((torch.bmm if x.ndim == 3 else torch.mm, x, y, out))

    def run() -> None:
        for multiply, x, y, out in tasks:
            multiply(x, y, out=out)

    return run
