"""Plans that nothing was compiled for."""

import dataclasses

from t5x_domain.planning.bounds import Bounds
from t5x_domain.planning.memory import Memory
from t5x_domain.planning.plan import Plan

GIB = 2**30


def memory(state=4.0, activations=3.0, temporaries=2.0, limit=16.0) -> Memory:
    """Of a device, in GiB; `state` is that of the parameters alone, the optimizer has none."""
    peak = (state + (activations or 0) + temporaries) * GIB
    kept = None if activations is None else activations * GIB
    return Memory(state * GIB, 0, 0, kept, temporaries * GIB, 0, peak, limit * GIB)


def plan(of=None, seconds=0.5, **changes) -> Plan:
    """A train step on 16 devices whose compute is the bound."""
    made = Plan(
        topology="v5e:4x4",
        num_devices=16,
        num_chips=16,
        program="train",
        mesh={"slice": 1, "data": 16, "fsdp": 1, "sequence": 1, "tensor": 1},
        batch_size=64,
        accumulation_steps=1,
        remat="none",
        num_parameters=10,
        tokens=1000,
        flops=1e12,
        memory=of or memory(),
        collectives=[],
        bounds=Bounds(compute=seconds, memory=seconds / 2, links=seconds / 4, network=0.0),
        compile_seconds=1.0,
        compiler_bytes=GIB,
    )
    return dataclasses.replace(made, **changes)
