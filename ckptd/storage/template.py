"""The manifests of images that are laid out alike: their text differs in places and digests, all else is kept.

With 10,000 tensors, to build a manifest and to encode it takes 13 times as long as to put its text together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from ckptd.errors import invariant
from ckptd.storage import manifest
from ckptd.storage.manifest import Place, ShardContent
from ckptd.storage.manifest_text import body, finish, to_json
from ckptd.storage.reuse import Entry

_PLACE = re.compile(r'("byte_range":\[\d+,\d+\],"digest":)null')
"""Nothing but a chunk that was not digested: a quote within a JSON string has a backslash before it."""
_TENSORS = b'"tensors":{'


class Template:
    """The text of all tensors of some shards, but for what may differ from one checkpoint to the next.

    The values are left out: how large they are may differ too.
    """

    def __init__(self, shards: Sequence[ShardContent]) -> None:
        """Take the tensors of shards that were not digested; raises `StateError` when they don't fit together."""
        self._before: list[str] = []
        """What comes before each place, in the order of the text."""
        self._places: list[str] = []
        """Where each entry lies in its image, and what introduces its digest."""
        self._entries: dict[Entry, int] = {}
        """The order of the text."""
        self._end = ""
        for name, tensor in manifest.tensors_of(shards).items():
            for chunk in tensor["chunks"]:
                self._entries[Entry(chunk["shard"], chunk.get("entry", name))] = len(self._entries)
            first, *others = _PLACE.split(f"{to_json(name)}:{to_json(tensor)}")
            self._before += [self._end + first, *others[1:-1:2]]
            self._places += others[::2]
            self._end = others[-1] + ","
        invariant(len(self._places) == len(self._entries), "every chunk of a tensor has one place")

    def text(
        self,
        digests: Mapping[Entry, str] | None,
        leaves: Mapping[Entry, Sequence[str]],
        places: Mapping[Entry, Place],
    ) -> bytes:
        """Return the text of all tensors.

        `digests` are those of all entries, None for a snapshot that was not digested; `leaves` are of the entries that
        have several, `places` of those whose bytes lie elsewhere than in the image.
        """
        found = repeat("null") if digests is None else self._digests(digests, leaves)
        text = "".join(chain.from_iterable(zip(self._before, self._placed(places), found, strict=False)))
        return (text + self._end).encode()

    def _digests(self, digests: Mapping[Entry, str], leaves: Mapping[Entry, Sequence[str]]) -> list[str]:
        found = [f'"{digest}"' for digest in map(digests.__getitem__, self._entries)]
        for entry in leaves.keys() & self._entries.keys():
            found[self._entries[entry]] += f',"leaves":{to_json(leaves[entry])}'
        return found

    def _placed(self, places: Mapping[Entry, Place]) -> list[str]:
        placed = self._places.copy()
        for entry, (file, begin, end) in places.items():
            elsewhere = "" if file is None else f'"file":"{file}",'
            placed[self._entries[entry]] = f'{elsewhere}"byte_range":[{begin},{end}],"digest":'
        return placed


def encode(document: Mapping[str, Any], tensors: bytes) -> bytes:
    """Return the bytes of a manifest that has further `tensors`; `document` is as built for the values alone."""
    begin, name, end = body(document).partition(_TENSORS)
    return finish((begin, name, tensors, end))
