"""Known vulnerabilities of the pinned packages, by pip-audit: status 1 if there are any.

Where the service cannot be reached, or knows none of the packages, nothing was
audited: that is printed, and is no failure.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

PINNED = Path(__file__).parents[1] / "constraints.txt"
COMMAND = ["pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--timeout=10", "--format=json"]
SECONDS = 300
UNREACHABLE = re.compile(r"Max retries|Could not connect|is not redirecting|ServiceError|\btimed out\b")


def verdict(printed: str, said: str) -> tuple[int, list[str]]:
    """The status, and what to print, for what pip-audit wrote to its two outputs."""
    try:
        packages = json.loads(printed)["dependencies"]
    except (ValueError, KeyError):
        problem = next(reversed(said.strip().splitlines()), "it said nothing")
        found = UNREACHABLE.search(said)
        return (0, ["not audited: service unreachable"]) if found else (1, [f"pip-audit failed: {problem}"])
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        return 0, [f"not audited: service unreachable (it knows none of {len(packages)} packages)"]
    skipped = [f"not audited: {package['name']}" for package in packages if "vulns" not in package]
    bad = [
        f"{package['name']} {package['version']}: {one['id']}, mended in {', '.join(one['fix_versions']) or 'none yet'}"
        for package in audited
        for one in package["vulns"]
    ]
    return (1 if bad else 0), [*skipped, *bad, f"audited {len(audited)} of {len(packages)} packages: {len(bad)} found"]


def main() -> int:
    """Ask about every line of constraints.txt."""
    command = [sys.executable, "-m", *COMMAND, "-r", str(PINNED)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)  # noqa: S603 - ours
        status, lines = verdict(done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        status, lines = 0, ["not audited: service unreachable (it took too long)"]
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
