import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # `from samples import ...`

settings.register_profile("fuzz", max_examples=499)  # told apart by its number; see test_fuzz.py
