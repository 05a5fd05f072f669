import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]


def test_the_committed_messages_are_those_of_their_protos():
    check = subprocess.run([REPO / "hack/generate-protos", "--check"], capture_output=True, text=True)

    assert check.returncode == 0, check.stderr
