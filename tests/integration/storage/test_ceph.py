"""The object store's contract with a real S3 server: Ceph's gateway from Debian's packages. Runs nightly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CONTRACT = HERE / "test_infra_object_store.py"
PROGRAMS = ("radosgw", "ceph-mon", "ceph-osd", "ceph", "curl")


@pytest.mark.nightly
@pytest.mark.skipif(
    any(shutil.which(program) is None for program in PROGRAMS),
    reason="needs Ceph (apt-get install radosgw ceph-mon ceph-osd ceph-common curl)",
)
def test_the_contract_holds_on_ceph(tmp_path: Path, free_port: int) -> None:
    command = ["bash", str(HERE / "start_rgw.sh"), str(tmp_path / "ceph"), str(free_port), "access", "secret"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ceph:
        assert ceph.stdout is not None
        log = []
        try:
            for line in ceph.stdout:
                log.append(line)
                if line == "ready\n":
                    break
            else:
                pytest.fail("".join(log))
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CONTRACT)],
                env={**os.environ, "DEAL_TEST_S3": f"http://access:secret@127.0.0.1:{free_port}"},
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
        finally:
            ceph.terminate()
    assert done.returncode == 0, done.stdout
