"""What GitHub reads: workflows and templates."""

import re

import pytest
import yaml

from suite import ROOT

GITHUB = ROOT / ".github"


@pytest.mark.parametrize("path", sorted(GITHUB.glob("workflows/*")), ids=lambda path: path.name)
def test_actions_are_pinned(path):
    """To a commit, which nobody can move, with the version beside it."""
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action) or action.startswith("./"), action


def test_nothing_is_uploaded_before_the_tests_of_both_kinds():
    jobs = yaml.safe_load((GITHUB / "workflows/release.yml").read_text())["jobs"]
    assert set(jobs) - set(jobs["build-and-upload"]["needs"]) == {"build-and-upload"}
    assert "gpu" in jobs["test-on-gpu"]["runs-on"]
    assert jobs["test-on-gpu"]["steps"][-1]["run"] == "nix run -L .#ci-test"


@pytest.mark.parametrize("path", sorted(GITHUB.glob("ISSUE_TEMPLATE/*")), ids=lambda path: path.name)
def test_issue_forms(path):
    """GitHub hides a form that lacks one of these, and says so only on the page of the file."""
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(field["attributes"]["label"] for field in form["body"])
