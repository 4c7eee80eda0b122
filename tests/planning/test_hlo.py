"""Reading compiled programs: loops, how often things run, and what is kept from one loop for another."""

import jax
import jax.numpy as jnp
import pytest

from t5x_domain.planning.hlo import Module
from t5x_domain.planning.memory import kept_activations

# As libtpu writes it: layouts with tiles and memory spaces, comments in tuples, no trip count; the first turn was taken
# out of the loop.
TPU = """HloModule jit_step, is_scheduled=true

%body.1 (param.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %param.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%param.1), index=1
  %y.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x.1), kind=kLoop, calls=%fused.1
  ROOT %tuple.1 = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) tuple(%counter.1, %y.1)
}

%condition.1 (param.2: (s32[], f32[8,128])) -> pred[] {
  %bound.1 = s32[]{:T(128)} constant(8), backend_config={"flag_configs":[]}
  %param.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %counter.2 = s32[]{:T(128)} get-tuple-element(%param.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter.2, %bound.1), direction=LT
}

%fused.1 (param.3: f32[8,128]) -> f32[8,128] {
  %param.3 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %tanh.1 = f32[8,128]{1,0:T(8,128)} tanh(%param.3)
}

ENTRY %main.1 (argument.1: f32[8,128]) -> f32[8,128] {
  %argument.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %peeled.1 = f32[8,128]{1,0:T(8,128)} fusion(%argument.1), kind=kLoop, calls=%fused.1
  %one.1 = s32[]{:T(128)} constant(1)
  %copied.1 = s32[]{:T(128)} copy(%one.1)
  %tuple.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%copied.1, %peeled.1)
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%tuple.2), condition=%condition.1, body=%body.1
  ROOT %result.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""


def test_a_loop_without_note_turns_from_its_start_to_its_bound():
    module = Module.of(TPU)
    assert module.entry == "main.1"
    (loop,) = module.loops()
    assert module.trip_count(loop) == 7
    assert module.turns == {"main.1": 1, "body.1": 7, "fused.1": 8}


def test_sizes_and_places_of_arrays():
    module = Module.of(TPU)
    assert module.by_name["while.1"].element_bytes() == [4, 4 * 8 * 128]
    assert module.by_name["y.1"].is_in_core() == [True]
    assert module.by_name["x.1"].is_in_core() == [False]


def test_a_copy_is_what_it_copies():
    assert Module.of(TPU).origin("copied.1").name == "one.1"


def nested(x):
    inner = lambda x, _: (jnp.tanh(x) + 1, None)  # noqa: E731
    outer = lambda x, _: (jax.lax.scan(inner, x, None, length=5)[0] * 2, None)  # noqa: E731
    return jax.lax.scan(outer, x, None, length=3)[0]


def test_a_compiled_loop_in_a_loop():
    module = Module.of(jax.jit(nested).lower(jnp.ones((64, 64))).compile().as_text())
    assert sorted(module.trip_count(loop) for loop in module.loops()) == [3, 5]
    bodies = {loop.attribute(r"body=%([\w.\-]+)") for loop in module.loops()}
    assert sorted(module.turns[body] for body in bodies) == [3, 15]


LAYERS, WIDTH, ROWS = 6, 64, 32


def network(policy):
    """A loss whose layers' products are exp(x w) of [32, 64], in a scan over six of them."""

    def layer(x, w):
        return jnp.exp(jnp.dot(x, w)), None

    body = layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return lambda weights, x: jnp.sum(jax.lax.scan(body, x, weights)[0])


@pytest.mark.parametrize(
    ("policy", "arrays"),
    [
        (None, 2),  # a layer's input for dw = x^T dy, and exp's result for its gradient
        (jax.checkpoint_policies.dots_saveable, 2),  # a layer's input, and its product
        (jax.checkpoint_policies.nothing_saveable, 1),  # a layer's input
    ],
)
def test_what_a_scan_keeps_for_its_gradient(policy, arrays):
    gradient = jax.jit(jax.grad(network(policy)))
    weights, x = jnp.zeros((LAYERS, WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
    module = Module.of(gradient.lower(weights, x).compile().as_text())
    assert kept_activations(module) == arrays * LAYERS * ROWS * WIDTH * 4


def test_a_forward_pass_keeps_nothing():
    weights, x = jnp.zeros((LAYERS, WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
    assert kept_activations(Module.of(jax.jit(network(None)).lower(weights, x).compile().as_text())) is None
