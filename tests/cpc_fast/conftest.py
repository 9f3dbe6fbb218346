"""The shapes that cpc_fast's signatures promise (shapes.py) are checked at every call of every test here.

The hook must come before anything imports these modules. Only those are hooked whose signatures hold such shapes.
"""

import sys
from pathlib import Path

from hypothesis import settings
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))  # `from samples import ...`

CHECKED = ("patches", "shifts", "latents", "contexts", "predictions", "loss", "bank", "anomaly_map", "model", "scoring")
install_import_hook([f"cpc_fast.{name}" for name in CHECKED], "beartype.beartype")

settings.register_profile("fuzz", max_examples=499)  # told apart by its number; see test_fuzz.py
