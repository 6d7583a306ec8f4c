"""Fits that torchrun starts: killed, gone on with by another number of processes, and on two hosts."""

import os
import signal
import subprocess
import time
from contextlib import suppress

import numpy as np
import pytest

from inference.cli.runs import Run
from tests.helpers.torchrun import process_of, torchrun

pytestmark = pytest.mark.slow
STEPS = {"eager": 2_000, "compiled": 20_000}
CLOSE = 1e-6  # nats, of losses of up to 10³


def fit_command(data, out, *more, engine="eager"):
    options = [
        "--batch-size",
        33,
        "--lr",
        0.01,
        "--no-decay",
        "--engine",
        engine,
        "--steps",
        2_000 if engine == "eager" else 20_000,
    ]
    return ["fit", "linear_regression", "--data", data, "--target", "y", "--out", out, *options, *more]


@pytest.fixture
def table(tmp_path):
    rows = np.random.default_rng(0).normal(size=(400, 5))
    path = tmp_path / "rows.csv"
    np.savetxt(path, np.c_[rows[:, :4], rows.sum(1)], delimiter=",", header="a,b,c,d,y", comments="")
    return path


def losses_of(folder):
    run = Run.read(folder)
    return run.posterior(folder).losses


def apart(found, alone):
    assert found.shape == alone.shape
    return np.abs(found - alone).max()


def wait(launcher, log, seconds=300):
    """Its status, and what it said."""
    status = launcher.wait(seconds)
    return status, log.read_text()


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize(("count", "victim"), [(2, 1), (4, 0), (4, 2)])
def test_one_that_is_killed_ends_all_and_another_number_goes_on(table, tmp_path, count, victim, engine, capsys):
    log, run, whole = tmp_path / "log", tmp_path / "run", tmp_path / "whole"
    assert wait(torchrun(*fit_command(table, whole, engine=engine), count=1, log=log), log)[0] == 0
    launcher = torchrun(*fit_command(table, run, engine=engine), count=count, log=log)
    children = [process_of(launcher, rank) for rank in range(count)]
    while not (run / "checkpoint.json").exists():
        time.sleep(0.02)
        assert launcher.poll() is None
    began = time.monotonic()
    os.kill(children[victim], signal.SIGKILL)
    status, words = wait(launcher, log)
    seconds = time.monotonic() - began
    assert status != 0
    assert seconds < 30
    assert words.count(f"kiln: process {victim} of {count} is gone or does not answer") == 1
    assert f"the checkpoint in {run} is kept" in words.replace("\n", " ")
    again = torchrun(*fit_command(table, run, "--resume", engine=engine), count=count // 2 + 1, log=log)
    assert wait(again, log)[0] == 0
    difference = apart(losses_of(run), losses_of(whole))
    with capsys.disabled():
        print(
            f"\n{engine}, {count} processes: ended {seconds:.1f} s after the kill; then losses {difference:.2g} apart"
        )
    assert difference < CLOSE


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable, each with its address; skipped where they may not be made."""
    names = [f"kiln-{os.getpid()}-{host}" for host in "ab"]
    wires = [f"kiln{os.getpid() % 10_000}{host}" for host in "ab"]
    commands = [
        *(["ip", "netns", "add", name] for name in names),
        ["ip", "link", "add", wires[0], "type", "veth", "peer", "name", wires[1]],
    ]
    for name, wire, address in zip(names, wires, ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
        inside = ["ip", "netns", "exec", name, "ip"]
        commands += [["ip", "link", "set", wire, "netns", name], [*inside, "addr", "add", address, "dev", wire]]
        commands += [[*inside, "link", "set", wire, "up"], [*inside, "link", "set", "lo", "up"]]
    try:
        for command in commands:
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces cannot be made: {error}")
        yield list(zip(names, wires, strict=True))
    finally:
        for name in names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_are_as_two_processes(two_hosts, table, tmp_path, capsys):
    log, one, two = tmp_path / "log", tmp_path / "one", tmp_path / "two"
    assert wait(torchrun(*fit_command(table, one), count=2, log=log), log)[0] == 0
    launchers = []
    for rank, (name, wire) in enumerate(two_hosts):
        options = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", "29517"]
        inside = ["ip", "netns", "exec", name]
        log = tmp_path / f"log{rank}"
        command = fit_command(table, two)
        launchers.append(torchrun(*command, count=1, log=log, options=options, before=inside, GLOO_SOCKET_IFNAME=wire))
    ends = [launcher.wait(300) for launcher in launchers]
    assert ends == [0, 0], "\n".join((tmp_path / f"log{rank}").read_text() for rank in (0, 1))
    difference = apart(losses_of(two), losses_of(one))
    with capsys.disabled():
        print(f"\ntwo hosts: losses {difference:.2g} apart from those of two processes on one")
    assert difference < CLOSE
