"""Cases over two hosts with addresses of their own: network namespaces of this machine, which a link joins."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
MAX_FAULT_S = 15.0
ADDRESSES = {"one": "10.0.0.1", "two": "10.0.0.2"}
ZERO = ["zero"] if importlib.util.find_spec("deepspeed") else []
TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")


class Host:
    """A network namespace with a name of its own, which ends with this process.

    As on Debian, its own name stands for a loopback address there.
    """

    def __init__(self, name, folder):
        hosts = folder / f"hosts-{name}"
        others = [f"{address} {other}" for other, address in ADDRESSES.items() if other != name]
        hosts.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]) + "\n")
        script = f"hostname {name} && mount --bind {hosts} /etc/hosts && echo ready && exec cat"
        self.name = name
        self.process = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.is_ready = self.process.stdout.readline() == "ready\n"

    def inside(self, *command):
        """The command that runs ``command`` on this host."""
        return ["nsenter", "--target", str(self.process.pid), "--net", "--uts", "--mount", *command]

    def pids(self):
        """Processes of this host."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    found |= {int(entry.name)} if (entry / "ns/net").readlink() == self._space else set()
        return found - {self.process.pid}

    @property
    def _space(self):
        return Path(f"/proc/{self.process.pid}/ns/net").readlink()

    def close(self):
        self.process.communicate(timeout=10)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two hosts; a test is skipped where this user cannot make them."""
    if sys.platform != "linux" or os.geteuid() or not all(map(shutil.which, TOOLS)):
        pytest.skip("network namespaces need Linux, root, and the tools of iproute2 and util-linux")
    folder = tmp_path_factory.mktemp("hosts")
    found = [Host(name, folder) for name in ADDRESSES]
    try:
        if not all(host.is_ready for host in found):
            pytest.skip("this user may make no network namespaces")
        one, two = found
        pair = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(two.process.pid)]
        if subprocess.run(one.inside(*pair), stderr=subprocess.DEVNULL).returncode:
            pytest.skip("this kernel joins no network namespaces")
        for host in found:
            for command in (
                ("addr", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
            ):
                subprocess.run(host.inside("ip", *command), check=True)
            subprocess.run(host.inside("ip", "link", "set", "lo", "up"), check=True)
        yield found
    finally:
        for host in found:
            host.close()


@pytest.fixture(scope="module")
def ended(hosts, tmp_path_factory):
    """Three cases over both hosts: two that run well, and one in which the second host's link is cut."""
    folder = tmp_path_factory.mktemp("cases")
    base = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    base |= {"MASTER_ADDR": "one", "MASTER_PORT": "29500", "CUT_FILE": str(folder / "cut")}
    base.pop("GLOO_SOCKET_IFNAME", None)
    started = [
        subprocess.Popen(
            host.inside(sys.executable, str(HERE / "host_rank.py"), str(folder), "well", *ZERO, "cut"),
            env={**base, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]
    (out, err), (_, other_err) = [process.communicate(timeout=180) for process in started]
    assert started[0].returncode == 0, err + other_err
    return [json.loads(line) for line in out.splitlines()], other_err, float((folder / "cut").read_text())


def test_a_case_runs_over_hosts_whose_own_names_are_loopback_addresses(ended):
    (result, *_), _, _ = ended
    assert (result["outcome"], result["error"]) == ("ok", None)
    assert [rank["host"] for rank in result["world"]["ranks"]] == list(ADDRESSES)


@pytest.mark.skipif(not ZERO, reason="deepspeed is not installed")
def test_zero_divides_weights_over_hosts(ended):
    (_, result, _), _, _ = ended
    assert (result["outcome"], result["error"]) == ("ok", None)
    ranks = result["world"]["ranks"]
    assert [rank["host"] for rank in ranks] == list(ADDRESSES)
    assert ranks[0]["parts"]["base"] == ranks[1]["parts"]["base"] > 0


def test_a_host_that_is_cut_off_is_named_and_both_ends_end(hosts, ended):
    (*_, result), other_err, cut_s = ended
    assert (result["outcome"], result["error"]["kind"]) == ("crashed", "LauncherDied")
    assert result["error"]["message"] == (
        f"rank 1 failed (last seen in phase {result['error']['phase']}): its process on machine two did not answer for "
        "10 s; the other rank waited in all_reduce."
    )
    ended_s, _, says = other_err.splitlines()[-1].partition(" ")
    assert says == "the process of rank 0 is gone, or its machine cannot be reached."
    assert max(result["ended_s"], float(ended_s)) - cut_s < MAX_FAULT_S
    assert [host.pids() for host in hosts] == [set(), set()]
