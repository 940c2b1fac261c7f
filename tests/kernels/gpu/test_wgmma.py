"""Sparse warpgroup products without a GPU: compiled ahead of time, emulated lane by lane, refused elsewhere."""

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from triton.experimental.gluon import language as gl

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.gpu import reference, wgmma_sp
from sparsegpt.kernels.gpu.fragments import to_fragments, whole_inputs
from sparsegpt.kernels.gpu.wgmma_sp import LARGE, SMALL, Tile
from tests.kernels.aot import compile_for
from tests.kernels.gpu.hopper_emulator import SharedMemory, emulate_hopper, shared_offset
from tests.kernels.helpers import relative_error, weight24

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # float32 sums and one rounding of the result

# ---------------------------------------------------------------- compiled ahead of time


@pytest.mark.parametrize(("dtype", "told"), [("bf16", wgmma_sp.TELLS_ADDRESS), ("fp16", False)])
@pytest.mark.parametrize("tile", [SMALL, LARGE], ids=["small", "large"])
def test_sparse_warpgroup_products_without_spills(tile: Tile, dtype: str, told: bool) -> None:
    types = {
        **dict.fromkeys(("A", "E"), "*i32"),
        **dict.fromkeys(("inputs", "bias", "out"), f"*{dtype}"),
        **dict.fromkeys(("TOKENS", "ROWS", "PAIRS", "WORDS", "STEPS", "stride"), "i32"),
    }
    constants = {"WARPS": tile.warps, "BLOCKS": tile.blocks, "STAGES": tile.stages, "TYPE": dtype.replace("p", "")}
    constants |= {"BIAS": True, "ACTIVATION": "silu", "TOLD": told}
    built = compile_for(wgmma_sp.wgmma_kernel, 90, types, constants, tile.warps)
    assert built.stack == built.local == 0
    assert built.shared == tile.shared_bytes  # nothing else, so the stages begin where shared memory does
    shape = f"m64n{8 * tile.blocks}k32.f32.{constants['TYPE']}"
    assert len(re.findall(rf"wgmma\.mma_async\.sp\.sync\.aligned\.{shape}", built.ptx)) == 4
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10, %r\d+;", built.ptx)  # zeros, if masked
    if built.sass is not None:
        assert not re.search(r"\b(LDL|STL)\b", built.sass)
        assert len(re.findall(rf"HGMMA\.SP\.64x{8 * tile.blocks}x32\.F32", built.sass)) == 4
        assert len(re.findall(r"WARPGROUP\.ARRIVE", built.sass)) == 1  # the assembler did not take them apart
        assert len(re.findall(r"WARPGROUP\.DEPBAR", built.sass)) == 1
        # a lane's four registers of A come with one load, of four for a step; and the bias
        assert len(re.findall(r"LDG\.E\.128", built.sass)) == 2 * 4 + tile.warps // 4


def test_sizes_of_one_are_constants_to_the_compiler() -> None:
    types = {**dict.fromkeys(("A", "E"), "*i32"), **dict.fromkeys(("inputs", "bias", "out"), "*fp16"), "stride": "i32"}
    sizes = dict.fromkeys(("TOKENS", "ROWS", "PAIRS", "WORDS", "STEPS"), 1)
    constants = {"WARPS": SMALL.warps, "BLOCKS": SMALL.blocks, "STAGES": SMALL.stages, "TYPE": "f16", **sizes}
    constants |= {"BIAS": False, "ACTIVATION": "none", "TOLD": wgmma_sp.TELLS_ADDRESS}
    built = compile_for(wgmma_sp.wgmma_kernel, 90, types, constants, SMALL.warps)
    assert built.stack == built.local == 0 and built.shared == SMALL.shared_bytes


# ---------------------------------------------------------------- emulated lane by lane


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "told"),
    [
        (1, 32, 32, True),
        (9, 40, 100, False),
        (64, 130, 576, True),  # more steps than stages, and a second block of rows
        (65, 200, 132, False),
        (130, 264, 640, True),  # the same of the large tile, and a second block of tokens
    ],
)
def test_wgmma_sp_emulated(
    tokens: int,
    rows: int,
    columns: int,
    told: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
) -> None:
    weight = weight24(rows, columns, dtype)
    inputs, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    fragments = to_fragments(pack(weight))
    emulate_hopper(monkeypatch, told=told)
    plain = inputs.double() @ weight.double().T
    assert relative_error(wgmma_sp.matmul(fragments, inputs), plain) < TOLERANCE[dtype]
    expected = reference.ACTIVATIONS["silu"](plain + bias.double())
    assert relative_error(wgmma_sp.matmul(fragments, inputs, bias, "silu"), expected) < 2 * TOLERANCE[dtype]


DESCRIPTOR = 1 << 62 | 1024 // 16 << 32 | 1 << 16
MISTAKES = {  # in the assembly of the small tile, whose operands have 32 registers each
    "stride of 8 rows": (f"{DESCRIPTOR:#x}", f"{1 << 62 | 512 // 16 << 32 | 1 << 16:#x}"),
    "no swizzle": (f"{DESCRIPTOR:#x}", f"{1024 // 16 << 32 | 1 << 16:#x}"),
    "start in other units": ("start, $320, 4;", "start, $320, 3;"),
    "half a step": ("add.u64 inputs, inputs, 4;", "add.u64 inputs, inputs, 2;"),
    "two steps": ("add.u64 inputs, inputs, 4;", "add.u64 inputs, inputs, 8;"),
    "selector": (", 1, add,", ", 0, add,"),
    "registers of A": ("{$128,$129,$130,$131}", "{$128,$130,$129,$131}"),
    "tile of A": ("{$128,$129,$130,$131}", "{$160,$161,$162,$163}"),
    "half of A": ("{$128,$129,$130,$131}", "{$192,$193,$194,$195}"),
    "metadata": ("inputs, $256,", "inputs, $288,"),
    "sums": ("{$0,$1,$2,$3,", "{$0,$2,$1,$3,"),
    "no fence": ("wgmma.fence.sync.aligned;", ""),
    "no commit": ("wgmma.commit_group.sync.aligned;", ""),
    "no wait": ("wait_group.sync.aligned 0;", "wait_group.sync.aligned 1;"),
}
BROKEN_RULES: dict[str, tuple[str, Callable[..., None]]] = {
    "no proxy fence": ("fence", lambda memory: None),
    "no barrier": ("barrier", lambda memory: None),
    "a copy too few waited for": ("wait_group", lambda memory, pending: land(memory, pending + 1)),
    "copies in flight at the end": ("wait_group", lambda memory, pending: pending and land(memory, pending)),
}
land = SharedMemory.wait_group


@pytest.fixture
def goes_wrong(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> Callable[[], bool]:
    """Whether an emulated product that needs both tiles, both halves of a step and every stage fails or is wrong."""
    weight, inputs = weight24(64, 384, torch.float16), torch.randn(20, 384).half()
    fragments, expected = to_fragments(pack(weight)), inputs.double() @ weight.double().T
    emulate_hopper(monkeypatch, told=True)

    def run() -> bool:
        try:
            return not relative_error(wgmma_sp.matmul(fragments, inputs), expected) < TOLERANCE[torch.float16]
        except AssertionError:
            return True

    return run


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_sees_mistakes_in_the_assembly(
    mistake: str, goes_wrong: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not goes_wrong()
    (right, wrong), products = MISTAKES[mistake], wgmma_sp.products
    assert right in products("f16", 32)
    monkeypatch.setattr(wgmma_sp, "products", lambda *sizes: products(*sizes).replace(right, wrong))
    assert goes_wrong()


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_the_emulator_sees_broken_rules_of_order(
    rule: str, goes_wrong: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedMemory, *BROKEN_RULES[rule])
    assert goes_wrong()


@pytest.mark.skipif(
    not hasattr(gl.NVMMASharedLayout, "format_hardware_view"), reason="this Triton does not show shared layouts"
)
def test_the_emulated_layout_is_triton_s() -> None:
    """The compiler's own list of what lies at each place of two swizzle patterns."""
    shown = gl.NVMMASharedLayout(128, element_bitwidth=16, rank=2).format_hardware_view([16, 64])
    places = torch.tensor([[int(number) for number in re.findall(r"\d+", line)] for line in shown.splitlines()[1:]])
    assert len(places) == 16 * 64
    assert torch.equal(shared_offset(places[:, 1], places[:, 2]), places[:, 0])


# ---------------------------------------------------------------- refusals


def test_wgmma_sp_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert "needs an NVIDIA GPU" in str(wgmma_sp.refuse(torch.device("cpu"), torch.float16))
    for capability, reason in (((8, 9), "has 8.9"), ((10, 0), "has 10.0"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        said = wgmma_sp.refuse(cuda, torch.bfloat16)
        assert said is None if reason is None else reason in str(said)
    assert "float16 or bfloat16" in str(wgmma_sp.refuse(cuda, torch.float32))
    fragments = to_fragments(pack(weight24(32, 64, torch.float16)))
    with pytest.raises(SparseGPTError, match="expects inputs"):
        wgmma_sp.matmul(fragments, torch.randn(2, 64))
    with pytest.raises(SparseGPTError, match="expected one of none"):
        wgmma_sp.matmul(fragments, torch.randn(2, 64).half(), None, "swish")
    assert wgmma_sp.matmul(fragments, torch.randn(0, 64).half()).shape == (0, 32)


def test_stages_at_an_unknown_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_hopper(monkeypatch, told=False, unknown_bytes=16)
    with pytest.raises(SparseGPTError, match=r"install Triton 3\.9"):
        wgmma_sp.matmul(to_fragments(pack(weight24(32, 64, torch.float16))), torch.randn(2, 64).half())


def test_inputs_are_copied_only_where_copies_of_16_bytes_need_it() -> None:
    whole = torch.randn(3, 128).half()
    assert whole_inputs(whole, 128) is whole
    for inputs in (torch.randn(3, 100).half(), torch.randn(3 * 128 + 1).half()[1:].view(3, 128), whole.T[:64].T):
        columns = -(-inputs.shape[1] // 64) * 64
        found = whole_inputs(inputs, columns)
        assert found.shape[1] == columns
        assert found.data_ptr() % 16 == 0 and found.is_contiguous()
        assert torch.equal(found[:, : inputs.shape[1]], inputs) and not found[:, inputs.shape[1] :].any()
