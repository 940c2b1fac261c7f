"""Packing a Hugging Face folder and back: same bits, smaller, whole or not at all, damaged files refused."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.headers import read_header
from sparsegpt.files.model_files import weight_files
from sparsegpt.files.tensor_files import (
    CHECKSUMS,
    INDEX,
    WEIGHTS,
    ShardedWriter,
    header_room,
    tensor_checksum,
    verify_checksums,
)
from sparsegpt.kernels import Packed24, unpack
from sparsegpt.kernels.checkpoint.archive import pack_folder, unpack_folder
from sparsegpt.run.inspection import inspect_folder
from tests.kernels.helpers import weight24

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": weight24(50, 64, dtype, 1),  # keeps the pattern, yet is an embedding
        f"{Q}.weight": weight24(64, 64, dtype, 2),
        f"{Q}.bias": torch.randn(64).to(dtype),
        f"{DOWN}.weight": weight24(63, 100, dtype, 3),
        "model.layers.0.mlp.up_proj.weight": torch.randn(100, 64).to(dtype),
        "model.norm.weight": torch.ones(65, dtype=dtype),
        "lm_head.weight": weight24(50, 64, dtype, 1),
        "model.layers.0.mlp.experts.0.gate.weight": weight24(8, 64, dtype, 4),
    }


def folder(path: Path, weights: dict[str, Tensor], model_type: str = "llama", layers: object = None) -> Path:
    path.mkdir()
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "dtype": "bfloat16"}))
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_text("the same weights again")
    (path / "extra").mkdir()
    (path / "extra" / "note.txt").write_text("kept")
    if layers is not None:
        (path / "report.json").write_text(json.dumps({"layers": layers}))
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder and its packed form; not to be changed."""
    path = tmp_path_factory.mktemp("both")
    pack_folder(folder(path / "source", tensors()), path / "packed")
    return path


@pytest.fixture
def packed(both: Path, tmp_path: Path) -> Path:
    """The packed folder, beside its source."""
    shutil.copytree(both, tmp_path, dirs_exist_ok=True)
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    source = folder(tmp_path / "source", tensors(dtype))
    report = pack_folder(source, tmp_path / "packed")
    assert set(report.packed) == {Q, DOWN}
    assert unpack_folder(tmp_path / "packed", tmp_path / "back") == report.packed
    back = load_file(tmp_path / "back" / WEIGHTS)
    expected = tensors(dtype)
    assert back.keys() == expected.keys()
    for name in set(expected) - {f"{Q}.bias"}:  # the bias is random
        if "up_proj" not in name:
            assert torch.equal(back[name], expected[name]) and back[name].dtype == dtype
    assert torch.equal(back[f"{Q}.bias"], load_file(source / WEIGHTS)[f"{Q}.bias"])
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_packed_folder_is_what_the_format_says(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    settings = config["quantization_config"]
    assert settings["quant_method"] == "sparsegpt" and settings["format_version"] == 2
    assert settings["modules"] == {Q: [64, 64], DOWN: [63, 100]} and "sparsity_config" not in config
    found = load_file(packed / WEIGHTS)
    assert torch.equal(unpack(Packed24(found[f"{DOWN}.values"], found[f"{DOWN}.meta"], (63, 100))),
                       tensors()[f"{DOWN}.weight"])  # fmt: skip
    assert (packed / "extra" / "note.txt").read_text() == "kept" and (packed / "tokenizer.json").exists()
    assert not (packed / "pytorch_model.bin").exists()
    with safe_open(packed / WEIGHTS, framework="pt") as file:
        checksums = json.loads(file.metadata()[CHECKSUMS])
    assert checksums == {name: tensor_checksum(tensor) for name, tensor in found.items()}


def test_a_placeholder_stands_where_the_weight_was(packed: Path) -> None:
    """Of a shape that no weight has, so that no loader takes it for one."""
    found = load_file(packed / WEIGHTS)
    assert {name for name in found if found[name].dtype == torch.uint8} == {f"{Q}.weight", f"{DOWN}.weight"}
    assert all(found[f"{name}.weight"].tolist() == [0] for name in (Q, DOWN))


def test_a_weight_that_is_packed_and_there_as_well_is_refused(packed: Path, tmp_path: Path) -> None:
    rewrite(packed, lambda found: found.update({f"{Q}.weight": torch.randn(64, 64)}))
    with pytest.raises(SparseGPTError, match=rf"{Q}\.weight is there packed and as it was"):
        unpack_folder(packed, tmp_path / "back")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change tensors of a folder; their checksums are true."""
    found = load_file(folder / WEIGHTS)
    change(found)
    with ShardedWriter(folder, header_room(found)) as writer:
        writer.add(*found.items())


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "one position twice": (lambda found: found[f"{Q}.meta"].fill_(0x55555555), "keeps positions 1 and 1"),
    "positions backwards": (lambda found: found[f"{Q}.meta"][5].fill_(0x11111111), "row 5, group 0 keeps positions 1"),
    "values of whole numbers": (lambda found: found.update({f"{Q}.values": found[f"{Q}.values"].long()}), "int64"),
    "metadata of another size": (lambda found: found.update({f"{Q}.meta": found[f"{Q}.meta"].short()}), "int16"),
    "values of another shape": (lambda found: found.update({f"{Q}.values": found[f"{Q}.values"].T.contiguous()}), "32"),
    "no dimension": (
        lambda found: found.update({f"{Q}.meta": torch.tensor(1, dtype=torch.int32)}),
        r"\(\) torch.int32",
    ),
    "values after the last column": (
        lambda found: found[f"{DOWN}.values"][1].fill_(1),
        "after the last of 100 columns",
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_content_that_no_packer_writes_is_refused_by_all_readers(packed: Path, tmp_path: Path, how: str) -> None:
    change, said = WRONG[how]
    rewrite(packed, change)
    for read in (lambda: unpack_folder(packed, tmp_path / "back"), lambda: inspect_folder(packed)):
        with pytest.raises(SparseGPTError, match=said) as caught:
            read()
        assert str(packed) in str(caught.value) and "pack the model again" in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_a_linear_named_twice_is_refused(packed: Path, tmp_path: Path) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"] = {"m.*.up": [2, 64, 64], "m.1.up": [64, 64]}
    path.write_text(json.dumps(config))
    rewrite(packed, lambda found: found.update({f"m.{i}.up.{part}": found[f"{Q}.{part}"].clone()
                                                for i in (0, 1) for part in ("values", "meta")}))  # fmt: skip
    with pytest.raises(SparseGPTError, match=r"names m\.1\.up twice"):
        unpack_folder(packed, tmp_path / "back")


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 64.0, True, "64", None, [64], -64, 0, 2**63])
@pytest.mark.parametrize("place", [0, 1])
def test_sizes_that_are_none_are_refused(packed: Path, tmp_path: Path, size: object, place: int) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"][Q][place] = size
    path.write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match="no readable modules"):
        unpack_folder(packed, tmp_path / "back")


def test_nothing_from_outside_of_the_folder_comes_along(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tensors())
    (tmp_path / "id_rsa").write_text("PRIVATE")
    (source / "notes.txt").symlink_to(tmp_path / "id_rsa")
    (source / "extra" / "deep.txt").symlink_to(tmp_path / "id_rsa")
    (source / "more").symlink_to(tmp_path)
    report = pack_folder(source, tmp_path / "packed")
    assert set(report.left_behind) == {"notes.txt", "extra/deep.txt", "more"}
    (tmp_path / "packed" / "late.txt").symlink_to(tmp_path / "id_rsa")
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    for target in (tmp_path / "packed", tmp_path / "back"):
        assert (target / "extra" / "note.txt").read_text() == "kept"
        found = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_symlink()}
        assert not found & {"notes.txt", "extra/deep.txt", "more", "late.txt"}


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_weights_and_config_that_lie_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    source = folder(tmp_path / "source", tensors())
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SparseGPTError, match="leads out of"):
        pack_folder(source, tmp_path / "packed")


def test_the_writer_takes_each_name_once(tmp_path: Path) -> None:
    with pytest.raises(SparseGPTError, match="a comes twice"), ShardedWriter(tmp_path, 4096) as writer:
        writer.add(("a", torch.zeros(1)), ("a", torch.zeros(1)))


def test_reasons_for_staying_dense(tmp_path: Path) -> None:
    report = pack_folder(folder(tmp_path / "source", tensors()), tmp_path / "packed")
    assert report.left_dense["model.layers.0.mlp.up_proj.weight"] == "does not keep 2:4"
    assert "linear" in report.left_dense["lm_head.weight"]
    assert "expert" in report.left_dense["model.layers.0.mlp.experts.0.gate.weight"]
    assert report.packed_bytes < 0.7 * report.dense_bytes


def test_report_decides_what_is_packed(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tensors(), layers=[{"name": DOWN, "sparsity": "2:4"}])
    report = pack_folder(source, tmp_path / "packed")
    assert report.packed == (DOWN,) and report.left_dense[f"{Q}.weight"] == "not pruned"


def test_listed_layer_that_breaks_the_pattern(tmp_path: Path) -> None:
    weights = tensors()
    weights[f"{Q}.weight"][3, 8:12] = 1.0
    source = folder(tmp_path / "source", weights, layers=[{"name": Q, "sparsity": "2:4"}])
    with pytest.raises(SparseGPTError, match=rf"{Q}\.weight: not 2:4: row 3, columns 8\.\.11"):
        pack_folder(source, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]  # nothing half-written is left


def test_listed_layer_that_is_absent(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tensors(), layers=[{"name": "model.nowhere", "sparsity": "2:4"}])
    with pytest.raises(SparseGPTError, match=r"no model\.nowhere\.weight"):
        pack_folder(source, tmp_path / "packed")


def test_transposed_weights_are_packed_along_their_inputs(tmp_path: Path) -> None:
    """GPT-2 keeps [in, out]; the packed form is that of [out, in], and unpacking gives the layout back."""
    name, weight = "transformer.h.0.mlp.c_fc", weight24(48, 64, torch.bfloat16, 2)
    weights = {f"{name}.weight": weight.T.contiguous(), "transformer.wte.weight": weight24(50, 64, torch.bfloat16, 1)}
    source = folder(tmp_path / "source", weights, "gpt2", [{"name": name, "sparsity": "2:4"}])
    assert pack_folder(source, tmp_path / "packed").packed == (name,)
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (settings["modules"], settings["transposed"]) == ({name: [48, 64]}, [name])
    found = load_file(tmp_path / "packed" / WEIGHTS)
    assert torch.equal(unpack(Packed24(found[f"{name}.values"], found[f"{name}.meta"], (48, 64))), weight)
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transposed", ["model.ghost"]),
        ("stacked", [Q]),
        ("transposed", 3),
        ("modules", {"experts.*.up": [64, 64]}),
        ("modules", {"experts.*.up": [0, 64, 64]}),
        ("modules", {Q: [2, 64, 64]}),
    ],
)
def test_modules_that_make_no_sense_are_refused(packed: Path, tmp_path: Path, key: str, value: object) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"][key] = value
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match="no readable modules"):
        unpack_folder(packed, tmp_path / "back")


def test_more_experts_than_the_weights_hold_are_refused_at_once(packed: Path, tmp_path: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["modules"]["model.experts.*.up"] = [10**15, 64, 64]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match=r"promises model\.experts\.0\.up\.values"):
        unpack_folder(packed, tmp_path / "back")


def test_shards_in_and_out(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tensors())
    pack_folder(source, tmp_path / "packed", shard_bytes=8000)
    index = json.loads((tmp_path / "packed" / INDEX).read_text())
    shards = sorted(path.name for path in (tmp_path / "packed").glob("*.safetensors"))
    assert len(shards) >= 3 and shards == sorted(set(index["weight_map"].values()))
    assert index["weight_map"][f"{Q}.values"] == index["weight_map"][f"{Q}.meta"]
    unpack_folder(tmp_path / "packed", tmp_path / "back", shard_bytes=8000)
    again = pack_folder(tmp_path / "back", tmp_path / "again")
    assert set(again.packed) == {Q, DOWN}
    one, many = load_file(tmp_path / "again" / WEIGHTS), weight_files(tmp_path / "packed")
    for name, tensor in one.items():
        with safe_open(many[name], framework="pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
def test_packing_needs_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """24 tensors of 4 MB: what the process allocates stays far below the 96 MB of them all."""
    weight = weight24(1024, 2048, torch.bfloat16)
    source = folder(tmp_path / "source", {f"layers.{i}.up_proj.weight": weight.clone() for i in range(24)})
    warm_up = folder(tmp_path / "small", {"layers.0.up_proj.weight": weight24(16, 32, torch.bfloat16)})
    pack_folder(warm_up, tmp_path / "small-packed")  # what is loaded once for a process is not what packing takes
    unpack_folder(tmp_path / "small-packed", tmp_path / "small-back")
    assert peak_of(lambda: pack_folder(source, tmp_path / "packed")) < 40_000_000
    assert peak_of(lambda: unpack_folder(tmp_path / "packed", tmp_path / "back")) < 40_000_000


def peak_of(act: Callable[[], object]) -> int:
    """Most bytes allocated above the start while `act` ran, sampled every millisecond."""
    before, seen, done = allocated(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(allocated())

    watcher = threading.Thread(target=watch)
    watcher.start()
    act()
    done.set()
    watcher.join()
    return max(seen) - before


def allocated() -> int:
    """Bytes of memory that no file backs: mapped weights do not count."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, -1),
        lambda path: flip(path, read_header(path).data_start),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"I32"', b'"F32"')),
        lambda path: path.write_bytes(b""),
    ],
)
def test_damaged_files_are_refused(packed: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    damage(packed / WEIGHTS)
    with pytest.raises(SparseGPTError, match=WEIGHTS):
        unpack_folder(packed, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_file_without_checksums_is_refused(packed: Path, tmp_path: Path) -> None:
    save_file(load_file(packed / WEIGHTS), packed / WEIGHTS)
    with pytest.raises(SparseGPTError, match="no readable checksums"):
        unpack_folder(packed, tmp_path / "back")


def test_newer_version_and_other_methods_are_refused(packed: Path, tmp_path: Path) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match=r"version 3.*update sparsegpt"):
        unpack_folder(packed, tmp_path / "back")
    config["quantization_config"] = {"quant_method": "gptq"}
    path.write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match="not packed here"):
        unpack_folder(packed, tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "[1]", "expected a JSON object"),
        ("report.json", "[]", "expected a JSON object"),
        (INDEX, '{"weight_map": 3}', "no weight_map"),
        (INDEX, '{"weight_map": {"a": "gone.safetensors"}}', r"names the shard gone\.safetensors"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, content: str, message: str) -> None:
    source = folder(tmp_path / "source", tensors())
    (source / name).write_text(content)
    if name == INDEX:  # a single file goes first, as in transformers
        (source / WEIGHTS).unlink()
    with pytest.raises(SparseGPTError, match=message):
        pack_folder(source, tmp_path / "packed")


def test_unreadable_modules_and_unwritable_targets(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SparseGPTError, match="cannot be made"):
        unpack_folder(packed, tmp_path / "file" / "below")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["modules"] = [1]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match="no readable modules"):
        unpack_folder(packed, tmp_path / "back")


def test_truncated_source(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tensors())
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(SparseGPTError, match="truncated or damaged"):
        pack_folder(source, tmp_path / "packed")


def test_missing_module_tensors(packed: Path, tmp_path: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["modules"]["model.ghost"] = [8, 8]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match=r"promises model\.ghost\.values"):
        unpack_folder(packed, tmp_path / "back")


def test_refused_sources_and_targets(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(SparseGPTError, match="already packed"):
        pack_folder(packed, tmp_path / "twice")
    with pytest.raises(SparseGPTError, match="exists and is not empty"):
        pack_folder(tmp_path / "source", packed)
    with pytest.raises(SparseGPTError, match=r"config\.json"):
        pack_folder(tmp_path / "nowhere", tmp_path / "out")
    (packed / WEIGHTS).unlink()
    with pytest.raises(SparseGPTError, match="found neither"):
        unpack_folder(packed, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    pack_folder(tmp_path / "source", tmp_path / "empty")


def test_writer_handles_any_shape(tmp_path: Path) -> None:
    """Scalars, empty tensors and odd sizes, which leave the tensors behind them unaligned."""
    weights = {
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "odd": torch.randn(7).half(),
        "after": torch.randn(5, 3, dtype=torch.float64),
        "strided": torch.randn(6, 4).t(),
        "ints": torch.arange(5),
        "é": torch.ones(3, dtype=torch.bool),
    }
    with ShardedWriter(tmp_path, header_room(weights)) as writer:
        for named in weights.items():
            writer.add(named)
    verify_checksums(tmp_path / WEIGHTS)
    back = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
