"""The processes that share one fit, started by torchrun or the user: what they send each other, and who is missing."""

from __future__ import annotations

import gc
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from inference.storage.tensor_archive import flatten, unflatten

__all__ = ["ProcessGroup", "gathered", "launched", "speaks", "spoken", "total", "who"]

_STEP = timedelta(seconds=60)  # how far apart the processes may be within a chunk of steps
_PATIENCE = timedelta(minutes=30)  # and elsewhere: one of them searches, compiles, or writes, and the others wait
_ROLL_CALL = timedelta(seconds=10)
_ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (ValueError, TypeError, NotImplementedError, OSError)}
_SPEAKER = "speaker"
E = TypeVar("E", bound=Exception)


class ProcessGroup:
    """The process ``rank`` among the ``count`` that call ``fit`` together, inside torch's process group.

    As a context manager it has connections of its own, with time limits of its
    own, which end with the block: a process that is killed, or that raises, is
    missed by all others at once. ``hint`` is what their error says of how to go on,
    and ``left`` whether this one has left them.

    Raises
    ------
    ConnectionError
        From every method, at all processes that are left, if one is gone or does
        not answer: with its number.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.hint = "start all of them again"
        nccl = device.type == "cuda" and "cuda:nccl" in dist.get_backend_config()
        self.left = False
        try:
            self._meetings = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self._steps = dist.new_group(backend="nccl" if nccl else "gloo", timeout=_STEP)
            self._roll = dist.new_group(backend="gloo", timeout=_ROLL_CALL)
        except RuntimeError as error:
            raise ConnectionError(
                f"not all of {self.count} processes came to fit, or some cannot reach each other "
                f"({_first_line(error)}): call it in each, and see GLOO_SOCKET_IFNAME for the network that they use"
            ) from error

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, prints and calls callbacks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, in place."""
        self._try(lambda: dist.all_reduce(values, dist.ReduceOp.SUM, self._steps))
        return values

    def most(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes, which may be far apart."""
        values = torch.tensor(numbers)
        self._try(lambda: dist.all_reduce(values, dist.ReduceOp.MAX, self._meetings))
        return values.tolist()

    def told(self, mine: Any) -> Any:
        """What the first process has to say that has anything but None, at all of them; None where none has.

        Numbers, texts, tensors and containers of them, sent as JSON and raw numbers.
        """
        speaker = -self.most(-(self.count if mine is None else self.rank))[0]
        return None if speaker == self.count else self._sent(mine, speaker)

    def first(self, make: Callable[[], Any]) -> Any:
        """What ``make()`` gives at the first process, at all of them; an error that it raises there all raise."""
        if not self.leads:
            found = self._sent(None, 0)
            if "error" in found:
                kind, words = found["error"]
                raise spoken(_ERRORS[kind](words), 0)
            return found["value"]
        try:
            value = make()
        except tuple(_ERRORS.values()) as error:
            kind = next(name for name, known in _ERRORS.items() if isinstance(error, known))
            self._sent({"error": [kind, str(error)]}, 0)
            raise
        self._sent({"value": value}, 0)
        return value

    def close(self) -> None:
        """Leave the others, who notice at once."""
        if not self.left:
            self.left = True
            self._hang_up(self._steps, self._meetings, self._roll)

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Inside the block :func:`total` is over this group; one that raises there leaves it."""
        token = _NOW.set(self)
        try:
            yield
        except BaseException:
            self.close()
            raise
        finally:
            _NOW.reset(token)

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sent(self, value: Any, source: int) -> Any:
        """``value`` of the process ``source``, at all."""
        content, tensors = flatten(value) if self.rank == source else (None, {})
        kinds = [[name, str(part.dtype).removeprefix("torch."), list(part.shape)] for name, part in tensors.items()]
        text = self._bytes(json.dumps([content, kinds]).encode() if self.rank == source else None, source)
        content, kinds = json.loads(text)
        for name, kind, shape in kinds:
            mine = tensors.get(name)
            raw = torch.empty(shape, dtype=getattr(torch, kind)) if mine is None else mine.contiguous()
            if raw.numel():
                self._broadcast(raw.reshape(-1).view(torch.uint8), source)
            tensors[name] = raw
        return value if self.rank == source else unflatten(content, tensors)

    def _bytes(self, text: bytes | None, source: int) -> bytes:
        size = torch.tensor([0 if text is None else len(text)])
        self._broadcast(size, source)
        numbers = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8)
        self._broadcast(numbers, source)
        return numbers.numpy().tobytes()

    def _broadcast(self, values: Tensor, source: int) -> None:
        self._try(lambda: dist.broadcast(values, source, self._meetings))

    def _try(self, communicate: Callable[[], object]) -> None:
        problem = "this process had left them" if self.left else ""
        if not problem:
            try:
                communicate()
            except RuntimeError as error:
                problem = _first_line(error)
        if problem:  # outside of the handler, whose traceback would keep the connections open, as any name for one does
            raise self._lost(problem)

    def _lost(self, problem: str) -> ConnectionError:
        """Close all connections but one, so that all notice, and call the roll over that one."""
        gone: Sequence[int] = ()
        if not self.left:
            self._hang_up(self._steps, self._meetings)
            gc.collect()  # torch's own reports of errors keep connections in cycles
            gone = self._missing()
            self.left = True
            self._hang_up(self._roll)
        who = f"process {', '.join(map(str, gone))} of {self.count} is" if gone else f"one of {self.count} processes is"
        words = f"{who} gone or does not answer, which ends the others (counted from 0; {problem}): {self.hint}"
        left = set(range(self.count)) - set(gone)
        return spoken(ConnectionError(words), min(left))

    def _missing(self) -> list[int]:
        """The processes that do not answer; those that do have heard of this one too."""
        others, here = [rank for rank in range(self.count) if rank != self.rank], torch.zeros(1)
        calls = {other: _begun(dist.isend, here, other, self._roll) for other in others}
        answers = {other: _begun(dist.irecv, torch.zeros(1), other, self._roll) for other in others}
        missing = [other for other, answer in answers.items() if not _is_done(answer)]
        for call in calls.values():
            _is_done(call)
        return missing

    def _hang_up(self, *connections: Any) -> None:
        for connection in connections:
            with suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(connection)
        for name in [name for name, value in vars(self).items() if any(value is one for one in connections)]:
            setattr(self, name, None)


_NOW: ContextVar[ProcessGroup | None] = ContextVar("kiln_group", default=None)


@torch.library.custom_op("kiln::total", mutates_args=())
def total(values: Tensor) -> Tensor:
    """The sum over the processes of the :class:`ProcessGroup` that is reducing; ``values`` themselves where none is."""
    group = _NOW.get()
    return values.clone() if group is None else group.total(values.clone())


@total.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


@contextmanager
def gathered(device: torch.device) -> Iterator[ProcessGroup | None]:
    """The group of this process, None where it is alone; all but the first keep their warnings to themselves."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield None
        return
    with ExitStack() as stack:
        group = stack.enter_context(ProcessGroup(device))
        if not group.leads:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UserWarning)
        yield group


@contextmanager
def launched(device: str) -> Iterator[bool]:
    """Join the processes that torchrun started with this one, if it did; whether this is the one that writes.

    They talk by NCCL where they work on GPUs, each on that of its local number, else by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ or dist.is_initialized():
        yield True
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def speaks(error: BaseException) -> bool:
    """Whether this process is the one to report an error, where all processes have it."""
    return int(getattr(error, _SPEAKER, os.environ.get("RANK", "0"))) == int(os.environ.get("RANK", "0"))


def who(error: BaseException) -> str:
    """The process that an error is of, in words, where there are several and it is not one of all."""
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return "" if count == "1" or hasattr(error, _SPEAKER) else f"process {rank} of {count}: "


def _first_line(error: Exception) -> str:
    """What torch says, without the place in its source and its advice."""
    return re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].partition(". ")[0]


def _begun(send_or_receive: Callable[..., dist.Work | None], *args: Any) -> dist.Work | None:
    """What is on its way, None where the other end is closed."""
    try:
        return send_or_receive(*args)
    except RuntimeError:
        return None


def _is_done(work: dist.Work | None) -> bool:
    """Whether it comes to its end in time."""
    try:
        return work is not None and work.wait(_ROLL_CALL)
    except RuntimeError:
        return False


def spoken(error: E, speaker: int) -> E:
    """``error``, which all processes raise and ``speaker`` is to report."""
    setattr(error, _SPEAKER, speaker)
    return error
