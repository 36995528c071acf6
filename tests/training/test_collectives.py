"""Tests the count of bytes that devices exchange, on a program of known content and on a compiled one."""

import jax
import jax.numpy as jnp

from codiemb_jax.training.collectives import count_collective_bytes

PROGRAM = """
HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %state = (s32[], bf16[4,8]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (state.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  %block = bf16[4,8]{1,0} get-tuple-element(%state.1), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%counter.1, %two)
  %send = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) collective-permute-start(%block), source_target_pairs={{0,1},{1,0}}
  %fusion = bf16[4,8]{1,0} fusion(%block), kind=kLoop, calls=%fused
  %received = bf16[4,8]{1,0} collective-permute-done(%send)
  ROOT %tuple = (s32[], bf16[4,8]{1,0}) tuple(%next, %received)
}

%fused (block.1: bf16[4,8]) -> bf16[4,8] {
  %block.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %negate = bf16[4,8]{1,0} negate(%block.1)
}, execution_thread="sparsecore"

ENTRY %main (weight: bf16[4,8], gradient: f32[16], second: f32[2,8]) -> bf16[4,8] {
  %weight = bf16[4,8]{1,0} parameter(0)
  %gradient = f32[16]{0} parameter(1)
  %second = f32[2,8]{1,0} parameter(2)
  %start = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%weight), dimensions={0}
  %done = bf16[8,8]{1,0} all-gather-done(%start)
  %total = (f32[16]{0}, f32[2,8]{1,0}) all-reduce(%gradient, %second), to_apply=%sum
  %part = f32[4]{0} reduce-scatter(%gradient), dimensions={0}, to_apply=%sum
  %zero = s32[] constant(0)
  %initial = (s32[], bf16[4,8]{1,0}) tuple(%zero, %weight)
  %loop = (s32[], bf16[4,8]{1,0}) while(%initial), condition=%condition, body=%body
  ROOT %result = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_bytes_of_a_known_program():
    gathered, reduced, permuted = 8 * 8 * 2, 2 * 16 * 4, 4 * 8 * 2
    scattered = 16 * 4
    total, exposed = count_collective_bytes(PROGRAM)
    assert total == gathered + reduced + scattered + 5 * permuted  # the counter rises by 2 to 10
    assert exposed == gathered + reduced + scattered  # nothing runs between the start and the end of the all-gather


def test_bytes_of_a_compiled_loop():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))

    def gather_often(x: jax.Array) -> jax.Array:
        def body(total: jax.Array, _: None) -> tuple[jax.Array, None]:
            return total + jnp.sin(jax.lax.all_gather(x * total, "data", tiled=True)).sum(), None

        return jax.lax.scan(body, jnp.ones(()), None, length=7)[0]

    spec = jax.sharding.PartitionSpec("data")
    step = jax.jit(
        jax.shard_map(gather_often, mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec(), check_vma=False)
    )
    hlo = step.lower(jax.ShapeDtypeStruct((24, 16), jnp.float32)).compile().as_text()
    assert count_collective_bytes(hlo).total == 7 * 24 * 16 * 4
