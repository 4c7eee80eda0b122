"""Compiling in a process of its own: libtpu reads its environment once, and may crash or run out of memory."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

from t5x_domain.errors import UserError
from t5x_domain.planning.plan import Case, Plan, plan
from t5x_domain.planning.topologies import Topology

_ANSWER = "plan: "


class CompilerFailure(UserError):
    """The compiling process ended without a plan."""


def plan_elsewhere(case: Case, *, timeout: float | None = None) -> Plan:
    """`plan` in another process.

    Args:
      case: what to compile.
      timeout: seconds; None for no limit.

    Raises:
      UserError: as `plan`.
      CompilerFailure: the compiler crashed, or took longer than `timeout`.
    """
    topology = Topology.of(case.topology, case.slices)
    topology.require_compiler()
    command = [sys.executable, "-m", "t5x_domain.planning.elsewhere", json.dumps(dataclasses.asdict(case))]
    environment = os.environ | topology.environment
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise CompilerFailure(
            f"compiling for {topology.name} takes longer than --compile_timeout={timeout:g} seconds; raise it."
        ) from error
    answers = [line.removeprefix(_ANSWER) for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        mend = " Try a smaller topology, or a machine with more memory." if done.returncode < 0 else ""
        raise CompilerFailure(
            f"the compiler for {topology.name} {_ending(done.returncode)}: {_last_line(done.stderr)}{mend}"
        )
    answer = json.loads(answers[-1])
    if "error" in answer:
        raise UserError(answer["error"])
    return Plan.of_json(answer)


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _last_line(text: str) -> str:
    """The last that an exception says, without JAX's notes on its own frames."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or ["it said nothing."])[-1][:300]


def main() -> None:
    """Answers with a plan, or a user's error, as a line of JSON."""
    case = Case(**json.loads(sys.argv[1]))
    try:
        answer = dataclasses.asdict(plan(case))
    except UserError as error:
        answer = {"error": str(error)}
    print(_ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
