import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.plan import Plan
from t5x_domain.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def test_shown_is_what_a_shell_would_do(tmp_path):
    path = str(tmp_path / "deep" / "script.sh")
    plan = Plan({path: "a\nb\n"}, [["echo", "it's $HOME"], ["true"]])
    *written, first, second = plan.show().splitlines()
    assert written[:3] == [f"# {path}", "a", "b"]
    assert (shlex.split(first), second) == (["echo", "it's $HOME"], "true")
    assert not Path(path).exists()
    assert plan.carry_out() == 0
    assert Path(path).read_text() == "a\nb\n"


def test_one_that_fails_does_not_keep_the_next_from_running(tmp_path):
    commands = [["bash", "-c", f"exit {status}"] for status in (0, 3, 4)] + [["touch", str(tmp_path / "last")]]
    assert Plan({}, commands).carry_out() == 3
    assert (tmp_path / "last").exists()


def test_what_is_written_is_for_this_user_alone(tmp_path):
    path = tmp_path / "deep" / "script.sh"
    before = os.umask(0o022)
    try:
        Plan({str(path): "export WANDB_API_KEY=secret"}, []).carry_out()
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o755  # the logs are anybody's
    finally:
        assert os.umask(before) == 0o022


def test_a_command_that_asks_is_told_that_nobody_answers(tmp_path):
    """It has neither the launcher's input nor, in a session of its own, a terminal to open."""
    asks = f"read -r answer; echo $? >{tmp_path}/read; ps -o sid= -p $$ >{tmp_path}/session; echo $$ >{tmp_path}/own"
    code = f"from launch.plan import Plan; Plan({{}}, [['bash', '-c', {asks!r}]]).carry_out()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, input=b"yes\n", check=True, timeout=30)
    assert (tmp_path / "read").read_text() == "1\n"
    assert (tmp_path / "session").read_text().strip() == (tmp_path / "own").read_text().strip()


def test_what_to_do_is_said_after_a_failure(capfd):
    Plan({}, [["true"], ["bash", "-c", "exit 3"]], advice="Do that.").carry_out()
    assert capfd.readouterr().err == "launch: bash -c 'exit 3' ended with status 3. Do that.\n"


def test_a_signal_is_a_status_of_the_shells_kind():
    assert Plan({}, [["bash", "-c", "kill -9 $$"]]).carry_out() == 137


def test_wrong_use(tmp_path):
    with pytest.raises(UserError, match="no-such-program is not installed"):
        Plan({}, [["no-such-program"]]).carry_out()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="config.logs: .* cannot be written"):
        Plan({str(tmp_path / "file" / "script"): ""}, []).carry_out()


@pytest.mark.parametrize(
    ("number", "busy"),
    [(signal.SIGTERM, "while :; do sleep 0.05; done"), (signal.SIGINT, "while :; do sleep 0.05; done")]
    + [(signal.SIGTERM, "kill -STOP $$")],
)
def test_a_signal_reaches_the_command_and_is_the_last_word(tmp_path, number, busy):
    told = f"trap 'touch {tmp_path}/told; exit 75' TERM; touch {tmp_path}/ready; {busy}"
    code = f"""
import sys
from launch.plan import Plan
sys.exit(Plan({{}}, [["bash", "-c", {told!r}], ["touch", "{tmp_path}/next"]]).carry_out())
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (tmp_path / "told").exists()
    assert not (tmp_path / "next").exists()
