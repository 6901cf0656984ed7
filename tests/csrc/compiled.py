"""csrc/ as nvcc compiles it: its builder, the objects that every test shares, and their machine code."""

import functools
import importlib.util
import itertools
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / "csrc"
_JUMP = re.compile(r"\b(?:BRA|CALL|BSSY|WARPSYNC\.COLLECTIVE)\b.*?\b(0x[0-9a-f]+)$")


def _builder():
    """csrc/build.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


csrc = _builder()


@dataclass
class Kernel:
    """The machine code of one kernel: texts of instructions by their addresses."""

    name: str
    code: dict[int, str]

    def between(self, first: int, last: int) -> list[str]:
        """The instructions at addresses first to last."""
        return [text for address, text in self.code.items() if first <= address <= last]

    def loops(self) -> list[list[str]]:
        """The bodies of innermost loops: from the target of a jump back to the jump."""
        jumps = {a: int(m[1], 16) for a, text in self.code.items() if "BRA" in text and (m := _JUMP.search(text))}
        loops = {(start, a) for a, start in jumps.items() if start < a}
        inner = {(s, e) for s, e in loops if not any(s <= t and u <= e for t, u in loops - {(s, e)})}
        return [self.between(*ends) for ends in sorted(inner)]

    def reachable(self, start: int) -> list[str]:
        """What may run from an address on."""
        following = dict(itertools.pairwise(sorted(self.code)))
        seen, todo = set(), [start]
        while todo:
            address = todo.pop()
            if address is None or address in seen:
                continue
            seen.add(address)
            text = self.code[address]
            if jump := _JUMP.search(text):
                todo.append(int(jump[1], 16))
            if not re.match(r"(BRA 0x|EXIT|RET)", text):  # a predicate stands before it, or between it and its target
                todo.append(following.get(address))
        return [self.code[address] for address in sorted(seen)]


@functools.cache
def kernels(source: str, architecture: str) -> list[Kernel]:
    """The kernels of an object of OBJECTS."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [cuobjdump, "-sass", "-arch", f"sm_{architecture}", OBJECTS / f"{source}.o"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = []
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, listing = part.partition("\n")
        code = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?) ;", listing, flags=re.M)
        found.append(Kernel(name, {int(address, 16): instruction for address, instruction in code}))
    return found
