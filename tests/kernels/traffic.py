"""What interpreted kernels do to memory, address by address: accesses out of bounds and races between programs.

A launch may touch only what lies between the ends of the arrays that it was given (of views side by side in one
storage: of all of them). Programs run in any order and at once, so an address is written by one program, once, and read
in the same launch by that program alone, before. What atomics add to may meet, and is neither read nor written. Not
seen: races inside a program, and elements of different sizes that overlap.
"""

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor


class Traffic:
    """The addresses of one launch after the other."""

    def __init__(self, monkeypatch):
        self.spans = None
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
            monkeypatch.setattr(InterpreterBuilder, name, self._watched(name, getattr(InterpreterBuilder, name)))
        begin, end = GridExecutor._init_args_hst, GridExecutor._restore_args_dev

        def begun(executor, args, kwargs):
            args, kwargs = begin(executor, args, kwargs)
            self.begin(executor.fn.__name__, [*args, *kwargs.values()])
            return args, kwargs

        def ended(executor, *args):
            self.end()
            return end(executor, *args)

        monkeypatch.setattr(GridExecutor, "_init_args_hst", begun)
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", ended)

    def _watched(self, name, real):
        kind = name.rsplit("_", 1)[1]

        def call(builder, *args, **kwargs):
            pointers, mask = {"rmw": (1, 3), "load": (0, 1), "store": (0, 2), "cas": (0, None)}[kind]
            self.touch("rmw" if kind == "cas" else kind, args[pointers], mask and args[mask], builder.grid_idx)
            return real(builder, *args, **kwargs)

        return call

    def begin(self, kernel, arguments):
        arrays = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
        spans = []
        for a in (a for a in arrays if hasattr(a, "data_ptr") and a.numel()):
            last = sum((size - 1) * stride for size, stride in zip(a.shape, a.stride(), strict=True))
            spans.append((a.data_ptr(), a.data_ptr() + (last + 1) * a.element_size()))
        merged = []
        for start, stop in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(stop, merged[-1][1])
            else:
                merged.append([start, stop])
        self.kernel, self.spans = kernel, np.array(merged, np.uint64).reshape(-1, 2)
        self.time = 0
        self.touched = {kind: [] for kind in ("load", "store", "rmw")}

    def touch(self, kind, pointers, mask, program):
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = addresses.ravel().astype(np.uint64)
        size = np.uint64(max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8))
        at = np.searchsorted(self.spans[:, 0], addresses, "right").astype(np.int64) - 1
        inside = (at >= 0) & (addresses + size <= self.spans[at.clip(0), 1])
        assert inside.all(), (
            f"{self.kernel}, program {program}: {kind} of {np.count_nonzero(~inside)} elements outside of its arrays, "
            f"the first {self._beside(addresses[~inside][0])}"
        )
        number = np.ravel_multi_index(program, (2**20,) * 3)
        once = addresses if kind == "store" else np.unique(addresses)
        self.time += 1
        self.touched[kind].append(np.stack([once.astype(np.int64), *np.full((2, len(once)), [[number], [self.time]])]))

    def _beside(self, address):
        ends = self.spans.ravel().astype(np.int64)
        return f"{np.abs(ends - np.int64(address)).min()} bytes from an end"

    def end(self):
        loads, stores, adds = (
            np.concatenate([np.empty((3, 0), np.int64), *self.touched[kind]], 1) for kind in ("load", "store", "rmw")
        )
        written, first = np.unique(stores[0], return_index=True)
        twice = stores.shape[1] - len(written)
        assert not twice, f"{self.kernel} writes {twice} elements more than once"
        for what, some in (("reads", loads), ("writes", stores)):
            both = np.intersect1d(some[0], adds[0])
            assert not len(both), f"{self.kernel} {what} and adds to {len(both)} elements in one launch"
        if len(written):  # in place: by the program that writes, and before
            at = np.searchsorted(written, loads[0]).clip(0, len(written) - 1)
            _, writer, when = stores[:, first[at]]
            late = (written[at] == loads[0]) & ((writer != loads[1]) | (when < loads[2]))
            assert not late.any(), f"{self.kernel} reads {np.count_nonzero(late)} elements that it may have written"
