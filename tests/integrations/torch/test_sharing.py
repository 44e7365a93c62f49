"""Replicated state is captured once: each rank computes its share, and all shares together are the whole."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptd.client.framework import Membership
from ckptd.errors import StateError
from ckptd.storage.image import VALUES_NAME, parse
from ckptd_integrations.torch import witness
from ckptd_integrations.torch.arrangement import row_major_offset
from ckptd_integrations.torch.sharing import SLACK, Shareable, share_out, split_dim, window

shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)
items = st.lists(st.tuples(shapes, st.sampled_from([1, 2, 4, 8])), max_size=12)


@settings(deadline=None, max_examples=100)
@given(items=items, ranks=st.integers(1, 9), order=st.randoms(use_true_random=False))
def test_shares_cover_exactly(items, ranks, order):
    """Every row of every tensor is in exactly one rank's share, in whatever order ranks list the tensors."""
    tensors = [Shareable(f"t{number}", shape, item) for number, (shape, item) in enumerate(items)]
    shuffled = order.sample(tensors, len(tensors))
    covered = {}
    for rank in range(ranks):
        shares = share_out(tensors, ranks, rank)
        again = share_out(shuffled, ranks, rank)
        assert sorted((tensors[i].name, *rows) for i, *rows in shares) == sorted(
            (shuffled[i].name, *rows) for i, *rows in again
        )
        for index, begin, end in shares:
            covered.setdefault(index, []).append((begin, end))
    for index, tensor in enumerate(tensors):
        dim = split_dim(tensor.shape)
        rows = sorted(covered[index])
        assert rows[0][0] == 0
        assert rows[-1][1] == (1 if dim is None else tensor.shape[dim])
        assert all(left[1] == right[0] for left, right in pairwise(rows))


@settings(deadline=None, max_examples=100)
@given(items=items, ranks=st.integers(1, 9))
def test_shares_are_balanced(items, ranks):
    """No rank has more than its part, give or take a row and what is not worth a cut on either side."""
    tensors = [Shareable(f"t{number}", shape, item) for number, (shape, item) in enumerate(items)]
    total = sum(tensor.size_bytes for tensor in tensors)
    row = [
        tensor.size_bytes // (tensor.shape[split_dim(tensor.shape)] if prod(tensor.shape) > 1 else 1)
        for tensor in tensors
    ]
    for rank in range(ranks):
        size = 0
        for index, begin, end in share_out(tensors, ranks, rank):
            size += (end - begin) * row[index]
        assert abs(size - total / ranks) <= 2 * max([total / ranks / SLACK, *row, 0]) + 2


def test_large_tensors_are_cut_and_small_ones_are_not():
    """One tensor of 4 GiB is divided evenly; a cut close to a tensor's edge leaves it whole."""
    huge = [Shareable("w", (2**20, 2**10), 4)]
    assert [share_out(huge, 4, rank)[0][1:] for rank in range(4)] == [
        (rank * 2**18, (rank + 1) * 2**18) for rank in range(4)
    ]
    uneven = [Shareable("a", (1010,), 4), Shareable("b", (990,), 4)]
    assert share_out(uneven, 2, 0) == [(0, 0, 1010)]
    assert share_out(uneven, 2, 1) == [(1, 0, 990)]


@settings(deadline=None, max_examples=100)
@given(data=st.data(), whole=st.lists(st.integers(1, 5), max_size=4))
def test_contiguous_boxes(data, whole):
    """A box counts as contiguous when torch says that its elements lie one after another, and where they begin."""
    begin = [data.draw(st.integers(0, size - 1)) for size in whole]
    shape = [data.draw(st.integers(1, size - first)) for size, first in zip(whole, begin, strict=True)]
    tensor = torch.arange(prod(whole)).view(whole)
    box = tensor[tuple(slice(first, first + size) for first, size in zip(begin, shape, strict=True))]
    offset = row_major_offset(whole, begin, shape)
    assert (offset is not None) == box.is_contiguous()
    if offset is not None:
        assert offset == box.storage_offset()


@settings(deadline=None, max_examples=50)
@given(step=st.integers(0, 10**9), total=st.integers(0, 10**7), size=st.integers(1, 10**6))
def test_windows(step, total, size):
    """A witness looks at as many bytes as there are or it may, inside of what there is."""
    begin, end = window(step, total, size)
    assert 0 <= begin <= end <= total
    assert end - begin == min(total, size)


def state():
    """Return what all ranks hold alike, with all that is odd, and something of this rank's own."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    extra = {
        "images": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "wide": torch.randn(5, dtype=torch.complex128).conj(),
        "turned": torch.randn(7, 3).t(),
        "tied": model[0].weight,
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(3.5),
    }
    return {"model": model, "optimizer": optimizer, "extra": extra}


def images(harness, ranks, step=1, whole=False, change=None):
    """Return the images of all ranks, and what each would send as its witness."""
    found = []
    for rank in range(ranks):
        held = state()
        if change is not None:
            change(rank, held)
        binding = harness.bind(
            **held, own=torch.full((3,), rank), membership=Membership(rank, ranks, ("model", "optimizer", "extra"))
        )
        found.append((harness.image(binding, step, whole), binding.prepare(step, whole=whole).witness()))
        binding.close()
    return [image for image, _ in found], [seen for _, seen in found]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_what_they_hold_alike(harness, ranks):
    """The images of all ranks hold replicated tensors once, and each rank restores all of them and its own."""
    captured, _ = images(harness, ranks)
    spans = [{span.name: span for span in parse(image).spans} for image in captured]
    once = sum(span.end - span.begin for of_rank in spans for span in of_rank.values() if span.piece)
    total = sum(span.end - span.begin for span in parse(images(harness, 1)[0][0]).spans if span.name != VALUES_NAME)
    names = {span.piece.tensor for of_rank in spans for span in of_rank.values() if span.piece}
    assert ("extra.images" in names) == (ranks > 1)
    assert "own" not in names
    if ranks > 1:
        assert once == total - 24  # all but `own`
        sizes = [sum(span.end - span.begin for span in of_rank.values() if span.piece) for of_rank in spans]
        assert max(sizes) < 1.5 * once / ranks
    for rank in range(ranks):
        expected, blank = state(), state()
        for parameter in blank["model"].parameters():
            parameter.data.zero_()
        blank["extra"] = {key: torch.zeros_like(value) for key, value in blank["extra"].items()}
        blank["extra"]["tied"] = blank["model"][0].weight
        held = {**blank, "own": torch.zeros(3, dtype=torch.int64)}
        harness.restore(captured, membership=Membership(rank, ranks, ("model", "optimizer", "extra")), **held)
        harness.same(held["model"], expected["model"])
        harness.same(held["optimizer"].state_dict(), expected["optimizer"].state_dict())
        harness.same({**held["extra"], "tied": 0}, {**expected["extra"], "tied": 0})
        assert held["own"].tolist() == [rank] * 3


def test_whole(harness):
    """On demand each rank captures everything as its own, and there is no witness."""
    captured, seen = images(harness, 2, whole=True)
    for image in captured:
        assert not any(span.piece for span in parse(image).spans)
        assert "model.0.weight" in {span.name for span in parse(image).spans}
    assert seen == [{}, {}]


def test_witnesses_agree_until_a_tensor_differs(harness, monkeypatch):
    """Ranks that hold the same send the same witness; over the steps, a single changed element shows on one of them."""
    monkeypatch.setattr(witness, "WINDOW_BYTES", 1500)

    def change(rank, held):
        if rank:
            held["model"][2].weight.data[1, 17] += 1

    looked = set()
    differed = set()
    for step in range(25):
        first, second = images(harness, 2, step)[1]
        assert first == second
        assert first
        looked.update(name.split("[")[0] for name in first)
        first, second = images(harness, 2, step, change=change)[1]
        assert first.keys() == second.keys()
        differed.update(name.split("[")[0] for name in first if first[name] != second[name])
    assert differed == {"model.2.weight"}
    assert {"model.0.weight", "extra.images", "extra.turned", "extra.wide"} <= looked


def test_a_replicated_name_has_to_be_bound(harness):
    """A name that is said to be replicated and is not attached is refused at once."""
    with pytest.raises(StateError, match="'modle'"):
        harness.bind(model=1, membership=Membership(0, 2, ("modle",)))
