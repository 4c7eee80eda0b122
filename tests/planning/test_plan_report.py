"""What a reader is told."""

import re
import shlex

from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.planning.advice import Attempt
from t5x_domain.planning.collectives import Collective
from t5x_domain.planning.report import advice_lines, as_json, lines, search_lines
from t5x_domain.planning.search import Choice
from tests.planning.made_up import memory, plan


def words(text):
    return re.sub(r" +", " ", "\n".join(text))


def test_a_plan_names_sizes_traffic_bounds_and_cost():
    sent = [Collective("all-gather", "ici", 16, 48, 2**31)]
    told = words(lines(plan(collectives=sent), price=3.6))
    assert "train step on v5e:4x4: 16 chips, 16 devices, data=16" in told
    assert "activations kept for the backward pass 3.00" in told
    assert "all 9.00 of 16.00" in told
    assert "all-gather ici 16 48 2.00 GiB" in told
    assert "FLOPs at the chips' peak 0.5000 s <- the bound" in told
    assert "at most 2,000 tokens a second" in told
    # 16 chips for half a second at 3.6 an hour: 0.008; a million times that for 10^9 tokens instead of 10^3.
    assert "at least 0.0080 a step, 8,000.00 for 10^9 tokens, at 3.6 a chip-hour" in told


def test_what_does_not_fit_says_by_how_much():
    assert "does not fit by 9.00 GiB" in words(lines(plan(memory(state=20))))


def test_what_does_not_compile_says_why():
    assert "does not compile: INTERNAL: no" in words(
        lines(plan(problem="INTERNAL: no", bounds=None, collectives=[], memory=None))
    )


def test_advice_is_flags_to_copy():
    change = ("ModelConfig.remat = 'full'", "Run.accumulation_steps = 2")
    told = words(advice_lines(plan(memory(state=20)), [Attempt(change, "less is kept", plan())]))
    flags = """--gin.ModelConfig.remat="'full'" --gin.Run.accumulation_steps=2"""
    assert f"tried {flags}: 9.00 GiB a device, fits\n less is kept" in told
    assert told.endswith(f"it fits with {flags}")


def test_flags_are_what_a_shell_gives_back():
    change = ("Updates.optimizer = @Adafactor()", "ModelConfig.remat = 'full'", "Updates.groups = None")
    told = next(line for line in advice_lines(plan(memory(state=20)), [Attempt(change, "", plan())]) if "tried" in line)
    assert shlex.split(told.removeprefix("tried ").rpartition(": ")[0]) == [
        "--gin.Updates.optimizer=@Adafactor()", "--gin.ModelConfig.remat='full'", "--gin.Updates.groups=None",
    ]  # fmt: skip


def test_a_change_whose_compilation_failed_says_why():
    failed = Attempt(("MeshShape.data = 2",), "", plan(memory=None, bounds=None, problem="was ended by SIGKILL"))
    assert "tried --gin.MeshShape.data=2: was ended by SIGKILL" in words(advice_lines(plan(), [failed]))


def test_without_a_way_the_least_number_of_devices_is_said():
    """20 GiB of parameters on each of 2 and as much of gradients: 80 GiB, five times 16."""
    stuck = plan(memory(state=20), mesh=plan().mesh | {"fsdp": 2})
    assert "are 80.00 GiB in all, which takes 5 devices of this kind at least" in words(advice_lines(stuck, []))


def test_a_search_is_a_table_with_flags_for_its_first_line():
    ranked = [
        (Choice(MeshShape(data=4, fsdp=4), 64, "none"), plan(seconds=0.25)),
        (Choice(MeshShape(), 64, "none"), plan()),
    ]
    told = words(search_lines(ranked, price=3.6))
    assert "data=4 fsdp=4, 64 rows, remat=none 9.00 0.2500 compute 4,000 4,000.00" in told
    assert "the first: --gin.MeshShape.slice=1 --gin.MeshShape.data=4 --gin.MeshShape.fsdp=4" in told


def test_json_holds_what_is_derived():
    assert as_json(plan())["fits"] is True
    assert as_json(plan())["tokens_per_second"] == 2000
