"""A run on Weights & Biases, beside TensorBoard, if `Run.wandb_project` is set."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from t5x_domain.errors import UserError
from t5x_domain.files import Growing, write_atomically


class WeightsAndBiases:
    """The same numbers under the same names as in TensorBoard.

    wandb's own environment variables apply: WANDB_MODE=offline for a machine without network (`wandb sync` uploads
    later), WANDB_ENTITY, WANDB_API_KEY and the rest.
    """

    def __init__(self, project: str, records: Growing, config: Mapping[str, Any]) -> None:
        """Begins a run of `project`, or goes on with that which wandb.json in the run directory names.

        Raises:
          UserError: wandb is not installed or refuses.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"Run.wandb_project = {project!r}: Weights & Biases is not installed; "
                "pip install 't5x_domain[wandb]', or leave Run.wandb_project unset."
            ) from error
        record = records.home / "wandb.json"
        if not record.exists():
            write_atomically(record, json.dumps({"id": secrets.token_hex(4)}).encode())
        identity = json.loads(record.read_text(encoding="utf-8"))
        try:
            self._run = wandb.init(
                project=project,
                id=identity["id"],
                resume="allow",
                name=records.home.name,
                dir=str(records.local),
                config=dict(config),
                settings={"console": "off"},  # what is printed stays where it is printed
            )
        except wandb.Error as error:
            raise UserError(
                f"Run.wandb_project = {project!r}: {' '.join(str(error).split())} "
                "Log in with `wandb login`, set WANDB_MODE=offline, or leave Run.wandb_project unset."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one update; wandb itself drops those of updates that it has seen before a restart."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Hands over what is left."""
        self._run.finish()
