"""Processes of an ingest: answers in order, failures by name, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headwater import DeviceError
from headwater.ingest import SourceError
from headwater.ingest.processes import Crew

pytestmark = pytest.mark.usefixtures("no_process_is_left")


def _echo(delays: list[float]) -> tuple[str, Callable[[Iterator[Any]], Iterator[Any]]]:
    """Answers (task, process) after the task's delay; "die" and "fail" do so."""

    def work(tasks: Iterator[Any]) -> Iterator[Any]:
        for task in tasks:
            if task is None:
                continue
            if task == "die":
                os.kill(os.getpid(), signal.SIGTERM)
            if task == "fail":
                raise ZeroDivisionError("by zero")
            if task == "ours":
                raise SourceError("this file is broken")
            time.sleep(delays[task % len(delays)])
            yield task, os.getpid(), bytes(300_000)  # more than a pipe holds

    return "ready", work


@pytest.fixture(scope="class")
def crew() -> Iterator[Crew]:
    with Crew(_echo, {"first": ([0.0, 0.2, 0.0],), "second": ([0.0, 0.2, 0.0],)}) as ready:
        yield ready


class TestCrew:
    @pytest.fixture(autouse=True)
    def no_process_is_left(self) -> None:
        """The crew of this class stays until its last test."""

    def test_answers_come_in_the_order_of_the_tasks(self, crew: Crew) -> None:
        assert crew.facts == ["ready", "ready"]
        for _ in range(2):  # it can be used again
            found = list(crew.map(iter(range(20))))
            assert [task for task, *_ in found] == list(range(20))
            assert len({process for _, process, _ in found}) == 2

    def test_tasks_are_given_out_a_few_ahead(self, crew: Crew) -> None:
        given = []

        def tasks() -> Iterator[int]:
            for number in range(0, 300, 3):
                given.append(number)
                yield number

        answers = crew.map(tasks())
        for taken in range(1, 4):
            next(answers)
            time.sleep(0.1)
            assert len(given) <= taken + 8
        assert len(list(answers)) == 97
        assert len(given) == 100


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("die", DeviceError, "^second: its process was ended by SIGTERM"),
        ("fail", DeviceError, "^second: ZeroDivisionError: by zero"),
        ("ours", SourceError, "^this file is broken"),
    ],
)
def test_a_failing_process_is_named(task: str, kind: type[ValueError], message: str) -> None:
    with (
        pytest.raises(kind, match=message),
        Crew(_echo, {"second": ([0.0],)}) as crew,
    ):
        for _ in crew.map(iter([0, 0, 0, task, *range(50)])):
            pass


def test_a_script_without_a_main_guard_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import headwater as hw\n"
        "from headwater.ingest.processes import Crew\n"
        "from headwater.ingest.prepare import _serve\n"
        "Crew(_serve, {'one': ((8, 8),)})\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "DeviceError: one: its process ended with exit code 1" in done.stderr
    assert "__main__" in done.stderr.splitlines()[-1]


def test_ctrl_c_ends_every_process_of_a_command(
    tmp_path: Path, corpus: Path, model_folder: Path
) -> None:
    """It reaches all of them: the workers leave it to the command."""
    words = ("ingest", corpus, "--model", model_folder, "--out", tmp_path / "i")
    command = ["-c", "from headwater.cli import main; main()", *words, "--devices", "cpu,cpu"]
    parent = started(command, processes=4)  # two workers, and Python's resource tracker
    time.sleep(1)  # while the workers still import
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "Traceback" not in out + err
    assert not (tmp_path / "i").exists()
    wait_until(lambda: not processes_of(parent.pid))


def test_processes_leave_interrupts_to_the_command_and_leave_with_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from headwater.ingest.processes import Crew\n"
        "from headwater.ingest.prepare import _serve\n"
        "if __name__ == '__main__':\n"
        "    with Crew(_serve, {'one': ((8, 8),)}):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(600)\n"
    )
    parent = started([script], processes=3)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    others = set(processes_of(parent.pid)) - {str(parent.pid)}
    deaf = [deaf_to_interrupts(process) for process in others]
    parent.kill()
    parent.communicate(timeout=60)
    assert all(deaf)
    wait_until(lambda: not processes_of(parent.pid))


def started(words: list[Any], processes: int) -> subprocess.Popen[str]:
    """A Python command in a session of its own, once so many processes of it live."""
    parent = subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell's background jobs, this test run perhaps, hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_until(lambda: len(processes_of(parent.pid)) >= processes)
    return parent


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def deaf_to_interrupts(process: str) -> bool:
    status = Path("/proc", process, "status").read_text()
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    bit = 1 << (signal.SIGINT - 1)
    return bool((int(masks["SigBlk"], 16) | int(masks["SigIgn"], 16)) & bit)


def processes_of(session: int) -> list[str]:
    """The living processes of a session, by /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(status.parent.name)
    return found
