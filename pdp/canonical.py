"""The canonical form of large data, made in a process of its own: parsing tens of MiB holds an interpreter up for a second, and with it
every request."""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from mesh.policy import canonical_data

SMALL: Final = 256 << 10
"""Bytes of data that are no more than a few milliseconds."""
_PATIENCE: Final = 120.0


async def canonical(data: bytes) -> bytes:
    """As `mesh.policy.canonical_data`. Raises ValueError; RuntimeError when the process could not do it."""
    if len(data) <= SMALL:
        return canonical_data(data)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pdp.canonical", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        async with asyncio.timeout(_PATIENCE):
            made, _ = await process.communicate(data)
    except TimeoutError:
        raise RuntimeError(f"its {len(data)} bytes of data were not read within {_PATIENCE:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return made
    if process.returncode == 1 and made:
        raise ValueError(made.decode())
    raise RuntimeError(f"the process that reads its {len(data)} bytes of data ended with {process.returncode}")


def main() -> int:
    """Reads data from standard input, and writes its canonical form, or what is wrong with it, to standard output."""
    try:
        made, code = canonical_data(sys.stdin.buffer.read()), 0
    except ValueError as problem:
        made, code = str(problem).encode(), 1
    sys.stdout.buffer.write(made)
    return code


if __name__ == "__main__":
    sys.exit(main())
