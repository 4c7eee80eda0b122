"""A whole plan, compiled for the virtual devices of this machine: what it says against arrays that are really there."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.flops import forward_flops, train_step_flops
from t5x_domain.models.rtd import DetectingEncoderDecoder, ReplacedTokenDetection
from t5x_domain.objectives.auxiliary_detection import denoising_with_detection_loss
from t5x_domain.objectives.rtd import replaced_token_detection_loss
from t5x_domain.parallel.chips import CHIPS
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.parallel.sharding import put
from t5x_domain.planning import memory, program
from t5x_domain.planning.elsewhere import CompilerFailure, plan_elsewhere
from t5x_domain.planning.plan import Case, Plan, build, plan
from t5x_domain.planning.report import as_json
from t5x_domain.planning.topologies import Topology
from t5x_domain.training.optimizer import AdamW, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.state import Blueprint
from tests.tiny import CONFIG, MODELS, batch

RUN = """
include 'gin/runs/pretrain.gin'
MODEL = @EncoderDecoder
ModelConfig.vocab_size = 512
ModelConfig.embed_dim = 64
ModelConfig.mlp_dim = 128
ModelConfig.num_heads = 4
ModelConfig.head_dim = 16
ModelConfig.num_encoder_layers = 2
ModelConfig.num_decoder_layers = 2
ModelConfig.dtype = 'float32'
LENGTHS = {'inputs': 24, 'targets': 16}
BATCH_SIZE = 16
Updates.optimizer = @AdamW()
MeshShape.data = 2
MeshShape.fsdp = 2
MeshShape.tensor = 2
"""
SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Neither vocabulary nor cache nor corpora are anywhere."""
    file = tmp_path_factory.mktemp("gin") / "run.gin"
    file.write_text(RUN)
    return Case("cpu:8", 1, (str(file),), ())


@pytest.fixture(scope="module")
def planned(case):
    return plan(case)


def bytes_on_first_device(tree):
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def test_state_and_batch_are_as_large_as_the_trainers(planned):
    """By the arrays that a trainer makes: those of this model on this mesh, and a batch as `tests.tiny` makes it."""
    mesh = MeshShape(**SHAPE).build()
    blueprint = Blueprint(EncoderDecoder, CONFIG, mesh)
    state = blueprint.init_state(blueprint.init(0), Updates(AdamW(), constant(0.1)).build(blueprint.axes))
    used = [name for name in batch() if not name.startswith(("encoder_target", "encoder_loss", "decoder_prefix"))]
    found = planned.memory
    assert found.parameters == bytes_on_first_device(state.params)
    assert found.optimizer == bytes_on_first_device(state.opt_state)
    assert found.batch == bytes_on_first_device(put(mesh, {name: batch()[name] for name in used}))
    assert planned.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_kinds_add_up_to_the_peak(planned):
    found = planned.memory
    kinds = [
        getattr(found, kind) for kind in ("parameters", "optimizer", "batch", "activations", "temporaries", "other")
    ]
    assert sum(kinds) == found.peak
    # 2 layers in each stack keep at least their inputs, on a device with a quarter of the rows.
    assert found.activations >= 2 * (24 + 16) * 16 / 4 * 64 * 4
    assert found.temporaries >= found.parameters  # the gradients, all there for their norm
    assert planned.fits


def test_shares_of_parameters_are_gathered_and_products_summed(planned):
    kinds = {(one.kind, one.network, one.group) for one in planned.collectives}
    assert ("all-gather", "ici", 2) in kinds
    assert ("all-reduce", "ici", 2) in kinds
    gathered = sum(one.bytes for one in planned.collectives if one.kind == "all-gather")
    # Forward, each kernel's half comes from the other device: no less than half of what a device holds of the layers.
    assert gathered >= 0.5 * planned.memory.parameters


def test_tokens_and_flops_are_those_of_the_run(planned):
    assert planned.tokens == 16 * (24 + 16)
    assert planned.flops == train_step_flops(EncoderDecoder, CONFIG, 16, {"inputs": 24, "targets": 16})


def test_a_plan_survives_json(planned):
    for written in (dataclasses.asdict(planned), as_json(planned)):
        assert Plan.of_json(json.loads(json.dumps(written))) == planned


def planned_run(model, **changes):
    fields = {"lengths": {"inputs": 24, "targets": 16}, "batch_size": 16, "updates": Updates(AdamW(), constant(0.1))}
    return program.PlannedRun(**{"model": model, "config": CONFIG, "mesh": MeshShape(**SHAPE), **fields, **changes})


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (DecoderOnly, {"config": dataclasses.replace(CONFIG, num_encoder_layers=0)}),
        (ReplacedTokenDetection, {"loss": replaced_token_detection_loss}),
        (DetectingEncoderDecoder, {"loss": denoising_with_detection_loss}),
        (EncoderDecoder, {"accumulation_steps": 2}),
    ],
)
def test_every_assembly_has_a_train_step_that_lowers(model, changes):
    run = planned_run(model, **changes)
    made = program.train_step(run, run.mesh.build())
    made.function.trace(*made.arguments).lower()
    assert made.flops == train_step_flops(model, run.config, 16, run.lengths)


@pytest.mark.parametrize("name", MODELS)
def test_what_writes_answers_lowers(name):
    from t5x_domain.inference.decoding import Decoding

    run = planned_run(MODELS[name], updates=None)
    made = program.decode_step(run, Decoding(max_tokens=8, num_beams=2), run.mesh.build())
    made.function.trace(*made.arguments).lower()
    assert (made.tokens, made.steps) == (16 * 2 * 8, 8)
    reading, writing = (forward_flops(run.model, CONFIG, {"inputs": 24, "targets": n}) for n in (0, 8))
    # Where the inputs are a decoder's own, their last position alone is scored.
    unscored = 23 * 2 * CONFIG.vocab_size * CONFIG.embed_dim if run.model is DecoderOnly else 0
    assert made.flops == 16 * (reading - unscored + 2 * (writing - reading))
    # The decoder's kernels and the output, of two float32 shares each: nothing of an encoder's.
    kernels = memory.device_bytes({k: v for k, v in made.parameters.items() if k in ("decoder", "output")})
    assert kernels <= made.read_by_step < kernels + memory.device_bytes(made.parameters["embedding"])


def test_what_has_no_room_for_its_state_is_not_compiled(case, monkeypatch):
    """Of 100 bytes a device."""
    tiny = dataclasses.replace(CHIPS["v5e"], hbm_bytes=100)
    monkeypatch.setattr(Topology, "chip", tiny)
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    found = plan(case)
    assert not found.fits
    assert "no room for parameters, gradients and optimizer" in found.problem
    assert found.memory.temporaries == found.memory.parameters / 2  # gradients in bfloat16 at least


def test_a_run_without_optimizer_has_no_train_step(case):
    run = planned_run(EncoderDecoder, updates=None)
    with pytest.raises(UserError, match=r"Run.updates is not set; give a --gin_file"):
        program.train_step(run, run.mesh.build())


def test_a_batch_that_does_not_divide_is_refused_before_compiling(case):
    with pytest.raises(UserError, match="Run.batch_size = 6 does not divide into 4"):
        build(case.changed("BATCH_SIZE = 6"), Topology.of("cpu:8"))


def test_what_does_not_fit_is_read_from_the_compilers_words():
    """As libtpu 0.0.48 words it, of temporaries alone and of everything."""
    made = program.train_step(run := planned_run(EncoderDecoder), run.mesh.build())
    held = memory.least(made, None)
    arguments = held.parameters + held.optimizer + held.batch
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (46.09G) "
    )
    found = memory.of_refused(made, temporaries + "exceeds available HBM (15.75G). HLO module: jit_step.")
    assert (found.fits, found.limit, found.temporaries) == (False, 15.75 * 2**30, 46.09 * 2**30)
    assert found.peak == pytest.approx(46.09 * 2**30 + arguments)
    everything = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm "
    found = memory.of_refused(made, everything + "capacity by 4.35G.")
    assert found.peak == 20.10 * 2**30
    assert memory.of_refused(made, "INTERNAL: the compiler is at its wits' end") is None


@pytest.fixture
def broken(monkeypatch):
    """Puts a script in the place of the compiling process."""

    def broken(script):
        run = subprocess.run
        command = [sys.executable, "-c", script]
        monkeypatch.setattr(subprocess, "run", lambda _, **options: run(command, **options))

    return broken


def test_a_compiler_that_crashes_is_a_sentence(case, broken):
    broken(
        "import os, signal; print('out of memory', file=__import__('sys').stderr); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(CompilerFailure, match=r"was ended by SIGKILL: out of memory Try a smaller topology"):
        plan_elsewhere(case)


def test_an_error_while_tracing_is_said_in_its_own_words(case, broken):
    """JAX puts a note on its frames behind it; and no machine would mend it."""
    broken("import sys; sys.exit('Traceback:\\nTypeError: no such shape\\n--------\\nFor simplicity, JAX has removed')")
    with pytest.raises(CompilerFailure, match=r"ended with status 1: TypeError: no such shape$"):
        plan_elsewhere(case)


def test_a_compiler_that_takes_too_long_is_a_sentence(case, broken):
    broken("import time; time.sleep(60)")
    with pytest.raises(CompilerFailure, match="longer than --compile_timeout=0.5 seconds"):
        plan_elsewhere(case, timeout=0.5)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_train_step_for_two_slices_of_tpus(case):
    """Compiled by libtpu with its kernels: gradients cross the slices, parameters do not."""
    changes = ("MeshShape.slice = 2", "MeshShape.data = 1", "MeshShape.fsdp = 4", "MeshShape.tensor = 1")
    long = ("LENGTHS = {'inputs': 128, 'targets': 128}", "ModelConfig.dtype = 'bfloat16'")
    found = plan_elsewhere(dataclasses.replace(case, topology="v5e:2x2", slices=2).changed(*changes, *long))
    assert found.problem is None
    assert found.memory.limit == 16 * 2**30
    across = sum(one.bytes for one in found.collectives if one.network == "dcn")
    assert {one.kind for one in found.collectives if one.network == "dcn"} == {"all-reduce"}
    # A device exchanges its share of the gradients, in float32 or less, and sums to report.
    assert 0.4 * found.memory.parameters < across < 1.2 * found.memory.parameters
    assert found.bounds.network == pytest.approx(across / 3.125e9)


def test_the_verb_says_and_writes_it(case, tmp_path):
    """In processes of their own, for two devices, with the smallest model."""
    small = ("ModelConfig.embed_dim=32", "ModelConfig.vocab_size=128", "MeshShape.data=1", "MeshShape.tensor=1")
    flags = ["--topology=cpu:2", f"--gin_file={case.files[0]}", f"--json={tmp_path / 'plan.json'}", "--price=2"]
    command = [sys.executable, "-m", "t5x_domain.compile", *flags, *(f"--gin.{binding}" for binding in small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "train step on cpu:2: 2 chips, 2 devices, fsdp=2" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert written["mesh"]["fsdp"] == 2
    assert f"{written['num_parameters']:,} parameters, 16 rows" in done.stdout


@functools.cache
def verb(*flags):
    return subprocess.run(
        [sys.executable, "-m", "t5x_domain.compile", *flags], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--gin_file is needed"),
        (("--gin_file=x.gin",), "--topology is needed, for example --topology=v5e:4x4"),
        (("--gin_file=x.gin", "--topology=v9:8"), "--topology=v9:8: is not known; write"),
    ],
)
def test_a_wrong_command_is_answered_with_what_is_wrong(flags, message):
    assert verb(*flags).returncode == 2
    assert message in verb(*flags).stderr
