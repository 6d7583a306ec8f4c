import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name, *ids):
    return {"name": name, "version": "1.0", "vulns": [{"id": one, "fix_versions": ["1.1"]} for one in ids]}


def skipped(name):
    return {"name": name, "skip_reason": "not found"}


def told(*packages):
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_known_vulnerability_fails_and_is_named(audit):
    status, lines = audit.verdict(told(package("good"), package("bad", "CVE-1"), skipped("own")), "")
    assert status == 1
    assert "bad 1.0: CVE-1, mended in 1.1" in lines
    assert "not audited: own" in lines
    assert lines[-1] == "audited 2 of 3 packages: 1 found"


def test_packages_without_any_pass(audit):
    assert audit.verdict(told(package("good")), "") == (0, ["audited 1 of 1 packages: 0 found"])


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (told(skipped("one"), skipped("two")), "No known vulnerabilities found"),
        ("", "requests.exceptions.ConnectionError: HTTPSConnectionPool(…): Max retries exceeded with url: /"),
        ("", "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed"),
    ],
)
def test_nobody_to_ask_is_said_and_is_no_failure(audit, printed, said):
    status, lines = audit.verdict(printed, said)
    assert status == 0
    assert lines[0].startswith("not audited: service unreachable")


def test_an_audit_that_fails_by_itself_is_a_failure(audit):
    status, lines = audit.verdict("", "Traceback\nNo module named pip_audit")
    assert (status, lines) == (1, ["pip-audit failed: No module named pip_audit"])
