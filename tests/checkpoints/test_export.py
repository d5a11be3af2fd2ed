"""Checkpoints are written completely or not at all, and nothing of the user's is overwritten."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from symprune_lightning import (
    CausalLMModule,
    PruningWarning,
    RankError,
    SymPrune,
    Trainer,
    export_model,
    load_masks,
    prune_model,
)
from symprune_lightning.checkpoints.export import (
    check_destination,
    name_unfinished,
    save_checkpoint,
)
from symprune_lightning.checkpoints.manifest import MANIFEST, read_manifest
from tests.groups import run_group
from tests.models import LANGUAGE, batches, build


def hidden_files(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_an_earlier_checkpoint_is_replaced(tmp_path):
    for run in (1, 2):
        save_checkpoint(tmp_path / "out", build("llama"), None, {"run": run}, {})
        assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == {"run": run}
    assert not hidden_files(tmp_path)


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError, match=r"the tokenizer is a str; pass a tokenizer or processor"):
        save_checkpoint(tmp_path / "out", build("llama"), "name", {}, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=rf"has no {MANIFEST}\): choose a new folder"):
        save_checkpoint(tmp_path, build("llama"), None, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_error_while_writing_keeps_the_earlier_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "out", build("llama"), None, {"run": 1}, {})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "out", build("llama"), None, {"run": object()}, {})
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == {"run": 1}
    assert not hidden_files(tmp_path)


def test_missing_folders_are_created_with_the_usual_mode(tmp_path):
    path = save_checkpoint(tmp_path / "a" / "b", build("llama"), None, {}, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_destination(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_destination(tmp_path / "file" / "deeper")


def test_folder_without_write_permission():
    """As another user: root can write to every folder."""
    code = (
        "import os, sys\n"
        "from symprune_lightning.checkpoints.export import check_destination\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: check_destination(sys.argv[1])\n"
        "except PermissionError as error: sys.exit(f'refused: {error}')\n"
    )
    # not in tmp_path, whose parents are open to one user only
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, f"{folder}/out"]
        run = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert "refused: cannot write to" in run.stderr, run.stderr
    assert "choose another" in run.stderr


def test_mount_points_are_refused():
    with pytest.raises((PermissionError, FileExistsError), match=r"mount point|is not empty"):
        check_destination("/proc")
    if Path("/dev/shm").is_dir() and not any(Path("/dev/shm").iterdir()):
        with pytest.raises(PermissionError, match="is a mount point"):
            check_destination("/dev/shm")


def test_a_disk_without_space_is_found_before_the_run(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match=r"a checkpoint of .* GB does not fit on the disk of"):
        check_destination(tmp_path / "out", free + 2**40)
    assert check_destination(tmp_path / "out", 1) == tmp_path / "out"
    model = CausalLMModule(build("llama"))
    # ten thousand times the disk: the embedding claims its size without taking memory
    model.prunable_model.model.embed_tokens.weight = torch.nn.Parameter(
        torch.zeros(1).expand(free, 10_000), requires_grad=False
    )
    with pytest.raises(OSError, match="does not fit on the disk"):
        Trainer(accelerator="cpu", logger=False).prune(
            model, output=str(tmp_path / "out"), callbacks=SymPrune()
        )


def test_unfinished_checkpoints_of_killed_runs_are_named(tmp_path):
    (tmp_path / ".first.partial").mkdir()
    with pytest.warns(PruningWarning, match=r"first\.partial is the unfinished checkpoint"):
        name_unfinished(check_destination(tmp_path / "second"))
    name_unfinished(tmp_path / "first")  # cleaned up when it is written
    save_checkpoint(tmp_path / "first", build("llama"), None, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_compiled_model_is_written_by_its_plain_names(tmp_path):
    model = build("llama")
    result = prune_model(model, batches(), score="wanda")
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    export_model(torch.compile(model, backend="eager"), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result.is_applied_to(loaded)
    assert read_manifest(tmp_path / "out")["architecture"] == "LlamaForCausalLM"


def test_adapters_are_merged_before_a_model_is_written(tmp_path):
    model = build("llama")
    prune_model(model, batches(), score="wanda")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="merge the adapters first"):
        export_model(adapted, tmp_path / "out")
    with pytest.raises(TypeError, match="output= writes transformers models, and PeftModel"):
        Trainer(accelerator="cpu", logger=False).prune(
            CausalLMModule(adapted), output=str(tmp_path / "out"), callbacks=SymPrune()
        )


def test_a_failed_rename_restores_the_earlier_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "out", build("llama"), None, {"run": 1}, {})
    rename = Path.rename

    def failing(self, target):
        if self.name == ".out.partial" and Path(target).name == "out":
            raise OSError("out of inodes")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="out of inodes"):
        save_checkpoint(tmp_path / "out", build("llama"), None, {"run": 2}, {})
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == {"run": 1}
    assert not hidden_files(tmp_path)


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    """The limit on file sizes makes writing fail as a full disk does."""
    save_checkpoint(tmp_path / "out", build("llama"), None, {"run": 1}, {})
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.*")}
    code = (
        "import resource, signal\n"
        "from symprune_lightning.checkpoints.export import save_checkpoint\n"
        "from tests.models import build\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        f"save_checkpoint({str(tmp_path / 'out')!r}, build('llama'), None, {{'run': 2}}, {{}})\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"OSError: cannot write the checkpoint {tmp_path / 'out'}: ")
    assert last.endswith("Its contents have not changed")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.*")} == before
    assert not hidden_files(tmp_path)


@pytest.mark.parametrize("name", LANGUAGE)
def test_any_pruned_model_is_exported(name, tmp_path):
    model = build(name)
    with pytest.raises(ValueError, match="has zeros: prune it first"):
        export_model(model, tmp_path / "out")
    result = prune_model(model, batches(name))
    path = export_model(model, tmp_path / "out", settings={"note": "a"}, metrics={"loss": 1.5})
    manifest = read_manifest(path)
    assert manifest["initial_sparsity"] is None  # that of the dense model is not known
    assert manifest["sparsity"] == result.sparsity
    assert [layer["name"] for layer in manifest["layers"]] == list(load_masks(path))
    assert manifest["settings"] == {"note": "a"}
    assert manifest["metrics"] == {"dense": {}, "pruned": {"loss": 1.5}}
    masks = load_masks(path)
    assert masks.keys() == result.masks.keys()
    assert all(torch.equal(masks[layer], mask) for layer, mask in result.masks.items())
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def export_sharded(rank: int, size: int, folder: Path) -> None:
    model = build("llama")
    prune_model(model, batches())
    mesh = init_device_mesh("cpu", (size,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    path = export_model(model, folder / "sharded")
    # every rank returns once rank 0 has written
    assert (path / MANIFEST).is_file()
    assert not hidden_files(folder)


def fail_to_export(rank: int, size: int, folder: Path) -> None:
    model = build("llama")
    prune_model(model, batches())
    (folder / "file").touch()
    with pytest.raises(NotADirectoryError if rank == 0 else RankError):
        export_model(model, folder / "file")


@pytest.mark.slow
def test_all_ranks_raise_if_rank_0_cannot_write(tmp_path):
    run_group(fail_to_export, 2, tmp_path)


@pytest.mark.slow
def test_a_model_sharded_over_two_ranks(tmp_path):
    model = build("llama")
    result = prune_model(model, batches())
    run_group(export_sharded, 2, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert read_manifest(tmp_path / "sharded")["sparsity"] == result.sparsity


def test_a_link_to_a_folder_is_written_through(tmp_path):
    """As on clusters, where the output is on another file system."""
    target, link = tmp_path / "large" / "run", tmp_path / "out"
    target.mkdir(parents=True)
    link.symlink_to(target)
    model = build("llama")
    prune_model(model, [], score="magnitude")
    for _ in range(2):  # the second run replaces the checkpoint of the first
        assert export_model(model, link) == target.resolve()
        assert link.is_symlink()
        assert (link / MANIFEST).is_file()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        assert [path.name for path in target.parent.iterdir()] == ["run"]


def test_a_link_to_nowhere_creates_its_target(tmp_path):
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "later")
    model = build("llama")
    prune_model(model, [], score="magnitude")
    export_model(model, link)
    assert (tmp_path / "later" / MANIFEST).is_file()


def test_adapters_that_transformers_has_added_are_refused(tmp_path):
    model = build("llama")
    prune_model(model, batches())
    # what model.add_adapter sets, which needs another version of peft than that of the tests
    model._hf_peft_config_loaded = True
    with pytest.raises(TypeError, match="transformers has added adapters to this LlamaForCausalLM"):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
