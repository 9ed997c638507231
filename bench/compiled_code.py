"""What a compiled kernel's text and binary tell of it: registers, stack, widths of its accesses, loading ahead."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton.backends.nvidia


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and stack bytes, as cuobjdump reads them from the binary."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", out)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {out!r}")
    return int(match[1]), int(match[2])


def width_of(instruction: str) -> int:
    """Bytes that one thread moves by a PTX access such as ld.global.v4.b32."""
    vector = re.search(r"\.v(\d)", instruction)
    bits = re.search(r"\.[bufs](\d+)$", instruction)
    assert bits is not None, instruction
    return (int(vector[1]) if vector else 1) * int(bits[1]) // 8


def access_widths(ptx: str, wanted: set[int]) -> list[int]:
    """Widths of the global loads and stores, and copies to shared memory, whose address derives from one of the
    kernel's pointer parameters `wanted`.

    PTX is in static single assignment but for loop-carried registers, so following definitions backwards finds the
    parameters.
    """
    parents: dict[str, set[str]] = {}
    origin: dict[str, int] = {}
    uses: list[tuple[str, int]] = []
    for line in ptx.splitlines():
        code = line.split("//")[0].strip().removesuffix(";")
        code = re.sub(r"^@!?%p\d+\s+", "", code)
        access = re.match(r"((?:ld|st)\.global[.\w:]*)\s", code)
        ahead = re.match(r"cp\.async\.\w+\.shared\.global[.\w:]* \[.*?\], \[\s*(%\w+).*?\], (\w+)", code)
        if access:
            address = re.search(r"\[\s*(%\w+)", code)
            assert address is not None, code
            uses.append((address[1], width_of(re.sub(r"\.L\d::\w+", "", access[1]))))
        elif ahead:
            uses.append((ahead[1], int(ahead[2], 0)))
        if parameter := re.match(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]", code):
            origin[parameter[1]] = int(parameter[2])
        elif not (access or ahead) and (registers := re.findall(r"%rd\d+", code)):
            parents.setdefault(registers[0], set()).update(registers[1:])
    widths = []
    for register, width in uses:
        seen, stack = set(), [register]
        while stack:
            r = stack.pop()
            if r not in seen:
                seen.add(r)
                stack.extend(parents.get(r, ()))
        if wanted & {origin[r] for r in seen if r in origin}:
            widths.append(width)
    return widths


def loads_ahead(ttgir: str) -> bool:
    """Whether each loop waits for copies, and each wait leaves later ones under way."""
    loops = [text.partition("scf.yield")[0] for text in ttgir.split("scf.for")[1:]]
    waits = [re.findall(r"ttg\.async_wait .*?num = (\d+)", loop) for loop in loops]
    return bool(loops) and all(found and all(int(n) > 0 for n in found) for found in waits)
