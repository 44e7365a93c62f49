"""Imports of what other libraries wrote: every element arrives, any number of ranks restores it, nothing runs code."""

import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ckptd.errors import CkptdError, ConfigError, DamagedError, FencedError, NotFoundError, RefusedError, StateError
from ckptd.storage import catalog, image, importing, keys
from ckptd.storage.export import export
from ckptd.storage.export_safetensors import export_safetensors
from ckptd.storage.importing import bring_in
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd_integrations.torch.dcp_format import import_dcp
from ckptd_integrations.torch.import_safetensors import import_safetensors
from ckptd_integrations.torch.tensors import DTYPES
from ckptd_integrations.torch.torch_format import import_torch
from tests.integrations.torch.stored import AT, committed, imported, restored, save_dcp
from tests.integrations.torch.test_formats import Tied, make, train


def tensors():
    """Tensors of all dtypes, and shapes and names out of the ordinary."""
    bits = torch.arange(48, dtype=torch.uint8)
    found = {name: (bits % 2).bool() if name == "BOOL" else bits.clone().view(dtype) for name, dtype in DTYPES.items()}
    return found | {
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 3),
        "ä b/c": torch.ones(1),
        "line\nbreak": torch.ones(2),
        "": torch.ones(3),
        "__ckptd__.values": torch.ones(4),
        "large": torch.randn(3000, 1000),
    }


def test_a_safetensors_file(tmp_path, harness):
    """A file of the library becomes a state of its name, or of the one that is given, with every element."""
    state = tensors()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for names, name in (({}, "model"), ({"net": ""}, "net"), ({"net": "model"}, "net")):
        tier, cargo, at = imported(import_safetensors, tmp_path / "model.safetensors", names)
        assert (cargo.states, cargo.step, at.step) == ((name,), None, 0)
        for world_size in (1, 3):
            for rank in range(world_size):
                bound = {name: {key: torch.zeros_like(item) for key, item in state.items()}}
                restored(tier, at, bound, rank, world_size)
                harness.same({key: bound[name][key] for key in state}, state)
                assert len(bound[name]) == len(state)


def test_a_folder_with_an_index(tmp_path, harness):
    """Files with an index as hubs have them, alone or in their folder, are one state; the step is the caller's."""
    state = make("plain", 1)["model"].state_dict()
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for number, (name, item) in enumerate(state.items()):
        parts[sorted(parts)[number % 2]][name] = item.clone()
    for file, part in parts.items():
        safetensors.torch.save_file(part, tmp_path / file, metadata={"format": "pt"})
    weights = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    for place in (tmp_path, index):
        tier, _, at = imported(import_safetensors, place, step=9)
        assert at.step == 9
        model = make("plain", 2)["model"]
        restored(tier, at, {"model": model})
        harness.same(model.state_dict(), state)
    index.unlink()
    with pytest.raises(NotFoundError, match=r"model\.safetensors\.index\.json"):
        imported(import_safetensors, tmp_path)


def test_a_model_with_tied_weights(tmp_path, harness):
    """A tensor that is stored under one name only fills a model that has it under two; what lacks both is refused."""
    model = make("plain", 1)["model"]
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    tier, cargo, at = imported(import_safetensors, tmp_path / "model.safetensors")
    assert len(cargo.tensors) == len(model.state_dict()) - 1
    again = make("plain", 2)["model"]
    restored(tier, at, {"model": again})
    harness.same(again.state_dict(), model.state_dict())
    assert again.last.weight is again.first.weight
    apart = Tied()
    apart.last.weight = nn.Parameter(torch.zeros(7, 4))
    with pytest.raises(StateError, match=r"in the model and not in the checkpoint"):
        restored(tier, at, {"model": apart})


def test_our_own_export(tmp_path):
    """An export to safetensors is imported with its step and metrics, and exports to the very same files again."""
    state = make("adamw", 1)
    train(state, 2)
    export(export_safetensors, committed(state), "job", AT, tmp_path / "first", max_file_bytes=200)
    tier, cargo, at = imported(import_safetensors, tmp_path / "first")
    assert (at.step, cargo.metrics, set(cargo.states)) == (7, {"loss": 0.5}, {"model", "optimizer"})
    export(export_safetensors, tier, "job", at, tmp_path / "second", max_file_bytes=200)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert len(first) == 5
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} == {"checkpoint.json"}
    again = make("adamw", 2)
    with pytest.raises(StateError, match="without its param_groups"):
        restored(tier, at, {"model": again["model"], "optimizer": again["optimizer"]})
    tier, _, at = imported(import_safetensors, tmp_path / "first", {"model": "model"})
    restored(tier, at, {"model": again["model"]})
    assert torch.equal(again["model"].norm.running_mean, state["model"].norm.running_mean)


def test_our_own_export_with_generators(tmp_path):
    """The generators of random numbers in an export to safetensors are left out, which is said; all else comes."""
    state = {"model": nn.Linear(3, 2)}
    export(export_safetensors, committed(state, rng=True), "job", AT, tmp_path / "out")
    assert (tmp_path / "out/__ckptd__.safetensors").exists()
    for names in ({}, {"model": ""}):
        tier, cargo, at = imported(import_safetensors, tmp_path / "out", names)
        assert cargo.states == ("model",)
        assert cargo.notes == ("left out: generators of random numbers, which safetensors can't hold whole",)
        found = restored(tier, at, {"model": nn.Linear(3, 2)}, rng=True)
        assert torch.equal(found["model"].weight, state["model"].weight)
    with pytest.raises(ConfigError, match="can't be named '__ckptd__'"):
        imported(import_safetensors, tmp_path / "out/__ckptd__.safetensors")


def test_safetensors_need_no_torch(tmp_path):
    """Where torch can't be imported, `ckptctl` imports and exports safetensors, and says what other formats need."""
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    run = "import sys; sys.modules['torch'] = None; from ckptd.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environ = os.environ | {"CKPTD_HOME": str(tmp_path / "home")}
    results = []
    for arguments in (
        ["import", "model.safetensors", "--job", "new", "--store", "runs", "--step", "5"],
        ["export", "new", "--to", "out", "--store", "runs"],
        ["export", "new", "--to", "no", "--store", "runs", "--format", "dcp"],
    ):
        ran = subprocess.run(
            [sys.executable, "-c", run, *arguments],
            cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        results.append((ran.returncode, ran.stderr))
    assert results[:2] == [(0, ""), (0, "")]
    assert results[2][0] == 12
    assert results[2][1].splitlines()[1:] == ["  hint: pip install 'ckptd[torch]'"]
    assert "format dcp needs torch" in results[2][1]
    assert safetensors.torch.load_file(tmp_path / "out/model.safetensors")["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, harness, zipped):
    """A module's state alone is "model"; of states by name those that are asked for come, also from deep inside."""
    state = make("adamw", 1)
    train(state, 2)
    model = state["model"].state_dict()
    torch.save(model, tmp_path / "weights.bin", _use_new_zipfile_serialization=zipped)
    tier, cargo, at = imported(import_torch, tmp_path / "weights.bin")
    assert cargo.states == ("model",)
    again = make("adamw", 2)
    restored(tier, at, {"model": again["model"]})
    harness.same(again["model"].state_dict(), model)
    run = {"state_dict": model, "optimizer_states": [state["optimizer"].state_dict()], "epoch": 4}
    torch.save(run, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    names = {"model": "state_dict", "optimizer": "optimizer_states.0"}
    tier, cargo, at = imported(import_torch, tmp_path / "last.ckpt", names, step=2)
    assert (set(cargo.states), at.step) == ({"model", "optimizer"}, 2)
    again = make("adamw", 3)
    del again["schedule"]
    restored(tier, at, again)
    harness.same(again["optimizer"].state_dict(), state["optimizer"].state_dict())
    tier, cargo, at = imported(import_torch, tmp_path / "last.ckpt", {"all": ""})
    assert cargo.states == ("all",)
    assert restored(tier, at, {"all": None})["all"]["epoch"] == 4


def test_a_dcp_folder(tmp_path, harness):
    """What `dcp.save` wrote, with optimizers at any depth, is restored into objects."""
    state = make("momentum", 1)
    train(state, 2)
    save_dcp({"app": {key: item.state_dict() for key, item in state.items()}, "epoch": 3}, tmp_path / "dcp")
    tier, cargo, at = imported(import_dcp, tmp_path / "dcp")
    assert cargo.states == ("app", "epoch")
    again = make("momentum", 2)
    back = restored(tier, at, {"app": dict(again), "epoch": 0})
    assert back["epoch"] == 3
    assert back["app"]["model"] is again["model"]
    for key, item in again.items():
        harness.same(item.state_dict(), state[key].state_dict(), key)


def ordered(names, *, by_name):
    """A model of equal and different layers, and an optimizer that has its parameters in the order of `names`."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 4))
    parameters = dict(model.named_parameters())
    found = [(name, parameters[name]) for name in names]
    return {"model": model, "optimizer": torch.optim.AdamW(found if by_name else [item for _, item in found])}


NAMES = ["0.weight", "0.bias", "1.weight", "2.weight", "2.bias", "3.weight", "3.bias"]
SWAPPED = [*NAMES[:3], *NAMES[5:], *NAMES[3:5]]  # layers of one form have changed places


@pytest.mark.parametrize("written", ["by number", "by name"])
@pytest.mark.parametrize(
    ("order", "by_name", "says"),
    [
        (NAMES, True, None),
        (NAMES, False, None),
        (SWAPPED, True, r"parameter 3 .* has the name 2\.weight in the checkpoint and 3\.weight now"),
        (NAMES[::-1], False, r"parameter 0 .* has the shape of exp_avg \(3, 4\) in the checkpoint and \(4,\) now"),
    ],
)
def test_an_optimizer_with_its_parameters_in_another_order(tmp_path, written, order, by_name, says):
    """What names or shapes show to be another parameter's is refused before anything is filled."""
    state = ordered(NAMES, by_name=True)
    state["model"](torch.randn(2, 4)).square().mean().backward()
    state["optimizer"].step()
    if written == "by name":
        optimizer = get_optimizer_state_dict(state["model"], state["optimizer"])
    else:
        optimizer = state["optimizer"].state_dict()
    save_dcp({"model": state["model"].state_dict(), "optimizer": optimizer}, tmp_path / "dcp")
    tier, _, at = imported(import_dcp, tmp_path / "dcp")
    again = ordered(order, by_name=by_name)
    if says is None:
        restored(tier, at, again)
        moments = [
            {name: one["optimizer"].state[item]["exp_avg"] for name, item in one["model"].named_parameters()}
            for one in (state, again)
        ]
        assert all(torch.equal(moments[0][name], moments[1][name]) for name in NAMES)
    else:
        with pytest.raises(StateError, match=says):
            restored(tier, at, again)
        assert not again["optimizer"].state


def test_names_that_are_not_there(tmp_path):
    """A group that is not there, or a name that ckptd keeps for itself, is refused with what there is."""
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "b.safetensors")
    for names in ({"model": "c"}, {"model": ""}, {"__ckptd__.x": "a"}):
        with pytest.raises(ConfigError):
            imported(import_safetensors, tmp_path, names)
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="optimizer"):
        imported(import_torch, tmp_path / "x.pt", {"optimizer": "optimizer"})


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "dcp/.metadata", "dcp/__0_0.distcp"])
def test_a_file_that_was_copied_in_part(tmp_path, name):
    """Wherever a copy ended, the file is refused by name with a hint, and nothing is in the store."""
    state = {"w": torch.arange(4000.0), "v": torch.ones(3)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    save_dcp({"model": state}, tmp_path / "dcp")
    importer = {"model.safetensors": import_safetensors, "model.pt": import_torch}.get(name, import_dcp)
    path = tmp_path / name
    size = path.stat().st_size
    for end in [size - 1, size * 3 // 4, size // 2, size // 4, 100, 8, 1, 0]:
        os.truncate(path, end)
        tier = MemoryTier()
        with (
            pytest.raises(DamagedError, match=re.escape(str(path))) as caught,
            importer(path if importer is not import_dcp else path.parent, {}) as cargo,
        ):
            bring_in(cargo, tier, "job", 3)
        assert caught.value.hint
        assert "\n" not in caught.value.message
        assert not list(tier.list(""))


def test_only_a_job_without_checkpoints(tmp_path):
    """A job that has a checkpoint is left alone; one that was begun and has none gets the next generation."""
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    tier = MemoryTier()
    catalog.claim_generation(tier, "job", 4, None, 0.0)
    with import_safetensors(tmp_path, {}) as cargo:
        assert bring_in(cargo, tier, "job", 3).id == (5, 3)
        before = sorted(entry.key for entry in tier.list(""))
        with pytest.raises(ConfigError, match="has checkpoints in"):
            bring_in(cargo, tier, "job", 9)
    assert sorted(entry.key for entry in tier.list("")) == before


def test_a_job_that_somebody_runs(tmp_path, monkeypatch):
    """A job that an agent holds is left alone, also before its first checkpoint."""
    monkeypatch.setattr(importing, "_HOLD_DEADLINE_S", 0.1)
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    agent, ours = LocalTier(tmp_path / "runs"), LocalTier(tmp_path / "runs")
    agent.hold("job", 1.0)
    with import_safetensors(tmp_path / "model.safetensors", {}) as cargo:
        with pytest.raises(FencedError):
            bring_in(cargo, ours, "job", 3)
        assert not list(ours.list("job/"))
        agent.close()
        assert bring_in(cargo, ours, "job", 3).id == (1, 3)
    ours.close()


class Late(LocalTier):
    """A tier of a job whose agent commits its first checkpoint and ends, while others wait for their turn."""

    def hold(self, job, deadline_s):
        """Wait for the agent."""
        agent = LocalTier(self.root)
        with import_safetensors(self.root.parent / "model.safetensors", {}) as cargo:
            bring_in(cargo, agent, job, 8)
        agent.close()
        super().hold(job, deadline_s)


def test_a_job_that_somebody_ran_a_moment_ago(tmp_path):
    """What the job's agent committed before it let go of the job is seen: there is no second beginning."""
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    tier = Late(tmp_path / "runs")
    with (
        import_safetensors(tmp_path / "model.safetensors", {}) as cargo,
        pytest.raises(ConfigError, match="the newest of step 8"),
    ):
        bring_in(cargo, tier, "job", 3)
    assert catalog.holdings(tier, "job").committed == ((1, 8),)
    tier.close()


class Plain(MemoryTier):
    """A tier that can't tell who comes first."""

    def __init__(self):
        super().__init__()
        self.capabilities = type(self.capabilities)(
            **{name: getattr(self.capabilities, name) for name in self.capabilities.__slots__}
            | {"create_only_put": False}
        )


def test_a_tier_without_create_only_put(tmp_path):
    """Where nobody can be sure to be the first, nothing is imported, and nothing written."""
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    tier = Plain()
    with import_safetensors(tmp_path, {}) as cargo, pytest.raises(RefusedError):
        bring_in(cargo, tier, "job", 3)
    assert not list(tier.list(""))


def test_a_source_that_changes_is_never_committed(tmp_path, monkeypatch):
    """A file that is changed or cut between the two readings leaves no checkpoint."""
    path = tmp_path / "model.safetensors"
    claim = catalog.claim_generation
    for change in ("flip", "cut"):
        safetensors.torch.save_file({"w": torch.arange(5000.0)}, path)
        tier = MemoryTier()

        def meanwhile(*arguments, change=change, **options):
            if change == "cut":
                os.truncate(path, 9000)
            else:
                with path.open("r+b") as file:
                    file.seek(9000)
                    file.write(b"\xff\xff")
            claim(*arguments, **options)

        monkeypatch.setattr(catalog, "claim_generation", meanwhile)
        with import_safetensors(path, {}) as cargo, pytest.raises(CkptdError) as caught:
            bring_in(cargo, tier, "job", 3)
        assert isinstance(caught.value, DamagedError)
        assert not catalog.holdings(tier, "job").committed


def test_what_is_committed_is_like_any_other(tmp_path):
    """The shard is a safetensors file of the usual form, of one rank, whose tensors are the job's."""
    safetensors.torch.save_file({"w": torch.ones(3, 2), "s": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    tier, _, at = imported(import_safetensors, tmp_path, step=12)
    assert at == (1, 12)
    loaded = catalog.load_manifest(tier, "job", at)
    assert (loaded.world_size, loaded.parent) == (1, None)
    placements = {name: tensor.placement for name, tensor in loaded.tensors.items()}
    assert placements == {"model.w": "job", "model.s": "job", image.VALUES_NAME: "rank"}
    data = tier.get(keys.shard_key("job", at, 0))
    assert safetensors.torch.load(data)["model.w"].tolist() == [[1, 1]] * 3
    assert len(data) % image.BLOCK_BYTES == 0
