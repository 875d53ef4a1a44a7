"""No secret stands in a tracked file.

A scan of its own in the place of detect-secrets: that finds keywords and digests (13 here, none of
them a secret), and its list of what is known fails whenever a line above moves.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SECRETS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----\s*\n[A-Za-z0-9+/=:, -]{16}",
    "AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "AWS secret": r"(?i:aws_?secret_?access_?key)\W{1,5}[A-Za-z0-9/+]{40}\b",
    "GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})\b",
    "GitLab token": r"\bglpat-[A-Za-z0-9_-]{20}\b",
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "PyPI token": r"\bpypi-[A-Za-z0-9_-]{50,}\b",
    "npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}\b",
    "Databricks token": r"\bdapi[0-9a-f]{32}\b",
    "JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "bearer token": r"\b(?i:bearer) [A-Za-z0-9_-]{43}\b",
}
PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in SECRETS.values()))


def test_no_tracked_file_holds_a_secret() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    assert "README.md" in names
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}"
        for name in names
        if (ROOT / name).is_file()
        for text in [(ROOT / name).read_bytes().decode("utf-8", "replace")]
        for match in PATTERN.finditer(text)
    ]
    assert found == [], "revoke these, then take them out of the history too"


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN " + "PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC",
        "key = AKIA" + "Q3EXAMPLE7PLANTD",
        'AWS_SECRET_ACCESS_KEY="' + "wJalrXUtnFEMI+K7MDENG/bPxRfiCYPLANTEDKEY" + '"',
        "ghp_" + "a1" * 18,
        "glpat-" + "a1" * 10,
        "HF_TOKEN=hf_" + "aB" * 17,
        "pypi-" + "Ag" * 40,
        "npm_" + "a1" * 18,
        "xoxb-" + "12345678901",
        "dapi" + "0123456789abcdef" * 2,
        "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4",
        "Authorization: Bearer " + "aB3_" * 10 + "aB3",
    ],
)
def test_secrets_of_each_kind_would_be_found(text: str) -> None:
    assert PATTERN.search(f"some text {text}\n")
