"""Every assembly over sixteen devices, in a process of its own: the others have eight."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
EVERY_AXIS = {"slice": 2, "data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
CASES = [
    ("EncoderDecoder", EVERY_AXIS),
    ("DecoderOnly", EVERY_AXIS),
    ("EncoderOnly", EVERY_AXIS),
    ("ReplacedTokenDetection", EVERY_AXIS),
    ("EncoderDecoder", {"slice": 4, "data": 1, "tensor": 4}),
    ("EncoderDecoder", {"data": 1, "fsdp": 16}),
]


def test_loss_and_gradients_equal_those_of_one_device():
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=16")}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [model for model, _ in CASES]


def main():
    import jax
    import numpy as np
    from exact import assert_exact, loss_and_gradients
    from tiny import CONFIG, LOSS, batch, blueprint, masked_batch, mesh

    from t5x_domain.models import assemblies, rtd
    from t5x_domain.objectives.rtd import replaced_token_detection_loss

    assert len(jax.devices()) == 16
    detection = functools.partial(replaced_token_detection_loss, num_components=2, max_share=0.5)

    @functools.cache
    def alone(name):
        detects = name == "ReplacedTokenDetection"
        model = getattr(rtd if detects else assemblies, name)
        config = dataclasses.replace(CONFIG, dtype="float64", tie_embeddings=True, rtd_embedding_sharing="gdes")
        rows = masked_batch() if detects or name == "EncoderOnly" else batch()
        loss, plan = detection if detects else LOSS, blueprint(model=model, config=config)
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), plan.init(0))
        return model, config, loss, params, rows, loss_and_gradients(plan, loss, params, rows)

    with jax.enable_x64(True):
        for name, shape in CASES:
            model, config, loss, params, rows, wanted = alone(name)
            plan = blueprint(mesh(**shape), model, config)
            assert plan.mesh.size == 16
            assert_exact(loss_and_gradients(plan, loss, params, rows), wanted)
            print(name, flush=True)


if __name__ == "__main__":
    main()
