"""Taking adapters out of a model again: merged into its weights, or as if they had never been there."""

from collections.abc import Iterable

from torch import nn

from fastpeft.layers.adapter import ModulesToSaveWrapper
from fastpeft.tuner.schedule import ScheduledAdapters


class Tuner(ScheduledAdapters):
    """A model with adapters in it, which can be merged and taken out."""

    def merge_adapter(self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False) -> None:
        """Add the adapters (the active ones by default) to the base weights; `unmerge_adapter` restores the bits.

        Raises:  ValueError with safe_merge if a value is not finite; then no module is merged
        """
        names = self._to_merge(adapter_names)
        before = {layer: list(layer.merged_adapters) for _, layer in self.layers()}
        if not any(before.values()):
            self._put_trained(names)
        try:
            for layer in before:
                layer.merge(names, safe_merge)
        except ValueError:
            for layer, merged in before.items():
                layer.unmerge()
                layer.merge(merged)
            if not any(before.values()):
                self._put_trained(self.active_adapters)
            raise

    def unmerge_adapter(self) -> None:
        for _, layer in self.layers():
            layer.unmerge()
        self._put_trained(self.active_adapters)

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None) -> nn.Module:
        """The plain model with the adapters merged into its weights for good; module by module, so nothing is held twice."""
        names = self._to_merge(adapter_names)
        if safe_merge:
            self._check_finite(names)
        self._put_trained(names)
        owners = self._owners()
        for _, layer in list(self.layers()):
            self._replace(owners, layer, layer.bake(names))
        self._untie()
        return self.model

    def _to_merge(self, adapter_names: Iterable[str] | None) -> list[str]:
        """The adapters to merge, the active ones by default; refuses a method without a merged form before anything changes."""
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
        self._check_together(names)
        prompted = [name for name in names if name in self.prompts]
        if prompted:
            raise NotImplementedError(
                f"merge: {prompted} is {self.peft_config[prompted[0]].peft_type}, which adds to the model's input; no weight of "
                "the base model can do that: keep the adapter beside it"
            )
        for _, layer in self.layers():
            if any(name in layer.adapter_names for name in names):
                layer.check_mergeable()
                if not isinstance(layer, ModulesToSaveWrapper):  # of several copies the first is taken
                    layer.check_selection([*layer.merged_adapters, *names])
        return names

    def _check_finite(self, names: list[str]) -> None:
        for path, layer in self.layers():
            if not layer.merges_finite(names):
                raise ValueError(
                    f"merge_and_unload: {path} has values that are not finite with {names}; nothing was merged"
                )

    def _untie(self) -> None:
        """Tell the model's config when its output embedding is not its input embedding any more."""
        config = getattr(self.model, "config", None)
        if not getattr(config, "tie_word_embeddings", False) or not hasattr(self.model, "get_output_embeddings"):
            return
        outputs, inputs = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if outputs is not None and outputs.weight is not inputs.weight:
            config.tie_word_embeddings = False

    def unload(self) -> nn.Module:
        """The plain model as it was before any adapter."""
        self.unmerge_adapter()
        self._put_trained([])
        owners = self._owners()
        for _, layer in list(self.layers()):
            layer.set_adapter([])
            self._replace(owners, layer, layer.get_base_layer())
        self.peft_config, self.active_adapters, self._trained_of, self.disabled = {}, [], {}, False
        self.prompts = nn.ModuleDict()
        return self.model
