"""What every Triton launcher needs: the device, the precision, the split of the work, descriptors, and named ranges.

Nothing here waits for the device. One environment variable counts, TRITON_INTERPRET, and Triton itself reads it.
"""

import contextlib
import functools
from importlib import metadata

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .ranges import stage


def interpreted() -> bool:
    """True under TRITON_INTERPRET=1: kernels run on the CPU, as numpy."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _arch(device: torch.device) -> str:
    if interpreted():
        if TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy := metadata.version("numpy")) >= "2.4":
            raise RuntimeError(
                "The interpreter of Triton before 3.7 needs NumPy before 2.4. Here are Triton "
                f"{triton.__version__} and NumPy {numpy}; pip install 'numpy<2.4', or a newer Triton."
            )
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return tiles.architecture(properties.gcnArchName)
    return tiles.architecture((properties.major, properties.minor))


@functools.cache
def _units(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def default_precision(device: torch.device) -> str:
    """How float32 tiles multiply unless told: as torch's own products on that device.

    "tf32" where `torch.backends.cuda.matmul.fp32_precision` is "tf32" (as `set_float32_matmul_precision("high")` makes
    it), otherwise "tf32x3": three tf32 products on the matrix units, within a few roundings of float32, where "ieee"
    would leave the matrix units idle. On AMD "ieee".
    """
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def sixteens(tensor: Tensor) -> Tensor:
    """Zeros appended until the features are a multiple of 16, as stores of whole rows need them."""
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % 16))


class Launch:
    """Launches kernels for one op on one tensor's device, in its dtype."""

    def __init__(self, name: str, tensor: Tensor, input_precision: str | None = None):
        if input_precision not in (None, "tf32", "tf32x3", "ieee"):
            raise ValueError(f'{name}: input_precision must be "tf32", "tf32x3" or "ieee". Got {input_precision!r}.')
        self.name, self.device, self.dtype = name, tensor.device, tensor.dtype
        self.arch = _arch(self.device)
        wide = self.dtype == torch.float64
        self.accumulator = torch.float64 if wide else torch.float32
        self.acc = tl.float64 if wide else tl.float32
        self.precision = "ieee"
        if self.dtype == torch.float32:
            self.precision = input_precision or default_precision(self.device)
        self.width = 16 if self.dtype.itemsize == 2 else 32
        self.upcast = self.arch == "interpreter" and self.dtype == torch.bfloat16

    def tile(self, op: str, d: int, *, ids: bool = False) -> tiles.Tile:
        return tiles.tile(op + ("+ids" if ids else ""), d, self.width, self.arch, self.precision)

    def dot(self) -> dict:
        """The constants that a kernel with a product takes."""
        return {"ACC": self.acc, "PRECISION": self.precision, "UPCAST": self.upcast}

    def split(self, row_tiles: int, streamed: int, columns: int, splits: int | None) -> tuple[int, int]:
        """Length of a piece of the streamed side (a multiple of `columns`), and how many pieces there are."""
        steps = triton.cdiv(streamed, columns)
        splits = splits or tiles.splits(row_tiles, steps, _units(self.device))
        size = max(1, triton.cdiv(steps, max(1, min(splits, steps)))) * columns
        return size, max(1, triton.cdiv(streamed, size))

    def rows(self, tensor: Tensor, features: int, descriptors: bool) -> Tensor:
        """The tensor as tiles read it, a copy where it lies otherwise: its rows side by side, 16 elements apart or a
        multiple; for pointers as wide as whole tiles, because masks over features take registers of the loop."""
        d = tensor.shape[1]
        wide = d if descriptors else triton.cdiv(d, features) * features
        aligned = tensor.stride(0) % 16 == 0 and tensor.data_ptr() % 16 == 0
        if wide == d and tensor.stride(1) == 1 and tensor.stride(0) >= d and aligned:
            return tensor
        if wide == d:  # contiguous() would take one row of a wider buffer as it lies
            return tensor.clone(memory_format=torch.contiguous_format)
        return torch.nn.functional.pad(tensor, (0, wide - d))

    def describe(self, tensor: Tensor, rows: int, features: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, features])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b with fp32 results (fp64 for fp64): rounding scores to 16 bits would cost the small losses."""
        if self.dtype.itemsize > 2:
            return a @ b
        if self.device.type == "cuda" and not torch.version.hip:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()

    def range(self, name: str):
        return stage(self.name, name, self.device)

    def __call__(self, name: str, kernel, grid: tuple[int, ...], *args, **options) -> None:
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device, self.range(name):
            kernel[grid](*args, **options)
