"""Stand-ins for cluster programs, so that scripts can really be run."""

import os
import subprocess
import sys


def put(folder, name, text):
    """An executable `name` in folder/bin; `text` is its bash."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def environment(folder, **variables):
    """That in which the stand-ins are found first."""
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}


def bash(folder, script, **variables):
    """Runs a script's text in `folder`."""
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=30,
    )


def parses(script):
    """`bash -n`."""
    return subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=10).stderr == ""


SHOW_ARGUMENTS = f"""exec {sys.executable} -S -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" """

# A gin binding with all that shells and Kubernetes read as something else.
NASTY = """Metadata.templates=("it's $HOME $(id) $$ `id` {source} \\\\ \\"quoted\\" *; & | # !x",)"""
