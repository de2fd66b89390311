"""Keys and values of tokens that were seen, for decoding one token after the other."""

import torch


class KeyValueCache:
    """Grows by the tokens of every call: `update(k, v)` gives all keys and values so far, [B, S, Hkv, D].

    The storage doubles when it is full, so a token is copied twice on average. Keep one cache per layer.
    """

    def __init__(self):
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self.length = 0

    def __len__(self) -> int:
        return self.length

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, length, Hkv, D], or None before the first update."""
        return None if self._keys is None else self._keys[:, : self.length]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._values is None else self._values[:, : self.length]

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k and v [B, S, Hkv, D]; all of both. With gradients the parts are joined by copies, which autograd knows."""
        if self._keys is not None and self._keys[:, :0].shape != k[:, :0].shape:
            raise ValueError(
                f"KeyValueCache: expected keys [B={self._keys.shape[0]}, S, {self._keys.shape[2]}, {self._keys.shape[3]}] as "
                f"before, got {tuple(k.shape)}; use a new cache for a new batch"
            )
        total = self.length + k.shape[1]
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            self._keys = k if self._keys is None else torch.cat([self.keys, k], dim=1)
            self._values = v if self._values is None else torch.cat([self.values, v], dim=1)
        else:
            self._keys = self._appended(self._keys, k, total)
            self._values = self._appended(self._values, v, total)
        self.length = total
        return self.keys, self.values

    def _appended(self, kept, new, total):
        if kept is None or kept.shape[1] < total:
            room = new.new_empty(new.shape[0], max(total, 2 * self.length), *new.shape[2:])
            if kept is not None:
                room[:, : self.length] = kept[:, : self.length]
            kept = room
        kept[:, self.length : total] = new
        return kept

    def reorder(self, rows: torch.Tensor) -> None:
        """Row b becomes row rows[b]: beam search."""
        if self._keys is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KeyValueCache.crop: expected a length of 0 to {self.length}, got {length}")
        self.length = length
