"""Which node is which device."""

from __future__ import annotations

import time
from logging import getLogger

from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from federated.flower.records import count_of, reason_of, record_of

LOG = getLogger("flwr.federated")  # below Flower's own, which prints


class Nodes:
    """The nodes of a run, each with the device that it says it is.

    Args:
        num_devices: M.
        timeout: seconds to wait for answers.
    """

    def __init__(self, num_devices: int, timeout: float) -> None:
        self.num_devices, self.timeout = num_devices, timeout
        self.of: dict[int, int] = {}  # device → node
        self._says: dict[int, int] = {}  # node → device, as it says

    def meet(self, grid: Grid, silent: set[int]) -> set[int]:
        """Ask the nodes that are new which device they are, and settle which node is which device.

        A device stays with its node while that is there and answers, so that nobody takes its place.

        Args:
            grid: where the nodes are.
            silent: devices that did not answer when they were asked last.

        Returns:
            The devices that have another node than before: it remembers nothing.

        Raises:
            RuntimeError: no node is a device.
        """
        there = list(grid.get_node_ids())
        new = [node for node in there if node not in self._says]
        if new:
            self._ask(grid, new)
        moved, missing = set(), []
        for device in range(self.num_devices):
            found = [node for node, number in self._says.items() if number == device and node in there]
            before = self.of.pop(device, None)
            now = self._node_of(found, before, device in silent)
            if now is None:
                missing.append(device)
                continue
            if now != before:
                moved.add(device)
            self.of[device] = now
            for node in set(found) & set(new) - {now}:
                LOG.warning("node %d says that it is device %d, which node %d is", node, device, now)
        if not self.of:
            raise RuntimeError(f"the nodes must be devices 0 to {self.num_devices - 1}, none of {len(there)} is")
        if missing:
            LOG.warning("devices %s have no node, and are late until one comes", missing)
        return moved

    def _ask(self, grid: Grid, new: list[int]) -> None:
        """Ask some nodes which device they are."""
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
        for reply in grid.send_and_receive(questions, timeout=self.timeout):
            node = reply.metadata.src_node_id
            try:
                if not reply.has_content():
                    raise ValueError(reason_of(reply))
                metrics = record_of(reply.content, "metrics", MetricRecord)
                self._says[node] = count_of(metrics, "device", 0, self.num_devices - 1)
            except ValueError as error:
                LOG.warning("node %d is no device of this run: %s", node, error)

    @staticmethod
    def _node_of(found: list[int], before: int | None, silent: bool) -> int | None:
        """Choose a device's node among those found, the oldest first: the one before, if it is there and answers."""
        now = before if before is not None or not found else found[0]
        if now in found and not silent:
            return now
        return next((node for node in reversed(found) if node != now), now if now in found else None)


def wait_for_nodes(grid: Grid, count: int, what: str, timeout: float) -> list[int]:
    """Return the ids of all nodes as soon as there are `count` of them.

    Raises:
        RuntimeError: fewer came within `timeout` seconds; `what` is what the sentence calls them.
    """
    end = time.monotonic() + timeout
    while len(found := list(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise RuntimeError(f"{count} {what} are needed, {len(found)} came in {timeout:.0f} s")
        time.sleep(0.2)  # a Grid has no call that waits for nodes
    return found
