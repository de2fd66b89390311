"""Adapter files: what is written, what is refused and why, and that a failure loses nothing."""

import json
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpeft import LoraConfig, PeftModel, checkpoint, get_peft_model
from fastpeft.checkpoint import CONFIG_NAME, TENSORS_NAME, read_adapter, write_adapter
from tests import tiny_models
from tests.tiny_models import bits, edit, flags, logits, small_llama, trained
from tests.tolerance import assert_bits_equal

TENSORS = {"base_model.model.a.weight": torch.arange(6.0).view(2, 3), "base_model.model.b.weight": torch.ones(2)}
CONFIG = {"peft_type": "LORA", "r": 2}


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- writing ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    write_adapter(tmp_path / "new" / "folder", CONFIG, TENSORS)
    config, tensors = read_adapter(tmp_path / "new" / "folder")
    assert config == CONFIG
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert_bits_equal(name, tensors[name], tensor)
    assert set(files(tmp_path / "new" / "folder")) == {CONFIG_NAME, TENSORS_NAME}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes_and_layouts_survive(tmp_path, dtype):
    tensors = {"t": torch.arange(6).view(2, 3).t().to(dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    write_adapter(tmp_path, CONFIG, tensors)
    for name, tensor in read_adapter(tmp_path)[1].items():
        assert_bits_equal(name, tensor, tensors[name])


def test_tensors_that_share_memory_are_written_each(tmp_path):
    """safetensors refuses tensors that share storage: tied copies (modules_to_save of both embeddings) do."""
    whole = torch.arange(6.0)
    write_adapter(tmp_path, CONFIG, {"whole": whole, "same": whole, "part": whole[2:]})
    assert load_file(tmp_path / TENSORS_NAME)["part"].tolist() == [2, 3, 4, 5]


def test_the_same_adapter_gives_the_same_files(tmp_path):
    wrapped = trained()
    wrapped.save_pretrained(tmp_path / "one")
    wrapped.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert files(tmp_path / "one")[CONFIG_NAME].endswith(b"}\n")


def test_tensors_without_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="meta device"):
        write_adapter(tmp_path / "folder", CONFIG, {"t": torch.zeros(2, device="meta")})
    assert not (tmp_path / "folder").exists()


def _fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _half_a_file(tensors, path, metadata=None):
    path.write_bytes(b"half a fi")
    _fail()


FAILURES = {
    "disk_full": ("save_file", _half_a_file),
    "second_file_fails": ("json", types.SimpleNamespace(**{**vars(json), "dumps": lambda *a, **k: "\udc80"})),
    "rename_fails": ("os", types.SimpleNamespace(**{**vars(os), "replace": _fail})),
}


@pytest.mark.parametrize(("name", "replacement"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("existing", [True, False], ids=["over_an_adapter", "new"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, name, replacement, existing):
    """The old adapter is whole, and no temporary file stays."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    if existing:
        write_adapter(folder, CONFIG, TENSORS)
    before = files(folder)
    monkeypatch.setattr(checkpoint, name, replacement)
    with pytest.raises((OSError, ValueError)):
        write_adapter(folder, {"r": 4}, {"other": torch.zeros(3)})
    monkeypatch.undo()
    assert files(folder) == before


def test_an_error_inside_safetensors_is_an_os_error(tmp_path, monkeypatch):
    def broken(tensors, path, metadata=None):
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        write_adapter(tmp_path, CONFIG, TENSORS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        trained().save_pretrained(tmp_path)
    tmp_path.chmod(0o700)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("where", ["here", "here/below"], ids=["a_file", "below_a_file"])
def test_a_file_in_the_folder_s_place_is_refused(tmp_path, where):
    (tmp_path / "here").write_text("mine")
    with pytest.raises(OSError):
        trained().save_pretrained(tmp_path / where)
    assert files(tmp_path) == {"here": b"mine"}


def test_named_adapters_go_into_folders_of_their_name(tmp_path):
    wrapped = trained()
    wrapped.add_adapter("two", LoraConfig(r=3, target_modules=["down_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "both")
    assert set(files(tmp_path / "both")) == {f"{d}{f}" for d in ("", "two/") for f in (CONFIG_NAME, TENSORS_NAME)}
    wrapped.save_pretrained(tmp_path / "one", selected_adapters=["two"])
    assert set(files(tmp_path / "one")) == {f"two/{CONFIG_NAME}", f"two/{TENSORS_NAME}"}
    with pytest.raises(ValueError, match="absent"):
        wrapped.save_pretrained(tmp_path / "none", selected_adapters=["absent"])
    assert not (tmp_path / "none").exists()
    assert not any(".two." in name or ".default." in name for name in read_adapter(tmp_path / "both" / "two")[1])


# -- reading what is broken ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """An adapter's folder and the function that it gives."""
    torch.manual_seed(0)
    wrapped = trained()
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder, error=ValueError, model=None) -> str:
    """The one-line message of a refusal to load, after a check that the model was left as it was."""
    model = small_llama() if model is None else model
    before, was, stood = bits(model), flags(model), {p: id(m) for p, m in model.named_modules()}
    with pytest.raises(error) as caught:
        PeftModel.from_pretrained(model, folder)
    assert flags(model) == was
    assert {p: id(m) for p, m in model.named_modules()} == stood
    for name, tensor in bits(model).items():
        assert_bits_equal(name, tensor, before[name])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_or_file_is_named(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no_such_folder" in refused(tmp_path / "no_such_folder", FileNotFoundError)
    assert CONFIG_NAME in refused(tmp_path / "empty", FileNotFoundError)
    (saved / TENSORS_NAME).unlink()
    assert TENSORS_NAME in refused(saved, FileNotFoundError)


@pytest.mark.parametrize("name", checkpoint.PICKLE_NAMES)
def test_a_pickle_is_refused_with_the_reason(saved, name):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (saved / TENSORS_NAME).unlink()
    torch.save(Trap(), saved / name)
    assert re.search(f"{name} is a pickle, and unpickling runs code", refused(saved))


def test_a_pickle_under_the_safetensors_name_is_refused(saved):
    torch.save(TENSORS, saved / TENSORS_NAME)
    assert "not a safetensors file" in refused(saved)


def test_a_truncated_file_is_refused_wherever_it_ends(saved):
    whole = (saved / TENSORS_NAME).read_bytes()
    for size in {*range(64), *range(64, len(whole), 53), len(whole) - 1}:
        (saved / TENSORS_NAME).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{TENSORS_NAME} \({size} bytes\) is damaged, truncated"):
            read_adapter(saved)
    refused(saved)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\xff" * 64, b"not a file of tensors", b"{}"], ids=repr)
def test_garbage_is_refused(saved, content):
    (saved / TENSORS_NAME).write_bytes(content)
    assert "damaged" in refused(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"null", b'"LORA"', b"\xff\xfe", b"{}", b'{"peft_type": "LORA", "r": 0}'],
    ids=repr,
)
def test_a_broken_config_is_refused(saved, content):
    (saved / CONFIG_NAME).write_bytes(content)
    refused(saved)


@pytest.mark.parametrize("value", [None, True, 0, -1, 2.5, "text", "(", [], [1], {}, {"a": "b"}], ids=repr)
def test_a_config_with_a_field_of_another_type_is_never_a_crash(saved, value):
    """Whatever stands in one field: the adapter loads, or the reason is an error that the command line prints."""
    config = json.loads((saved / CONFIG_NAME).read_text())
    for key in config:
        (saved / CONFIG_NAME).write_text(json.dumps(config | {key: value}))
        reason = ""
        try:
            PeftModel.from_pretrained(small_llama(), saved)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = str(error)
        assert "\n" not in reason, f"{key}={value!r}: {reason}"


def test_missing_unexpected_and_wrong_shaped_tensors_are_listed(saved):
    """PEFT warns about a missing tensor and drops an unexpected one without a word: the adapter is then another."""
    key = "base_model.model.model.layers.0.self_attn.{}.weight"

    def change(tensors):
        del tensors[key.format("q_proj.lora_A")]
        tensors[key.format("v_proj.lora_B")] = torch.zeros(3, 2)
        tensors[key.format("k_proj.lora_A")] = torch.zeros(2, 32)

    edit(saved, change)
    message = refused(saved)
    assert f"1 missing: {key.format('q_proj.lora_A')}" in message
    assert f"1 unexpected: {key.format('k_proj.lora_A')}" in message
    assert f"1 wrong shape: {key.format('v_proj.lora_B')} expected (16, 2), got (3, 2)" in message


@pytest.mark.parametrize(
    "make",
    [lambda: small_llama(num_key_value_heads=4), tiny_models.llama, tiny_models.gpt2, tiny_models.bert],
    ids=["other_heads", "other_width_and_depth", "gpt2", "bert"],
)
def test_an_adapter_of_another_model_is_refused(saved, make):
    refused(saved, model=make().eval())


def test_a_long_list_is_cut(tmp_path):
    wrapped = get_peft_model(tiny_models.llama(), LoraConfig(target_modules="all-linear"))
    wrapped.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.clear())
    message = refused(tmp_path, model=tiny_models.llama())
    assert "42 missing" in message
    assert "(36 more)" in message


def test_a_refused_adapter_leaves_the_loaded_ones(saved):
    wrapped = trained()
    y, before = logits(wrapped), bits(wrapped)
    edit(saved, lambda tensors: tensors.popitem())
    for name in ("default", "other"):
        with pytest.raises(ValueError, match="1 missing"):
            wrapped.load_adapter(saved, name)
        assert list(wrapped.peft_config) == ["default"]
        assert set(bits(wrapped)) == set(before)
        assert_bits_equal("logits", logits(wrapped), y)


# -- the hub ------------------------------------------------------------------------------------------------------------


def _hub(monkeypatch, download) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))


def test_a_hub_id_is_downloaded(saved, monkeypatch):
    calls = []

    def download(repo_id, *, allow_patterns):
        calls.append((repo_id, sorted(allow_patterns)))
        return str(saved)

    _hub(monkeypatch, download)
    wrapped = PeftModel.from_pretrained(small_llama(), "user/adapter-1.0")
    wrapped.load_adapter("user/adapter-1.0", "second")
    assert calls == [("user/adapter-1.0", [CONFIG_NAME, TENSORS_NAME])] * 2


def test_a_folder_comes_before_the_hub(saved, monkeypatch):
    _hub(monkeypatch, lambda *args, **options: pytest.fail("the hub was asked for a folder that exists"))
    monkeypatch.chdir(saved.parent.parent)
    PeftModel.from_pretrained(small_llama(), f"{saved.parent.name}/{saved.name}")


@pytest.mark.parametrize(
    "path", ["/user/adapter", "./user/adapter", "user", "a/b/c", "../adapter", "user/.adapter", "~/a"]
)
def test_a_path_is_not_looked_up_on_the_hub(path, monkeypatch):
    _hub(monkeypatch, lambda *args, **options: pytest.fail("the hub was asked for a path"))
    assert str(Path(path)) in refused(path, FileNotFoundError)


def test_a_hub_that_cannot_be_reached_is_a_file_not_found(monkeypatch):
    """Really offline: huggingface_hub itself, with HF_HUB_OFFLINE=1."""
    message = refused("user/no-such-adapter", FileNotFoundError)
    assert "no folder user/no-such-adapter" in message
    assert "hub" in message


@pytest.mark.parametrize("error", [OSError("503\nServer Error"), ValueError("bad id")], ids=["os_error", "value_error"])
def test_what_the_hub_says_is_passed_on_in_one_line(error, monkeypatch):
    def download(repo_id, **options):
        raise error

    _hub(monkeypatch, download)
    assert str(error).split()[0] in refused("user/adapter", FileNotFoundError)


def test_without_huggingface_hub_a_hub_id_is_a_missing_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refused("user/adapter", FileNotFoundError)
    assert "pip install huggingface_hub" in message
