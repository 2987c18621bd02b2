"""The bus: what fits arrives whole, what does not is a counted value, and nobody is stopped by a stranger's bytes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.errors import BudgetExceeded, ContractError, UnavailableError
from supervisor.bus import (
    FRAMES_MAX,
    Client,
    Codec,
    Poller,
    Received,
    Refused,
    Server,
    ipc_endpoint,
    runtime_directory,
)
from supervisor.protocol import Message, Noted, Progress, Ready, Stop
from tests.sockets import losses_of

BYTES_MAX = 2**20
WAIT_MS = 5_000
READY = Ready(role="actor", index=3, incarnation=1, pid=77)


@pytest.fixture
def endpoint() -> Iterator[str]:
    with runtime_directory() as directory:
        yield ipc_endpoint(directory, "control")


def serve(endpoint: str, *kinds: type[Message]) -> Server:
    return Server(endpoint, run_id="run-1", accepts=kinds or (Ready, Progress), frame_bytes_max=BYTES_MAX)


def connect(endpoint: str, identity: str = "actor-3-1", *, run_id: str = "run-1") -> Client:
    return Client(endpoint, identity, run_id=run_id, accepts=(Stop, Noted), frame_bytes_max=BYTES_MAX)


def await_message(end: Server | Client) -> Received | Refused:
    poller = Poller()
    poller.add(end)
    assert poller.readable(end, poller.wait(WAIT_MS)), "nothing came"
    heard = end.receive()
    assert heard is not None
    return heard


def codec(*kinds: type[Message], run_id: str = "run-1", bytes_max: int = BYTES_MAX) -> Codec:
    return Codec(run_id=run_id, accepts=kinds or (Ready,), frame_bytes_max=bytes_max)


def cause(parts: list[bytes]) -> str:
    with pytest.raises(ContractError) as caught:
        codec().decode(parts)
    return str(getattr(caught.value, "cause", ""))


def test_a_message_and_its_answer_arrive_whole_with_their_frames(endpoint: str) -> None:
    frames = (b"", bytes(200_000), b"tail")
    with serve(endpoint) as server, connect(endpoint) as client:
        client.send(READY, frames)
        heard = await_message(server)
        assert heard == Received("actor-3-1", READY, frames)
        server.send(heard.peer, Stop(reason="enough"))
        assert client.receive(WAIT_MS) == Received("", Stop(reason="enough"), ())
        assert client.receive() is None
        assert server.receive() is None


def test_the_client_may_come_before_its_server(endpoint: str) -> None:
    with connect(endpoint) as client:
        client.send(READY)
        with serve(endpoint) as server:
            assert isinstance(await_message(server), Received)


def test_a_peer_that_comes_back_under_its_name_is_the_one_that_is_answered(endpoint: str) -> None:
    with serve(endpoint) as server:
        first = connect(endpoint)
        first.send(READY)
        await_message(server)
        with connect(endpoint) as second:
            second.send(READY)
            heard = await_message(server)
            server.send(heard.peer, Noted(of="Ready"))
            assert isinstance(second.receive(WAIT_MS), Received)
            assert first.receive() is None
        first.close()


def test_messages_of_one_peer_keep_their_order(endpoint: str) -> None:
    with serve(endpoint) as server, connect(endpoint) as client:
        for work in range(100):
            client.send(Progress(role="actor", index=3, incarnation=1, work=work))
        heard = [await_message(server) for _ in range(100)]
        assert [item.message.work for item in heard if isinstance(item, Received)] == list(range(100))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([b"\x00\x01\x02 what is this"], "checksum"),
        ([b"hi"], "truncated"),
        ([b""], "truncated"),
        ([b"x"] * (FRAMES_MAX + 2), "oversize"),
    ],
)
def test_garbage_from_a_stranger_is_counted_and_the_next_message_still_arrives(
    endpoint: str, parts: list[bytes], expected: str
) -> None:
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    try:
        with serve(endpoint) as server, connect(endpoint) as client:
            stranger.connect(endpoint)
            stranger.send_multipart(parts)
            heard = await_message(server)
            assert isinstance(heard, Refused)
            assert heard.cause == expected
            assert server.refused == {expected: 1}
            client.send(READY)
            assert isinstance(await_message(server), Received)
    finally:
        stranger.close()
        context.term()


def test_a_frame_over_the_limit_costs_its_sender_the_connection_not_the_server(endpoint: str) -> None:
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    try:
        with serve(endpoint) as server, connect(endpoint) as client:
            stranger.connect(endpoint)
            stranger.send(bytes(BYTES_MAX + 1))
            client.send(READY)
            heard = await_message(server)
            assert isinstance(heard, Received), "the large frame never reached us"
    finally:
        stranger.close()
        context.term()


def test_another_runs_message_is_refused(endpoint: str) -> None:
    with serve(endpoint) as server, connect(endpoint, run_id="run-2") as client:
        client.send(READY)
        heard = await_message(server)
        assert isinstance(heard, Refused)
        assert heard.cause == "wrong_run"
        assert "run-2" in heard.detail


def test_an_unwelcome_kind_is_refused_with_the_welcome_ones(endpoint: str) -> None:
    with serve(endpoint) as server, connect(endpoint) as client:
        client.send(Stop(reason="you first"))
        heard = await_message(server)
        assert heard == Refused("actor-3-1", "unknown_kind", "kind 'Stop'; welcome here: Ready, Progress")


def test_a_peer_that_is_not_there_is_unavailable(endpoint: str) -> None:
    with serve(endpoint) as server, pytest.raises(UnavailableError, match="actor-9-1 is not connected"):
        server.send("actor-9-1", Stop(reason=""))


def test_a_full_queue_sheds_at_the_sender(endpoint: str) -> None:
    with connect(endpoint) as client:  # nobody listens
        with pytest.raises(BudgetExceeded, match="does not take them"):
            for _ in range(5_000):
                client.send(READY)


def test_an_address_in_use_is_unavailable(endpoint: str) -> None:
    nowhere = "ipc:///nowhere/at/all/socket"
    with pytest.raises(UnavailableError, match="cannot listen on"):
        serve(nowhere)


def test_a_poller_waits_for_sockets_and_descriptors_together(endpoint: str) -> None:
    read_fd, write_fd = os.pipe()
    try:
        with serve(endpoint) as server:
            poller = Poller()
            poller.add(server)
            poller.add(read_fd)
            assert poller.wait(0) == frozenset()
            os.write(write_fd, b"x")
            seen = poller.wait(WAIT_MS)
            assert poller.readable(read_fd, seen)
            assert not poller.readable(server, seen)
            poller.remove(read_fd)
            assert poller.wait(0) == frozenset()
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_the_runtime_directory_is_private_and_goes_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with runtime_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not directory.exists()
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}:/another")
    with runtime_directory() as directory:
        assert directory.parent == tmp_path


def test_a_socket_path_longer_than_the_kernel_allows_says_what_to_set() -> None:
    with pytest.raises(UnavailableError, match="RUNTIME_DIRECTORY"):
        ipc_endpoint(Path("/" + "d" * 110), "control")


# A server that dies and another that takes its place


def work_heard(server: Server, until: int) -> list[int]:
    """The `work` of the Progress messages that come, up to and including `until`; every one must be whole."""
    heard: list[int] = []
    while not heard or heard[-1] != until:
        received = await_message(server)
        assert isinstance(received, Received), received
        assert isinstance(received.message, Progress)
        assert received.frames == big_frames(received.message.work)
        heard.append(received.message.work)
    return heard


def big_frames(work: int) -> tuple[bytes, ...]:
    return tuple(bytes([work, frame]) * 150_000 for frame in range(3))


def progress(work: int) -> Progress:
    return Progress(role="actor", index=3, incarnation=1, work=work)


def test_what_was_sent_while_nobody_listened_comes_to_the_next_server_whole_and_in_order(
    endpoint: str,
) -> None:
    with connect(endpoint) as client, losses_of(client) as await_loss:
        with serve(endpoint, Progress) as server:
            client.send(progress(1), big_frames(1))
            assert work_heard(server, 1) == [1]
        await_loss()
        for work in (2, 3, 4):
            client.send(progress(work), big_frames(work))
        with serve(endpoint, Progress) as server:
            assert work_heard(server, 4) == [2, 3, 4]
            client.send(progress(5), big_frames(5))
            assert work_heard(server, 5) == [5]


def test_every_next_server_can_answer_once_it_has_been_spoken_to(endpoint: str) -> None:
    with connect(endpoint) as client, losses_of(client) as await_loss:
        for life in range(5):
            with serve(endpoint) as server:
                with pytest.raises(UnavailableError):
                    server.send("actor-3-1", Noted(of="too early"))
                client.send(READY)
                heard = await_message(server)
                server.send(heard.peer, Noted(of=str(life)), [bytes(300_000)])
                assert client.receive(WAIT_MS) == Received("", Noted(of=str(life)), (bytes(300_000),))
            await_loss()
        assert client.receive() is None


STOPPED_SERVER = """
import sys, zmq
socket = zmq.Context().socket(zmq.ROUTER)
socket.bind(sys.argv[1])
print("bound", flush=True)
print(len(socket.recv_multipart()), flush=True)
sys.stdin.read()
"""


@pytest.mark.processes
def test_a_message_half_taken_by_a_killed_server_is_lost_alone(endpoint: str) -> None:
    """What the killed one has taken is lost with it; nothing arrives in part, twice or out of order."""
    with connect(endpoint) as client, losses_of(client) as await_loss:
        with subprocess.Popen(
            [sys.executable, "-c", STOPPED_SERVER, endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"bound\n"
                client.send(READY)
                assert process.stdout.readline() == b"2\n"
                process.send_signal(signal.SIGSTOP)  # from here on the kernel's buffer fills, and no more
                for work in range(1, 9):
                    client.send(progress(work), big_frames(work))
            finally:
                process.kill()
        await_loss()
        client.send(progress(9), big_frames(9))
        with serve(endpoint, Progress) as server:
            heard = work_heard(server, 9)
            assert heard == list(range(heard[0], 10))


# The codec alone


def test_a_sender_is_told_that_its_message_is_too_large() -> None:
    with pytest.raises(BudgetExceeded, match="frame_bytes_max"):
        codec(bytes_max=100).encode(READY, [bytes(200)])


def test_another_protocol_is_refused_by_name() -> None:
    parts = codec().encode(READY)
    text = parts[0][4:]
    values = msgspec.msgpack.decode(text)
    other = msgspec.msgpack.encode([values[0] + 1, *values[1:]])
    assert cause([_crc(other) + other]) == "protocol"


def test_a_body_of_another_shape_is_malformed() -> None:
    text = msgspec.msgpack.encode([1, "run-1", "Ready", [], {"role": "actor", "index": "three"}])
    assert cause([_crc(text) + text]) == "malformed"
    text = msgspec.msgpack.encode({"no": "header"})
    assert cause([_crc(text) + text]) == "malformed"


def test_frames_of_other_sizes_than_announced_are_refused() -> None:
    # The same bytes cut elsewhere have the same checksum, so the sizes have to be looked at.
    parts = codec().encode(READY, [b"ab", b"c"])
    assert cause([parts[0], b"a", b"bc"]) == "truncated"


@given(st.data())
def test_no_single_bit_can_flip_unnoticed(data: st.DataObject) -> None:
    parts = codec().encode(READY, [b"some frame", b"another"])
    which = data.draw(st.integers(0, len(parts) - 1))
    bit = data.draw(st.integers(0, 8 * len(parts[which]) - 1))
    damaged = bytearray(parts[which])
    damaged[bit // 8] ^= 1 << (bit % 8)
    parts[which] = bytes(damaged)
    with pytest.raises(ContractError):
        codec().decode(parts)


@given(st.lists(st.binary(max_size=64), max_size=6))
def test_whatever_bytes_come_the_answer_is_a_contract_error(parts: list[bytes]) -> None:
    with pytest.raises(ContractError):
        codec().decode(parts)


@given(st.integers(0, 10**9), st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False)), st.data())
def test_what_is_encoded_is_decoded(work: int, metrics: dict[str, float], data: st.DataObject) -> None:
    frames = data.draw(st.lists(st.binary(max_size=100), max_size=5))
    message = Progress(role="learner", index=0, incarnation=2, work=work, metrics=metrics)
    both = codec(Progress)
    assert both.decode(both.encode(message, frames)) == (message, tuple(frames))


def _crc(text: bytes) -> bytes:
    import google_crc32c

    return int(google_crc32c.value(text)).to_bytes(4, "little")
