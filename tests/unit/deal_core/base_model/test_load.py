"""Every kind of source ends as one loaded model; what is unsafe or missing is refused in words a user can act on."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from deal_core.base_model.device import bf16_instructions
from deal_core.base_model.load import choose_dtype, load_base
from deal_core.base_model.sources import resolve_base, sha256_of_model
from deal_core.errors import ConfigError, IntegrityError
from tests.unit.deal_core.tiny_gguf import write_gguf


@pytest.fixture(scope="module")
def gguf_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as a GGUF file; expected.pt in the same folder holds the weights that a reader should get."""
    file = tmp_path_factory.mktemp("gguf") / "Tiny model.gguf"
    torch.save(write_gguf(tiny_base, file), file.with_name("expected.pt"))
    return file


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_a_gguf_file_becomes_its_weights_and_its_chat_template(
    gguf_file: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = load_base(str(gguf_file), tmp_path, precision="fp32")
    expected = torch.load(gguf_file.with_name("expected.pt"), weights_only=True)
    found = base.model.state_dict()
    assert set(expected) | {"lm_head.weight"} == set(found)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.to(torch.bfloat16).float(), rtol=0, atol=0, msg=name)
    original = AutoTokenizer.from_pretrained(tiny_base)
    assert base.tokenizer.chat_template == original.chat_template
    for text in ("My card is lost, since 2024.\n\nAnswer: lost card<|im_end|>", "  naïve Größe"):
        assert base.tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert (base.kind, base.name) == ("causal", "Tiny model")


def test_a_converted_folder_is_plain_safetensors(gguf_file: Path, tmp_path: Path) -> None:
    folder = resolve_base(str(gguf_file), tmp_path)
    assert folder.is_relative_to(tmp_path)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".gguf")) for name in names)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    given = load_base(str(folder), tmp_path)  # a folder that resolve_base returned is a source too, for the same base
    assert (given.sha256, given.name) == (load_base(str(gguf_file), tmp_path).sha256, "Tiny model")


def test_a_folder_that_states_its_own_digest_is_believed_in_the_cache_alone(
    gguf_file: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    entry = resolve_base(str(gguf_file), cache)
    mine = load_base(str(gguf_file), cache)
    told = copy_of(tiny_base, tmp_path / "told")
    shutil.copy(entry / "deal_source.json", told)
    hashed = load_base(str(tiny_base), cache).sha256
    for place in (cache, told.parent, told):  # `told` is in no cache folder's models/
        found = load_base(str(told), place)
        assert (found.sha256, found.name) == (hashed, "told"), "a folder passed for another base model"
    moved = copy_of(entry, tmp_path / "moved")
    assert load_base(str(moved), cache).sha256 != mine.sha256, "a copy elsewhere is hashed as any folder is"
    for entry_path in (str(entry), f"{cache}/models/../models/{entry.name}"):
        assert load_base(entry_path, cache).sha256 == mine.sha256


def test_a_converted_model_that_was_changed_afterwards_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    entry = resolve_base(str(gguf_file), tmp_path)
    source, weights = entry / "deal_source.json", entry / "model.safetensors"
    known = load_base(str(gguf_file), tmp_path).sha256
    content = bytearray(weights.read_bytes())
    content[-10] ^= 64
    weights.write_bytes(content)
    recorded = json.loads(source.read_text())["content_sha256"]
    for given in (str(gguf_file), str(entry)):
        with pytest.raises(IntegrityError) as caught:
            load_base(given, tmp_path)
        message = str(caught.value)
        assert recorded in message and sha256_of_model(entry, None) in message and f"Remove {entry}" in message
    shutil.rmtree(entry)
    assert load_base(str(gguf_file), tmp_path).sha256 == known
    source.write_text("{")
    with pytest.raises(IntegrityError, match=r"deal_source\.json .* cannot be read"):
        load_base(str(gguf_file), tmp_path)


def test_a_gguf_file_is_converted_once_whatever_its_place(gguf_file: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    moved = Path(shutil.copy(gguf_file, tmp_path / gguf_file.name))

    def resolve(file: Path) -> Path:
        return resolve_base(str(file), tmp_path / "cache", lambda what, done, total: seen.append(f"{what} {done}"))

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(resolve, [gguf_file, moved, gguf_file, moved]))
    assert len(folders) == 1 and seen.count(f"converting {gguf_file.name} 0") == 1
    assert [entry.name for entry in (tmp_path / "cache/models").iterdir() if not entry.name.endswith(".lock")] == [
        folders.pop().name
    ]


def test_what_a_killed_conversion_left_is_not_taken_for_a_model(gguf_file: Path, tmp_path: Path) -> None:
    entry = resolve_base(str(gguf_file), tmp_path)
    left = entry.rename(entry.with_name(f".{entry.name}.partial"))
    (left / "model.safetensors").write_bytes(b"half")
    again = resolve_base(str(gguf_file), tmp_path)
    assert again == entry and (entry / "model.safetensors").stat().st_size > 4 and not left.exists()


def test_a_damaged_gguf_file_leaves_nothing_behind(gguf_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    whole = gguf_file.read_bytes()
    for content in (b"not a model", whole[:20_000], whole[:-5_000]):
        broken.write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.gguf cannot be read as a GGUF model"):
            resolve_base(str(broken), tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache/models").iterdir()] == [".lock"] * 3


def test_a_gguf_file_that_lacks_a_weight_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    write_gguf(tiny_base, tmp_path / "partial.gguf", without="blk.1.ffn_up")
    with pytest.raises(ConfigError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        resolve_base(str(tmp_path / "partial.gguf"), tmp_path / "cache")


def test_a_local_folder_is_loaded_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), tmp_path, precision="bf16")
    assert (base.kind, base.name, base.model.dtype) == ("causal", tiny_base.name, torch.bfloat16)
    assert not base.model.training and base.tokenizer.pad_token == "<|endoftext|>"


def test_answers_are_greedy_whatever_the_base_advises_for_chatting(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "base")
    file = folder / "generation_config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "min_length": 5}))
    found = load_base(str(folder), tmp_path / "cache").model.generation_config
    plain = load_base(str(tiny_base), tmp_path / "cache").model.generation_config
    assert found.to_diff_dict() == plain.to_diff_dict() and found.eos_token_id == known["eos_token_id"]


def test_a_tokenizer_without_padding_pads_with_its_end_token(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    base = load_base(str(folder), tmp_path / "cache")
    assert base.tokenizer.pad_token == base.tokenizer.eos_token == "<|im_end|>"
    assert base.model.generation_config.pad_token_id == base.tokenizer.eos_token_id
    for token in ("eos_token", "unk_token"):
        config.pop(token, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no padding, end or unknown token"):
        load_base(str(folder), tmp_path / "cache")


def test_a_model_with_weights_missing_is_not_filled_up_with_random_ones(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        load_base(str(folder), tmp_path / "cache")
    (folder / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ConfigError, match="SafetensorError"):
        load_base(str(folder), tmp_path / "cache")


def test_pickled_weights_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pickle only \(pytorch_model\.bin\).*save_pretrained"):
        load_base(str(folder), tmp_path / "cache")


def test_code_that_comes_with_a_model_never_runs(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base(str(folder), tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["somebody/some-model", "gpt2"])
def test_a_hub_out_of_reach_gives_one_clear_error(source: str, offline_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^The model '{source}' could not be fetched from the Hub.*\Z"):
        resolve_base(source, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can quantize")
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_base_that_cannot_be_quantized_here_is_not_even_looked_for(quantize: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"quantize is {quantize}, which needs a CUDA device"):
        load_base("no/such-model", tmp_path / "cache", quantize=quantize)
    assert not (tmp_path / "cache").exists()


def test_a_hub_id_is_served_from_the_hubs_cache(tiny_base: Path, offline_hub: Path, tmp_path: Path) -> None:
    repository, revision = offline_hub / "models--somebody--tiny", "0123456789abcdef0123456789abcdef01234567"
    copy_of(tiny_base, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    base = load_base("somebody/tiny", tmp_path / "cache")
    assert base.name == "somebody/tiny"
    assert base.sha256 == load_base(str(tiny_base), tmp_path / "cache").sha256  # the same model by another way


def test_precision_is_what_was_asked_for_or_what_the_machine_does_well(tmp_path: Path) -> None:
    assert (choose_dtype("bf16"), choose_dtype("fp32")) == (torch.bfloat16, torch.float32)
    with pytest.raises(ConfigError, match="fp16"):
        choose_dtype("fp16")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        fast = bool(bf16_instructions())
        assert choose_dtype("auto") == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize(
    ("flags", "fast"),
    [("amx_tile amx_bf16", True), ("avx512f avx512_bf16", True), ("avx2 avx512f amx_int8", False), ("", False)],
)
def test_a_cpu_does_bf16_well_by_its_flags(flags: str, fast: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: amx_bf16 by name only\nflags\t\t: {flags}\n")
    assert bool(bf16_instructions(tmp_path / "cpuinfo")) is fast
    assert bf16_instructions(tmp_path / "absent") == ()


def test_a_model_that_receives_its_weights_has_the_parameters_of_the_one_that_sends_them(
    tiny_base: Path, tmp_path: Path
) -> None:
    whole = load_base(str(tiny_base), tmp_path / "cache", precision="bf16", in_main_memory=True)
    unread = copy_of(tiny_base, tmp_path / tiny_base.name)
    (unread / "model.safetensors").write_bytes(b"no weights")
    empty = load_base(str(unread), tmp_path / "cache", precision="bf16", in_main_memory=True, receives=whole.sha256)
    assert (empty.name, empty.sha256, empty.kind) == (whole.name, whole.sha256, whole.kind)
    shapes = [
        [(name, p.shape, p.dtype, p.device) for name, p in base.model.named_parameters()] for base in (whole, empty)
    ]
    assert shapes[0] == shapes[1], "tied ones come once"
    buffers = [dict(base.model.named_buffers()) for base in (whole, empty)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffer, buffers[1][name]) for name, buffer in buffers[0].items())
    assert empty.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert not empty.model.training
