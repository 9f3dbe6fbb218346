"""Arrays between sentinels: who writes beyond the end of one is found out."""

import torch

GUARD = 64  # elements on either side; a multiple of what descriptors ask of an address
MOST = 2**22  # larger arrays are left alone
SENTINELS = {torch.float64: 1.2345678e5, torch.float32: 1.2345678e5, torch.float16: 1234.5, torch.bfloat16: 1234.5,
             torch.int64: 0x1234_5678_9ABC, torch.int32: 0x1234_5678}  # fmt: skip


def poison(tensor):
    """Filled with NaN, integers with a huge negative number."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return tensor
    if tensor.is_floating_point():
        tensor.detach().fill_(float("nan"))
    elif tensor.dtype in (torch.int32, torch.int64):
        tensor.fill_(torch.iinfo(tensor.dtype).min // 3)
    return tensor


class Guarded:
    """Makes arrays that lie between sentinels, and remembers them."""

    def __init__(self):
        self.buffers = []

    def between(self, tensor):
        """`tensor` again, elsewhere."""
        if tensor.dtype not in SENTINELS or tensor.device.type == "meta" or tensor.layout != torch.strided:
            return tensor
        if type(tensor) is torch.Tensor and tensor.is_contiguous() and tensor.numel() <= MOST:
            with torch.no_grad():
                buffer = torch.full((tensor.numel() + 2 * GUARD,), SENTINELS[tensor.dtype], dtype=tensor.dtype,
                                    device=tensor.device)  # fmt: skip
                inner = torch.tensor([], dtype=tensor.dtype, device=tensor.device)
                inner.set_(buffer.untyped_storage(), GUARD, tensor.shape, tensor.stride())
                inner.requires_grad_(tensor.requires_grad)
            self.buffers.append(buffer)
            inner.detach().copy_(tensor.detach())
            tensor = inner
        return tensor

    def check(self):
        for buffer in self.buffers:
            sentinel, rest = SENTINELS[buffer.dtype], torch.cat([buffer[:GUARD], buffer[-GUARD:]])
            assert (rest == torch.tensor(sentinel, dtype=buffer.dtype)).all(), (
                f"something wrote outside an array of {len(buffer) - 2 * GUARD} {buffer.dtype}"
            )
