"""Hosts on one machine: network namespaces with names and addresses of their own, on one switch.

Needs root, iproute2 and util-linux. All of it is gone when the block ends; the machine's own
network is not touched.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.ranks import ROOT

_PORT = "29500"  # every host has all ports for itself


@dataclass(frozen=True)
class Hosts:
    """`count` hosts, called h1, h2, ...; host i has the address 10.0.0.i."""

    prefix: str
    count: int

    def start(self, module: str, *arguments: str) -> list[subprocess.Popen[str]]:
        """`python -m MODULE ARGUMENTS` as one rank on each host, rank 0 on h1."""
        ranks = []
        for rank in range(self.count):
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(self.count),
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "10.0.0.1",
                "MASTER_PORT": _PORT,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "eth0",
            }
            named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"h{rank + 1}"]
            ranks.append(
                subprocess.Popen(
                    [
                        "ip",
                        "netns",
                        "exec",
                        f"{self.prefix}{rank + 1}",
                        *named,
                        sys.executable,
                        "-W",
                        "ignore",
                        "-m",
                        module,
                        *arguments,
                    ],
                    cwd=ROOT,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return ranks

    def cut_off(self, host: int) -> None:
        """Pull the plug of host `host`: what is sent to it is lost without an error."""
        _ip("-n", f"{self.prefix}0", "link", "set", f"port{host}", "down")

    def reconnect(self, host: int) -> None:
        """Put it back."""
        _ip("-n", f"{self.prefix}0", "link", "set", f"port{host}", "up")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """`count` hosts around a switch, which is a namespace too."""
    made = Hosts(f"lbr-{os.getpid()}-", count)
    switch, *names = (f"{made.prefix}{i}" for i in range(count + 1))
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for number, name in enumerate(names, 1):
            port = f"port{number}"
            _ip("netns", "add", name)
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "switch", "up")
            _ip("-n", name, "address", "add", f"10.0.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        yield made
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
