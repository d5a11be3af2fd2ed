"""A run that stops resumes after the last finished block, with the same masks."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from symprune_lightning import (
    NM,
    BlockReconstruction,
    Progression,
    Search,
    StreamedCheckpoint,
    prune_model,
)
from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.layers.find import find_layers
from symprune_lightning.errors import JournalError, PruningError
from tests.groups import run_group
from tests.models import LANGUAGE, batches, build, llama

METHODS: dict[str, dict[str, Any]] = {
    "ria": {"score": "ria"},
    "exactswap": {"score": "wanda", "refine": ["r2dsnot", "exactswap"]},
    "permuted": {"score": "ria", "pattern": NM(2, 4, permute=True)},
    "block": {"score": "ria", "calibration_order": "block", "group": "block"},
    "dense": {"score": "ria", "calibration_order": "dense"},
    "model": {"score": "ria", "calibration_order": "dense", "group": "model"},
    "update": {"score": "ria", "update": "obsupdate"},
    "sparsegpt": {"solver": "sparsegpt"},
    "owl": {"score": "wanda", "allocation": "owl"},
    "search": {
        "score": "wanda",
        "allocation": Search(candidates=(Progression(slope=0.0), Progression(slope=0.2))),
    },
    "by-layer": {"sparsity": {"re:.*down_proj": 0.25, "re:.*": 0.5}},
    "magnitude": {"score": "magnitude"},
    "reconstruct": {
        "calibration_order": "block",
        "reconstruct": BlockReconstruction(epochs=2, learning_rate=1e-2, target="model"),
    },
    "reconstruct-block": {
        "update": "maskedcg",
        "calibration_order": "block",
        "reconstruct": BlockReconstruction(
            epochs=1, learning_rate=None, target="block", train_norms=True
        ),
    },
}


class StopError(Exception):
    pass


class StopAfter(PruningHooks):
    """Raises after this number of layers."""

    def __init__(self, layers: int) -> None:
        self.remaining = layers

    def on_layer_pruned(self, report: Any, mask: Any) -> None:
        self.remaining -= 1
        if not self.remaining:
            raise StopError


def small(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return llama(num_hidden_layers=3, **options).eval()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(result: Any, expected: Any) -> None:
    assert result.masks.keys() == expected.masks.keys()
    for name, mask in expected.masks.items():
        assert torch.equal(result.masks[name], mask), name
    assert result.permutations.keys() == expected.permutations.keys()
    for name, order in expected.permutations.items():
        assert torch.equal(result.permutations[name], order), name
    reports = [sorted(r.layers, key=lambda x: x.name) for r in (result, expected)]
    for mine, other in zip(*reports, strict=True):
        assert (mine.name, mine.swaps, mine.tokens) == (other.name, other.swaps, other.tokens)
        expected_error = other.error_refined
        assert mine.error_refined == (expected_error and pytest.approx(expected_error, rel=1e-5))
    assert result.trials == expected.trials
    curves = [[(b.name, b.errors, b.learning_rate) for b in r.blocks] for r in (result, expected)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("stop", [1, 8, 16])
@pytest.mark.parametrize("method", METHODS)
def test_resumes_with_the_same_masks(tmp_path, method, stop):
    options = METHODS[method]
    whole = small()
    expected = prune_model(whole, batches(), **options)
    with pytest.raises(PruningError, match="start the same run again"):
        prune_model(small(), batches(), **options, journal=tmp_path, hooks=[StopAfter(stop)])
    model = small()
    same(prune_model(model, batches(), **options, journal=tmp_path), expected)
    for name, value in weights(whole).items():
        assert torch.equal(model.get_parameter(name), value), name
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", LANGUAGE)
def test_architectures(tmp_path, name):
    expected = prune_model(build(name), batches(name))
    with pytest.raises(PruningError):
        prune_model(build(name), batches(name), journal=tmp_path, hooks=[StopAfter(7)])
    same(prune_model(build(name), batches(name), journal=tmp_path), expected)


def test_finished_blocks_are_not_pruned_again(tmp_path):
    scored: list[str] = []

    class Scored(PruningHooks):
        def on_layer_scored(self, layer: str, scores: Any, mask: Any) -> None:
            scored.append(layer)

    with pytest.raises(PruningError):
        prune_model(small(), batches(), journal=tmp_path, hooks=[StopAfter(17)])
    result = prune_model(small(), batches(), journal=tmp_path, hooks=[Scored()])
    # blocks 0 and 1 are finished; 1, recorded last, is pruned again to compare it
    assert [name.split(".")[2] for name in scored] == ["1"] * 7 + ["2"] * 7
    scored.clear()
    # a complete run repeats its last block only
    same(prune_model(small(), batches(), journal=tmp_path, hooks=[Scored()]), result)
    assert [name.split(".")[2] for name in scored] == ["2"] * 7


def test_a_search_is_not_repeated(tmp_path):
    options, forwards = METHODS["search"], []

    def forward(model: Any, batch: Any) -> Any:
        forwards.append(batch)
        return model(**batch)

    expected = prune_model(small(), batches(), **options)
    with pytest.raises(PruningError):
        prune_model(small(), batches(), **options, journal=tmp_path, hooks=[StopAfter(1)])
    same(prune_model(small(), batches(), **options, journal=tmp_path, forward=forward), expected)
    assert len(forwards) == len(batches()), "one forward per batch: no trial was repeated"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.6}, r"sparsity was 0.5 and is now 0.6"),
        ({"score": "wanda"}, r"score was RIA\(alpha=0.5\) and is now Wanda\(\)"),
        ({"refine": "dsnot"}, r"refine of layer model.layers.0.self_attn.q_proj was"),
        ({"calibration_order": "block"}, r"calibration_order was layer and is now block"),
        ({"ignore": ["re:.*q_proj"]}, r"layer model.layers.0.self_attn.q_proj was not? ?among"),
        ({"batches": batches(count=4)}, "the calibration data differ"),
        ({"batches": batches()[::-1]}, "the calibration data differ"),
        ({"model": llama(num_hidden_layers=3)}, "the model's weights differ"),
        ({"update": "obsupdate"}, "update was None and is now OBSUpdate"),
        (
            {"reconstruct": True, "calibration_order": "block"},
            "reconstruct was None and is now BlockReconstruction",
        ),
    ],
)
def test_refuses_another_run(tmp_path, change, message):
    with pytest.raises(PruningError):
        prune_model(small(), batches(), journal=tmp_path, hooks=[StopAfter(9)])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = change.get("model", small())
    dense = weights(model)
    options = {k: v for k, v in change.items() if k not in ("model", "batches")}
    message = message.replace("was not? ?among", "was among" if "ignore" in change else "")
    with pytest.raises(JournalError, match=message) as raised:
        prune_model(model, change.get("batches", batches()), **options, journal=tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "delete the folder" in str(raised.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert all(torch.equal(model.get_parameter(name), value) for name, value in dense.items())


def test_refuses_a_last_block_that_is_not_reproduced(tmp_path):
    prune_model(small(), batches(), journal=tmp_path)
    last = sorted(tmp_path.glob("block-*"))[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    with pytest.raises(PruningError, match="differs from the one in"):
        prune_model(small(), batches(), journal=tmp_path)


def test_says_which_file_is_damaged(tmp_path):
    prune_model(small(), batches(), journal=tmp_path)
    file = tmp_path / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(JournalError, match=r"block-00001.safetensors.*Delete it and all files"):
        prune_model(small(), batches(), journal=tmp_path)


def test_the_advice_of_the_messages_works(tmp_path):
    expected = prune_model(small(), batches(), journal=tmp_path)
    (tmp_path / "block-00001.safetensors").write_bytes(b"?")
    for part in (1, 2):
        (tmp_path / f"block-{part:05}.safetensors").unlink()
    same(prune_model(small(), batches(), journal=tmp_path), expected)
    (tmp_path / "run.json").unlink()
    with pytest.raises(JournalError, match=r"is missing run\.json"):
        prune_model(small(), batches(), journal=tmp_path)


def test_says_that_the_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    model = small()
    dense = weights(model)
    with pytest.raises(OSError, match="cannot write the journal"):
        prune_model(model, batches(), journal=tmp_path / "file" / "deeper")
    assert all(torch.equal(model.get_parameter(name), value) for name, value in dense.items())


def test_a_full_disk_leaves_what_was_finished(tmp_path):
    """The limit on file sizes makes writing fail as a full disk does, in the third block."""
    expected = prune_model(small(), batches())
    limited = (
        "import resource, signal\n"
        "from tests.engine.test_journal import StopAfter, small, batches, prune_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "class Limit(StopAfter):\n"
        "    def on_layer_pruned(self, report, mask):\n"
        "        self.remaining -= 1\n"
        "        if not self.remaining:\n"
        "            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))\n"
        f"prune_model(small(), batches(), journal={str(tmp_path)!r}, hooks=[Limit(15)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "PruningError" in last
    assert f"cannot write {tmp_path}/block-00002.safetensors" in last
    assert "free disk space" in last
    assert [f.name for f in sorted(tmp_path.glob("*block*"))] == [
        "block-00000.safetensors",
        "block-00001.safetensors",
    ]
    same(prune_model(small(), batches(), journal=tmp_path), expected)


@pytest.mark.parametrize("stop", [3, 9, 20])
@pytest.mark.parametrize(
    "method",
    [
        "ria",
        "update",
        "block",
        "dense",
        "permuted",
        "magnitude",
        "reconstruct",
        "reconstruct-block",
    ],
)
def test_streamed(tmp_path, method, stop):
    options = METHODS[method]
    small().save_pretrained(tmp_path / "dense")

    def stream(output: str, **more: Any) -> None:
        with StreamedCheckpoint(tmp_path / "dense", tmp_path / output) as checkpoint:
            result = prune_model(
                checkpoint.model, batches(), placement=checkpoint, **options, **more
            )
            checkpoint.save({"sparsity": result.sparsity})

    stream("expected")
    journal = tmp_path / "journal"
    with pytest.raises(PruningError):
        stream("sparse", journal=journal, hooks=[StopAfter(stop)])
    assert not (tmp_path / "sparse").exists()
    stream("sparse", journal=journal)
    files = sorted(tmp_path.glob("expected/*.safetensors"))
    assert [f.name for f in files] == [
        f.name for f in sorted(tmp_path.glob("sparse/*.safetensors"))
    ]
    for file in files:
        written = load_file(tmp_path / "sparse" / file.name)
        for name, value in load_file(file).items():
            assert torch.equal(written[name], value), name


def test_streamed_refuses_other_weights(tmp_path):
    for seed in (0, 1):
        build("llama", seed).save_pretrained(tmp_path / "dense")
        with StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse") as checkpoint:
            if seed == 1:
                with pytest.raises(JournalError, match="the model's weights differ"):
                    prune_model(
                        checkpoint.model,
                        batches(),
                        placement=checkpoint,
                        journal=tmp_path / "journal",
                    )
            else:
                prune_model(
                    checkpoint.model, batches(), placement=checkpoint, journal=tmp_path / "journal"
                )
            checkpoint.save({})


def in_group(rank: int, size: int, folder: Path, kind: str) -> None:
    journal = folder / "journal"

    def model_and_ranks() -> tuple[torch.nn.Module, Communicator]:
        model = small(tie_word_embeddings=False)
        if kind == "fsdp":
            mesh = init_device_mesh("cpu", (size,))
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model, Communicator.from_default_group()

    for method in ("exactswap", "update", "permuted", "owl", "search"):
        if (kind, method) == ("fsdp", "search"):
            continue
        options = {**METHODS[method], "ignore": []}
        for stop in (3, 9):
            at = journal / f"{method}{stop}"
            model, ranks = model_and_ranks()
            mine = list(ranks.shard(batches(count=5)))
            try:
                prune_model(
                    model, mine, communicator=ranks, **options, journal=at, hooks=[StopAfter(stop)]
                )
            except PruningError:
                pass
            else:
                raise AssertionError("it was not stopped")
            dist.barrier()
            model, ranks = model_and_ranks()
            result = prune_model(model, mine, communicator=ranks, **options, journal=at)
            dense = small(tie_word_embeddings=False)
            expected_result = prune_model(dense, batches(count=5), **options)
            same(result, expected_result)
            expected_masks = expected_result.masks
            assert result.is_applied_to(model)
            assert {x.name for x in find_layers(model, result.masks)} == set(expected_masks)


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp", 2), ("ddp", 3)])
def test_several_ranks(tmp_path, kind, size):
    run_group(in_group, size, tmp_path, kind)


def test_another_number_of_ranks_may_resume(tmp_path):
    run_group(interrupted, 2, tmp_path)
    expected = prune_model(small(), batches(count=5))
    same(prune_model(small(), batches(count=5), journal=tmp_path / "journal"), expected)


def interrupted(rank: int, size: int, folder: Path) -> None:
    ranks = Communicator.from_default_group()
    mine = ranks.shard(batches(count=5))
    with pytest.raises(PruningError):
        prune_model(
            small(), mine, communicator=ranks, journal=folder / "journal", hooks=[StopAfter(16)]
        )


VICTIM = """
import os, sys
from pathlib import Path
import torch
from tests.engine.test_journal import small, batches, prune_model
from tests.killing import dying_at

folder, dying = Path(sys.argv[1]), dying_at(int(sys.argv[2]))
torch.set_num_threads(1)
os.fsync = dying(os.fsync)
os.replace = dying(os.replace)
print("go", flush=True)
result = prune_model(small(), batches(), refine="exactswap", journal=folder / "journal")
torch.save(dict(result.masks), folder / "masks.pt")
"""


def run_victim(folder: Path, calls: int, delay: float | None = None) -> int:
    command = [sys.executable, "-c", VICTIM, str(folder), str(calls)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    if delay is not None:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(delay)
        process.kill()
    process.communicate()
    return process.returncode


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """SIGKILL at ten moments: five while a file is being written, five at random times."""
    expected = tmp_path / "expected"
    expected.mkdir()
    start = time.monotonic()
    assert run_victim(expected, 0) == 0
    taken = time.monotonic() - start
    masks = torch.load(expected / "masks.pt", weights_only=True)
    chance = random.Random(0)
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = 0
    # each goes on from where the one before was killed: journal's files are flushed twice each
    for calls in (1, 3, 4, 5, 6):
        killed += run_victim(folder, calls) == -signal.SIGKILL
        check_files(folder)
    other = tmp_path / "random"
    other.mkdir()
    for _ in range(5):
        killed += run_victim(other, 0, chance.uniform(0, 0.05 * taken)) == -signal.SIGKILL
        check_files(other)
    assert killed >= 8
    for place in (folder, other):
        assert run_victim(place, 0) == 0
        check_files(place)
        found = torch.load(place / "masks.pt", weights_only=True)
        assert found.keys() == masks.keys()
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def check_files(folder: Path) -> None:
    """All files that have their names can be read."""
    for file in (folder / "journal").glob("[!.]*"):
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert load_file(file)


@pytest.mark.parametrize("version", [None, 0, 2])
def test_refuses_a_journal_of_another_format(tmp_path, version):
    prune_model(small(), batches(), journal=tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    run.pop("format_version")
    if version is not None:
        run["format_version"] = version
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(JournalError, match="this version of symprune-lightning reads format 1"):
        prune_model(small(), batches(), journal=tmp_path)
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(JournalError, match=r"cannot read .*run.json.*Delete the folder"):
        prune_model(small(), batches(), journal=tmp_path)


def test_a_run_that_fails_early_leaves_no_journal(tmp_path):
    """The corrected call is not refused; other files of the folder, and recorded runs, stay."""
    folder = tmp_path / "journal"
    with pytest.raises(ValueError, match="is empty"):
        prune_model(small(), [], journal=folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is empty"):
        prune_model(small(), [], journal=folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    with pytest.raises(PruningError):
        prune_model(small(), batches(), journal=folder, hooks=[StopAfter(9)])
    with pytest.raises(JournalError, match="is the journal of another run"):
        prune_model(small(), batches(), score="wanda", journal=folder)
    assert (folder / "run.json").is_file()
    assert (folder / "config.json").is_file()
