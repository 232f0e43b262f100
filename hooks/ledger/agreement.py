"""Every disagreement between the ledger, the pages and the tests."""

from pathlib import Path

from ledger.claims import faults_of_figures, faults_of_list, faults_of_measured, load
from ledger.evidence import faults_of_tests
from ledger.stated import faults_of_pages


def faults(root: Path, tests: bool = True) -> list[str]:
    """Every disagreement there is, each with its file and line; without those of the tests where `tests` is False."""
    try:
        claims = load(root)
    except ValueError as error:
        return [str(error)]
    found = faults_of_list(claims) + faults_of_measured(claims, root)
    found += faults_of_figures(claims, root) + faults_of_pages(claims, root)
    return found + faults_of_tests(claims, root) if tests else found
