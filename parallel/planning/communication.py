"""Time of collectives: rings over processes that a layout lays over nodes."""

from dataclasses import dataclass, replace
from typing import Self

from parallel.planning.hardware import Device, Network


@dataclass(frozen=True)
class Cluster:
    """Equal nodes.

    Attributes:
        device: of each process.
        devices_per_node: processes that share a node.
        network: between nodes; None: there is one node.
    """

    device: Device
    devices_per_node: int
    network: Network | None

    def of(self, world_size: int) -> Self:
        """What so many processes use of it: no network where one node holds them all."""
        return replace(self, network=None) if world_size <= self.devices_per_node else self

    def _link(self, span: int, at_once: int) -> tuple[float, float]:
        """Bytes per second and latency of `at_once` rings that together are so many consecutive ranks."""
        if self.network is None or self.devices_per_node % span == 0:
            return self.device.link_bytes_per_second, self.device.link_latency
        rate = self.network.bytes_per_second * self.network.efficiency
        return rate / (min(self.devices_per_node, at_once) if self.network.shared else 1), self.network.latency

    def all_reduce(self, size: float, members: int, span: int, pieces: int = 1) -> float:
        """Seconds of sums of `size` bytes over all members, so many pieces of it one after the other.

        Each member sends twice the others' parts.
        """
        if members == 1:
            return 0.0
        rate, latency = self._link(span, span // members)
        return 2.0 * (members - 1) * (size / members / rate + pieces * latency)

    def all_gather(self, size: float, members: int, span: int, pieces: int = 1) -> float:
        """Seconds in which every member has all of `size` bytes, or, of a reduce-scatter, its part of the sums."""
        return self.device.gather_cost * self.all_reduce(size, members, span, pieces)

    def send(self, size: float, span: int, at_once: int) -> float:
        """Seconds of messages from so many processes to as many others, all within so many consecutive ranks."""
        rate, latency = self._link(span, at_once)
        return size / rate + latency
