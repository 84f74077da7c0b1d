"""From the nodes we know to those nearest to a key, asking each the caller's question on the way.

Knows distances and who answered. Does not know what is asked: the question is handed in and returns whom the node
named. The package's crawls go in rounds and wait for the slowest of each; this one goes on with every answer. All the
nearest nodes known are asked at once (in a small swarm that is everybody, in one round trip); it ends when they all
answered, or when a majority did and the rest had its time. Those keep being asked: nobody is cancelled for being slow.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable

from kademlia.crawling import SpiderCrawl
from kademlia.node import Node

from moshpitd.directory.config import DirectoryConfig
from moshpitd.directory.protocol import HardenedProtocol

Question = Callable[[Node], Awaitable[tuple[Node, ...] | None]]
"""Returns whom the node named, None if it was silent."""
Spawn = Callable[[Coroutine[object, object, tuple[Node, ...] | None]], "asyncio.Task[tuple[Node, ...] | None]"]


class Crawl(SpiderCrawl):
    """One walk towards one key."""

    def __init__(
        self,
        protocol: HardenedProtocol,
        target: Node,
        known: Iterable[Node],
        *,
        width: int,
        config: DirectoryConfig,
        spawn: Spawn,
        includes_self: bool,
    ) -> None:
        """`width`: how many of the nearest nodes are sought. `includes_self`: we are one, and count in the majority."""
        super().__init__(protocol, target, list(known), width, width)
        self._config = config
        self._spawn = spawn
        self._own_votes = int(includes_self)
        self._answered: set[bytes] = set()
        self._silent: set[bytes] = set()
        self._asked = 0
        self._running: dict[asyncio.Task[tuple[Node, ...] | None], Node] = {}

    async def find(self, question: Question) -> list[Node]:
        """Asks until done; the nodes that answered, nearest first."""
        loop = asyncio.get_running_loop()
        begun, patience_until = loop.time(), math.inf
        while True:
            self._ask_the_nearest(question)
            awaited = self._awaited()
            missing = [node for node in awaited if node.id not in self._answered]
            if not missing or not self._running:
                break
            votes, electorate = len(awaited) - len(missing) + self._own_votes, len(awaited) + self._own_votes
            if 2 * votes <= electorate or len(awaited) == len(missing):
                patience_until = math.inf
            elif patience_until == math.inf:
                patience_until = loop.time() + max(self._config.linger_s, loop.time() - begun)
            if loop.time() >= patience_until:
                break
            timeout_s = None if patience_until == math.inf else patience_until - loop.time()
            done, _ = await asyncio.wait(self._running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._take(self._running.pop(task), task.result())
        return [node for node in self.nearest if node.id in self._answered]

    def _ask_the_nearest(self, question: Question) -> None:
        for node in self.nearest.get_uncontacted():
            if self._asked == self._config.contacts_per_crawl_max:
                return
            self._asked += 1
            self.nearest.mark_contacted(node)
            self._running[self._spawn(_ask(question, node))] = node

    def _awaited(self) -> list[Node]:
        """The nearest, without those that were silent lately: they are asked, but nobody waits for them while others
        live."""
        nearest = list(self.nearest)
        return [node for node in nearest if not self.protocol.is_suspect(node)] or nearest

    def _take(self, node: Node, named: tuple[Node, ...] | None) -> None:
        if named is None:
            self._silent.add(node.id)
            self.nearest.remove([node.id])
            return
        self._answered.add(node.id)
        self.nearest.push([one for one in named if one.id not in self._silent])


async def _ask(question: Question, node: Node) -> tuple[Node, ...] | None:
    return await question(node)
