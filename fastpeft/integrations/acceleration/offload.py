"""What autograd keeps for backward, held in CPU memory between forward and backward.

A saved tensor's whole storage is copied once, however many views of it are saved, to pinned memory on a stream of its own, and
comes back when backward first asks for a view. Parameters, buffers and the tensors of a quantised weight stay: they exist anyway.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastpeft.integrations.acceleration.ledger import Acceleration
from fastpeft.layers.base_weight import frozen_weight, is_quantized
from fastpeft.ops.tracing import traced

LEAST_BYTES = 1 << 20
"""Smaller storages stay on the device: a copy costs its launch, and they are not what fills a GPU."""


class _OnHost:
    """A storage's bytes on the CPU, and on the device again from the first use in backward. It dies with the graph nodes that
    hold it, and backward frees a node when it has run."""

    def __init__(self, host: torch.Tensor, device: torch.device, copied: "torch.cuda.Event | None"):
        self.host, self.device, self.copied = host, device, copied
        self.returned: torch.Tensor | None = None

    def bytes_on_device(self) -> torch.Tensor:
        if self.returned is None:
            if self.copied is not None:
                torch.cuda.current_stream(self.device).wait_event(self.copied)
            returned = torch.empty_like(self.host, device=self.device, pin_memory=False)
            self.returned = returned.copy_(self.host, non_blocking=True)
        return self.returned


class _Saved:
    """One saved tensor: a view of a storage that is on the host."""

    def __init__(self, stored: _OnHost, tensor: torch.Tensor):
        self.stored, self.dtype = stored, tensor.dtype
        self.view = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def restore(self) -> torch.Tensor:
        return self.stored.bytes_on_device().view(self.dtype).as_strided(*self.view)


class Offload:
    """Moves what autograd saves while `saving()` is entered.

    model: its parameters, buffers and quantised weights stay; devices: types of devices that tensors are moved from
    moved_bytes: storages moved so far, each counted once
    """

    def __init__(self, model: nn.Module, devices: tuple[str, ...] = ("cuda", "xpu"), least_bytes: int = LEAST_BYTES):
        self.model, self.devices, self.least_bytes = model, devices, least_bytes
        self.moved_bytes = 0
        self._stays: set[int] = set()
        self._seen: dict[int, tuple[StorageWeakRef, int, weakref.ref[_OnHost]]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        self._stays = {tensor.untyped_storage()._cdata for tensor in _tensors_of(self.model)}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._seen.clear()

    def _pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Saved":
        if tensor.device.type not in self.devices or tensor.layout != torch.strided:
            return tensor.detach()  # an output with its graph would hold the node that keeps it
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.least_bytes or storage._cdata in self._stays or tensor.is_conj() or tensor.is_neg():
            return tensor.detach()
        return _Saved(self._moved(tensor, storage), tensor)

    @staticmethod
    def _unpack(saved: "torch.Tensor | _Saved") -> torch.Tensor:
        return saved.restore() if isinstance(saved, _Saved) else saved

    def _moved(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> _OnHost:
        """The host's copy of a storage; one that was written to since it was copied is copied again."""
        source, version, known = self._seen.get(storage._cdata, (None, -1, None))
        stored = known() if known is not None and not source.expired() and version == tensor._version else None
        if stored is None:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            stored = self._copied(whole)
            self.moved_bytes += storage.nbytes()
            self._seen[storage._cdata] = (StorageWeakRef(storage), tensor._version, weakref.ref(stored))
        return stored

    def _copied(self, whole: torch.Tensor) -> _OnHost:
        device = whole.device
        if device.type != "cuda" or traced(whole):
            return _OnHost(whole.to("cpu", copy=True), device, None)
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True).copy_(whole, non_blocking=True)
            copied = stream.record_event()
        whole.record_stream(stream)  # the storage's memory is not handed out again before the copy is done
        return _OnHost(host, device, copied)


def offload_activations(ledger: Acceleration, core: nn.Module) -> None:
    """Move what the model's forward keeps for backward to CPU memory, in training, until restore."""
    devices = {parameter.device.type for parameter in core.parameters()}
    if devices <= {"cpu"}:
        ledger.note("activation offload: off, the model is on the CPU and there is nothing to offload to")
        return
    watch_forward(ledger, core, Offload(ledger.model))
    ledger.note(f"activation offload: on, saved tensors of {LEAST_BYTES >> 20} MiB and more go to CPU memory")


def watch_forward(ledger: Acceleration, core: nn.Module, offload: Offload) -> None:
    """Enter `offload` around every forward of `core` that a backward may follow."""
    entered: list[contextlib.ExitStack] = []

    def enter(module, args):
        if torch.compiler.is_compiling():
            return
        stack = contextlib.ExitStack()
        if module.training and torch.is_grad_enabled():
            stack.enter_context(offload.saving())
        entered.append(stack)

    def leave(module, args, output):
        if not torch.compiler.is_compiling():
            entered.pop().close()

    for handle in (
        core.register_forward_pre_hook(enter, prepend=True),
        core.register_forward_hook(leave, always_call=True),
    ):
        ledger.undo_by(handle.remove)


def _tensors_of(model: nn.Module) -> list[torch.Tensor]:
    quantized = [frozen_weight(module) for module in model.modules() if is_quantized(module)]
    held = [tensor for weight in quantized for tensor in weight.tensors().values()]
    return [*model.parameters(), *model.buffers(), *held]
