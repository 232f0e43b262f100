"""What two ranks really send: the bytes that leave each rank's network interface, beside those that it counts.

Each rank is a process in a network namespace of its own, as on a machine of its own; a pair of virtual interfaces joins
the two. For each way of `nondual.parallel.demo`, forward and backward together, the interface's counter is read before
and after. Linux, as root, with the command `ip`.

    nox -s bench -- parallel_wire
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import write
from nondual.parallel import traffic
from nondual.parallel.demo import LENGTH, Way, drawn, ways

dist = torch.distributed
SPACES, LINKS, ADDRESSES = ("nondual0", "nondual1"), ("ndveth0", "ndveth1"), ("10.99.7.1", "10.99.7.2")
PORT, SECONDS = 29517, 120


def ip(*arguments: str) -> None:
    """Run the command ip."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def two_networks() -> Iterator[None]:
    """Two network namespaces, joined by a pair of virtual interfaces, while the block runs."""
    try:
        for space in SPACES:
            ip("netns", "add", space)
        ip("link", "add", LINKS[0], "netns", SPACES[0], "type", "veth", "peer", "name", LINKS[1], "netns", SPACES[1])
        for space, link, address in zip(SPACES, LINKS, ADDRESSES):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
            for each in ("lo", link):
                ip("-n", space, "link", "set", each, "up")
        yield
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=20)


def left_the_interface(rank: int) -> int:
    """Bytes that this rank's interface has sent so far, headers included."""
    return int(Path(f"/sys/class/net/{LINKS[rank]}/statistics/tx_bytes").read_text())


def sent(way: Way, rank: int) -> dict[str, Any]:
    """What a rank counts and what its interface sends, in one forward and backward pass."""
    given, gradient = drawn("cpu")
    mine = [way.layout.shard(x, rank, 2).requires_grad_() for x in given[: way.inputs]]
    d_out = way.layout.shard(gradient, rank, 2)
    dist.barrier()
    before = left_the_interface(rank)
    with traffic() as count:
        way.ours(*mine).backward(d_out)
    dist.barrier()
    return {"counted": count.bytes, "wire": left_the_interface(rank) - before}


def as_a_rank(rank: int, file: Path) -> None:
    """One rank's process."""
    torch.set_num_threads(1)
    address = f"tcp://{ADDRESSES[0]}:{PORT}"
    limit = timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=limit)
    found = {way.name: sent(way, rank) for way in ways(2)}
    dist.barrier()
    file.write_text(json.dumps(found))
    dist.destroy_process_group()


def main(options: list[str]) -> None:
    if rank := next((option.removeprefix("--rank=") for option in options if option.startswith("--rank=")), None):
        return as_a_rank(int(rank), Path(os.environ["NONDUAL_WIRE"], rank))
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise SystemExit("parallel_wire makes network namespaces: run it on Linux, as root, with the command ip")
    with tempfile.TemporaryDirectory() as folder, two_networks():
        started = []
        for rank, (space, link) in enumerate(zip(SPACES, LINKS)):
            command = ["ip", "netns", "exec", space, sys.executable, "-m", "benchmarks", "parallel_wire"]
            env = os.environ | {"GLOO_SOCKET_IFNAME": link, "NONDUAL_WIRE": folder}
            started.append(subprocess.Popen([*command, f"--rank={rank}"], env=env))
        try:
            statuses = [process.wait(SECONDS) for process in started]
        finally:
            for process in started:
                process.kill()
        if any(statuses):
            raise SystemExit(f"the ranks ended with the statuses {statuses}")
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(2)]
    figures = {name: [of_rank[name] for of_rank in found] for name in found[0]}
    write("parallel_wire", "nox -s bench -- parallel_wire", {"length": LENGTH, "ways": figures})
