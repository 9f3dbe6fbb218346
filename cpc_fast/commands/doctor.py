"""`cpc-fast doctor`: what runs here, and what would make it faster."""

from __future__ import annotations

from .console import print_table, say


def doctor() -> int:
    """Say what runs here, and what would make it faster."""
    from ..doctor import examine

    found = examine()
    print_table("Versions", ("what", "version"), found.versions)
    print_table("Devices", ("device", "what it is"), found.devices)
    print_table("What would run", ("op", "device", "implementation", "why"), found.ops)
    print_table(
        "What is here", ("what", "", "why"), [(n, "yes" if yes else "no", why) for n, yes, why in found.features]
    )
    for advice in found.advice:
        say(f"- {advice}")
    return 0
