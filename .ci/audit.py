"""Fail if a package that is installed here has a known vulnerability, by what pip-audit hears from PyPI.

Where PyPI cannot be asked, or takes longer than two minutes, that is said in one line and is no failure.
"""

import json
import subprocess
import sys
from pathlib import Path

FREEZE = [sys.executable, "-m", "pip", "freeze"]  # All but pip itself, which is Python's matter.
PIP_AUDIT = [Path(sys.executable).with_name("pip-audit"), "--requirement", "/dev/stdin"]
PIP_AUDIT += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]

pins = subprocess.run(FREEZE, capture_output=True, text=True, check=True).stdout
try:
    report = subprocess.run(PIP_AUDIT, input=pins, capture_output=True, text=True, timeout=120)
    packages = json.loads(report.stdout)["dependencies"]
except (subprocess.TimeoutExpired, ValueError):
    packages = []
asked = [package for package in packages if "vulns" in package]
found = [(package, hole) for package in asked for hole in package["vulns"]]
for package, hole in found:
    mended = ", ".join(hole["fix_versions"]) or "no version yet"
    print(f"{package['name']} {package['version']}: {hole['id']}, mended in {mended}.")
if asked:
    print(f"{len(asked)} of {len(packages)} packages were looked up; known vulnerabilities: {len(found)}.")
else:
    print("PyPI could not be asked for known vulnerabilities: nothing was audited.")
sys.exit(1 if found else 0)
