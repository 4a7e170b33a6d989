# SPDX-License-Identifier: MIT
"""Reading machine code: finds instructions, loops, accesses and products in short texts."""

import subprocess

import pytest

from bench.codegen.assembly import (
    amdgcn_resources,
    innermost_loops,
    parse_amdgcn,
    parse_sass,
    ptxas_notes,
    sass_resources,
    serialising_note,
)
from bench.codegen.products import opcode_flops


def sass(*lines):
    """Lines of SASS at addresses 0x0, 0x10, … as cuobjdump prints them."""
    return "".join(f"        /*{16 * n:04x}*/        {line} ;      /* 0x0 */\n" for n, line in enumerate(lines))


def test_sass_counts_by_width_and_predicate():
    (loop,) = innermost_loops(
        parse_sass(
            sass(
                "LDG.E.U16 R1, [R2.64]",  # outside
                "@P1 LDG.E.LTC128B.128.CONSTANT R4, desc[UR4][R2.64]",  # 0x10
                "LDG.E R8, [R2.64+0x10]",
                "@!PT LDS RZ, [RZ]",  # never executed
                "STG.E.64 [R2.64], R4",
                "@!P0 STG.E.U8 [R2.64], R4",
                "STL.64 [R1], R4",
                "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
                "HGMMA.64x128x16.F32.BF16 R4, gdesc[UR4], R4",
                "SHFL.BFLY PT, R1, R2, 0x1, 0x1f",
                "BAR.SYNC.DEFER_BLOCKING 0x0",
                "@P2 BRA 0x10",
                "EXIT",
                "BRA 0xd0",  # the trap after the end is not a loop
                "NOP",
            )
        )
    )
    assert loop.counts == {
        "load.128": 1, "load.32": 1, "store.64": 1, "store.8": 1, "local": 1, "copy.128": 1, "tensor": 1,
        "shuffle": 1, "barrier": 1,
    }  # fmt: skip
    assert loop.predicated == 2
    assert loop.instructions == 10


def test_sass_loops_are_found_in_the_graph():
    """An inner loop whose cold block is after the outer loop. A condition is among the operands of one branch."""
    instructions = parse_sass(
        sass(
            "MOV R1, R2",
            "STG.E.U16 [R2.64], R1",  # 0x10, outer loop only
            "BSSY B0, 0x60",
            "@P0 BRA 0xa0",  # to the cold block
            "STG.E.128 [R2.64], R4",  # 0x40, inner loop
            "BSYNC B0",  # 0x50
            "@P1 BRA 0x20",
            "BRA.U UP0, 0x10",
            "EXIT",
            "BRA 0x90",
            "STG.E [R2.64], R1",  # 0xa0, the cold block
            "BRA 0x50",
        )
    )
    assert instructions[7].successors == [1, 8]
    (loop,) = innermost_loops(instructions)
    assert loop.counts == {"store.128": 1, "store.32": 1}
    assert (loop.begin, loop.instructions) == (2, 7)


AMDGCN = """
	.type	_kernel,@function
_kernel:                                ; @_kernel
.Lfunc_begin0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; outer
	buffer_load_ushort v1, v2, s[4:7], 0 offen
.LBB0_2:                                ; =>This Inner Loop Header: Depth=2
	{select}
	global_load_dwordx4 v[4:7], v[2:3], off
	buffer_store_dwordx4 v[4:7], v9, s[4:7], 0 offen
	global_store_b64 v[2:3], v[4:5], off
	ds_read2_b32 v[4:5], v1
	ds_bpermute_b32 v1, v2, v3
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	s_cbranch_scc1 .LBB0_2
	s_cbranch_vccnz .LBB0_1
	s_endpgm
.Lfunc_end0:
	.size	_kernel, .Lfunc_end0-_kernel
"""


@pytest.mark.parametrize(
    ("select", "predicated"),
    [
        ("s_and_b64 vcc, exec, vcc", 0),  # reads the lane mask
        ("s_and_saveexec_b64 s[0:1], vcc", 3),
        ("s_and_b64 exec, exec, vcc", 3),
        ("s_and_b32 exec_lo, exec_lo, s1", 3),
        ("v_cmpx_gt_u32_e32 v8, v7", 3),
        ("v_cndmask_b32_e32 v9, v8, v7, vcc", 1),  # sends the lanes of one access outside the buffer
        ("v_cndmask_b32_e32 v2, v8, v7, vcc", 0),  # global instructions have no bounds: another address hides no lane
    ],
)
def test_amdgcn_counts_by_width_and_predicate(select, predicated):
    (loop,) = innermost_loops(parse_amdgcn(AMDGCN.format(select=select)))
    assert loop.counts == {
        "load.128": 1, "store.128": 1, "store.64": 1, "shared_load": 1, "shuffle": 1, "tensor": 1,
    }  # fmt: skip
    assert loop.predicated == predicated
    assert loop.instructions == 8


def test_sass_products_exp2_and_waits():
    """Products are counted by opcode, without the operands. wgmma waits by WARPGROUP.DEPBAR."""
    (loop,) = innermost_loops(
        parse_sass(
            sass(
                "WARPGROUP.ARRIVE",
                "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, !UPT",  # 0x10
                "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0",
                "WARPGROUP.DEPBAR.LE gsb0, 0x0",
                "HMMA.16816.F32.BF16 R4, R8, R12, R4",
                "MUFU.EX2 R4, R5",
                "MUFU.RCP R4, R5",
                "UTMALDG.2D [UR8], [UR4]",
                "@P0 BRA 0x10",
                "EXIT",
            )
        )
    )
    assert loop.products == {"HGMMA.64x64x16.F32.BF16": 2, "HMMA.16816.F32.BF16": 1}
    assert loop.counts == {"tensor": 3, "wait": 1, "exp2": 1, "bulk": 1}


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 / 4),  # four warps share it
        ("HGMMA.64x16x8.F32.TF32", 2 * 64 * 16 * 8 / 4),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("v_mfma_f32_32x32x8_bf16_1k", 2 * 32 * 32 * 8),
        ("v_mfma_f32_16x16x16_bf16", 2 * 16 * 16 * 16),
        ("v_mfma_f32_4x4x4_16b_f16", 2 * 4 * 4 * 4 * 16),
        ("v_mfma_f32_16x16x4_f32", 2 * 16 * 16 * 4),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", 2 * 64 * 64 * 32 / 4),
        ("v_smfmac_f32_16x16x32_bf16", 2 * 16 * 16 * 32),
        ("UTCHMMA", None),  # its shape is in a register
    ],
)
def test_products_are_read_from_the_opcode(opcode, flops):
    assert opcode_flops(opcode) == flops


LOG = """
ptxas info    : (C7519) warpgroup.arrive is injected in around line 2402 by compiler to allow use of registers in GMMA
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_dkdv_kernel' for 'sm_90a'
{}    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
SERIALISED = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized …\n"
WAIT = "ptxas info    : (C7517) warpgroup.wait is injected in around line 15 by compiler to allow use of registers …\n"


@pytest.mark.parametrize(
    ("line", "number"),
    [("", None), (SERIALISED, "(C7515)"), (WAIT, "(C7517)"), (SERIALISED + WAIT, "(C7515)"),
     (WAIT + SERIALISED, "(C7515)")],
)  # fmt: skip
def test_ptxas_remarks_that_serialise(line, number):
    note = serialising_note(ptxas_notes(LOG.format(line)))
    assert (note and note[:7]) == number


ACCUMULATOR, DESCRIPTORS = "{%f1, %f2, %f3, %f4}", "%rd2, %rd2"
WGMMA = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {ACCUMULATOR}, {DESCRIPTORS}, 1, 1, 1, 0, 0;"
PTX = f"""
.version 8.4
.target sm_90a
.address_size 64
.visible .entry _kernel(.param .u64 out, .param .u64 descriptor, .param .u32 n)
{{
  .reg .b32 %r<2>; .reg .b64 %rd<3>; .reg .f32 %f<5>; .reg .pred %p;
  ld.param.u64 %rd1, [out];
  ld.param.u64 %rd2, [descriptor];
  ld.param.u32 %r1, [n];
  mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
  wgmma.fence.sync.aligned;
  {WGMMA}
  wgmma.commit_group.sync.aligned;
loop:
  add.f32 %f1, %f1, 0f3F800000;
  {WGMMA}
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 1;
  sub.u32 %r1, %r1, 1;
  setp.ne.u32 %p, %r1, 0;
  @%p bra loop;
  wgmma.wait_group.sync.aligned 0;
  st.global.v4.f32 [%rd1], {ACCUMULATOR};
  ret;
}}
"""


def test_ptxas_still_says_so(tmp_path):
    """An accumulator changes while a wgmma writes it. If ptxas changes its words, serialised kernels go unseen."""
    triton = pytest.importorskip("triton", reason="ptxas comes with Triton")
    source, target = tmp_path / "serialised.ptx", tmp_path / "serialised.o"
    source.write_text(PTX)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "serialized" in serialising_note(ptxas_notes(done.stderr))


SASS_KINDS = {
    "load.256": ["LDG.E.ENL2.256"], "load.128": ["LDG.E.128.CONSTANT"], "load.64": ["LD.E.64"], "load.32": ["LDG.E"],
    "load.16": ["LDG.E.U16", "LD.E.S16"], "load.8": ["LDG.E.S8", "LDG.E.U8.CONSTANT"],
    "store.128": ["STG.E.128"], "store.32": ["ST.E"], "store.16": ["STG.E.U16"],
    "copy.128": ["LDGSTS.E.BYPASS.LTC128B.128"], "copy.64": ["LDGSTS.E.64"], "copy.32": ["LDGSTS.E"],
    "bulk": ["UTMALDG.2D", "UTMASTG.3D", "UBLKCP.S.G"],
    "atomic.32": ["RED.E.ADD.F32", "REDG.E.ADD", "ATOM.E.ADD"], "atomic.64": ["ATOMG.E.CAS.64"],
    "shared_load": ["LDS.128", "LDSM.16.M88.4"], "shared_store": ["STS", "STSM.16"], "shared_atomic": ["ATOMS.ADD"],
    "local": ["LDL.64", "STL"], "shuffle": ["SHFL.BFLY"], "barrier": ["BAR.SYNC", "SYNCS.PHASECHK"],
    "tensor": ["HMMA.16816.F32", "IMMA.16832", "DMMA.884", "QMMA.16832", "HGMMA.64x8x16", "IGMMA.64x8x32",
               "QGMMA.64x8x32", "UTCHMMA", "UTCIMMA", "UTCQMMA.2CTA"],
    "exp2": ["MUFU.EX2", "MUFU.EX2.F16"], "wait": ["WARPGROUP.DEPBAR.LE"],
    None: ["MUFU.RCP", "WARPGROUP.ARRIVE", "FFMA", "LDC.64", "DEPBAR.LE", "IMAD.MOV.U32"],
}  # fmt: skip
AMDGCN_KINDS = {
    "load.128": ["buffer_load_dwordx4", "global_load_b128"], "load.96": ["buffer_load_dwordx3", "global_load_b96"],
    "load.64": ["flat_load_dwordx2", "global_load_b64"], "load.32": ["buffer_load_dword", "global_load_b32"],
    "load.16": ["buffer_load_ushort", "global_load_d16_b16", "buffer_load_short_d16", "global_load_u16"],
    "load.8": ["buffer_load_ubyte", "global_load_u8", "global_load_i8"],
    "store.128": ["buffer_store_dwordx4"], "store.16": ["global_store_short", "global_store_b16"],
    "store.8": ["buffer_store_byte", "global_store_b8"],
    "atomic.32": ["global_atomic_add_f32"], "atomic.64": ["global_atomic_add_f64", "buffer_atomic_add_x2"],
    "copy.128": ["buffer_load_dwordx4 v1, s[0:3], 0 offen lds", "global_load_lds_dwordx4"],
    "copy.32": ["buffer_load_dword v1, s[0:3], 0 offen lds"],
    "local": ["scratch_load_dword", "scratch_store_dwordx4"],
    "tensor": ["v_mfma_f32_32x32x8_bf16_1k", "v_smfmac_f32_16x16x32_bf16", "v_wmma_f32_16x16x16_f16"],
    "barrier": ["s_barrier", "s_barrier_wait"], "exp2": ["v_exp_f32_e32"],
    "shuffle": ["ds_permute_b32", "ds_bpermute_b32", "ds_swizzle_b32", "v_permlane32_swap_b32", "v_add_f32_dpp"],
    "shared_load": ["ds_read_b128", "ds_load_b64"], "shared_store": ["ds_write_b64", "ds_store_b32"],
    "shared_atomic": ["ds_add_f32"], None: ["v_add_f32_e32", "s_barrier_signal", "s_waitcnt", "v_log_f32_e32"],
}  # fmt: skip


def amdgcn(*lines):
    return "_kernel,@function\n" + "\n".join(lines) + "\n.Lfunc_end0:\n"


def kinds(instructions):
    return [instruction.kind for instruction in instructions]


@pytest.mark.parametrize("kind", SASS_KINDS)
def test_kinds_of_sass(kind):
    assert set(kinds(parse_sass(sass(*SASS_KINDS[kind])))) == {kind}
    assert len(parse_sass(sass(*SASS_KINDS[kind]))) == len(SASS_KINDS[kind])


@pytest.mark.parametrize("kind", AMDGCN_KINDS)
def test_kinds_of_amdgcn(kind):
    assert kinds(parse_amdgcn(amdgcn(*AMDGCN_KINDS[kind]))) == [kind] * len(AMDGCN_KINDS[kind])


def test_where_control_goes_in_sass():
    lines = {
        "MOV R1, R2": [1], "@P0 EXIT": [2], "@PT BRA 0x60": [6], "@!UP1 BRA 0x0": [0, 4], "CALL.REL 0x70": [7, 5],
        "BRA !P3, 0x10": [1, 6], "@P1 RET.REL": [7], "KILL": [], "@P2 KILL": [9], "BRX R4": [], "JMX R4": [],
        "RET.ABS": [], "BSSY B1, 0x0": [13], "@P0 BSYNC B1": [0, 14], "BSYNC B1": [0], "BRA.DIV ~URZ, 0x20": [2, 16],
        "EXIT": [],
    }  # fmt: skip
    found = parse_sass(sass(*lines))
    assert [instruction.successors for instruction in found] == list(lines.values())
    assert [number for number, instruction in enumerate(found) if instruction.is_predicated] == [1, 3, 6, 8, 13]
    assert len(parse_sass(sass("EXIT", "NOP", "NOP"))) == 1  # without the padding
    assert [i.is_predicated for i in parse_sass(sass("@UPT STG.E R1", "@PT STG.E R1", "@UP0 STG.E R1"))] == [0, 0, 1]


def test_where_control_goes_in_amdgcn():
    lines = ("a:", "v_mov_b32 v1, v2 ; a remark", "s_cbranch_vccz a", "s_branch b", "s_setpc_b64 s[0:1]", "b:",
             "s_cbranch_scc0 nowhere", ".p2align 8", "s_endpgm", "s_nop 0")  # fmt: skip
    found = parse_amdgcn(amdgcn(*lines))
    assert [instruction.successors for instruction in found] == [[1], [0, 2], [4], [], [5], [], []]
    assert found[0].operands == "v1, v2"


def test_registers_and_memory_of_a_kernel():
    text = " Function _k:\n  REG:168 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:600 TEXTURE:0\n"
    assert sass_resources(text) == {"registers": 168, "stack": 24}
    found = {".vgpr_count": 256, ".agpr_count": 128, ".sgpr_count": 96, ".private_segment_fixed_size": 40,
             ".vgpr_spill_count": 7, ".sgpr_spill_count": 3}  # fmt: skip
    text = "---\n" + "".join(f"    {name}:     {value}\n" for name, value in found.items())
    assert amdgcn_resources(text) == {"registers": 256, "stack": 40, "spilled": 7, "spilled_scalar": 3}


@pytest.mark.parametrize(
    ("filler", "number", "is_loop"),
    [("MOV R1, R2", 5, False), ("MOV R1, R2", 6, True), ("STS [R1], R2", 2, True), ("MUFU.EX2 R1, R2", 1, True)],
)
def test_a_short_loop_that_only_waits_is_none(filler, number, is_loop):
    """Blackwell waits for its tensor cores in a loop."""
    lines = ["MOV R1, R2", "SYNCS.PHASECHK.TRANS64 P0", *[filler] * number, "@!P0 BRA 0x10", "EXIT"]
    assert len(innermost_loops(parse_sass(sass(*lines)))) == is_loop


def test_loops_come_in_the_order_of_the_code():
    """A branch over the first loop leads to the second one."""
    lines = ["@P0 BRA 0x50", "STS [R1], R2", "LDS R1, [R2]", "@P1 BRA 0x10", "EXIT", "LDG.E R1, [R2]", "@P2 BRA 0x50"]
    loops = innermost_loops(parse_sass(sass(*lines, "EXIT")))
    assert [(loop.begin, loop.instructions) for loop in loops] == [(1, 3), (5, 2)]


def test_a_loop_with_two_ways_back():
    """The compiler turned a `continue` around: both branches belong to one loop."""
    lines = ["MOV R1, R2", "LDG.E R1, [R2]", "@P0 BRA 0x50", "STG.E [R2], R1", "BRA 0x10", "STS [R1], R2"]
    (loop,) = innermost_loops(parse_sass(sass(*lines, "@P1 BRA 0x10", "EXIT")))
    assert loop.counts == {"load.32": 1, "store.32": 1, "shared_store": 1}
    assert (loop.begin, loop.instructions) == (1, 6)


def test_lanes_that_skip_two_accesses_in_amdgcn():
    """Each access has an address of its own."""
    select = ["v_cndmask_b32_e32 v8, v1, v2, vcc", "v_cndmask_b32_e32 v9, v1, v2, vcc"]
    access = [f"buffer_store_dword v1, v{register}, s[0:3], 0 offen" for register in (8, 9, 7)]
    (loop,) = innermost_loops(parse_amdgcn(amdgcn("a:", *select, *access, "s_cbranch_scc1 a", "s_endpgm")))
    assert (loop.predicated, loop.counts) == (2, {"store.32": 3})


def test_lanes_that_skip_a_copy_in_amdgcn():
    """Its address is the first operand. Without a selected address no lane skips."""
    for register, predicated in (("v[8:9]", 1), ("v9", 1), ("v7", 0)):
        (loop,) = innermost_loops(
            parse_amdgcn(
                amdgcn(
                    "a:",
                    "v_cndmask_b32_e32 v9, v8, v7, vcc",
                    f"buffer_load_dwordx4 {register}, s[0:3], 0 offen lds",
                    "buffer_load_dwordx4 v[10:13], v6, s[0:3], 0 offen",
                    "s_cbranch_scc1 a",
                    "s_endpgm",
                )
            )
        )
        assert (loop.predicated, loop.counts) == (predicated, {"copy.128": 1, "load.128": 1})
