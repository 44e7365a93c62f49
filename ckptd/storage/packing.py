"""The file of a rank that does not write its whole image: a shard of its own, put together from parts of the image."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ckptd.storage import image
from ckptd.storage.image import PIECES_KEY, Layout, TensorSpec
from ckptd.storage.tier import Buffer


@dataclass(frozen=True, slots=True)
class Packed:
    """A file that holds a part of an image's entries."""

    layout: Layout
    parts: tuple[Buffer, ...]
    """Its bytes; all but the header and the values lie in the image."""
    values: bytes
    """The values blob as the file has it: padded to the file's end, so in general not as the image has it."""


def pack(data: memoryview, layout: Layout, left_out: Collection[str]) -> Packed:
    """Put together a file of an image's entries without those `left_out`; the values are never left out.

    Nothing is copied but the values. Entries that lie side by side in the image stay one part.
    """
    blob = image.read_values(data, layout.values)
    kept = [span for span in layout.spans[:-1] if span.name not in left_out]
    specs = [TensorSpec(span.name, span.dtype, span.shape, span.piece) for span in kept]
    metadata = {key: value for key, value in layout.metadata.items() if key != PIECES_KEY}
    planned = image.plan(specs, len(blob), metadata)
    room = bytearray(planned.values.end - planned.values.begin)
    image.write_values(memoryview(room), planned.values._replace(begin=0, end=len(room)), blob)
    values = bytes(room)
    lies_at = {span.name: (span.begin, span.end) for span in kept}
    runs: list[list[int]] = []
    for span in planned.spans[:-1]:
        begin, end = lies_at[span.name]
        if runs and runs[-1][1] == begin:
            runs[-1][1] = end
        elif end > begin:
            runs.append([begin, end])
    parts: list[Buffer] = [planned.header, *(data[begin:end] for begin, end in runs), values]
    return Packed(planned, tuple(parts), values)
