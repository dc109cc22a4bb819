"""Processes that work through tasks beside this one, their answers in the order of the tasks.

One pipe each, no shared queue and no shared memory: a process that dies closes its pipe and is
noticed at once, one whose parent dies reads the end of its pipe and leaves, and containers with a
small /dev/shm are no obstacle. They are spawned, not forked, because CUDA survives no fork.
"""

from __future__ import annotations

import queue
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from types import TracebackType
from typing import Any

from headwater.attribution import ModelError

from .errors import DeviceError, SourceError

# What a process runs: called once with its own arguments, it returns a fact for the parent and
# the work itself, which turns tasks into answers one to one. Between two tasks the work is given a
# None whenever nothing waits: the moment to hand out whatever it still holds back.
Work = Callable[[Iterator[Any]], Iterator[Any]]
Setup = Callable[..., tuple[Any, Work]]

_IN_FLIGHT = 3  # tasks of one process: one held back, one under way, one waiting
_PATIENCE = 10.0  # seconds for a process to leave
# Without it a spawned process, which imports the script again, would start processes itself.
_GUARD = "; a script that names devices needs `if __name__ == '__main__':` around its calls"


@dataclass(frozen=True)
class _Failure:
    error: ValueError | None  # one of ours, whose message is whole
    message: str
    trace: str


@dataclass
class _Member:
    name: str
    process: BaseProcess
    pipe: Connection
    tasks: deque[int] = field(default_factory=deque)  # in flight, by number


class Crew:
    """A context of processes, one for each name; ends them all when it is left."""

    def __init__(self, setup: Setup, arguments: Mapping[str, tuple[Any, ...]]) -> None:
        """Start the processes and wait until `setup(*arguments[name])` is done in each.

        Raises:
            DeviceError: one of them failed or died; it is named.
        """
        self._members: list[_Member] = []
        self.facts: list[Any] = []  # what each setup returned beside its work
        context = get_context("spawn")
        # Python starts it with the first process and then lets interrupts through again.
        resource_tracker.ensure_running()
        try:
            for name, given in arguments.items():
                pipe, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, setup, given), daemon=True)
                with _interrupts_held():
                    process.start()
                    theirs.close()  # the end of the pipe is then seen when the process ends
                    self._members.append(_Member(name, process, pipe))
            for member in self._members:
                self.facts.append(_receive(member, hint=_GUARD))
        except BaseException:
            self._end(at_once=True)
            raise

    def __enter__(self) -> Crew:
        """The crew, ready."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes: in their own time after the work, at once after an error."""
        self._end(at_once=kind is not None)

    def map(self, tasks: Iterator[Any]) -> Iterator[Any]:
        """The answer to each task, in the order of the tasks.

        Each process has at most two tasks at a time, and no task is given out that many places
        ahead of the oldest unanswered one: answers that wait for their turn stay few.

        Raises:
            DeviceError: a process failed or died; it is named.
        """
        answers: dict[int, Any] = {}
        given = handed_out = 0
        window = 2 * _IN_FLIGHT * len(self._members)
        more = True
        while True:
            while more and given - handed_out < window and (member := self._idlest()):
                try:
                    task = next(tasks)
                except StopIteration:
                    more = False
                    break
                self._send(member, given, task)
                given += 1
            if handed_out in answers:
                yield answers.pop(handed_out)
                handed_out += 1
            elif not more and handed_out == given:
                return
            else:
                for ready in wait([member.pipe for member in self._members]):
                    member = next(m for m in self._members if m.pipe is ready)
                    answer = _receive(member)
                    answers[member.tasks.popleft()] = answer

    def _idlest(self) -> _Member | None:
        member = min(self._members, key=lambda member: len(member.tasks))
        return member if len(member.tasks) < _IN_FLIGHT else None

    @staticmethod
    def _send(member: _Member, number: int, task: Any) -> None:
        try:
            member.pipe.send(task)
        except OSError:
            while True:
                _receive(member)  # behind answers that nobody needs any more lies why it left
        member.tasks.append(number)

    def _end(self, *, at_once: bool) -> None:
        for member in self._members:
            member.pipe.close()
            if at_once:
                member.process.terminate()
        for member in self._members:
            member.process.join(_PATIENCE)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.process.close()
        self._members = []


def _receive(member: _Member, hint: str = "") -> Any:
    """The next answer of a process; DeviceError if it failed or died instead."""
    try:
        answer = member.pipe.recv()
    except (EOFError, OSError):
        raise DeviceError(f"{member.name}: its process {_ending(member.process, hint)}") from None
    if isinstance(answer, _Failure):
        error = answer.error or DeviceError(f"{member.name}: {answer.message}")
        error.add_note(answer.trace)
        raise error
    return answer


def _ending(process: BaseProcess, hint: str) -> str:
    process.join(_PATIENCE)
    code = process.exitcode
    if code is not None and code < 0:
        remedy = "; lower --batch-size if memory ran out" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{remedy}"
    return f"ended with exit code {code}{hint}"


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process started here never sees Ctrl-C, which goes to all: its parent ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the process ------------------------------------------------------------------------------


def _serve(pipe: Connection, setup: Setup, arguments: tuple[Any, ...]) -> None:
    tasks: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    # Tasks are always taken in, so that parent and process never both wait to be read.
    Thread(target=_take_in, args=(pipe, tasks), daemon=True).start()
    try:
        fact, work = setup(*arguments)
        pipe.send(fact)
        for answer in work(_waiting(tasks)):
            pipe.send(answer)
    except BrokenPipeError:
        return  # nobody is left to tell
    except Exception as error:  # noqa: BLE001 (told to the parent, which raises it)
        ours = error if isinstance(error, (DeviceError, ModelError, SourceError)) else None
        message = " ".join(f"{type(error).__name__}: {error}".split())
        with suppress(OSError):
            pipe.send(_Failure(ours, message, traceback.format_exc()))


def _take_in(pipe: Connection, tasks: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    with suppress(EOFError, OSError):
        while True:
            tasks.put((pipe.recv(),))
    tasks.put(())


def _waiting(tasks: queue.SimpleQueue[tuple[Any, ...]]) -> Iterator[Any]:
    while True:
        if tasks.empty():
            yield None
        task = tasks.get()
        if not task:
            return
        yield task[0]
