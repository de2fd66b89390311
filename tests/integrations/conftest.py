"""What tests of the integrations share."""

import pytest

from fastpeft.ops import lora, lora_group


@pytest.fixture
def as_functions(monkeypatch):
    """Products by their autograd.Function, whatever their size: those of tiny models would all be composed of plain calls."""
    for module in (lora, lora_group):
        monkeypatch.setattr(module, "composed_is_faster", lambda *call: False)
