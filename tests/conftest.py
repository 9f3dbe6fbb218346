"""What must be settled before any test imports the packages.

Without a GPU, Triton kernels run in its interpreter on CPU tensors; Triton reads this when it is first imported.
The shapes that cpc_fast's signatures promise (shapes.py) are checked at every call.
"""

import os
import sys

import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise RuntimeError("tests/conftest.py must be loaded before anything imports triton.")
    os.environ["TRITON_INTERPRET"] = "1"

# Only the modules whose signatures hold such shapes.
CHECKED = ("patches", "shifts", "latents", "contexts", "predictions", "loss", "bank", "anomaly_map", "model", "scoring")
if any(f"cpc_fast.{name}" in sys.modules for name in CHECKED):
    raise RuntimeError("tests/conftest.py must be loaded before anything imports cpc_fast.")
install_import_hook([f"cpc_fast.{name}" for name in CHECKED], "beartype.beartype")
