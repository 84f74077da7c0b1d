"""Serves the local door with a scripted driver: `python -m tests.local.serve SOCKET [KEEPALIVE_S]`.

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


async def main(path: Path, keepalive_s: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    config = LocalConfig(keepalive_s=keepalive_s, keepalive_timeout_s=keepalive_s)
    server = await LocalServer.open(path, ScriptedDriver(say), ScriptedInfo(), config)  # type: ignore[arg-type]
    say("serving")
    await stop.wait()
    await server.close(5.0)
    say("left")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 10.0))
