"""The committed table of PEFT's names is what the script makes of the installed peft, and no reason is left over."""

import pytest

from benchmarks import peft_api
from benchmarks.peft_api_reasons import ABSENT, DIFFERENT, by_name


def test_the_committed_table_is_what_the_script_makes():
    """Make it anew with python -m benchmarks.peft_api."""
    assert peft_api.RESULT.read_text(encoding="utf-8") == peft_api.document()


def all_rows() -> list[peft_api.Row]:
    fields = [row for rows in peft_api.config_fields().values() for row in rows]
    return [*peft_api.functions(), *peft_api.model_members(), *fields]


@pytest.mark.parametrize(
    ("state", "table"), [("absent", ABSENT), ("different", DIFFERENT)], ids=["absent", "different"]
)
def test_no_reason_is_left_of_what_is_the_same_now(state, table):
    stale = set(by_name(table)) - {row.name for row in all_rows() if row.state == state}
    assert not stale, f"{sorted(stale)}: not {state} any more; take the reasons out of benchmarks/peft_api_reasons.py"


def test_what_is_not_the_same_has_a_reason():
    assert all(bool(row.why) != (row.state == "same") for row in all_rows())


def test_a_name_without_a_reason_fails():
    with pytest.raises(KeyError, match="say why in"):
        peft_api._row("new_function", lambda a: a, None)
    with pytest.raises(KeyError, match=r"new_function of peft .* is different here"):
        peft_api._row("new_function", lambda a, b: a, lambda a: a)
    assert peft_api._row("new_function", lambda a: a, lambda a, b=1, **more: a).state == "same"
    with pytest.raises(ValueError, match="one has two reasons"):
        by_name({"a": ("one",), "b": ("one",)})
