"""Which meshes are tried, which are left out, and how they are ranked."""

import dataclasses

import pytest

from t5x_domain.errors import UserError
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.planning.bounds import Bounds
from t5x_domain.planning.elsewhere import CompilerFailure
from t5x_domain.planning.plan import Case
from t5x_domain.planning.search import Choice, meshes, search
from tests.planning.made_up import memory, plan
from tests.tiny import CONFIG

CASE = Case("v5e:4x4", 1, ["run.gin"], ["TRAIN_STEPS = 1"])


def test_meshes_share_evenly_and_use_all_devices():
    """4 heads, so at most 4 shares of them; width 64."""
    found = list(meshes(32, 2, CONFIG))
    assert all(mesh.slice * mesh.data * mesh.fsdp * mesh.tensor == 32 for mesh in found)
    assert {mesh.tensor for mesh in found} == {1, 2, 4}
    assert found[0] == MeshShape(slice=2, data=16)
    assert len(found) == len(set(found)) == 5 + 4 + 3  # divisors of 16, of 8 and of 4
    halves = list(meshes(32, 2, CONFIG, sequence=2))
    assert {mesh.sequence for mesh in halves} == {2}
    assert halves[0] == MeshShape(slice=2, data=8, sequence=2)


@pytest.mark.parametrize("sequence", [-1, 0, 3])
def test_a_row_is_shared_evenly_among_a_slices_devices(sequence):
    with pytest.raises(UserError, match=f"MeshShape.sequence = {sequence}: --search keeps it.* the 16 devices"):
        next(meshes(32, 2, CONFIG, sequence=sequence))


def test_widths_that_do_not_divide_are_left_out():
    config = dataclasses.replace(CONFIG, embed_dim=48, num_heads=6, vocab_size=510)
    assert {mesh.tensor for mesh in meshes(24, 1, config)} == {1, 2}  # 3 and 6 divide the heads, but not the width 128
    assert max(mesh.fsdp for mesh in meshes(32, 1, config)) == 16


@pytest.fixture
def run():
    """Searches with memory and seconds by formula, and says what was compiled."""

    def run(choices, needs=lambda mesh: 1, fits=lambda choice: True, most=99):
        compiled, told = [], []

        def compile_one(case):
            choice = next(c for c in choices if c.bindings == tuple(case.bindings[1:]))
            compiled.append(choice)
            seconds = 1 / choice.mesh.data
            return plan(memory() if fits(choice) else memory(state=20), seconds, tokens=choice.batch_size)

        ranked = search(CASE, choices, compile_one, needs, 16.0, most=most, tell=told.append)
        return [choice for choice, _ in ranked], compiled, told

    return run


def choice(data, rows=64, remat="none"):
    return Choice(MeshShape(data=data, fsdp=16 // data), rows, remat)


def test_the_fastest_that_fits_is_first(run):
    ranked, compiled, _ = run([choice(2), choice(8), choice(4)])
    assert ranked == [choice(8), choice(4), choice(2)]
    assert len(compiled) == 3


def test_what_is_computed_again_costs_time():
    """All are bound by their FLOPs, which are the same; "full" runs the forward pass twice."""
    choices = [choice(4, remat="full"), choice(4, remat="none")]

    def compile_one(case):
        remat = "full" if "ModelConfig.remat = 'full'" in case.bindings else "none"
        return plan(memory(activations=1.0 if remat == "full" else 3.0), remat=remat)

    options = {"needs": lambda mesh: 1, "limit": 16.0, "most": 9, "tell": lambda line: None}
    ranked = search(CASE, choices, compile_one, **options)
    assert [found.remat for found, _ in ranked] == ["none", "full"]


def test_among_equals_less_is_sent():
    """Of the same bound, but for a rounding, the one with more bytes on the links is the second, whatever it holds."""
    sent = {2: 0.4, 4: 0.1}

    def compile_one(case):
        data = next(data for data in sent if f"MeshShape.data = {data}" in case.bindings)
        bounds = Bounds(compute=1.0 - 1e-9 * (4 - data), memory=0.2, links=sent[data], network=0.0)
        return plan(memory(activations=data), bounds=bounds)

    options = {"needs": lambda mesh: 1, "limit": 16.0, "most": 9, "tell": lambda line: None}
    ranked = search(CASE, [choice(2), choice(4)], compile_one, **options)
    assert [found.mesh.data for found, _ in ranked] == [4, 2]


def test_what_has_no_room_for_its_state_is_not_compiled(run):
    choices = [choice(16), choice(16, 128), choice(4)]
    _, compiled, told = run(choices, needs=lambda mesh: 17 if mesh.data == 16 else 1)
    assert compiled == [choice(4)]
    assert sum("no room" in line for line in told) == 1


def test_more_rows_than_did_not_fit_are_not_tried(run):
    choices = [choice(4, 64), choice(4, 128), choice(4, 256), choice(4, 256, "full")]
    ranked, compiled, _ = run(choices, fits=lambda c: c.batch_size < 128 or c.remat == "full")
    assert compiled == [choice(4, 64), choice(4, 128), choice(4, 256, "full")]
    assert choice(4, 256, "full") in ranked


def test_a_limit_of_compilations(run):
    _, compiled, told = run([choice(2), choice(4), choice(8)], most=2)
    assert compiled == [choice(2), choice(4)]
    assert "--search_limit=2" in told[-1]


def test_what_does_not_compile_is_told_and_passed_over():
    """Neither says anything of more rows, so those are tried."""
    told = []

    def compile_one(case):
        if "MeshShape.data = 2" in case.bindings:
            raise CompilerFailure("was ended by SIGKILL")
        if "MeshShape.data = 8" in case.bindings and "Run.batch_size = 64" in case.bindings:
            return plan(problem="INTERNAL: no such layout", **{"memory": None, "bounds": None})
        return plan()

    options = {"needs": lambda mesh: 1, "limit": 16.0, "most": 9, "tell": told.append}
    ranked = search(CASE, [choice(2), choice(4), choice(8), choice(8, 128)], compile_one, **options)
    assert [found for found, _ in ranked] == [choice(4), choice(8, 128)]
    assert "was ended by SIGKILL" in told[0]
    assert "no such layout" in told[2]


def test_nothing_that_fits_is_an_error_with_its_mend(run):
    with pytest.raises(UserError, match="take more devices"):
        run([choice(2)], fits=lambda c: False)
