"""Checkpoints that are larger than memory: read, pruned and written block by block."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from symprune_lightning.engine.layers import (
    LM_HEAD,
    Layer,
    decoder_blocks,
    linear_layers,
    prunable_layers,
)
from symprune_lightning.engine.residence import Residence
from symprune_lightning.export import check_destination, write_description
from symprune_lightning.files import whole_folder
from symprune_lightning.masks import FOLDER, save_masks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What is copied along: configuration and tokenizer."""


class StreamedCheckpoint(Residence):
    """A checkpoint of which one decoder block at a time is in memory.

    The model is built without weights. As calibration reaches a block, its weights are read from
    the safetensors files, pruned, written to the output, and let go; so the peak is one block, the
    embeddings, and the batches' hidden states. Use it as a context: the output folder takes its
    name when ``finish`` was called, and is deleted if it never was.

    Args:
        source: Local folder or hub name of a checkpoint in safetensors, named as the model's
            parameters.
        output: Folder to write, one file per block, in the source's dtype.
        device: Where a block is pruned.
        ignore: As for ``prune_model``, which has to be told the same: an output projection spared
            by it is not read into memory.

    Attributes:
        model: The model; its weights are on the meta device while they are not needed.
        blocks: Its decoder blocks.

    Raises:
        FileNotFoundError: There are no safetensors files in the folder.
        ValueError: The files name weights otherwise than the model does.

    Examples:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> from symprune_lightning import prune_model
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                      num_hidden_layers=2, num_attention_heads=2)
        >>> folder = tempfile.mkdtemp()
        >>> LlamaForCausalLM(config).save_pretrained(f"{folder}/dense")
        >>> batches = [{"input_ids": torch.arange(32)[None]}]
        >>> with StreamedCheckpoint(f"{folder}/dense", f"{folder}/sparse") as checkpoint:
        ...     result = prune_model(checkpoint, batches, score="wanda")
        ...     checkpoint.finish({"sparsity": result.sparsity})
        >>> model = AutoModelForCausalLM.from_pretrained(f"{folder}/sparse")
        >>> float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean())
        0.5
    """

    model: PreTrainedModel
    readable = False

    def __init__(
        self,
        source: str | Path,
        output: str | Path,
        *,
        device: str | torch.device = "cpu",
        ignore: Iterable[str] = LM_HEAD,
        trust_remote_code: bool = False,
    ) -> None:
        self._source = _folder(source)
        self._files = _weight_files(self._source)
        self._device = torch.device(device)
        self._output = output
        self._stack = ExitStack()
        config = AutoConfig.from_pretrained(self._source, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=config.dtype or "float32", trust_remote_code=trust_remote_code
            )
        model.tie_weights()  # what is tied is not pruned, and meta weights come untied
        _buffers_to(model, self._device)
        layers = prunable_layers(model, list(ignore), on_meta=True)
        super().__init__(model, list(decoder_blocks(model, linear_layers(model))))
        self._pruned = {layer.module for layer in layers}
        self._names = {module: name for name, module in model.named_modules()}
        inside = {module for block in self.blocks for module in block.modules()}
        self._outside = [m for m in model.modules() if m not in inside]
        head = model.get_output_embeddings()
        self._unread = None if head in self._pruned else head
        self._written: dict[str, str] = {}
        self._check_names()

    def __enter__(self) -> Self:
        self._partial = self._stack.enter_context(whole_folder(check_destination(self._output)))
        self._finished = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        unfinished = None
        if kind is None and not self._finished:
            unfinished = RuntimeError(
                f"{self._output} was not written: finish() was not called after pruning"
            )
            kind, error = RuntimeError, unfinished
        self._stack.__exit__(kind, error, trace)
        if unfinished is not None:
            raise unfinished

    @property
    def identity(self) -> str:
        """A hash of a sample of the source's files."""
        return _sample(self._source / file for file in sorted(set(self._files.values())))

    def open(self) -> None:
        """Read what lies outside the blocks, but for an output projection that is not pruned."""
        self._written.clear()
        for module in self._outside:
            if module is not self._unread:
                self._load(module, self._names[module], recurse=False)

    def enter(self, block: nn.Module) -> None:
        """Read a block."""
        self._load(block, self._names[block], recurse=True)

    def leave(self, block: nn.Module) -> None:
        """Write a block, and let it go."""
        name = self._names[block]
        state = {f"{name}.{key}": value for key, value in block.state_dict().items()}
        number = self.blocks.index(block) + 1
        self._write(number, state)
        self._write_masks(number, block.modules())
        for module in block.modules():
            _let_go(module)

    def close(self, *, complete: bool) -> None:
        """Write what lies outside the blocks: as read and pruned, or straight from the source."""
        if not complete:
            return
        pruned = [f"{self._names[m]}.weight" for m in self._outside if m in self._pruned]
        number = len(self.blocks) + 1
        self._write(number, {name: self.model.get_parameter(name) for name in pruned})
        self._write_masks(number, self._outside)
        for module in self._outside:
            _let_go(module)
        # one at a time: these are the largest tensors there are
        for name in [name for name in self._files if name not in self._written]:
            number += 1
            self._write(number, dict(self._read([name])))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the index, the configuration and the manifest; the folder is then complete."""
        for pattern in BESIDE:
            for file in self._source.glob(pattern):
                if file.name != INDEX:
                    shutil.copyfile(file, self._partial / file.name)
        size = sum(file.stat().st_size for file in self._partial.glob("*.safetensors"))
        index = {
            "metadata": {"total_size": size},
            "weight_map": dict(sorted(self._written.items())),
        }
        (self._partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_description(self._partial, manifest)
        self._finished = True

    def _load(self, module: nn.Module, name: str, *, recurse: bool) -> None:
        """Give a module's parameters and persistent buffers their values."""
        prefix = f"{name}." if name else ""
        own = [key for key, _ in module.named_parameters(recurse=recurse, remove_duplicate=False)]
        own += [key for key, _ in module.named_buffers(recurse=recurse)]
        wanted = {prefix + key: key for key in own if prefix + key in self._files}
        for full, tensor in self._read(wanted):
            path, _, key = wanted[full].rpartition(".")
            owner = module.get_submodule(path)
            # a copy, so that the file can be unmapped
            value = tensor.to(self._device, copy=True)
            if key in owner._parameters:
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[key] = value

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, each file opened once and let go at the end."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for file, inside in by_file.items():
            with safe_open(self._source / file, framework="pt") as opened:
                for name in inside:
                    yield name, opened.get_tensor(name)

    def _write(self, number: int, state: Mapping[str, Tensor]) -> None:
        """Write a file of the output."""
        tensors = {n: t.detach().cpu().contiguous() for n, t in state.items() if n in self._files}
        if tensors:
            file = f"model-{number:05}.safetensors"
            save_file(tensors, self._partial / file, metadata={"format": "pt"})
            self._written |= dict.fromkeys(tensors, file)

    def _write_masks(self, number: int, modules: Iterable[nn.Module]) -> None:
        """Write where the zeros of pruned layers are; those that were zero before are pruned."""
        layers = [Layer(self._names[m], m) for m in modules if m in self._pruned]
        if layers:
            masks = {layer.name: layer.read() != 0 for layer in layers}
            pruned = {name: mask for name, mask in masks.items() if not mask.all()}
            save_masks(self._partial / FOLDER / f"masks-{number:05}.safetensors", pruned)

    def _check_names(self) -> None:
        for block in self.blocks:
            for key, _ in block.named_parameters():
                name = f"{self._names[block]}.{key}"
                if name not in self._files:
                    raise ValueError(
                        f"{self._source} holds no {name}: its files name weights otherwise than "
                        f"{type(self.model).__name__} does; load the model as a whole instead"
                    )


def _folder(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(source).startswith(("/", ".", "~")):
        raise FileNotFoundError(f"no checkpoint folder at {path}")
    return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", *BESIDE]))


def _weight_files(folder: Path) -> dict[str, str]:
    """Weight name to file."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return dict(index["weight_map"])
    if not (folder / SINGLE).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {INDEX} nor {SINGLE}: only safetensors are streamed"
        )
    with safe_open(folder / SINGLE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), SINGLE)


def _sample(files: Iterable[Path]) -> str:
    """Hash of some bytes at regular places: not of all, which takes as long as pruning."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for place in range(0, size, max(1, size // 64)):
                opened.seek(place)
                digest.update(opened.read(4096))
    return digest.hexdigest()


def _let_go(module: nn.Module) -> None:
    """Free a module's own parameters."""
    for key, value in module._parameters.items():
        if value is not None:
            empty = torch.empty_like(value, device="meta")
            module._parameters[key] = nn.Parameter(empty, requires_grad=False)


def _buffers_to(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
