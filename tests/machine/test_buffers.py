"""The largest arrays of a program, by name."""

import jax
import jax.numpy as jnp
import pytest

from jaxbrewer.machine.buffers import Array, Buffer, arrays_in, largest
from jaxbrewer.machine.compiled import account_of

TEXT = """HloModule jit_step

%fused (p: f32[8]) -> f32[999] {
  ROOT %never = f32[999]{0} broadcast(%p), metadata={op_name="jit(step)/inside"}
}

ENTRY %main (p0: f32[64,8]) -> (f32[64,8], f32[]) {
  %p0 = f32[64,8]{1,0} parameter(0), metadata={op_name="state.params[\\'student\\'][\\'w\\']"}
  %p1 = bf16[64]{0} parameter(1), metadata={op_name="batch[\\'x\\']"}
  %near = f32[4096]{0:T(1024)S(1)} fusion(%p1), kind=kLoop, calls=%fused
  %a = f32[32,8]{1,0} fusion(%p0), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp()/exp"}
  %b = f32[32,8]{1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp()/exp"}
  %c-start = (f32[64,8]{1,0}, f32[64,8]{1,0}) copy-start(%p0)
  %c-done = f32[64,8]{1,0} copy-done(%c-start)
  %pair = (f32[64,8]{1,0}, f32[16]{0}) fusion(%b, %c-done), kind=kLoop, calls=%fused
  %new = f32[64,8]{1,0} get-tuple-element(%pair), index=0
  %more = f32[16]{0} get-tuple-element(%pair), index=1
  %loss = f32[] reduce(%more, %near), dimensions={0}, to_apply=%sum
  ROOT %out = (f32[64,8]{1,0}, f32[]) tuple(%new, %loss)
}
"""


def test_arguments_have_their_paths():
    assert largest(TEXT, "arguments", 5) == (
        Buffer("state.params['student']['w']", Array("f32[64,8]", 2048), 1),
        Buffer("batch['x']", Array("bf16[64]", 128), 1),
    )


def test_results_have_their_operations_and_leave_out_what_is_returned_or_near():
    """Of a pair the first is the new weight, which lies where the old one does."""
    assert largest(TEXT, "results", 5) == (
        Buffer("copy-done", Array("f32[64,8]", 2048), 1),
        Buffer("jvp()/exp", Array("f32[32,8]", 1024), 2),
        Buffer("fusion", Array("f32[16]", 64), 1),
    )
    assert len(largest(TEXT, "results", 2)) == 2


def test_a_program_that_returns_one_array_does_not_name_it():
    text = "\nENTRY %main (p: f32[8]) -> f32[4] {\n  ROOT %x = f32[4]{0} fusion(%p), calls=%f\n}"
    assert largest(text, "results", 5) == ()


@pytest.mark.parametrize(
    ("shape", "size"),
    [("pred[3]{0}", 3), ("f32[]", 4), ("bf16[2,3]{1,0}", 12), ("s4[8]", 4), ("f8e4m3fn[8]", 8)],
)
def test_bytes_are_those_of_the_type(shape, size):
    (array,) = arrays_in(shape)
    assert array.size == size


def test_a_real_program_names_what_its_user_named():
    def step(weights, x):
        hidden = jnp.sin(x @ weights["up"])
        return {"up": weights["up"] + (x.T @ jnp.cos(hidden))}, hidden.sum()

    shapes = {"up": jax.ShapeDtypeStruct((64, 4096), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    account = account_of(jax.jit(step, donate_argnums=0).lower(shapes, x).compile())
    assert account.held[0] == Buffer("weights['up']", Array("f32[64,4096]", 2**20), 1)
    assert [buffer.array.shape for buffer in account.held] == ["f32[64,4096]", "f32[8,64]"]
    assert {buffer.array.shape for buffer in account.made} >= {"f32[8,4096]"}
    assert account.donated == 2**20
