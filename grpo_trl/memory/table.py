"""A plan as a table, and sizes as text."""

import re
from collections.abc import Sequence

from rich.table import Table

from .changes import Advice
from .plan import PHASES, RESIDENT, Plan

UNITS = {"B": 1} | {
    f"{p}{end}": base ** (i + 1) for end, base in (("iB", 1024), ("B", 1000)) for i, p in enumerate("KMGT")
}


def parse_size(text: str) -> int:
    """`24GiB` -> bytes; units are those of `UNITS`, in any case.

    Raises:
        ValueError: text that is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    units = {name.lower(): size for name, size in UNITS.items()}
    if not found or found[2].lower() not in units or float(found[1]) == 0:
        raise ValueError(f"--memory {text!r} is no size; give a number with a unit, e.g. 24GiB ({', '.join(UNITS)}).")
    return int(float(found[1]) * units[found[2].lower()])


def size_text(size: int) -> str:
    """Bytes in GiB, or in MiB where that is less than a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def plan_table(plan: Plan) -> Table:
    """A column per device: what it holds, the peak of each phase, and whether that fits."""
    table = Table("", *plan.devices, title="Memory, planned")
    devices = list(plan.devices.values())
    for name in (*RESIDENT, *(name for names in PHASES.values() for name in names)):
        if any(device.items[name] for device in devices):
            table.add_row(name, *(size_text(device.items[name]) if device.items[name] else "" for device in devices))
    table.add_section()
    for phase in PHASES:
        table.add_row(f"peak of {phase}", *(size_text(device.phases[phase]) for device in devices))
    table.add_section()
    table.add_row("available", *(size_text(device.available) for device in devices))
    table.add_row("fits", *("yes" if device.strain <= 1 else "no" for device in devices))
    return table


def advice_lines(plan: Plan, ranked: Sequence[Advice]) -> list[str]:
    """The changes, the best first, each with the peak of the fullest device with it."""
    if not ranked:
        return ["No single change that is tried here (docs/memory.md) lowers the highest peak."]
    before = size_text(plan.fullest.peak)
    return ["What helps most, one change at a time:"] + [
        f"{rank}. {advice.change}: {size_text(advice.plan.fullest.peak)} instead of {before}"
        for rank, advice in enumerate(ranked, 1)
    ]
