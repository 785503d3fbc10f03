"""Reads and writes of single instructions, by hand."""

import re

import pytest

from posttrain.plan.hlo import HBM, HOST, VMEM, parse
from posttrain.plan.traffic import accesses, hbm_bytes, host_bytes

KIB = 1024
HEAD = """HloModule m

%take (p: f32[8,256], i: s32[]) -> f32[256] {
  %p = f32[8,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,256]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,256}
  ROOT %flat = f32[256]{0} bitcast(%row)
}

%nested (p: f32[8,256], i: s32[], x: f32[256]) -> f32[256] {
  %p = f32[8,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %x = f32[256]{0} parameter(2)
  %inner = f32[256]{0} fusion(%p, %i), kind=kLoop, calls=%take
  ROOT %sum = f32[256]{0} add(%inner, %x)
}

%put (p: f32[8,256], i: s32[], x: f32[1,256]) -> f32[8,256] {
  %p = f32[8,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %x = f32[1,256]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[8,256]{1,0} dynamic-update-slice(%p, %x, %i, %zero)
}

%accumulate (p: f32[8,256], i: s32[], x: f32[1,256]) -> f32[8,256] {
  %p = f32[8,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %x = f32[1,256]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,256]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,256}
  %sum = f32[1,256]{1,0} add(%old, %x)
  ROOT %new = f32[8,256]{1,0} dynamic-update-slice(%p, %sum, %i, %zero)
}

%rewrite (p: f32[8,256], i: s32[]) -> f32[8,256] {
  %p = f32[8,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  %sine = f32[8,256]{1,0} sine(%p)
  %row = f32[1,256]{1,0} slice(%sine), slice={[0:1], [0:256]}
  ROOT %new = f32[8,256]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}

%halves (p: f32[8,256]) -> f32[4,256] {
  %p = f32[8,256]{1,0} parameter(0)
  %a = f32[4,256]{1,0} slice(%p), slice={[0:4], [0:256]}
  %b = f32[4,256]{1,0} slice(%p), slice={[2:6], [0:256]}
  %c = f32[4,256]{1,0} slice(%p), slice={[4:8], [0:256]}
  %ab = f32[4,256]{1,0} add(%a, %b)
  ROOT %abc = f32[4,256]{1,0} add(%ab, %c)
}

%both (p: f32[8,256], i: s32[]) -> (f32[256], f32[8,256]) {
  %p = f32[8,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,256]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,256}
  %flat = f32[256]{0} bitcast(%row)
  %sine = f32[8,256]{1,0} sine(%p)
  ROOT %out = (f32[256]{0}, f32[8,256]{1,0}) tuple(%flat, %sine)
}

ENTRY %m (a: f32[8,256], b: f32[256], c: f32[1,256], h: f32[8,256]) -> f32[8,256] {
  %a = f32[8,256]{1,0} parameter(0)
  %b = f32[256]{0} parameter(1)
  %c = f32[1,256]{1,0} parameter(2)
  %h = f32[8,256]{1,0:S(5)} parameter(3)
  %i = s32[]{:S(6)} constant(3)
"""
CASES = {
    "tanh(%a)": 16,
    "f32[8,256]{1,0:S(1)} tanh(%a)": 8,
    "bf16[8,256]{1,0} convert(%a)": 12,
    "f32[256]{0} fusion(%a, %i), kind=kLoop, calls=%take": 2,
    "f32[256]{0} fusion(%a, %i, %b), kind=kLoop, calls=%nested": 3,
    "fusion(%a, %i, %c), kind=kLoop, calls=%put": 2,
    "fusion(%a, %i, %c), kind=kLoop, calls=%accumulate": 3,
    "fusion(%a, %i), kind=kLoop, calls=%rewrite": 16,
    "f32[4,256]{1,0} fusion(%a), kind=kLoop, calls=%halves": 12,
    "(f32[256]{0}, f32[8,256]{1,0}) fusion(%a, %i), kind=kLoop, calls=%both": 17,
    "f32[1,256]{1,0} slice(%a), slice={[0:1], [0:256]}": 2,
    "f32[1,256]{1,0:S(1)} slice(%a), slice={[0:1], [0:256]}": 1,
    "((f32[8,256]{1,0}), f32[1,256]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:256]}": 1,
    "dynamic-update-slice(%a, %c, %i, %i)": 2,
    "(f32[8,256]{1,0:S(1)}, f32[8,256]{1,0}, u32[]{:S(2)}) copy-start(%a)": 8,
    "(f32[8,256]{1,0}, f32[8,256]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%h)": 8,
    "(f32[8,256]{1,0}, f32[8,256]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a)": 16,
    "(f32[8,256]{1,0}, f32[32,256]{1,0}) all-gather-start(%a), dimensions={0}": 40,
    "all-reduce-start(%a)": 16,
    'custom-call(%a, %b), custom_call_target="tpu_custom_call"': 17,
    'custom-call(), custom_call_target="AllocateBuffer"': 0,
    "bitcast(%a)": 0,
    "copy-done(%a)": 0,
    "(f32[8,256]{1,0}, f32[256]{0}) tuple(%a, %b)": 0,
}


@pytest.mark.parametrize("case", CASES)
def test_kib_to_and_from_hbm(case: str) -> None:
    instruction = f"f32[8,256]{{1,0}} {case}" if re.match(r"[a-z\-]+\(", case) else case
    module = parse(f"{HEAD}  ROOT %r = {instruction}\n}}\n")
    assert hbm_bytes(accesses(module, module.entry, module.entry.root)) == CASES[case] * KIB


@pytest.mark.parametrize(
    ("instruction", "spaces"),
    [
        ("(f32[8,256]{1,0}, f32[8,256]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%h)", {HBM: 8, HOST: 8}),
        ("(f32[8,256]{1,0:S(5)}, f32[8,256]{1,0}, u32[]{:S(2)}) copy-start(%a)", {HBM: 8, HOST: 8}),
        ("f32[1,256]{1,0:S(1)} dynamic-slice(%h, %i, %i), dynamic_slice_sizes={1,256}", {HOST: 1, VMEM: 1}),
        ("f32[8,256]{1,0:S(5)} dynamic-update-slice(%h, %c, %i, %i)", {HBM: 1, HOST: 1}),
        ("(f32[8,256]{1,0}, u32[], token[]) send(%a), is_host_transfer=true", {HBM: 8, HOST: 8}),
    ],
)
def test_bytes_by_memory(instruction: str, spaces: dict[int, int]) -> None:
    module = parse(f"{HEAD}  ROOT %r = {instruction}\n}}\n")
    found = accesses(module, module.entry, module.entry.root)
    assert {space: sum(n for s, n in found if s == space) for space in spaces} == {
        k: v * KIB for k, v in spaces.items()
    }
    assert host_bytes(found) == spaces[HOST] * KIB
