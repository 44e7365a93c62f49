"""What has to be found after a power cut: everything that was acknowledged, and nothing that was never begun.

Each checkpoint, tag and generation is a register. Before the guest changes one it says what it may become, afterwards
what it is; between the two both count. What is found after a power cut is what it is from then on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

Value = str | None
"""What a register holds, in few letters; None when it isn't there."""
SOMETHING = "?"
"""Said by who can't know yet what a register will hold, but that it will be there."""


class Judge:
    """Hears what the guest does, and compares it with what it finds."""

    def __init__(self) -> None:
        self._allowed: defaultdict[str, set[Value]] = defaultdict(lambda: {None})

    def may(self, register: str, value: Value) -> None:
        """Hear that a register may become `value` from now on."""
        self._allowed[register].add(value)

    def did(self, register: str, value: Value) -> None:
        """Hear that it has become that, durably."""
        self._allowed[register] = {value}

    def found(self, registers: Mapping[str, str]) -> list[str]:
        """Return what is wrong with what was found, in words; it is taken for the truth from now on."""
        wrong = []
        for register in sorted({*self._allowed, *registers}):
            value, allowed = registers.get(register), self._allowed[register]
            if value in allowed or (value is not None and SOMETHING in allowed):
                continue
            if value is None:
                wrong.append(f"{register} was acknowledged and is gone")
            elif allowed == {None}:
                wrong.append(f"{register} is there, but was removed or never begun")
            else:
                wrong.append(f"{register} is {value}, not {' or '.join(sorted(map(str, allowed)))}")
        self._allowed.clear()
        self._allowed.update({register: {value} for register, value in registers.items()})
        return wrong
