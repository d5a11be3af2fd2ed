"""Checkpoints larger than memory: read, pruned and written block by block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from symprune_lightning.checkpoints.conversion import CheckpointConversion, stored_tensors
from symprune_lightning.checkpoints.export import check_destination
from symprune_lightning.checkpoints.manifest import write_manifest
from symprune_lightning.checkpoints.masks import FOLDER, save_masks
from symprune_lightning.checkpoints.pretrained import resolve_source
from symprune_lightning.checkpoints.weight_files import (
    INDEX,
    copy_tensor,
    sample_hash,
    weight_files,
)
from symprune_lightning.engine.files import atomic_directory
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.changes import LayerChange
from symprune_lightning.engine.layers.find import all_layers
from symprune_lightning.engine.layers.select import decoder_blocks
from symprune_lightning.engine.placement import WeightPlacement
from symprune_lightning.functional.packing import PackedMasks

AUXILIARY_FILES = [
    f"*.{x}" for x in ["json", "txt", "model", "jinja", "tiktoken", "spm", "bpe", "py"]
]
"""Files that are copied to the output: configuration, tokenizer, custom code of the model."""


class StreamedCheckpoint(WeightPlacement):
    """A checkpoint of which one decoder block at a time is in memory.

    The model is built without weights. When calibration reaches a block, its weights are read from
    the safetensors files, pruned, written to the output, and freed; peak memory is one block, the
    embeddings, and the hidden states of the batches. Use it as a context manager: the output folder
    appears once ``save`` was called, and is deleted otherwise.

    Args:
        source: Local folder or hub name of a checkpoint in safetensors, whose tensors
            transformers converts to the model's parameters.
        output: Folder to write, one file per block, in the source's dtype.
        device: Device on which a block is pruned.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Attributes:
        model: The model; weights that are not loaded are on the meta device.
        blocks: Its decoder blocks.

    Raises:
        FileNotFoundError: There are no safetensors files in the folder.
        ValueError: The checkpoint is quantised, its files do not hold the model's parameters, or
            blocks share weights.

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
        ...     result = prune_model(checkpoint.model, batches, score="wanda", placement=checkpoint)
        ...     checkpoint.save({"sparsity": result.sparsity})
        >>> model = AutoModelForCausalLM.from_pretrained(f"{folder}/sparse")
        >>> float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean())
        0.5
    """

    model: PreTrainedModel
    always_loaded: ClassVar[bool] = False

    def __init__(
        self,
        source: str | Path,
        output: str | Path,
        *,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self._source = _source_folder(source)
        self._files = weight_files(self._source)
        self._device = torch.device(device)
        self._output = output
        self._stack = ExitStack()
        config = AutoConfig.from_pretrained(self._source, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"the checkpoint {source} is quantised (quantization_config in its config.json); "
                f"prune the model before quantising it"
            )
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=config.dtype or "float32", trust_remote_code=trust_remote_code
            )
        model.tie_weights()  # init_empty_weights unties them, and tied weights are not pruned
        _move_buffers(model, self._device)
        super().__init__(model, list(decoder_blocks(model, all_layers(model))))
        self._names = {module: name for name, module in model.named_modules()}
        inside = {module for block in self.blocks for module in block.modules()}
        self._outside = [m for m in model.modules() if m not in inside]
        self._layers_of: dict[nn.Module, list[Layer]] = {}
        self._skipped_head: nn.Module | None = None
        self._written: dict[str, str] = {}
        self._pruned: set[str] = set()
        self._conversion = CheckpointConversion(model, self._source, self._files)
        self._check_blocks()

    def __enter__(self) -> Self:
        self._folder = self._stack.enter_context(atomic_directory(check_destination(self._output)))
        self._saved = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        unfinished = None
        if kind is None and not self._saved:
            unfinished = RuntimeError(
                f"{self._output} was not written: save() was not called after pruning"
            )
            kind, error = RuntimeError, unfinished
        self._stack.__exit__(kind, error, trace)
        if unfinished is not None:
            raise unfinished

    @property
    def fingerprint(self) -> str:
        """Hash of a sample of the source's files."""
        return sample_hash(self._source / file for file in sorted(set(self._files.values())))

    def open(self, layers: Sequence[Layer]) -> None:
        """Load the weights outside the blocks, except for an output projection that is ignored."""
        self._layers_of = {}
        for layer in layers:
            self._layers_of.setdefault(layer.module, []).append(layer)
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        # often the largest tensor of the model, and no pruned layer follows it
        self._skipped_head = None if head in self._layers_of else head
        self._written.clear()
        self._pruned.clear()
        for module in self._outside:
            if module is not self._skipped_head:
                # Of embeddings, only the rows of the calibration tokens are read if the file stays
                # mapped into memory. A weight that is pruned is changed in place.
                is_changed = module in self._layers_of
                self._load(module, self._names[module], recurse=False, copy=is_changed)

    def record_change(self, module: nn.Module, change: Callable[[], None]) -> None:
        """Record which layers are pruned; layers of zeros are left alone."""
        if isinstance(change, LayerChange):
            self._pruned.add(change.layer.name)

    def load_block(self, block: nn.Module) -> None:
        """Read a block."""
        self._load(block, self._names[block], recurse=True, copy=True)

    def unload_block(self, block: nn.Module) -> None:
        """Write a block and free its weights."""
        name = self._names[block]
        state = {f"{name}.{key}": value for key, value in block.state_dict().items()}
        number = self.blocks.index(block) + 1
        self._write(number, state)
        self._write_masks(number, block.modules())
        for module in block.modules():
            _free(module)

    def close(self, *, complete: bool) -> None:
        """Write the weights outside the blocks: as pruned, or straight from the source."""
        if not complete:
            return
        pruned = {
            f"{self._names[module]}.{layer.parameter_name}": layer.parameter
            for module in self._outside
            for layer in self._layers_of.get(module, ())
        }
        number = len(self.blocks) + 1
        self._write(number, pruned)
        self._write_masks(number, self._outside)
        for module in self._outside:
            _free(module)
        # one at a time: embeddings are the largest tensors of a model
        for name in [name for name in self._files if name not in self._written]:
            number += 1
            copy_tensor(self._source / self._files[name], name, self._folder / _file_name(number))
            self._written[name] = _file_name(number)

    def save(self, manifest: Mapping[str, Any]) -> None:
        """Write index, configuration and manifest; the folder is then complete.

        Args:
            manifest: Contents of ``sparsity_manifest.json``, see ``build_manifest``.
        """
        for pattern in AUXILIARY_FILES:
            for file in self._source.glob(pattern):
                if file.name != INDEX:
                    shutil.copyfile(file, self._folder / file.name)
        size = sum(file.stat().st_size for file in self._folder.glob("*.safetensors"))
        index = {
            "metadata": {"total_size": size},
            "weight_map": dict(sorted(self._written.items())),
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        names = [layer.name for layers in self._layers_of.values() for layer in layers]
        pruned = [name for name in names if name in self._pruned]
        write_manifest(self._folder, {**manifest, **stored_tensors(self.model, pruned)})
        self._saved = True

    def _load(self, module: nn.Module, name: str, *, recurse: bool, copy: bool) -> None:
        """Load a module's parameters and persistent buffers; without a copy, views of the files."""
        prefix = f"{name}." if name else ""
        own = [key for key, _ in module.named_parameters(recurse=recurse, remove_duplicate=False)]
        own += [key for key, _ in module.named_buffers(recurse=recurse)]
        wanted = {prefix + key: key for key in own if prefix + key in self._conversion}
        for full, tensor in self._conversion.read(wanted):
            path, _, key = wanted[full].rpartition(".")
            owner = module.get_submodule(path)
            value = tensor.to(self._device, copy=copy)
            if key in owner._parameters:
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[key] = value

    def _write(self, number: int, state: Mapping[str, Tensor]) -> None:
        """Write a file of the output."""
        converted = self._conversion.revert({n: t.detach().cpu() for n, t in state.items()})
        tensors = {name: tensor.contiguous() for name, tensor in converted.items()}

        if tensors:
            file = _file_name(number)
            save_file(dict(tensors), self._folder / file, metadata={"format": "pt"})
            self._written |= dict.fromkeys(tensors, file)

    def _write_masks(self, number: int, modules: Iterable[nn.Module]) -> None:
        """Write the masks of pruned layers; weights that were zero before count as pruned."""
        masks = PackedMasks()
        for module in modules:
            for layer in self._layers_of.get(module, ()):
                if layer.name in self._pruned and not (mask := layer.stored_matrix() != 0).all():
                    masks.add(layer.name, mask)
        if masks:
            save_masks(self._folder / FOLDER / f"masks-{number:05}.safetensors", masks)

    def _check_blocks(self) -> None:
        """Refuse blocks with a common weight, which would be freed with the first of them."""
        owners: dict[int, nn.Module] = {}
        for block in self.blocks:
            for key, parameter in block.named_parameters():
                if owners.setdefault(id(parameter), block) is not block:
                    raise ValueError(
                        f"{self._names[block]}.{key} of {type(self.model).__name__} is shared by "
                        f"several blocks: load the full model instead of streaming it"
                    )


def _file_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _source_folder(source: str | Path) -> Path:
    folder = resolve_source(str(source))
    if isinstance(folder, str):
        return Path(snapshot_download(folder, allow_patterns=["*.safetensors", *AUXILIARY_FILES]))
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}: only folders can be streamed")
    return folder


def _free(module: nn.Module) -> None:
    """Free a module's own parameters."""
    for key, value in module._parameters.items():
        if value is not None:
            empty = torch.empty_like(value, device="meta")
            module._parameters[key] = nn.Parameter(empty, requires_grad=False)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
