"""Messages between the processes of a run, over ZeroMQ; nothing else here touches ZeroMQ.

A `Server` (ROUTER) serves many `Client`s (DEALER). Never PUB, which drops in silence when a subscriber is slow. A
message on the wire is

    header frame = CRC32C (4 bytes, little-endian) ‖ MessagePack [protocol, run id, kind, frame sizes, body]
    raw frames   = the arrays, as they are

The checksum covers the header's rest and all raw frames, so a damaged, cut or re-ordered message is noticed as a
whole. Whatever arrives and does not fit (garbage, oversize, unknown or unwelcome kind, another run's message) comes
back from `receive` as a value, `Refused`, and is counted by cause; it never raises, because a stranger's bytes must
not be able to stop a process.

Limits: one message is at most `frame_bytes_max` bytes in all and `FRAMES_MAX` frames (refused before it is sent, and
by the receiver; ZeroMQ itself cuts a peer that sends a larger frame); queues hold `QUEUE_MESSAGES_MAX` messages a
peer, and a full queue raises `BudgetExceeded` at the sender. Sockets linger 0 ms when closed: a message that must
arrive is one that was answered.

Endpoints are address strings; only `ipc_endpoint` knows that they are files on this machine.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import google_crc32c
import msgspec
import zmq

from esper_simic.errors import BudgetExceeded, ContractError, UnavailableError
from supervisor.protocol import Message

PROTOCOL: Final = 1

FRAMES_MAX: Final = 256
"""Frames of one message; an unroll needs a few dozen."""

QUEUE_MESSAGES_MAX: Final = 1_000
"""ZeroMQ's high-water mark, each direction and peer. Credits keep far fewer in flight."""

IPC_PATH_BYTES_MAX: Final = 107
"""`sockaddr_un.sun_path` without its terminating zero."""

CRC_BYTES: Final = 4


class _Header(msgspec.Struct, frozen=True, array_like=True):
    protocol: int
    run_id: str
    kind: str
    frame_sizes: tuple[int, ...]
    body: msgspec.Raw


class Received(msgspec.Struct, frozen=True):
    """A message that fits the contract, with its raw frames; `peer` is empty at a client."""

    peer: str
    message: Message
    frames: tuple[bytes, ...]


class Refused(msgspec.Struct, frozen=True):
    """Something that does not: `cause` is a counter's label, `detail` says what was wrong with it."""

    peer: str
    cause: str
    detail: str


class _Unfit(ContractError):
    """Carries the cause from the check that found it to the counter."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


class Codec:
    """Frames to messages and back, for one run and one set of welcome kinds. No socket, no state.

    Args:
        run_id: Messages of another run are refused.
        accepts: The kinds that may be received.
        frame_bytes_max: Limit of the bytes of one message.
    """

    def __init__(self, *, run_id: str, accepts: Iterable[type[Message]], frame_bytes_max: int) -> None:
        self._run_id = run_id
        self._bytes_max = frame_bytes_max
        self._bodies = {kind.__name__: msgspec.msgpack.Decoder(kind) for kind in accepts}
        self._headers = msgspec.msgpack.Decoder(_Header)

    def encode(self, message: Message, frames: Sequence[bytes] = ()) -> list[bytes]:
        """Give the frames of a message.

        Raises:
            BudgetExceeded: It is larger than the receiver would take.
        """
        header = _Header(
            PROTOCOL,
            self._run_id,
            type(message).__name__,
            tuple(len(frame) for frame in frames),
            msgspec.Raw(msgspec.msgpack.encode(message)),
        )
        text = msgspec.msgpack.encode(header)
        size = CRC_BYTES + len(text) + sum(header.frame_sizes)
        if size > self._bytes_max or len(frames) > FRAMES_MAX:
            raise BudgetExceeded(
                f"a {header.kind} of {size} bytes in {len(frames)} frames exceeds supervisor.frame_bytes_max "
                f"{self._bytes_max} or {FRAMES_MAX} frames"
            )
        return [_checksum(text, frames) + text, *frames]

    def decode(self, parts: Sequence[bytes]) -> tuple[Message, tuple[bytes, ...]]:
        """Give the message and raw frames of received frames.

        Raises:
            ContractError: They break the contract; the error has a `cause`.
        """
        size = sum(len(part) for part in parts)
        if size > self._bytes_max or len(parts) > FRAMES_MAX + 1:
            raise _Unfit("oversize", f"{size} bytes in {len(parts)} frames, the limit is {self._bytes_max}")
        if not parts or len(parts[0]) <= CRC_BYTES:
            raise _Unfit("truncated", f"{len(parts)} frames, the first too short for a header")
        text, frames = parts[0][CRC_BYTES:], tuple(parts[1:])
        if _checksum(text, frames) != parts[0][:CRC_BYTES]:
            raise _Unfit("checksum", f"the checksum of {size} bytes in {len(parts)} frames does not match")
        try:
            header = self._headers.decode(text)
        except msgspec.DecodeError as error:
            raise _Unfit("malformed", f"the header is not one: {error}") from None
        self._check(header, frames)
        try:
            return self._bodies[header.kind].decode(header.body), frames
        except msgspec.DecodeError as error:
            raise _Unfit("malformed", f"the body is not a {header.kind}: {error}") from None

    def _check(self, header: _Header, frames: tuple[bytes, ...]) -> None:
        if header.protocol != PROTOCOL:
            raise _Unfit("protocol", f"protocol {header.protocol}, this process speaks {PROTOCOL}")
        if header.run_id != self._run_id:
            raise _Unfit("wrong_run", f"a message of run {header.run_id!r}, this is {self._run_id!r}")
        if header.frame_sizes != tuple(len(frame) for frame in frames):
            raise _Unfit("truncated", f"frames of other sizes than the announced {header.frame_sizes}")
        if header.kind not in self._bodies:
            raise _Unfit("unknown_kind", f"kind {header.kind!r}; welcome here: {', '.join(self._bodies)}")


def _checksum(text: bytes, frames: Iterable[bytes]) -> bytes:
    crc = google_crc32c.value(text)
    for frame in frames:
        crc = google_crc32c.extend(crc, frame)
    return int(crc).to_bytes(CRC_BYTES, "little")


class _Socket:
    """What server and client share: limits, the counters, and an end."""

    def __init__(self, kind: int, codec: Codec, frame_bytes_max: int) -> None:
        self._codec = codec
        self._counts: Counter[str] = Counter()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES_MAX)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES_MAX)
        self._socket.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max)

    @property
    def refused(self) -> Mapping[str, int]:
        """How many messages were refused, by cause."""
        return dict(self._counts)

    @property
    def pollable(self) -> zmq.Socket[bytes]:
        """The handle a `Poller` takes."""
        return self._socket

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the socket and its I/O thread; queued messages are dropped. A second call does nothing."""
        self._socket.close(linger=0)
        self._context.term()

    def _receive_parts(self) -> list[bytes] | None:
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _send_parts(self, parts: list[bytes], whom: str) -> None:
        try:
            # Frames are immutable bytes, so ZeroMQ may keep them instead of copying the large ones.
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            raise BudgetExceeded(
                f"{QUEUE_MESSAGES_MAX} messages wait for {whom}; it does not take them"
            ) from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise UnavailableError(f"{whom} is not connected") from None
            raise UnavailableError(f"cannot send to {whom}: {error}") from error

    def _judge(self, peer: str, parts: Sequence[bytes]) -> Received | Refused:
        try:
            message, frames = self._codec.decode(parts)
        except _Unfit as error:
            self._counts[error.cause] += 1
            return Refused(peer, error.cause, str(error))
        return Received(peer, message, frames)


class Server(_Socket):
    """The end that many clients talk to (ROUTER).

    Args:
        endpoint: Address to bind.
        run_id: Messages of another run are refused.
        accepts: The kinds welcome here.
        frame_bytes_max: Limit of one message.

    Raises:
        UnavailableError: The address cannot be bound.
    """

    def __init__(
        self, endpoint: str, *, run_id: str, accepts: Iterable[type[Message]], frame_bytes_max: int
    ) -> None:
        codec = Codec(run_id=run_id, accepts=accepts, frame_bytes_max=frame_bytes_max)
        super().__init__(zmq.ROUTER, codec, frame_bytes_max)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A peer that comes back before the loss of its old connection was noticed would be turned away without this.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise UnavailableError(f"cannot listen on {endpoint}: {error}") from error

    def receive(self) -> Received | Refused | None:
        """Take the next message without waiting; None when there is none."""
        parts = self._receive_parts()
        if parts is None:
            return None
        return self._judge(parts[0].decode("ascii", "backslashreplace"), parts[1:])

    def send(self, peer: str, message: Message, frames: Sequence[bytes] = ()) -> None:
        """Queue a message for a peer, named as in `Received.peer`.

        Raises:
            UnavailableError: The peer is not connected.
            BudgetExceeded: The message is too large, or the peer's queue is full.
        """
        identity = peer.encode("ascii", "backslashreplace")
        self._send_parts([identity, *self._codec.encode(message, frames)], peer)


class Client(_Socket):
    """The end that talks to one server (DEALER). It connects in the background and again after a loss.

    Args:
        endpoint: Address of the server; nobody needs to listen there yet.
        identity: Name under which the server knows this client, such as `actor-3-1`: ASCII, 1 to 255 bytes. Of
            two clients of one name the server knows the one that connected last.
        run_id: Messages of another run are refused.
        accepts: The kinds welcome here.
        frame_bytes_max: Limit of one message.
    """

    def __init__(
        self,
        endpoint: str,
        identity: str,
        *,
        run_id: str,
        accepts: Iterable[type[Message]],
        frame_bytes_max: int,
    ) -> None:
        codec = Codec(run_id=run_id, accepts=accepts, frame_bytes_max=frame_bytes_max)
        super().__init__(zmq.DEALER, codec, frame_bytes_max)
        self._endpoint = endpoint
        self._socket.setsockopt(zmq.IDENTITY, identity.encode("ascii"))
        # A server that is gone must not be hammered; a restarted one is found within a second.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
        self._socket.connect(endpoint)

    def receive(self, timeout_ms: int = 0) -> Received | Refused | None:
        """Take the next message, waiting at most `timeout_ms`; None when none came."""
        parts = self._receive_parts()
        if parts is None and timeout_ms > 0 and self._socket.poll(timeout_ms, zmq.POLLIN):
            parts = self._receive_parts()
        return None if parts is None else self._judge("", parts)

    def send(self, message: Message, frames: Sequence[bytes] = ()) -> None:
        """Queue a message for the server.

        Raises:
            BudgetExceeded: The message is too large, or the queue is full because nobody takes from it.
        """
        self._send_parts(self._codec.encode(message, frames), self._endpoint)


class Poller:
    """Waits for sockets of this module and for plain file descriptors (a pidfd, an eventfd) together."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()

    def add(self, what: Server | Client | int) -> None:
        """Watch for readability; adding twice does nothing."""
        self._poller.register(what if isinstance(what, int) else what.pollable, zmq.POLLIN)

    def remove(self, what: Server | Client | int) -> None:
        """Stop watching something that was added."""
        self._poller.unregister(what if isinstance(what, int) else what.pollable)

    def wait(self, timeout_ms: float) -> frozenset[int | zmq.Socket[bytes]]:
        """Give the readable descriptors and socket handles, after at most `timeout_ms`."""
        return frozenset(handle for handle, _ in self._poller.poll(max(0, math.ceil(timeout_ms))))

    def readable(self, what: Server | Client | int, seen: frozenset[int | zmq.Socket[bytes]]) -> bool:
        """Whether something that was added is among what `wait` gave."""
        return (what if isinstance(what, int) else what.pollable) in seen


def ipc_endpoint(directory: Path, name: str) -> str:
    """Address of a socket file on this machine.

    Raises:
        UnavailableError: The path is longer than the kernel allows for a socket.
    """
    path = str(directory / name)
    if len(os.fsencode(path)) > IPC_PATH_BYTES_MAX:
        raise UnavailableError(
            f"the socket path {path} has more than {IPC_PATH_BYTES_MAX} bytes; set TMPDIR or RUNTIME_DIRECTORY to a "
            "shorter directory"
        )
    return f"ipc://{path}"


@contextlib.contextmanager
def runtime_directory() -> Iterator[Path]:
    """A short directory for sockets that only this user may enter, gone afterwards.

    It lies in `$RUNTIME_DIRECTORY` where the service manager gives one, else in the directory for temporary files:
    run directories may have paths that are too long for a socket.
    """
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    # mkdtemp makes the directory with mode 0700.
    with tempfile.TemporaryDirectory(prefix="simic-", dir=given or None, ignore_cleanup_errors=True) as name:
        yield Path(name)
