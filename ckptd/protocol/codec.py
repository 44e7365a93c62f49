"""Length-prefixed JSON, sans-IO: bytes in, messages out, and the other way round.

A frame is four bytes of big-endian length and that many bytes of UTF-8 JSON, always an object. JSON because a
human can read it in a debugger and no byte of it can run code; never pickle. Sizes are bounded on both sides, so
a broken or hostile peer costs a refused frame and not the agent's memory.
"""

from __future__ import annotations

import json
import struct
import sys
from typing import Any

from ckptd.errors import ProtocolError

MAX_FRAME_BYTES = 16 * 2**20
_LENGTH = struct.Struct(">I")

Frame = dict[str, Any]


def encode(frame: Frame) -> bytes:
    """Return the bytes of one frame; raises `ProtocolError` when it is larger than a peer would accept."""
    try:
        body = json.dumps(frame, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a message can't be written as JSON: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Collects bytes as they arrive and returns the frames that are complete.

    After a `ProtocolError` the stream has no known boundary any more: close the connection.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_frame_bytes = max_frame_bytes

    def feed(self, data: bytes) -> list[Frame]:
        """Take `data` and return every frame that it completes, oldest first."""
        self._buffer += data
        frames: list[Frame] = []
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > self._max_frame_bytes:
                raise ProtocolError(f"a peer announced a message of {size} bytes, over {self._max_frame_bytes}")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                break
            frames.append(_parse(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return frames

    @property
    def pending_bytes(self) -> int:
        """How many bytes of an unfinished frame are held."""
        return len(self._buffer)


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:  # NaN and infinity are no JSON, and comparisons with them go wrong
        raise ValueError(text)
    return number


def _whole(text: str) -> int:
    number = int(text)
    if abs(number) > sys.float_info.max:  # and what is counted with it and a float would overflow
        raise ValueError(text)
    return number


_JSON = json.JSONDecoder(parse_float=_finite, parse_int=_whole, parse_constant=_finite)


def _parse(body: bytes) -> Frame:
    try:
        frame = _JSON.decode(body.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a peer sent a message that is not JSON") from error
    if not isinstance(frame, dict):
        raise ProtocolError("a peer sent JSON that is not an object")
    return frame
