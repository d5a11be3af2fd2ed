"""Two machines: two torchrun agents, in network namespaces of their own where that is allowed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from symprune_lightning import load_masks
from tests.cli.commands import small
from tests.groups import free_port

ADDRESSES = ("10.213.7.1", "10.213.7.2")


@contextmanager
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces that are joined by a pair of virtual devices."""
    names = [f"symprune-{os.getpid()}-{number}" for number in range(2)]
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        first, second = names
        pair = ("link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", second)
        ip("-n", first, *pair)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def torchrun(
    rank: int, address: str, port: int, prefix: list[str], options: list[str]
) -> subprocess.Popen:
    command = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
    command += ["--master-addr", address, "--master-port", str(port)]
    command += ["-m", "symprune_lightning.cli.main", "prune", *options]
    interface = {"GLOO_SOCKET_IFNAME": "veth0"} if prefix else {}
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "torch.distributed.run", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **interface},
    )


@pytest.fixture(params=["loopback", "namespaces"])
def nodes(request) -> Iterator[tuple[str, list[list[str]]]]:
    """Address of the first node, and what to put in front of the command on each."""
    if request.param == "loopback":
        yield "127.0.0.1", [[], []]
        return
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    with ExitStack() as stack:
        try:
            names = stack.enter_context(namespaces())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr}")
        yield ADDRESSES[0], [["ip", "netns", "exec", name] for name in names]


def test_two_nodes_prune_as_one_process(project: Path, symprune, nodes):
    options = ["--config", "ria-exactswap", *map(str, small(project))]
    symprune("prune", *options, "--output", project / "single")
    address, prefixes = nodes
    options += ["--trainer.strategy", "ddp", "--trainer.num_nodes", "2"]
    options += ["--trainer.devices", "1", "--output", str(project / "pruned")]
    port = free_port()
    with ExitStack() as stack:
        agents = [torchrun(rank, address, port, prefixes[rank], options) for rank in range(2)]
        for agent in agents:
            stack.callback(agent.terminate)  # also ends its worker; without effect once it ended
        outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert load_masks(project / "pruned") == load_masks(project / "single")
