"""What is tried when a run does not fit, and in which order."""

import dataclasses

import pytest

from t5x_domain.models.assemblies import EncoderDecoder
from t5x_domain.planning.advice import advise
from t5x_domain.planning.elsewhere import CompilerFailure
from t5x_domain.planning.plan import Case
from t5x_domain.planning.program import PlannedRun
from tests.planning.made_up import GIB, memory, plan
from tests.tiny import CONFIG

CASE = Case("v5e:4x4", 1, ["run.gin"], [])
RUN = PlannedRun(EncoderDecoder, CONFIG, {"inputs": 512, "targets": 256}, 64)


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
    (attempt,) = advise(CASE, plan(memory(state=12)), RUN, compile_one, 4)
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
    attempts = advise(CASE, plan(too_much, mesh=mesh), RUN, compile_one, 4)
    assert [attempt.bindings for attempt in attempts] == [
        ("ModelConfig.remat = 'minimal'",),
        ("ModelConfig.remat = 'full'",),
        ("Run.accumulation_steps = 2",),
    ]
    # Each on top of those before.
    assert asked[2].bindings == tuple(binding for attempt in attempts for binding in attempt.bindings)
    assert attempts[-1].plan.fits


def test_a_state_is_spread_no_further_than_the_width_goes():
    """600 GiB and gradients want 256 devices; a width of 64 has room for 64."""
    compile_one, _ = compiler([plan()])
    large = plan(memory(state=300), mesh=plan().mesh | {"data": 256})
    (attempt,) = advise(CASE, large, RUN, compile_one, 4)
    assert attempt.bindings == ("MeshShape.data = 4", "MeshShape.fsdp = 64")


def test_one_row_a_device_is_shared_by_two():
    too_much = memory(state=1, temporaries=30)
    mesh = plan().mesh | {"data": 2, "fsdp": 8}
    compile_one, _ = compiler([plan()])
    (attempt,) = advise(CASE, plan(too_much, mesh=mesh, remat="full", batch_size=16), RUN, compile_one, 4)
    assert attempt.bindings == ("MeshShape.data = 1", "MeshShape.sequence = 2", "Run.accumulation_steps = 2")


def test_what_was_tried_is_not_lost_when_the_compiler_fails():
    too_much = memory(state=1, temporaries=30)
    tried = [plan(too_much, remat="minimal")]

    def compile_one(case):
        if not tried:
            raise CompilerFailure("takes longer than --compile_timeout=9 seconds")
        return tried.pop()

    first, second = advise(CASE, plan(too_much), RUN, compile_one, 4)
    assert first.plan.memory == too_much
    assert second.plan.memory is None
    assert "--compile_timeout=9" in second.plan.problem
    assert not second.plan.fits


def test_another_optimizer_comes_last():
    """Adam's two moments beside 3 GiB of parameters and as much of gradients: 12 of 16 GiB, and all else is done."""
    adam = dataclasses.replace(memory(state=3, temporaries=12), optimizer=6 * GIB)
    mesh = plan().mesh | {"data": 1, "fsdp": 1}
    compile_one, _ = compiler([plan()])
    (attempt,) = advise(CASE, plan(adam, mesh=mesh, remat="full", batch_size=1), RUN, compile_one, 4)
    assert attempt.bindings[0] == "Updates.optimizer = @Adafactor()"
    assert "not 6.0 GiB" in attempt.why


@pytest.mark.parametrize("most", [0, 1])
def test_no_more_is_compiled_than_allowed(most):
    compile_one, asked = compiler([plan(memory(state=1, temporaries=30))] * 3)
    advise(CASE, plan(memory(state=1, temporaries=30)), RUN, compile_one, most)
    assert len(asked) == most


def test_nothing_is_advised_when_nothing_is_left():
    """No copies, one row, all recomputed, no tokens to share."""
    run = dataclasses.replace(RUN, lengths={"inputs": 128, "targets": 128})
    stuck = plan(memory(state=20), mesh=plan().mesh | {"data": 1, "fsdp": 16}, remat="full", batch_size=16)
    compile_one, asked = compiler([])
    assert advise(CASE, stuck, run, compile_one, 4) == []
    assert asked == []
