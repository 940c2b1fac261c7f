"""The C++ kernel against float64 on every path of this machine, its build, and life without a compiler."""

import ctypes
import functools
import logging
import math
import operator
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import Packed24, dequantize, quantize, unpack
from sparsegpt.kernels.cpu import build, dense, integer24, library, norm
from sparsegpt.kernels.cpu.library import LEVELS, machine_level
from sparsegpt.kernels.cpu.packed24 import prepare, refusal, run, run_swiglu, unpack_fast
from sparsegpt.kernels.cpu.read import read
from sparsegpt.kernels.dispatch.measured import ANY, MEASURED
from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.layers.sparse_linear import Sparse24Linear
from tests.forked import Forked
from tests.kernels.helpers import relative_error, weight24

# float32 sums of products of up to 1074 terms; one rounding to 8 bits for bfloat16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
HERE = LEVELS[: library.level_number(library.best_level()) + 1]
ROUTES, choose = PACKED24.routes, PACKED24.choose
needs_compiler = pytest.mark.skipif(machine_level() is None, reason="no C++ compiler here")


@needs_compiler
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 17, 64, 65])
def test_products_against_float64(tokens: int, dtype: torch.dtype, level: str, poisoned: None) -> None:
    for seed, (rows, columns) in enumerate([(1, 4), (5, 36), (64, 288), (130, 352), (33, 700), (11, 2148)]):
        weight = weight24(rows, columns, dtype, seed)
        inputs = torch.randn(tokens, columns).to(dtype)
        bias = torch.randn(rows).to(dtype) if seed % 2 else None
        expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert relative_error(run(pack(weight), inputs, bias, level=level), expected) < TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 17])
def test_dense_products_against_float64(tokens: int, level: str, poisoned: None) -> None:
    for seed, (rows, columns) in enumerate([(1, 1), (5, 7), (64, 288), (130, 353), (1030, 70)]):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
        inputs = torch.randn(tokens, columns).bfloat16()
        bias = torch.randn(rows).bfloat16() if seed % 2 else None
        expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
        found = dense.run(weight, inputs, bias, level=level)
        assert found.dtype == torch.bfloat16 and relative_error(found, expected) < TOLERANCE[torch.bfloat16]


@needs_compiler
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (1, 700)])
def test_rms_norm_against_float64(lead: tuple[int, ...], dtype: torch.dtype, level: str, poisoned: None) -> None:
    for columns, size, epsilon in ((1, 1.0, 1e-6), (7, 1e-4, 1e-5), (96, 300.0, 1e-6), (577, 1.0, 0.5)):
        inputs, weight = (size * torch.randn(*lead, columns)).to(dtype), torch.randn(columns).to(dtype)
        mean = inputs.double().square().mean(-1, keepdim=True)
        expected = inputs.double() / (mean + epsilon).sqrt() * weight.double()
        found = norm.run(inputs, weight, epsilon, level=level)
        assert found.shape == inputs.shape and found.dtype == dtype
        assert relative_error(found, expected) < TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("count", [0, 1, 31, 4097, 70000])
def test_a_read_sees_every_word(count: int, level: str) -> None:
    data = torch.randint(-(2**62), 2**62, (count,))
    assert read(data, level=level) == functools.reduce(operator.xor, data.tolist(), 0)


@needs_compiler
def test_rms_norm_rounds_before_the_weight() -> None:
    """As the models do: 1.00390625 is halfway between two bfloat16 and becomes 1, which 3 times is 3."""
    inputs = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
    scale = 1.00390625
    found = norm.run(inputs, torch.full((2,), 3.0, dtype=torch.bfloat16), scale**-2 - 1)
    assert torch.equal(found, torch.full((2,), 3.0, dtype=torch.bfloat16))
    assert torch.tensor(3 * scale).bfloat16() > 3


@needs_compiler
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 5, 9, 20])
def test_swiglu_against_float64(tokens: int, dtype: torch.dtype, level: str, poisoned: None) -> None:
    for rows, columns in ((1, 32), (70, 100), (37, 1200)):
        gate, up = (weight24(rows, columns, dtype, seed) for seed in (1, 2))
        inputs = torch.randn(tokens, columns).to(dtype)
        gated = inputs.double() @ gate.double().T
        expected = gated / (1 + (-gated).exp()) * (inputs.double() @ up.double().T)
        assert relative_error(run_swiglu(pack(gate), pack(up), inputs, level=level), expected) < TOLERANCE[dtype]


@needs_compiler
def test_swiglu_far_out() -> None:
    """silu of large negative and positive sums: 0 and the sum itself."""
    gate = torch.zeros(3, 32)
    gate[:, 0] = torch.tensor([-2e4, 2e4, float("nan")])
    up = torch.zeros(3, 32)
    up[:, 1] = 2.0
    found = run_swiglu(pack(gate), pack(up), torch.ones(1, 32))[0]
    assert found[0] == 0 and found[1] == 4e4 and found[2].isnan()


@pytest.mark.parametrize("level", [level for level in HERE if level in integer24.LEVELS])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [32, 96, 128, 512])
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_integer_values_against_float64(tokens: int, group_size: int, bits: int, level: str, poisoned: None) -> None:
    for seed, (rows, columns) in enumerate([(1, 4), (5, 36), (65, 288), (33, 700)]):
        small = quantize(pack(weight24(rows, columns, torch.bfloat16, seed)), bits, group_size)
        inputs, bias = torch.randn(tokens, columns).bfloat16(), torch.randn(rows).bfloat16() if seed % 2 else None
        dense = unpack(dequantize(small, torch.float64))  # q * scale is exact in float32
        expected = inputs.double() @ dense.T + (0 if bias is None else bias.double())
        found = integer24.run(small, inputs, bias, level=level)
        assert relative_error(found, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("level", [level for level in HERE if level in integer24.LEVELS])
def test_integer_values_with_inputs_of_every_size(level: str, poisoned: None) -> None:
    """Each 32 columns have inputs of another size, and each row takes one size."""
    sizes = (0.0, 1e-40, 1e-37, 1e-30, 1e-3, 1.0, 3e4, 1e30)
    columns = 32 * len(sizes)
    blocks = torch.arange(columns) // 32
    weight = weight24(len(sizes), columns, torch.bfloat16) * (blocks == torch.arange(len(sizes))[:, None])
    small = quantize(pack(weight), 8, 32)
    inputs = (torch.randn(3, columns) * torch.tensor(sizes)[blocks]).bfloat16()
    expected = inputs.double() @ unpack(dequantize(small, torch.float64)).T
    found = integer24.run(small, inputs, None, level=level).double()
    # below 1e-34 an AVX2 input is zero, and sums of 1e-40 are below every product's own rounding
    assert ((found - expected).abs() <= 0.01 * expected.abs().amax(0) + 1e-34).all()


@pytest.mark.parametrize("level", [level for level in HERE if level in integer24.LEVELS])
@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_integer_values_hide_no_overflow(wrong: float, level: str, poisoned: None) -> None:
    small = quantize(pack(weight24(5, 64, torch.bfloat16)), 4, 32)
    inputs = torch.randn(2, 64).bfloat16()
    inputs[1, 40:44] = wrong
    found = integer24.run(small, inputs, None, level=level)
    assert found[0].isfinite().all() and not found[1].isfinite().any()


def test_integer_refusals() -> None:
    small = quantize(pack(weight24(4, 32, torch.bfloat16)), 4)
    assert (integer24.refusal(small) is None) == (machine_level() in integer24.LEVELS)
    assert "computes in bfloat16" in str(integer24.refusal(replace(small, dtype=torch.float32)))
    strided = replace(small, words=small.words.repeat(1, 2)[:, ::2])
    assert "contiguous weight" in str(integer24.refusal(strided))


@pytest.mark.parametrize("level", [None, "plain"])
def test_integers_need_a_wide_path(level: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "machine_level", lambda: level)
    monkeypatch.setattr(integer24, "load_library", lambda: level)
    reason = str(integer24.refusal(quantize(pack(weight24(4, 32, torch.bfloat16)), 4)))
    assert ("needs AVX2" if level else "C++ compiler") in reason


@needs_compiler
def test_huge_pages_keep_the_bits() -> None:
    packed = pack(weight24(2048, 4096, torch.bfloat16))
    before = packed.values.clone(), packed.meta.clone()
    assert prepare(packed) is packed
    assert torch.equal(packed.values, before[0]) and torch.equal(packed.meta, before[1])


@needs_compiler
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 4), (65, 100), (300, 512)])
def test_unpack_fast_is_unpack(shape: tuple[int, int], dtype: torch.dtype, level: str, poisoned: None) -> None:
    packed = pack(weight24(*shape, dtype))
    assert torch.equal(unpack_fast(packed, level=level), unpack(packed))


@needs_compiler
def test_unpack_fast_keeps_every_bit() -> None:
    weight = torch.zeros(4, 32)
    weight[0, :2] = torch.tensor([float("nan"), float("-inf")])
    weight[1, 6:8] = torch.tensor([1e-42, -1e-45])
    weight[2, 31] = torch.tensor(0x7FA12345, dtype=torch.int32).view(torch.float32)  # a signalling NaN
    for dtype in (torch.float32, torch.bfloat16):
        packed = pack(weight.to(dtype))
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(unpack_fast(packed).view(bits), unpack(packed).view(bits))


@needs_compiler
def test_rounding_of_bfloat16_results() -> None:
    """The kernel rounds to nearest even like torch, and keeps infinities and NaN."""
    weight = torch.zeros(6, 32, dtype=torch.bfloat16)
    weight[:, 0], weight[:, 1] = 1.0, torch.tensor([2**-9, 2**-8 + 2**-9, 3e38, float("inf"), float("nan"), -1.0])
    found = run(pack(weight), torch.ones(1, 32, dtype=torch.bfloat16), None)
    expected = weight.float().sum(1).bfloat16()
    assert torch.equal(found[0].nan_to_num(7), expected.nan_to_num(7))


@needs_compiler
def test_threads_do_not_change_the_bits() -> None:
    packed, inputs = pack(weight24(1024, 256, torch.bfloat16)), torch.randn(3, 256).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(packed, inputs, None)
        torch.set_num_threads(3)
        assert torch.equal(run(packed, inputs, None), one)
        norms = torch.randn(500, 256), torch.randn(256), 1e-5
        many = norm.run(*norms)
        torch.set_num_threads(1)
        assert torch.equal(norm.run(*norms), many)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_refusals() -> None:
    assert "bfloat16 and float32" in str(refusal(pack(weight24(4, 32, torch.float16))))
    whole = pack(weight24(16, 64))
    strided = Packed24(whole.values[::2], whole.meta[::2], (8, 64))
    assert "contiguous weight; found strides (64, 1)" in str(refusal(strided))
    assert "it is on meta" in str(refusal(Packed24(whole.values.to("meta"), whole.meta.to("meta"), (16, 64))))
    with pytest.raises(SparseGPTError, match="expected one of plain"):
        run(pack(weight24(4, 32)), torch.randn(1, 32), None, level="sse9")
    with pytest.raises(SparseGPTError, match="must have one shape and dtype"):
        run_swiglu(pack(weight24(4, 32)), pack(weight24(8, 32)), torch.randn(1, 32))


@needs_compiler
def test_few_tokens_use_it_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Sparse24Linear.from_packed(pack(weight24(64, 96)), None)
    if layer.choice.route(1) != "cpu":
        pytest.skip("no measured row for this machine's path")
    seen: list[int] = []

    def spy(weight: Packed24, inputs: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(inputs))
        return run(weight, inputs, bias)

    monkeypatch.setitem(ROUTES, "cpu", replace(ROUTES["cpu"], run=spy))
    limit = layer.choice.steps[0][0]
    for tokens in (1, limit, limit + 1):
        inputs = torch.randn(tokens, 96)
        assert relative_error(layer(inputs), inputs @ layer.weight.T) < 2e-6
    assert seen == [1, limit]
    layer.kernels = "cpu"
    layer(torch.randn(100, 96))
    assert seen[-1] == 100


@pytest.mark.parametrize(("rows", "larger"), [(64, False), (131072, True)])
def test_the_table_knows_the_size(rows: int, larger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "machine_level", lambda: "avx512_bf16")
    monkeypatch.setitem(ROUTES, "cpu", replace(ROUTES["cpu"], refusal=lambda weight: None))
    choice = choose(pack(torch.zeros(rows, 96, dtype=torch.float32)))
    first, second = (row.steps for row in MEASURED if (row.path, row.dtype) == ("avx512_bf16", torch.float32))
    assert choice.steps == (*(second if larger else first), (ANY, "dense")) and first > second
    monkeypatch.setattr(library, "machine_level", lambda: "plain")
    assert choose(pack(torch.zeros(rows, 96, dtype=torch.float32))).route(1) == "dense"


@pytest.mark.parametrize(
    ("there", "scale", "taken"), [(1, 1.0, True), (1, 1.1, False), (1, float("nan"), False), (0, 1.0, False)]
)
def test_tiles_serve_only_after_a_right_product(
    there: int, scale: float, taken: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library that says that it has tiles, and computes `scale` times the product."""

    class Tiled:
        def sparse24_has_tiles(self) -> int:
            return there

    def product(values: int, meta: int, inputs: int, bias: int, out: int, *sizes: int) -> None:
        rows, columns, tokens, _, level = sizes
        assert level == LEVELS.index("amx")

        def at(address: int, *shape: int) -> Tensor:
            numbers = (ctypes.c_uint16 * math.prod(shape)).from_address(address)
            return torch.frombuffer(numbers, dtype=torch.bfloat16).view(shape)

        kept = at(inputs, tokens, columns // 4, 4)[..., :2].flatten(1).double()
        at(out, tokens, rows).copy_(scale * kept @ at(values, rows, columns // 2).double().T)

    library.tiles_work.cache_clear()
    monkeypatch.setattr(library, "load_library", Tiled)
    monkeypatch.setattr(library, "find_function", lambda name: product)
    with caplog.at_level(logging.WARNING, logger="sparsegpt.kernels"):
        assert library.tiles_work() == taken
    assert ("wrong products" in caplog.text) == (there == 1 and not taken)
    library.tiles_work.cache_clear()


def clear_caches() -> None:
    for cached in (
        build.load_library,
        library.machine_level,
        library.tiles_work,
        library.find_function,
        library.at_best_level,
    ):
        cached.cache_clear()


@needs_compiler
def test_the_library_of_all_sources_knows_this_machine() -> None:
    clear_caches()
    assert machine_level() in LEVELS


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clear_caches()
    yield tmp_path / "sparsegpt" / "kernels"
    clear_caches()


def kept_in(folder: Path) -> set[Path]:
    """What a cache holds besides the lock of those who build."""
    return set(folder.iterdir()) - {folder / build._LOCK}


@pytest.fixture
def small_source(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function, which compiles in a moment; the folder that it is built into."""
    source = fresh_build.parent.parent / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", (source,))
    return fresh_build


@needs_compiler
def test_builds_once_into_the_cache(small_source: Path) -> None:
    library = build._cached_build()
    assert kept_in(small_source) == {library}  # nothing else is left behind
    stamp = library.stat().st_mtime_ns
    assert build._cached_build() == library and library.stat().st_mtime_ns == stamp


@needs_compiler
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"\0"])
def test_a_damaged_library_is_never_loaded(damage, small_source: Path) -> None:
    library = build._cached_build()
    whole = library.read_bytes()
    library.write_bytes(damage(whole))
    assert build._cached_build() == library and library.read_bytes() == whole
    assert kept_in(small_source) == {library} and small_source.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.parametrize("others", ["the folder", "the one around it", "a link"])
def test_no_library_comes_from_where_others_write(
    others: str, small_source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if others == "a link":
        (tmp_path / "elsewhere").mkdir()
        small_source.parent.mkdir()
        small_source.symlink_to(tmp_path / "elsewhere")
    else:
        small_source.mkdir(parents=True)
        (small_source if others == "the folder" else small_source.parent).chmod(0o777)
    with caplog.at_level(logging.WARNING, logger="sparsegpt.kernels"):
        library = build._cached_build()
    assert small_source not in library.parents and not list(small_source.iterdir())
    assert library.parent.stat().st_mode & 0o777 == 0o700 and "can be written by others" in caplog.text


@needs_compiler
def test_a_mask_for_groups_makes_no_folder_of_others(small_source: Path) -> None:
    before = os.umask(0o002)
    try:
        assert build._cached_build().parent == small_source
    finally:
        os.umask(before)


@needs_compiler
def test_what_a_killed_build_left_goes_and_a_build_at_work_stays(small_source: Path) -> None:
    small_source.mkdir(parents=True, mode=0o700)
    for name, age in (("building-old", 10**5), ("building-new", 10)):
        (small_source / name).mkdir()
        (small_source / name / "half.so").write_bytes(b"half")
        os.utime(small_source / name, (time.time() - age,) * 2)
    library = build._cached_build()
    assert kept_in(small_source) == {library, small_source / "building-new"}


@needs_compiler
def test_two_processes_that_build_at_once_have_one_library(small_source: Path, forked_light: Forked) -> None:
    (source,) = build.SOURCES
    code = f"""
import os
from pathlib import Path
os.environ["XDG_CACHE_HOME"] = {os.environ["XDG_CACHE_HOME"]!r}
from sparsegpt.kernels.cpu import build
build.SOURCES = (Path({str(source)!r}),)
for _ in range(2):
    if not os.fork():
        print(build._cached_build(), flush=True)
        os._exit(0)
assert [os.wait()[1] for _ in range(2)] == [0, 0]
"""
    found = forked_light.python("-c", code).splitlines()
    assert len(found) == 2 and set(found) == {str(library) for library in kept_in(small_source)}


@pytest.mark.parametrize("case", ["none", "broken"])
def test_without_a_working_compiler(
    case: str, fresh_build: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = fresh_build.parent.parent / "cxx"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such header" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(fresh_build) if case == "none" else os.environ["PATH"])
    monkeypatch.setenv("CXX", "nowhere" if case == "none" else str(compiler))
    weight = weight24(64, 96)
    with caplog.at_level(logging.WARNING, logger="sparsegpt.kernels"):
        assert machine_level() is None and machine_level() is None
    assert len(caplog.records) == 1
    assert ("no C++ compiler" if case == "none" else "no such header") in caplog.text
    packed = pack(weight)
    assert choose(packed).route(1) == "dense" and "no sparse kernel serves it" in choose(packed).why
    assert torch.equal(unpack_fast(packed), weight)
    layer, inputs = Sparse24Linear.from_packed(packed, None), torch.randn(5, 96)
    assert relative_error(layer(inputs), inputs.double() @ weight.double().T) < 2e-6
    with pytest.raises(SparseGPTError, match=r"kernels=cpu: .*compiler"):
        choose(packed, "cpu")
