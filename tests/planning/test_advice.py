"""What is tried when a run does not fit, and in which order."""

import dataclasses

import pytest

from t5x_domain.planning.advice import advise
from t5x_domain.planning.plan import Case
from tests.planning.made_up import GIB, memory, plan
from tests.tiny import CONFIG

CASE = Case("v5e:4x4", 1, ["run.gin"], [])


def compiler(plans):
    """Gives these plans one after the other, and keeps the cases that were asked for."""
    asked, left = [], list(plans)

    def compile_one(case):
        asked.append(case)
        return left.pop(0)

    return compile_one, asked


def test_a_large_state_is_spread_before_anything_is_recomputed():
    """12 GiB of parameters and as much of gradients on 16: spread over 4 devices they are 6 GiB, less than half."""
    compile_one, asked = compiler([plan()])
    (attempt,) = advise(CASE, plan(memory(state=12)), CONFIG, compile_one, 4)
    assert attempt.bindings == ("MeshShape.data = 4", "MeshShape.fsdp = 4")
    assert "24.0 of 16.0 GiB" in attempt.why
    assert "6.0 GiB" in attempt.why
    assert asked[0].bindings == attempt.bindings


def test_then_more_is_recomputed_then_an_update_is_cut():
    too_much = memory(state=1, activations=None, temporaries=30)
    mesh = plan().mesh | {"data": 4, "fsdp": 4}
    tried = [
        plan(too_much, mesh=mesh, remat="minimal"),
        plan(too_much, mesh=mesh, remat="full"),
        plan(mesh=mesh, remat="full", accumulation_steps=2),
    ]
    compile_one, asked = compiler(tried)
    attempts = advise(CASE, plan(too_much, mesh=mesh), CONFIG, compile_one, 4)
    assert [attempt.bindings for attempt in attempts] == [
        ("ModelConfig.remat = 'minimal'",),
        ("ModelConfig.remat = 'full'",),
        ("Run.accumulation_steps = 2",),
    ]
    # Each on top of those before.
    assert asked[2].bindings == tuple(binding for attempt in attempts for binding in attempt.bindings)
    assert attempts[-1].plan.fits


def test_one_row_a_device_shares_the_products():
    too_much = memory(state=1, temporaries=30)
    mesh = plan().mesh | {"data": 2, "fsdp": 8}
    compile_one, _ = compiler([plan()])
    (attempt,) = advise(CASE, plan(too_much, mesh=mesh, remat="full", batch_size=16), CONFIG, compile_one, 4)
    assert attempt.bindings == ("MeshShape.fsdp = 4", "MeshShape.tensor = 2")


def test_another_optimizer_comes_last():
    """Adam's two moments beside 3 GiB of parameters and as much of gradients: 12 of 16 GiB, and all else is done."""
    adam = dataclasses.replace(memory(state=3, temporaries=12), optimizer=6 * GIB)
    mesh = plan().mesh | {"data": 1, "fsdp": 1}
    compile_one, _ = compiler([plan()])
    (attempt,) = advise(CASE, plan(adam, mesh=mesh, remat="full", batch_size=1), CONFIG, compile_one, 4)
    assert attempt.bindings[0] == "Updates.optimizer = @Adafactor()"
    assert "not 6.0 GiB" in attempt.why


@pytest.mark.parametrize("most", [0, 1])
def test_no_more_is_compiled_than_allowed(most):
    compile_one, asked = compiler([plan(memory(state=1, temporaries=30))] * 3)
    advise(CASE, plan(memory(state=1, temporaries=30)), CONFIG, compile_one, most)
    assert len(asked) == most


def test_nothing_is_advised_when_nothing_is_left():
    """No copies, one row, all recomputed, no heads to share."""
    config = dataclasses.replace(CONFIG, num_heads=1)
    stuck = plan(memory(state=20), mesh=plan().mesh | {"data": 1, "fsdp": 16}, remat="full", batch_size=16)
    compile_one, asked = compiler([])
    assert advise(CASE, stuck, config, compile_one, 4) == []
    assert asked == []
