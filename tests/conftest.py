"""Without a GPU, Triton kernels run in its interpreter on CPU tensors; Triton reads this when it is first imported."""

import os
import sys

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise RuntimeError("tests/conftest.py must be loaded before anything imports triton.")
    os.environ["TRITON_INTERPRET"] = "1"
