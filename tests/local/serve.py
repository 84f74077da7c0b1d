"""Serves the local door with a scripted driver: `python -m tests.local.serve SOCKET [KEEPALIVE_S [SHARED_MEMORY_DIR]]`.

Prints one line for everything that happens, `serving` first. SIGTERM drains and closes.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from moshpitd.local.server import LocalConfig, LocalServer
from tests.local.scripted import ScriptedDriver, ScriptedInfo


def say(line: str) -> None:
    print(line, flush=True)


async def main(path: Path, keepalive_s: float, shared_memory_dir: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    config = LocalConfig(keepalive_s=keepalive_s, keepalive_timeout_s=keepalive_s, shared_memory_dir=shared_memory_dir)
    server = await LocalServer.open(path, ScriptedDriver(say), ScriptedInfo(), config)  # type: ignore[arg-type]
    say("serving")
    await stop.wait()
    await server.close(5.0)
    say("left")


if __name__ == "__main__":
    socket, *more = sys.argv[1:]
    keepalive_s, shared_memory_dir = (*more, *("10", "auto")[len(more) :])
    asyncio.run(main(Path(socket), float(keepalive_s), shared_memory_dir))
