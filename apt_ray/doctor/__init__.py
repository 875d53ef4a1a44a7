"""What is wrong with a set-up, and what mends it: `apt-ray doctor`.

`findings` says what a finding is and makes the checks side by side; `machine` checks this
machine, `servers` what it is to reach. Nothing here imports torch, Ray or MLflow: each may be what
is broken.
`bundle` packs what whoever helps needs to know, through `redaction`.
"""

from apt_ray.doctor.checks import CHECKS, diagnose
from apt_ray.doctor.findings import Finding, Level, Setup

__all__ = ["CHECKS", "Finding", "Level", "Setup", "diagnose"]
