"""The entry of the integration: binds the user's objects, captures and restores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckptd.errors import StateError
from ckptd.storage import image as shard
from ckptd_integrations.torch.capture import METADATA, LayoutCache, TorchImage, pack_values
from ckptd_integrations.torch.fitting import Fitter
from ckptd_integrations.torch.nodes import read_document
from ckptd_integrations.torch.rng import RNG_NAME, capture_rng, restore_rng
from ckptd_integrations.torch.sources import ImageTensors, verify
from ckptd_integrations.torch.tensors import tabulate
from ckptd_integrations.torch.tree import Harvest

_RESERVED = "__ckptd__"


class TorchFramework:
    """The `Framework` of PyTorch; it has no state of its own."""

    def bind(self, state: Mapping[str, Any], *, rng: bool = True) -> TorchBinding:
        """Bind the user's named objects; `rng` asks to capture the process's random number generators as well.

        Raises `StateError` for a name that ckptd keeps for itself.
        """
        return TorchBinding(state, rng=rng)


class TorchBinding:
    """The `Binding` of PyTorch: the user's named objects, and the layout of their last capture."""

    def __init__(self, state: Mapping[str, Any], *, rng: bool = True) -> None:
        self.state: dict[str, Any] = dict(state)
        self._rng = rng
        self._layouts = LayoutCache()
        self._check_own_names()

    def prepare(self) -> TorchImage:
        """Collect what has to be captured now, without copying a tensor.

        Raises `StateError` naming the key and the type of what can't be captured.
        """
        self._check_own_names()
        harvest = Harvest()
        entries = [(name, harvest.encode(value, name)) for name, value in self.state.items()]
        if self._rng:
            entries.append((RNG_NAME, harvest.encode(capture_rng(), RNG_NAME)))
        table = tabulate(harvest.names, harvest.tensors)
        values = pack_values(entries, table)
        return TorchImage(self._layouts.place(table, len(values)), table, values)

    def restore(self, image: memoryview, digests: Mapping[str, str] | None) -> None:
        """Fill the bound objects in place from `image`, after checking `digests` when there are any.

        Raises `DamagedError` naming a tensor whose digest differs, and `StateError` naming what does not fit, both
        before anything was changed. No object aliases `image` afterwards.
        """
        layout = shard.parse(image)
        if digests is not None:
            verify(image, layout, digests)
        _check_framework(layout)
        document = read_document(shard.read_values(image, layout.values))
        tensors = ImageTensors(layout, document)
        fitter = Fitter(tensors)
        nodes = dict(document.entries)
        rng_node = nodes.pop(RNG_NAME, None)
        self._check_names(nodes)
        fills = {name: fitter.fit_root(nodes[name], value, name) for name, value in self.state.items()}
        make_rng = None if rng_node is None or not self._rng else fitter.build(rng_node, RNG_NAME)
        # What is made here is trained on, in whatever mode the script is now.
        with torch.inference_mode(mode=False), torch.no_grad(), tensors.opened(image):
            tensors.run_copies()
            for name, fill in fills.items():
                self.state[name] = fill()
            rng = None if make_rng is None else make_rng()
        if rng is not None:
            # Last, because code that loads a state may draw random numbers.
            restore_rng(rng)

    def _check_own_names(self) -> None:
        for name in self.state:
            if not isinstance(name, str) or name.startswith(_RESERVED):
                raise StateError(
                    f"state can't be named {name!r}", hint=f"use a string that begins not with {_RESERVED}"
                )

    def _check_names(self, captured: Mapping[str, Any]) -> None:
        for name in self.state:
            if name not in captured:
                raise StateError(
                    f"state {name!r} is bound now and was not captured",
                    hint="bind what the captured run bound, or start a new job",
                )
        for name in captured:
            if name not in self.state:
                raise StateError(
                    f"state {name!r} was captured and is not bound now",
                    hint="bind what the captured run bound, or start a new job",
                )


def _check_framework(layout: shard.Layout) -> None:
    framework = layout.metadata.get("ckptd.framework")
    if framework != METADATA["ckptd.framework"]:
        raise StateError(
            f"the checkpoint was captured by the framework {framework!r}, not by {METADATA['ckptd.framework']!r}",
            hint="attach it with the framework of the captured run",
        )
